# SPDX-License-Identifier: Apache-2.0
import errno
import json
import os
import shutil
from contextlib import suppress
from types import SimpleNamespace

import pytest

from keylayers.errors import OutputError
from keylayers.files import (
    RECORD,
    check_replaceable,
    output_folder,
    remove_unfinished,
    replaced_folder,
    says_full,
    unfinished,
    write_json,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 2}
    assert names(tmp_path) == ["record.json"]


def test_a_write_removes_what_a_killed_write_left(tmp_path):
    for name in (".a.json.0123abcd.tmp", ".aXjson.0123abcd.tmp"):
        (tmp_path / name).touch()
    write_text(tmp_path / "a.json", "new")
    assert names(tmp_path) == [".aXjson.0123abcd.tmp", "a.json"]


def test_an_output_folder_of_failed_work_keeps_what_was_there_and_what_was_made(tmp_path):
    (tmp_path / "old").mkdir()
    for name, made in (("a/b/c", "."), ("old", "."), ("new", "made")):
        with suppress(KeyError), output_folder(tmp_path / name) as folder:
            (folder / made).touch()
            raise KeyError
    assert names(tmp_path) == ["new", "old"]
    assert names(tmp_path / "new") == ["made"]


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match=r"must be a place that can be written, but '.*file/out'"),
        output_folder(tmp_path / "file" / "out"),
    ):
        pass


ERRORS = [
    (OSError(errno.ENOSPC, "No space left on device"), 2**40, True),
    (OSError(errno.EACCES, "Permission denied"), 0, False),
    (Exception("I/O error: Disk quota exceeded (os error 122)"), 2**40, True),
    (RuntimeError("unexpected pos 576 vs 470"), 1000, True),
    (RuntimeError("unexpected pos 576 vs 470"), 2**40, False),
]


@pytest.mark.parametrize(("error", "num_free", "is_full"), ERRORS)
def test_a_full_disk_is_told_from_other_errors(tmp_path, monkeypatch, error, num_free, is_full):

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=num_free))
    with pytest.raises(Exception, match=r".") as raised, output_folder(tmp_path / "out"):
        raise error
    assert isinstance(raised.value, OutputError) == is_full
    assert says_full(str(raised.value)) == is_full


def put(path, text):
    """Replace the folder `path` as commands do."""
    with unfinished(path), replaced_folder(path) as folder:
        (folder / RECORD).write_text(text)
        if text == "bad":
            raise KeyError


def test_a_replaced_folder_is_all_new_or_all_old(tmp_path):
    put(tmp_path / "a", "first")
    (tmp_path / "a" / "more").touch()
    with pytest.raises(KeyError):
        put(tmp_path / "a", "bad")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == [RECORD, "more"]
    put(tmp_path / "a", "third")
    assert (tmp_path / "a" / RECORD).read_text() == "third"
    assert (names(tmp_path), names(tmp_path / "a")) == (["a"], [RECORD])


@pytest.mark.parametrize("is_moved", [True, False])
def test_a_replacement_that_was_killed_is_undone_or_completed(tmp_path, is_moved):
    """Killed between the two renames, and after them."""
    held = {"old": "old", "new": "half"} if is_moved else {"old": "old", "a": "new"}
    for name, text in held.items():
        folder = tmp_path / (name if name == "a" else f".a.{name}")
        folder.mkdir()
        (folder / RECORD).write_text(text)
    (tmp_path / ".a.unfinished").mkdir()
    with unfinished(tmp_path / "a"):
        pass
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / RECORD).read_text() == ("old" if is_moved else "new")


def test_unfinished_work_is_kept_until_its_result_is_whole(tmp_path):
    with suppress(KeyError), unfinished(tmp_path / "a"):
        raise KeyError
    assert names(tmp_path) == []
    with suppress(KeyError), unfinished(tmp_path / "a") as folder:
        (folder / "checkpoint").touch()
        raise KeyError
    assert names(tmp_path) == [".a.unfinished"]
    assert names(tmp_path / ".a.unfinished") == ["checkpoint"]
    with unfinished(tmp_path / "a"):
        pass
    assert names(tmp_path) == []


def test_a_result_with_nothing_left_of_its_run_is_not_held(tmp_path):
    """Several runs share a stage 1, also one in a folder that they may only read."""
    os.utime(tmp_path, (0, 0))
    remove_unfinished(tmp_path / "adapter")
    assert tmp_path.stat().st_mtime_ns == 0
    with suppress(ValueError), unfinished(tmp_path / "adapter") as left:
        (left / "checkpoint").mkdir(parents=True)
        raise ValueError("it failed")
    remove_unfinished(tmp_path / "adapter")
    assert not left.exists()


def test_a_second_run_on_the_same_output_is_refused(tmp_path):
    with unfinished(tmp_path / "a") as folder:
        (folder / "checkpoint").touch()
        with (
            pytest.raises(OutputError, match=r"one run at a time must write to '.*a', but another"),
            unfinished(tmp_path / "a"),
        ):
            pass
        assert (folder / "checkpoint").exists()


def test_a_folder_that_somebody_else_made_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(OutputError, match="holds other files"):
        check_replaceable(tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        check_replaceable(tmp_path / "thesis.tex")
    check_replaceable(tmp_path / "new")
