# SPDX-License-Identifier: Apache-2.0
"""What data hold and nothing uses: a note names it, as it may be what matters to the user."""

import re

from keylayers.data.formats import Conversation
from keylayers.data.preferences import Preference
from keylayers.data.reading import Found
from keylayers.data.templates import ChatTemplate
from keylayers.data.turns import other_fields
from keylayers.errors import DataError


def unused_parts(
    found: Found[Conversation] | Found[Preference], template: ChatTemplate | None
) -> tuple[str, ...]:
    """Columns that no format reads, and fields and tools that the template ignores, in words."""
    parts = [f"columns {', '.join(found.unused_columns)}"] if found.unused_columns else []
    if template is None:
        return tuple(parts)
    fields: dict[str, None] = {}
    for example in found.examples:
        _check_tools(example, template)
        fields |= dict.fromkeys(name for turn in example.turns for name in other_fields(turn))
    ignored = [name for name in fields if name != "weight" and not template.reads(name)]
    if ignored:
        parts.append(f"fields of turns {', '.join(ignored)}, which the chat template does not use")
    conversations = (each for each in found.examples if isinstance(each, Conversation))
    if not re.search(r"\btools\b", template.text) and any(each.tools for each in conversations):
        parts.append("tools, which the chat template does not use")
    return tuple(parts)


def _check_tools(example: Conversation | Preference, template: ChatTemplate) -> None:
    """Refuse what tools say and their calls with templates that would leave them out in silence."""
    needed = ["tool"] if any(turn["role"] == "tool" for turn in example.turns) else []
    needed += ["tool_calls"] if any("tool_calls" in turn for turn in example.turns) else []
    if lacking := [name for name in needed if name not in template.text]:
        raise DataError(
            f"Row {example.row_number}: The chat template must render what tools say and their "
            f"calls, but {template.name!r} has no `{lacking[0]}`; choose another "
            "`--chat-template`, or remove such rows."
        )
