# SPDX-License-Identifier: Apache-2.0
"""Push a tuned model with its model card and record to the hub.

PEFT's own `push_to_hub` uploads the same weights with a card that says nothing of the ranking.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from keylayers.errors import ConfigError, OutputError

HTTPError = hub_errors.HTTPError  # type: ignore[attr-defined]  # of whichever client it uses


def make_repository(repo_id: str, *, private: bool | None = None) -> None:
    """Create the repository if it does not exist."""
    with _hub_errors(repo_id):
        HfApi().create_repo(repo_id, private=private, exist_ok=True)


def push_to_hub(folder: Path, repo_id: str) -> str:
    """Upload what `train` or `prune` wrote, and return the address of the commit."""
    with _hub_errors(repo_id):
        found = HfApi().upload_folder(
            folder_path=folder, repo_id=repo_id, commit_message="Upload by keylayers"
        )
    return str(found.commit_url)


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
