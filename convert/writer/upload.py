"""Putting a result on the hub, through huggingface_hub."""

from pathlib import Path

from convert.progress import Stage
from olmo3_mlx.checkpoints.hub import hub_errors
from olmo3_mlx.errors import HubError


def check_repository_name(repo: str) -> None:
    """Raise HubError for a text that is no repository's name; the hub is not asked."""
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415  (slow to import)
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # noqa: PLC0415

    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise HubError(f"{repo!r} is no repository's name: expected one like you/olmo3-7b-4bit") from None
    if repo.count("/") != 1:
        raise HubError(f"{repo!r} names no owner: expected a name like you/olmo3-7b-4bit")


def check_login(repo: str) -> None:
    """Raise HubError, before the long work, if nobody is logged in who could upload to `repo`."""
    from huggingface_hub import HfApi  # noqa: PLC0415  (slow to import)
    from huggingface_hub.errors import LocalTokenNotFoundError  # noqa: PLC0415

    with hub_errors(repo, doing="asking who is logged in", advice="check the network and `hf auth login`"):
        try:
            HfApi().whoami()
        except LocalTokenNotFoundError:
            raise HubError(f"to upload to {repo}, log in first: `hf auth login`") from None


def upload(folder: Path, repo: str, stage: Stage) -> str:
    """Make the repository if it is new, put all files of `folder` into it, and give its address.

    Raises HubError; the folder is as it was.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415  (slow to import)

    stage("uploading")
    advice = f"{folder} is complete, `hf upload {repo} {folder} .` tries again"
    with hub_errors(repo, doing="the upload", advice=advice):
        api = HfApi()
        url = api.create_repo(repo, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, repo_type="model", commit_message="Upload by olmo3-mlx"
        )
    return str(url)
