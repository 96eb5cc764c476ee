"""A model's name to a folder on this machine: a folder, "demo", or a Hugging Face hub id.

Downloads go through huggingface_hub: into its cache, resumed where they stopped, with progress on
standard error, and only the files that are needed. Once complete, they need no network.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from olmo3_mlx.errors import (
    CheckpointError,
    HubError,
    Olmo3Error,
    Setting,
    UnknownNameError,
    UnknownRevisionError,
)
from olmo3_mlx.fields import read_json

DEMO = Path(__file__).parents[1] / "demo"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt")

# A checkpoint's small files. Of these special_tokens_map.json is for other programs, a licence for people.
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    INDEX,
    *LICENSES,
)
_WEIGHT_FILE = re.compile(r"[\w-][\w.-]*\.safetensors")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(name: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a checkpoint; a hub id's is downloaded first, just its small files if not `weights`.

    `revision` is a hub branch, tag or commit. Raises CheckpointError for a name that is neither a
    folder nor a hub id, HubError for what the hub does not give.
    """
    folder = DEMO if name == "demo" else _local(name)
    if folder is not None:
        if revision is not None:
            raise CheckpointError(
                f"{name} is a folder here: ", Setting("revision", revision), " is for hub ids"
            )
        return folder
    if not HUB_ID.fullmatch(str(name)):
        raise UnknownNameError(
            str(name),
            f"{str(name) or 'the empty name'}: no such folder, and no hub id either (one looks like "
            f"allenai/Olmo-3-7B-Instruct)",
        )
    return _download(str(name), revision, weights)


def has_weights(folder: Path) -> bool:
    """True if a checkpoint's weights are all there."""
    try:
        return bool(weight_files(folder))
    except CheckpointError:
        return False


def is_hub_id(name: str | Path) -> bool:
    """True if a name means a model on the hub: it is no folder here, and looks like one there."""
    return name != "demo" and _local(name) is None and bool(HUB_ID.fullmatch(str(name)))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in the index's order. Raises CheckpointError."""
    index = folder / INDEX
    names = _indexed(index) if index.is_file() else [SINGLE]
    files = [folder / name for name in names]
    for file in files:
        if not file.is_file() and not index.is_file() and any(folder.glob("model-*-of-*.safetensors")):
            raise CheckpointError(f"{folder}: expected {INDEX}, which says what is in its shards, found none")
        if not file.is_file():
            raise CheckpointError(
                f"{folder}: expected {file.name}, found none: the checkpoint is incomplete, or not "
                f"in safetensors form"
            )
    return files


def _local(name: str | Path) -> Path | None:
    """The folder of that name, if there is one. Raises CheckpointError for a file."""
    try:
        folder = Path(name).expanduser()
        found, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError):  # no name that the system could have
        return None
    if not str(name):
        return None
    if exists and not found:
        raise CheckpointError(f"{name} is a file: expected the checkpoint's folder, or a hub id")
    return folder if found else None


def _indexed(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a weight_map of tensor names to files, found none")
    for name in weight_map.values():
        # Nothing outside the folder, and no pattern that would fetch more than the weights.
        if not isinstance(name, str) or not _WEIGHT_FILE.fullmatch(name):
            raise CheckpointError(f"{index}: expected file names of safetensors beside it, got {name!r}")
    return sorted(set(weight_map.values()))


def _download(hub_id: str, revision: str | None, weights: bool) -> Path:
    folder = _fetch(hub_id, revision, TEXT_FILES)
    if weights:
        index = folder / INDEX
        # From the same commit, which is the folder's name: the branch may have moved on.
        _fetch(hub_id, folder.name, _indexed(index) if index.is_file() else [SINGLE])
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
