"""Models on the Hugging Face hub, through huggingface_hub.

Downloads go into its cache, resumed where they stopped, with progress on standard error, and only the files
that are needed. Once complete, they need no network.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from olmo3_mlx.checkpoints.files import (
    BESIDES,
    INDEX,
    NEEDED,
    SHARDS,
    SINGLE,
    check_whole_model,
    has_weights,
    indexed_files,
    weight_files,
)
from olmo3_mlx.errors import CheckpointError, HubError, Olmo3Error, UnknownRevisionError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def download(hub_id: str, revision: str | None, weights: bool) -> Path:
    """The folder of a model in the hub's cache, fetched if need be; just its small files if not `weights`.

    Raises HubError; CheckpointError for an adapter.
    """
    folder = _fetch(hub_id, revision, NEEDED, BESIDES)
    check_whole_model(folder)
    if weights:
        _fetch_weights(hub_id, folder)
    return folder


def _fetch_weights(hub_id: str, folder: Path) -> None:
    # From the same commit, which is the folder's name: the branch may have moved on.
    index = folder / INDEX
    _fetch(hub_id, folder.name, indexed_files(index) if index.is_file() else [SINGLE, SHARDS])
    if index.is_file() and not has_weights(folder):  # an index of an earlier form
        _fetch(hub_id, folder.name, [SINGLE])
    try:
        weight_files(folder)
    except CheckpointError as error:
        with hub_errors(hub_id, doing=f"the download of what is missing ({error})"):
            _ask(hub_id, folder.name)
        raise HubError(f"{hub_id}: the hub has no complete weights for it ({error})") from None


def _fetch(hub_id: str, revision: str | None, files: Iterable[str], besides: Iterable[str] = ()) -> Path:
    """Fetch files, and if the hub can be reached also those `besides`."""
    from huggingface_hub import errors, snapshot_download  # noqa: PLC0415  (a folder's checkpoint needs none)

    with hub_errors(hub_id, revision):
        try:
            patterns = [*files, *besides]
            return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
        except errors.LocalEntryNotFoundError as error:
            # Out of reach, and the cache knows what the model has: another program may have left files out.
            if not besides or not hasattr(error, "snapshot_path"):
                raise
            return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(files)))


def _ask(hub_id: str, revision: str) -> None:
    """Raise what huggingface_hub raises if the hub cannot be reached."""
    from huggingface_hub import errors, list_repo_files  # noqa: PLC0415

    try:
        list_repo_files(hub_id, revision=revision)
    except errors.HfHubHTTPError:
        raise
    except Exception as error:
        raise errors.LocalEntryNotFoundError(str(error)) from None


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
    except hub.LocalEntryNotFoundError as error:
        some = "not all of it is" if hasattr(error, "snapshot_path") else "not"
        raise HubError(
            f"{at}: {some} downloaded yet, and the hub cannot be reached: check the network"
        ) from None
    except Exception as error:  # the HTTP client's own errors, which differ between its versions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubError(f"{at}: {doing} failed ({reason}): {advice}") from None
