# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D103
"""Compares two folders of records, bit for bit: `compare.py DIR_A DIR_B [PATTERN ...]`."""

import json
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

SHOWN = 5  # differences shown for each case
# Expected differences, as a pattern of `case:path` (`case` alone: it may be missing), with reasons.
ALLOWED = {
    "*:*options/prefix_cache_gib": "the option is removed",
    **dict.fromkeys(
        ("*:*options/max_loss", "*:*options/pad_ranks", "*:*options/heal_steps"),
        "new options of prune",
    ),
    **dict.fromkeys(
        ("*:*num_equal_pairs", "*:*num_empty_answers", "*:*num_masked_answers"), "new counts"
    ),
    **dict.fromkeys(
        (
            *(
                "*mixture*:*loss*",
                "*mixture*:*score*",
                "*mixture*:*nats*",
                "*mixture*:*error*",
                "*mixture*:*README*",
            ),
            *("*mixture*:*area*", "*mixture*:*mask/*", "*mixture*:*rounds*", "*mixture*:*card*"),
        ),
        "the loss of routers is in no loss",
    ),
    "memory-*:*": "a budget in GiB now takes the best modules that fit, by measured steps",
    "eval-losses:*config_sha256": "hashed in another way; old evaluations are measured again",
    "eval-losses:*pair*": "holds the hash above",
    **{
        f"eval-losses:*options/{name}": "sampling of problems is removed"
        for name in (
            *("problems", "problems_split", "samples", "temperature", "top_p"),
            *("max_new_tokens", "ask"),
        )
    },
}
# Wording, and hashes of paths and seconds.
NOT_COMPARED = {"log", "text", "inputs_sha256", "json_sha256"}


def flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every value with its path; numbers as they are written."""
    if isinstance(value, dict) and value:
        for key, one in value.items():
            if key not in NOT_COMPARED:
                yield from flat(one, f"{path}/{key}")
    elif isinstance(value, list) and value:
        for index, one in enumerate(value):
            yield from flat(one, f"{path}/{index}")
    else:
        yield path, re.sub(r"[^\"]*/src/keylayers/", "", json.dumps(value))  # of its checkout


def differences(name: str, a: Path, b: Path) -> list[str]:
    for path in (a, b):
        if not path.exists():
            return [] if name in ALLOWED else [f"missing: {path}"]
    left, right = (json.loads(path.read_text()) for path in (a, b))
    first, second = dict(flat(left)), dict(flat(right))
    found = []
    for key in [*first, *(key for key in second if key not in first)]:
        old, new = first.get(key, "absent"), second.get(key, "absent")
        if old != new and not any(fnmatch(f"{name}:{key}", pattern) for pattern in ALLOWED):
            found.append(f"{key}: {old[:200]} -> {new[:200]}")
    if found and isinstance(right, dict) and right.get("log"):
        found.insert(0, "message: " + " ".join(right["log"].split())[-600:])
    return found


def main() -> int:
    a, b = Path(sys.argv[1]), Path(sys.argv[2])
    patterns = sys.argv[3:] or ["*"]
    names = sorted({path.stem for folder in (a, b) for path in folder.glob("*.json")})
    names = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    num_different = 0
    for name in names:
        found = differences(name, a / f"{name}.json", b / f"{name}.json")
        if found:
            num_different += 1
            print(f"{name}: {len(found)} differences")
            print("".join(f"    {one}\n" for one in found[:SHOWN]), end="")
    print(f"{num_different} of {len(names)} cases differ" if names else "no case has this name")
    return int(num_different > 0 or not names)


sys.exit(main())
