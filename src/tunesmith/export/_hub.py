"""Pushing a folder to a hub: HF_ENDPOINT says which, HF_TOKEN who."""

from __future__ import annotations

from pathlib import Path

from ..errors import HubFailed, ModelError, RecipeError

TRANSIENT = (408, 429)  # statuses below 500 that are no refusal: a timeout, too many requests


def require_token() -> None:
    """Raises RecipeError where nobody is logged in: before anything is merged."""
    from huggingface_hub import get_token

    if not get_token():
        raise RecipeError("--push needs a token of the hub", where="HF_TOKEN", mend="set HF_TOKEN, or log in once with `hf auth login`")


def push_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Makes the repository if it is not there, uploads the folder in one commit, and gives its address.

    Raises ModelError, with the hub's own words, where the hub refuses it, and HubFailed where it does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=str(folder), commit_message="Model exported by tunesmith")
    except Exception as error:  # the hub's client has the errors of its transport, which changes from version to version
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        kept = f"the folder is written ({folder}): give the command again with --force, or upload it by the hub's own tools"
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, ValueError) or (status is not None and status < 500 and status not in TRANSIENT):
            mend = f"check the repository's name and the token's rights; {kept}"
            raise ModelError(f"the hub refused it: {first}", where=repository, mend=mend) from error
        raise HubFailed(f"the push failed: {first}", where=repository, mend=f"check the network and HF_ENDPOINT; {kept}") from error
    return str(made)
