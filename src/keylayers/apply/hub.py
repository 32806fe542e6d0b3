# SPDX-License-Identifier: Apache-2.0
"""Push a tuned model with its model card to the hub, with the keywords of PEFT's `push_to_hub`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from keylayers.errors import ConfigError, OutputError
from keylayers.files import RECORD

HTTPError = hub_errors.HTTPError  # type: ignore[attr-defined]  # of whichever client it uses


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> str:
    """Upload what `train` or `prune` wrote, and return the address of the commit.

    PEFT's own `push_to_hub` uploads the same weights with a card that says nothing of the ranking.

    Args:
        folder: An adapter or a checkpoint that keylayers wrote, with its card and record.
        repo_id: Name on the hub, for example `me/my-adapter`; created if it does not exist.
        private: Whether a new repository is private. Default: the account's setting.
        token: Token of the account. Default: that of the user who is logged in.
        revision: Branch.
        create_pr: Open a pull request instead of committing.
        commit_message: Default: "Upload by keylayers".

    Raises:
        ConfigError: keylayers did not write the folder, or the name is not valid on the hub.
        OutputError: the hub refuses it or cannot be reached.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise ConfigError(
            f"the folder to push must be one that keylayers wrote, but {str(folder)!r} holds no "
            f"{RECORD}"
        )
    make_repository(repo_id, private=private, token=token)
    with _hub_errors(repo_id):
        found = HfApi(token=token).upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload by keylayers",
        )
    return str(found.pr_url or found.commit_url)


def make_repository(
    repo_id: str, *, private: bool | None = None, token: str | bool | None = None
) -> None:
    """Create the repository if it does not exist. Called before long work, so that it fails early.

    Raises:
        ConfigError: the name is not valid on the hub.
        OutputError: the hub cannot be reached, or refuses the account.
    """
    with _hub_errors(repo_id):
        HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True)


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into one line, which contains no token."""
    try:
        yield
    except HFValidationError as error:
        raise ConfigError(
            f"`push_to_hub` must be a name on the hub, such as me/my-adapter, got {repo_id!r}: "
            f"{error}"
        ) from error
    except OfflineModeIsEnabled as error:
        raise OutputError(
            f"{repo_id!r} must be pushed online, but HF_HUB_OFFLINE is set; unset it"
        ) from error
    except (HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OutputError(
            f"the hub must take {repo_id!r}, but did not: {reason}; log in with `hf auth login`, "
            f"or check the name and the connection"
        ) from error
