"""Hostile and broken files."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from panet_d2.checkpoint.rules import save_whole
from panet_d2.checkpoint.safe_load import load_untrusted, model_weights
from panet_d2.errors import CheckpointError


class Hostile:
    """Writes a file where it is unpickled."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("wrap", [lambda h: h, lambda h: {"model": {"a": h}}, lambda h: [h]])
def test_runs_no_code(tmp_path, suffix, wrap):
    path, witness = tmp_path / f"hostile{suffix}", tmp_path / "witness"
    content = wrap(Hostile(witness))
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"hostile{suffix} is not a checkpoint.*safely"):
        load_untrusted(str(path))
    assert not witness.exists()


@pytest.mark.parametrize(
    "payload",
    [
        b"cos\nsystem\n(S'echo hi'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'__class__'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n(S'/etc/passwd'\ntR.",
    ],
)
def test_hand_written_pickles(tmp_path, payload):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(payload)
    with pytest.raises(CheckpointError, match="is not data|not a checkpoint"):
        load_untrusted(str(path))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_arrays_of_the_model_zoo(tmp_path, protocol):
    path = tmp_path / "zoo.pkl"
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.float64(3.0) * np.ones(2),
        "c": np.ones((2, 3), order="F"),
        "n": np.array(7),
    }
    content = {"model": arrays, "__author__": "somebody", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    weights = model_weights(load_untrusted(str(path)), str(path))
    assert weights["a"].dtype == torch.float32 and weights["b"].dtype == torch.float32
    for name, array in arrays.items():
        np.testing.assert_array_equal(weights[name].numpy(), array)


@pytest.mark.parametrize("old, new", [(b"numpy._core", b"numpy.core"), (b"", b"")])
def test_files_of_either_numpy(tmp_path, old, new):
    path = tmp_path / "zoo.pkl"
    data = pickle.dumps({"a": np.ones(3, np.float32)}, protocol=0)
    path.write_bytes(data.replace(old, new) if old else data)
    assert model_weights(load_untrusted(str(path)), "x")["a"].tolist() == [1, 1, 1]


def test_of_python_2(tmp_path):
    """Strings and bytes as Detectron's own files have them."""
    path = tmp_path / "zoo.pkl"
    path.write_bytes(b"\x80\x02}q\x00U\x05modelq\x01}q\x02s.")
    with pytest.raises(CheckpointError, match="no weights"):
        model_weights(load_untrusted(str(path)), str(path))


def test_state_dict_with_other_things_beside_it(tmp_path):
    path = tmp_path / "model.pth"
    state = torch.nn.Linear(2, 2).half().state_dict()
    torch.save({"state_dict": state, "meta": {"epoch": 12, "classes": ("a",)}}, path)
    weights = model_weights(load_untrusted(str(path)), str(path))
    assert weights["weight"].dtype == torch.float32
    assert torch.equal(weights["weight"], state["weight"].float())


def truncated():
    buffer = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(1000)}}, buffer)
    return buffer.getvalue()[:2000]


def zip_of_something_else():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        z.writestr("readme.txt", "hello")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"hello", truncated(), zip_of_something_else(), pickle.dumps({"a": 1})[:-3]]
)
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_broken_files(tmp_path, content, suffix):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"broken{suffix}"):
        load_untrusted(str(path))


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "holds a list"),
        ({"model": {}}, "no weights"),
        ({"model": {"a": "text"}}, "'a' is a str"),
        ({"model": {1: torch.zeros(1)}}, "1 is a Tensor"),
        ({"epoch": 3}, "'epoch' is a int"),
    ],
)
def test_other_contents(tmp_path, content, message):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        model_weights(load_untrusted(str(path)), str(path))


def test_lost_file(tmp_path):
    with pytest.raises(CheckpointError, match="no file .*lost.pth"):
        load_untrusted(str(tmp_path / "lost.pth"))


class TestSaveWhole:
    def test_stores_no_more_than_it_must(self, tmp_path):
        path = tmp_path / "out.pth"
        save_whole({"a": torch.zeros(1_000_000)[:10]}, str(path), "me")
        assert path.stat().st_size < 5000
        assert torch.load(path)["__author__"] == "me"

    def test_nothing_when_it_fails(self, tmp_path, monkeypatch):
        path = tmp_path / "out.pth"
        path.write_bytes(b"before")

        def full_disk(content, file):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space"):
            save_whole({"a": torch.zeros(1)}, str(path), "me")
        assert [p.name for p in tmp_path.iterdir()] == ["out.pth"]
        assert path.read_bytes() == b"before"

    def test_name(self, tmp_path):
        with pytest.raises(CheckpointError, match="must end in .pth"):
            save_whole({}, str(tmp_path / "out.pkl"), "me")
