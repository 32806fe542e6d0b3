# SPDX-License-Identifier: Apache-2.0
"""`--push-to-hub` of the commands that write adapters and checkpoints."""

from pathlib import Path

from keylayers.errors import ConfigError


def prepare_push(repo_id: str | None, private: bool) -> None:
    """Make the repository before any long work, so that a name or a login fails early.

    Raises:
        ConfigError: `private` without a repository, or a name that is none of the hub.
        OutputError: the hub does not take it.
    """
    if repo_id is None:
        if private:
            raise ConfigError(
                "`private` must be left out without `push_to_hub`: nothing is uploaded then"
            )
        return
    from keylayers.apply.hub import make_repository

    make_repository(repo_id, private=private or None)


def push(folder: Path, repo_id: str | None) -> None:
    """Upload the folder, if a repository is given, and say where it is.

    Raises:
        OutputError: the hub does not take it; the folder stays.
    """
    if repo_id is None:
        return
    from keylayers.apply.hub import push_to_hub
    from keylayers.commands.console import stdout

    stdout().print(f"pushed to {push_to_hub(folder, repo_id)}", markup=False)
