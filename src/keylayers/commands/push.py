# SPDX-License-Identifier: Apache-2.0
"""`--push-to-hub` of the commands that write adapters and checkpoints."""

from dataclasses import dataclass
from pathlib import Path

from keylayers.commands.console import stdout
from keylayers.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Whether the output is uploaded.

    Attributes:
        push_to_hub: Upload the folder with model card and record to this repository of the hub, for
            example me/my-adapter.
        private: Make that repository private, if it is new.
    """

    push_to_hub: str | None = None
    private: bool = False

    def __post_init__(self) -> None:
        if self.private and self.push_to_hub is None:
            raise ConfigError(
                "`private` must be left out without `push_to_hub`: nothing is uploaded then"
            )

    def prepare(self) -> None:
        """Make the repository before any long work, so that a name or a login fails early."""
        if self.push_to_hub is not None:
            from keylayers.apply.hub import make_repository

            make_repository(self.push_to_hub, private=self.private or None)

    def push(self, folder: Path) -> None:
        """Upload the folder, if a repository is given, and say where it is."""
        if self.push_to_hub is not None:
            from keylayers.apply.hub import push_to_hub

            stdout().print(f"pushed to {push_to_hub(folder, self.push_to_hub)}", markup=False)
