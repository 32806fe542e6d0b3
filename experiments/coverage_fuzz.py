# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided fuzzing of what reads rankings, verifications, YAML and study files.

    pip install atheris
    python experiments/coverage_fuzz.py TARGET CORPUS -max_total_time=150

TARGET is one of ranking, verification, yaml, study; CORPUS is a folder that keeps what reached new
code, and gets sound files to begin with. Every input must end in an error of keylayers' own or in a
right result, within five seconds; anything else stops the run with a traceback and keeps the input.
"""

import contextlib
import json
import math
import os
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

with atheris.instrument_imports(include=["keylayers", "yaml"]):
    import yaml

    from keylayers.commands.study.plan import plan
    from keylayers.commands.study.yaml_file import StudyFile
    from keylayers.errors import KeylayersError
    from keylayers.ranking.ranking import Ranking
    from keylayers.ranking.verification import Verification
    from keylayers.yaml_values import yaml_value

from test_fuzz_files import by_hand, verification_of
from test_fuzz_study import STUDY, bomb

FILE = Path("/dev/shm") / f"keylayers-fuzz-{os.getpid()}"


def ranking(data):
    """What is accepted is in order, finite, and the same after a round trip."""
    FILE.write_bytes(data)
    found = Ranking.load(FILE)
    known = [one.score for one in found.ordered() if one.score is not None]
    assert all(map(math.isfinite, known))
    assert known == sorted(known, reverse=True)
    assert Ranking.from_json(json.loads(json.dumps(found.to_json())), "again") == found


def verification(data):
    """What is accepted can be written again."""
    FILE.write_bytes(data)
    Verification.load(FILE).save(FILE)


def as_yaml(data):
    """What is accepted can be recorded."""
    json.dumps(yaml_value(data.decode("utf-8", "ignore"), "it"), allow_nan=False, default=str)


def study(data):
    """What is accepted is a plan."""
    content = yaml_value(data.decode("utf-8", "ignore"), "it")
    if isinstance(content, dict):
        for cell in plan(StudyFile.of(content, "it"), Path("out")):
            json.dumps(cell.commands, allow_nan=False)


TARGETS = {"ranking": ranking, "verification": verification, "yaml": as_yaml, "study": study}


def seeds(target):
    """Sound files of the kind."""
    if target == "ranking":
        return [json.dumps(by_hand().to_json()).encode()]
    if target == "verification":
        return [json.dumps(verification_of(by_hand()).to_json()).encode()]
    texts = [yaml.safe_dump(STUDY).encode(), bomb("options:\n  {}"), b"a: &a {b: 1}\nc: {<<: *a}"]
    return [*texts, b"a: !!float 1\nb: 2026-01-01\nc: |\n  text\nd: [~, yes, 0x1F, 1e3, .inf]"]


def main():
    """Fuzz until libFuzzer stops."""
    target = sys.argv.pop(1)
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(seeds(target)):
        (corpus / f"sound-{number}").write_bytes(content)

    def check(data):
        with contextlib.suppress(KeylayersError):
            TARGETS[target](data)

    atheris.Setup([*sys.argv, "-timeout=5", "-max_len=20000", "-rss_limit_mb=4096"], check)
    try:
        atheris.Fuzz()
    finally:
        FILE.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
