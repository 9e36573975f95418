import json
import math
import os

import numpy as np
import pytest

from panet_d2.checkpoint.atomic import AtomicPathManager, atomic_open, write_json


@pytest.mark.parametrize("mode, content", [("w", "new"), ("wb", b"new")])
def test_appears_when_it_is_whole(tmp_path, mode, content):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_open(str(path), mode) as f:
        f.write(content)
        f.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_open(str(path)) as f:
        f.write("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_two_writers_at_once_do_not_mix(tmp_path):
    path = tmp_path / "file"
    with atomic_open(str(path)) as first:
        first.write("first " * 1000)
        with atomic_open(str(path)) as second:
            second.write("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first " * 1000 and os.listdir(tmp_path) == ["file"]


def test_no_such_folder(tmp_path):
    path = str(tmp_path / "lost/file")
    with pytest.raises(FileNotFoundError, match="lost/file'$"), atomic_open(path):
        pass


def test_only_local_writing_is_ours(tmp_path):
    class Other:
        opened = []

        def open(self, path, mode="r", **kwargs):
            self.opened.append((path, mode))

        def isfile(self, path):
            return path == "x"

    manager = AtomicPathManager(Other())
    manager.open("s3://bucket/file", "wb")
    manager.open(str(tmp_path / "a"), "rb")
    manager.open(str(tmp_path / "a"))
    with manager.open(str(tmp_path / "a"), "w") as f:
        f.write("x")
    assert [mode for _, mode in Other.opened] == ["wb", "rb", "r"]
    assert (tmp_path / "a").read_text() == "x" and manager.isfile("x")


def test_nan_becomes_null(tmp_path):
    write_json(str(tmp_path / "x.json"), {"a": [math.nan, {"b": (1.5, np.float64("nan"))}], 2: "c"})
    found = json.loads((tmp_path / "x.json").read_text())
    assert found == {"a": [None, {"b": [1.5, None]}], "2": "c"}
