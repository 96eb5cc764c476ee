"""A model's name to a folder on this machine: a folder, "demo", or a hub id, which is downloaded."""

from pathlib import Path

from olmo3_mlx.checkpoints.hub import HUB_ID, download
from olmo3_mlx.errors import CheckpointError, Setting, UnknownNameError

DEMO = Path(__file__).parents[1] / "demo"


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
    return download(str(name), revision, weights)


def is_hub_id(name: str | Path) -> bool:
    """True if a name means a model on the hub: it is no folder here, and looks like one there."""
    return name != "demo" and _local(name) is None and bool(HUB_ID.fullmatch(str(name)))


def _local(name: str | Path) -> Path | None:
    """The folder of that name, if there is one. Raises CheckpointError for a file."""
    try:
        folder = Path(name).expanduser()
        found, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, TypeError, ValueError):  # no name that the system could have
        return None
    if not str(name):
        return None
    if exists and not found:
        raise CheckpointError(f"{name} is a file: expected the checkpoint's folder, or a hub id")
    return folder if found else None
