"""Models on the Hugging Face hub, through huggingface_hub.

Downloads go into its cache, resumed where they stopped, with progress on standard error, and only the files
that are needed. Once complete, they need no network.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from olmo3_mlx.checkpoints.files import INDEX, SINGLE, TEXT_FILES, indexed_files, weight_files
from olmo3_mlx.errors import CheckpointError, HubError, Olmo3Error, UnknownRevisionError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def download(hub_id: str, revision: str | None, weights: bool) -> Path:
    """The folder of a model in the hub's cache, fetched if need be; just its small files if not `weights`.

    Raises HubError.
    """
    folder = _fetch(hub_id, revision, TEXT_FILES)
    if weights:
        index = folder / INDEX
        # From the same commit, which is the folder's name: the branch may have moved on.
        _fetch(hub_id, folder.name, indexed_files(index) if index.is_file() else [SINGLE])
        try:
            weight_files(folder)
        except CheckpointError as error:
            raise HubError(f"{hub_id}: the hub has no complete weights for it ({error})") from None
    return folder


def _fetch(hub_id: str, revision: str | None, files: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (a folder's checkpoint needs none of it)

    with hub_errors(hub_id, revision):
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(files)))


@contextmanager
def hub_errors(
    hub_id: str,
    revision: str | None = None,
    doing: str = "the download",
    advice: str = "try again, complete files are kept",
) -> Iterator[None]:
    """What huggingface_hub raises in the block as a HubError of one line."""
    from huggingface_hub import errors as hub  # noqa: PLC0415  (slow to import)

    at = f"{hub_id} at revision {revision}" if revision else hub_id
    try:
        yield
    except Olmo3Error:
        raise
    except hub.GatedRepoError:
        raise HubError(f"{at}: access is gated: accept its terms on the hub, then `hf auth login`") from None
    except hub.RevisionNotFoundError:
        raise UnknownRevisionError(hub_id, revision) from None
    except hub.RepositoryNotFoundError:
        raise HubError(f"{hub_id}: the hub knows no such model: check the spelling") from None
    except hub.OfflineModeIsEnabled:
        raise HubError(
            f"{at}: only the hub can tell, and HF_HUB_OFFLINE forbids to ask it: unset it"
        ) from None
    except hub.LocalEntryNotFoundError:
        raise HubError(
            f"{at}: not downloaded yet, and the hub cannot be reached: check the network"
        ) from None
    except Exception as error:  # the HTTP client's own errors, which differ between its versions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubError(f"{at}: {doing} failed ({reason}): {advice}") from None
