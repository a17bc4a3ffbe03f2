"""Upload of an exported student to the Hugging Face hub."""

from pathlib import Path

from distillkit.errors import ConfigError, ServerError


def check_upload(repository: str) -> None:
    """Checks what can be known before an upload: the repository's name, and that there is a token.

    Args:
        repository: `USER/NAME`.

    Raises:
        ConfigError: If the name is not one of a repository, or there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in its list

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {repository}: {error} Write USER/NAME.") from error
    if "/" not in repository:  # the model card says under which name the student is loaded
        raise ConfigError(f"--push-to-hub {repository}: whose? Write USER/NAME.")
    if get_token() is None:
        raise ConfigError(
            "--push-to-hub needs a token that may write: run `hf auth login`, or set the environment variable HF_TOKEN."
        )


def upload(folder: Path, repository: str, private: bool = True) -> str:
    """Uploads a folder as a model repository, which is made if there is none.

    Args:
        folder: The folder of an exported student.
        repository: `USER/NAME`.
        private: Whether a new repository is private; one that exists stays as it is.

    Returns:
        The address of the repository.

    Raises:
        ServerError: If the hub can't be reached or refuses; the folder stays.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="distillkit")
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Student exported by distillkit")
    except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ServerError(
            f"{repository} can't be uploaded: {reason} The student is complete in {folder}; once that is put right, "
            f"run `hf upload {repository} {folder}`."
        ) from error
    return str(address)
