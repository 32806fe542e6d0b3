# SPDX-License-Identifier: Apache-2.0
"""What a ranking file says of its making, checked once when it is read. Needs no torch.

Commands and reports read these sections without looking twice. What is not named here is free.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from keylayers.errors import RankingError

Check = Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether it is a finite number; JSON also has integers that no float holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_positive(value: Any) -> bool:
    return _is_count(value) and 0 < value < 2**31


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


# section -> field -> (what must hold, in words; the check); a field without a mark may be absent.
_NUMBER, _COUNT = ("a finite number", is_number), ("a whole number from 0", _is_count)
_TEXT, _LIST = ("text", _is_text), ("a list", _is_list)
_RANK = ("a whole number from 1", _is_positive)
SECTIONS: Mapping[str, Mapping[str, tuple[str, Check]]] = {
    "environment": {"commit": ("text or null", lambda one: one is None or _is_text(one))},
    "options": {"lora_rank": _RANK, "lora_alpha": _RANK},
    "model": {"weights_sha256": _TEXT, "num_head_parameters": _COUNT},
    "data": {"content_sha256": _TEXT, "split_sha256": _TEXT},
    "adapter": {"weights_sha256": _TEXT},
    "tuned": {"weights_sha256": _TEXT},
    "stage_1": {
        "num_steps!": _COUNT,
        "stopped_by!": _TEXT,
        "seconds!": _NUMBER,
        "num_trained_parameters": _COUNT,
    },
    "inside_run": {"at_step!": _COUNT, "num_steps!": _COUNT, "reason!": _TEXT},
    "mask": {
        "losses!": _LIST,
        "seconds!": _NUMBER,
        "score_unit": _TEXT,
        "loss_reduction_nats": _NUMBER,
        "sum_of_scores_nats": _NUMBER,
    },
    "held_out_loss_nats": {"base!": _NUMBER, "tuned!": _NUMBER},
    "adalora_ranks_left": {},
}


def check_provenance(provenance: Any, source: str) -> None:
    """Refuse provenance that commands and reports could not read.

    Args:
        provenance: As it stands in the file.
        source: Where it comes from, for the message.

    Raises:
        RankingError: names the first section or field that is wrong.
    """
    _check_mapping(provenance, "provenance", source)
    _check_finite(provenance, source)
    for section, fields in SECTIONS.items():
        if section not in provenance:
            continue
        content = provenance[section]
        _check_mapping(content, f"provenance.{section}", source)
        for marked, (what, is_right) in fields.items():
            name = marked.rstrip("!")
            is_wrong = name in content and not is_right(content[name])
            if is_wrong or (name not in content and marked != name):
                came = f"{content[name]!r:.40}" if name in content else "nothing"
                raise RankingError(
                    f"{source!r} must hold {what} as `provenance.{section}.{name}`, got {came}; "
                    f"mend it, or make it again with `keylayers rank`"
                )


def _check_finite(provenance: Mapping[str, Any], source: str) -> None:
    """Refuse NaN and infinity wherever they stand: no JSON that is written may hold them."""
    open_parts: list[tuple[str, Any]] = [("provenance", provenance)]
    while open_parts:
        name, value = open_parts.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise RankingError(
                f"{source!r} must hold finite numbers alone, got {value} as `{name:.80}`; mend it, "
                f"or make it again with `keylayers rank`"
            )
        if isinstance(value, dict):
            open_parts += [(f"{name}.{key}", one) for key, one in value.items()]
        elif isinstance(value, list):
            open_parts += [(f"{name}[{index}]", one) for index, one in enumerate(value)]


def update_sha256s(provenance: Mapping[str, Any]) -> set[str]:
    """Hashes by which a record knows the update: of an adapter, or of a tuned checkpoint."""
    parts = [provenance.get(kind, {}) for kind in ("stage_1", "adapter", "tuned")]
    hashes = {part.get(name) for part in parts for name in ("adapter_sha256", "weights_sha256")}
    return hashes - {None}


def _check_mapping(value: Any, name: str, source: str) -> None:
    if not isinstance(value, dict):
        raise RankingError(
            f"{source!r} must hold a mapping `{name}`, got {type(value).__name__}; mend it, or "
            f"make it again with `keylayers rank`"
        )
