# SPDX-License-Identifier: Apache-2.0
"""The sub-commands of `keylayers`: a file for each, which is loaded when it is called."""

from typing import Annotated, Any

from cyclopts import App, Parameter

Json = Annotated[bool, Parameter(name="--json", negative=())]


def sub_command(examples: str, **more: Any) -> App:
    """The application of a sub-command, whose help ends with examples."""
    epilogue = f"Examples:\n\n```\n{examples}```\n"
    return App(help_epilogue=epilogue, help_format="markdown", **more)
