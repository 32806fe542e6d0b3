# SPDX-License-Identifier: Apache-2.0
"""JSON on which Arrow would crash is refused by line; brackets inside texts count for nothing."""

import gzip
import json

import pytest

ROW = {"prompt": 'a [[[ { \\ " ] b', "completion": ":-[ \\\\"}
SOUND = {
    "lines": "".join(json.dumps(ROW) + "\n" for _ in range(600)),
    "a list": json.dumps([ROW] * 600),
    "a list over lines": json.dumps([ROW] * 600, indent=2),
    "one object over lines": json.dumps({"data": [ROW]}, indent=2),
    "texts": json.dumps(["a", "b [ c"]),
    "nulls inside rows": '{"a": null, "b": [null, {"c": 1}]}\n' * 3,
    "500 levels": "[" * 500 + "]" * 500,
    "empty lines": '\n\n{"a": "b"}\n\n',
    "a byte order mark": "\ufeff" + '{"a": "b"}\n',
    "nothing": "",
}
WRONG = {
    "null first": ('null\n{"a": "b"}\n', "line 1 of .* holds a row that is null or a number"),
    "null in a list": ('[null, {"a": "b"}]', "line 1 of .* holds a row that is null"),
    "a number in a list over lines": ('[\n{"a": "b"},\n3\n]', "line 3 of .* holds a row"),
    "null behind a row": ('{"a": "b"}\n{"a": "b"} null\n', "line 2 of .* holds a row"),
    "deep": ("[" * 501, "line 1 of .* is nested deeper"),
    "deep over lines": ("[\n" * 501, "line 501 of .* is nested deeper"),
    "deep objects": ('{"a":' * 600 + "1" + "}" * 600, "line 1 of .* is nested deeper"),
}


def checked(tmp_path, text, name="data.jsonl"):
    from keylayers.data.json_shape import check_shape

    path = tmp_path / name
    content = text.encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    check_shape(path)


@pytest.mark.parametrize("kind", SOUND)
@pytest.mark.parametrize("name", ["data.jsonl", "data.json.gz"])
def test_what_arrow_can_read_is_let_through(kind, name, tmp_path):
    checked(tmp_path, SOUND[kind], name)


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["data.jsonl", "data.json.gz"])
def test_what_would_crash_arrow_is_refused(kind, name, tmp_path):
    from keylayers.errors import DataError

    text, line = WRONG[kind]
    with pytest.raises(DataError, match=f"JSON data must be objects, nested at most 500.* {line}"):
        checked(tmp_path, text, name)


def test_every_file_of_a_folder_is_looked_at(tmp_path):
    from keylayers.data.json_shape import check_shape
    from keylayers.errors import DataError

    (tmp_path / "a.jsonl").write_text('{"a": "b"}\n')
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.jsonl").write_text("null\n")
    with pytest.raises(DataError, match=r"line 1 of .*b\.jsonl"):
        check_shape(tmp_path)
