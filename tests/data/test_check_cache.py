import os
from dataclasses import replace

import pytest

from panet_d2.data import check_cache
from panet_d2.data.check_cache import CheckedFile, file_state, is_known_clean, remember_clean


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PANET_D2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def checked(tmp_path):
    path = tmp_path / "instances.json"
    path.write_text("{}")
    return CheckedFile(file_state(str(path)), masks=None, evaluated=True, keypoints=0)


def test_nothing_is_known_at_first(folder, checked):
    assert not is_known_clean(checked)
    assert not folder.exists()


def test_what_was_remembered_is_known(folder, checked):
    remember_clean(checked)
    assert is_known_clean(checked)


@pytest.mark.parametrize(
    "change",
    [
        {"masks": False},
        {"masks": True},
        {"evaluated": False},
        {"keypoints": 17},
    ],
)
def test_another_check_is_not_known(folder, checked, change):
    remember_clean(checked)
    other = replace(checked, **change)
    assert not is_known_clean(other)
    remember_clean(other)
    assert is_known_clean(other) and is_known_clean(checked)


def test_a_file_that_changed_is_not_known(folder, checked):
    path = checked.file.path
    remember_clean(checked)
    os.utime(path, ns=(1, checked.file.mtime_ns + 1))
    touched = replace(checked, file=file_state(path))
    assert not is_known_clean(touched)
    with open(path, "a") as f:
        f.write(" ")
    os.utime(path, ns=(1, checked.file.mtime_ns))
    longer = replace(checked, file=file_state(path))
    assert not is_known_clean(longer)
    remember_clean(longer)
    assert is_known_clean(longer)
    assert len(list(folder.rglob("*.*"))) == 1  # the record of the old file was replaced


def test_a_newer_check_looks_again(folder, checked, monkeypatch):
    remember_clean(checked)
    monkeypatch.setattr(check_cache, "VERSION", check_cache.VERSION + 1)
    assert not is_known_clean(checked)


def test_a_file_has_one_state_by_all_its_names(checked, tmp_path, monkeypatch):
    path = checked.file.path
    os.symlink(path, tmp_path / "link.json")
    monkeypatch.chdir(tmp_path)
    for name in ("link.json", "./instances.json"):
        assert file_state(name) == checked.file


@pytest.mark.parametrize("path", ["", "/nowhere/instances.json", "https://example.com/a.json"])
def test_what_is_not_a_local_file_has_no_state(path):
    assert file_state(path) is None


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff\xfe", b"[" * 100_000, b"{}"])
def test_a_broken_record_is_none(folder, checked, content):
    remember_clean(checked)
    [record] = folder.rglob("*.json")
    record.write_bytes(content)
    assert not is_known_clean(checked)
    remember_clean(checked)
    assert is_known_clean(checked)


def test_a_cache_that_cannot_be_used_is_no_error(folder, checked):
    folder.write_text("a file")  # root may write any folder
    remember_clean(checked)
    assert not is_known_clean(checked)
    folder.unlink()
    remember_clean(checked)
    [record] = folder.rglob("*.json")
    record.unlink()
    record.mkdir()
    assert not is_known_clean(checked)
    remember_clean(checked)
    assert os.listdir(record.parent) == [record.name]


def test_the_users_own_cache(tmp_path, checked, monkeypatch):
    monkeypatch.delenv("PANET_D2_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    remember_clean(checked)
    assert is_known_clean(checked)
    assert list((tmp_path / ".cache/panet_d2/checked_annotations").iterdir())
