# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
from contextlib import suppress

import pytest


def test_an_output_folder_of_failed_work_vanishes_with_its_parents(tmp_path):
    from keylayers.folders import output_folder

    with pytest.raises(KeyError), output_folder(tmp_path / "a" / "b" / "c"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_keeps_what_was_there_and_what_was_made(tmp_path):
    from keylayers.folders import output_folder

    (tmp_path / "old").mkdir()
    with pytest.raises(KeyError), output_folder(tmp_path / "old"):
        raise KeyError
    assert (tmp_path / "old").is_dir()
    with suppress(KeyError), output_folder(tmp_path / "new"):
        (tmp_path / "new" / "made").touch()
        raise KeyError
    assert (tmp_path / "new" / "made").exists()


def test_an_output_below_a_file_is_refused(tmp_path):
    from keylayers.errors import OutputError
    from keylayers.folders import output_folder

    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match=r"must be a place that can be written, but '.*file/out'"),
        output_folder(tmp_path / "file" / "out"),
    ):
        pass


def test_a_replaced_folder_is_all_new_or_all_old(tmp_path):
    from keylayers.folders import replaced_folder
    from keylayers.records import RECORD

    target = tmp_path / "adapter"
    with replaced_folder(target) as folder:
        (folder / RECORD).write_text("first")
    with suppress(KeyError), replaced_folder(target) as folder:
        (folder / RECORD).write_text("second")
        raise KeyError
    assert (target / RECORD).read_text() == "first"
    with replaced_folder(target) as folder:
        (folder / RECORD).write_text("third")
        (folder / "more").touch()
    assert sorted(child.name for child in target.iterdir()) == [RECORD, "more"]
    assert [child.name for child in tmp_path.iterdir()] == ["adapter"]


def left_by(path, process_id):
    """What a process that was killed while it put a new folder at `path` has left."""
    from keylayers.records import RECORD

    path.mkdir()
    for name, content in (("tmp", "half"), ("old", "older")):
        folder = path.with_name(f".{path.name}.{process_id}.{name}")
        folder.mkdir()
        (folder / RECORD).write_text(content)
    (path / RECORD).write_text("whole")


def replaced(path):
    """What `path` holds after it was replaced, and what is beside it."""
    from keylayers.folders import replaced_folder
    from keylayers.records import RECORD

    with replaced_folder(path) as folder:
        (folder / RECORD).write_text("new")
    return (path / RECORD).read_text(), sorted(one.name for one in path.parent.iterdir())


def test_what_a_process_of_the_same_number_left_is_removed(tmp_path):
    """As in a container, which starts the same command under the same number each time."""
    left_by(tmp_path / "a", os.getpid())
    assert replaced(tmp_path / "a") == ("new", ["a"])


def test_what_a_killed_process_left_is_removed_before_its_parent_asks_for_it(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        left_by(tmp_path / "a", child.pid)
        found = replaced(tmp_path / "a")
        assert found == ("new", [f".a.{child.pid}.old", f".a.{child.pid}.tmp", "a"])  # at work
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not asked for
        assert replaced(tmp_path / "a") == ("new", ["a"])
    finally:
        child.kill()
        child.wait()


def test_what_an_earlier_process_of_a_running_ones_number_left_is_removed(tmp_path):
    left_by(tmp_path / "a", os.getppid())
    hour = 3600
    for one in tmp_path.iterdir():
        os.utime(one, (one.stat().st_atime, one.stat().st_mtime - 1000 * hour))
    assert replaced(tmp_path / "a") == ("new", ["a"])


def test_what_is_kept_of_a_run_goes_when_its_result_is_found_whole(tmp_path):
    from keylayers.folders import remove_unfinished, unfinished

    remove_unfinished(tmp_path / "a")  # nothing is there
    with suppress(KeyError), unfinished(tmp_path / "a") as folder:
        (folder / "checkpoint").touch()
        raise KeyError
    assert [one.name for one in tmp_path.iterdir()] == [".a.unfinished"]
    remove_unfinished(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_somebody_else_made_is_not_replaced(tmp_path):
    from keylayers.errors import OutputError
    from keylayers.folders import check_replaceable

    (tmp_path / "thesis.tex").touch()
    with pytest.raises(OutputError, match="holds other files"):
        check_replaceable(tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        check_replaceable(tmp_path / "thesis.tex")
    check_replaceable(tmp_path / "new")
