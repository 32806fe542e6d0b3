# SPDX-License-Identifier: Apache-2.0
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


def test_a_folder_that_somebody_else_made_is_not_replaced(tmp_path):
    from keylayers.errors import OutputError
    from keylayers.folders import check_replaceable

    (tmp_path / "thesis.tex").touch()
    with pytest.raises(OutputError, match="holds other files"):
        check_replaceable(tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        check_replaceable(tmp_path / "thesis.tex")
    check_replaceable(tmp_path / "new")
