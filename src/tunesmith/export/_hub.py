"""Pushing a folder to a hub: HF_ENDPOINT says which, HF_TOKEN who."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError, RecipeError


def require_token() -> None:
    """Raises RecipeError where nobody is logged in: before anything is merged."""
    from huggingface_hub import get_token

    if not get_token():
        raise RecipeError("--push needs a token of the hub", where="HF_TOKEN", mend="set HF_TOKEN, or log in once with `hf auth login`")


def push_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Makes the repository if it is not there, uploads the folder in one commit, and gives its address. Raises ModelError, with the hub's
    own words."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=str(folder), commit_message="Model exported by tunesmith")
    except Exception as error:  # the hub's client has the errors of its transport, which changes from version to version
        first = str(error).strip().splitlines()[0]
        mend = "check the repository's name, the token's rights and the network; the folder is written and can be pushed again"
        raise ModelError(f"the hub refused it: {first}", where=repository, mend=mend) from error
    return str(made)
