"""Hostile and broken files."""

import argparse
import io
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from panet_d2.checkpoint.rules import save_whole
from panet_d2.checkpoint.safe_load import first_line, load_untrusted, model_weights
from panet_d2.errors import CheckpointError


class Hostile:
    """Writes a file where it is unpickled."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def save(content, path, how):
    """As pickle, or as torch's zip file or the format before it."""
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    return str(path)


FORMATS = pytest.mark.parametrize("how", ["pickle", "zip", "legacy"])


@FORMATS
@pytest.mark.parametrize(
    "wrap, message",
    [
        (lambda h: h, r"hostile.pth asks for posix.mkdir, which is not data\.$"),
        (lambda h: {"model": h}, r"hostile.pth asks for posix.mkdir, which is not data\.$"),
        (lambda h: {"model": {"a": h}}, r"hostile.pth: 'a' asks for posix.mkdir, which is not"),
        (lambda h: [h], "hostile.pth holds a list"),
    ],
)
def test_runs_no_code(tmp_path, how, wrap, message):
    witness = tmp_path / "witness"
    path = save(wrap(Hostile(witness)), tmp_path / "hostile.pth", how)
    with pytest.raises(CheckpointError, match=message):
        model_weights(load_untrusted(path), path)
    assert not witness.exists()


@FORMATS
def test_hostile_beside_the_weights(tmp_path, how):
    witness = tmp_path / "witness"
    content = {"model": {"a": np.ones(2, np.float32)}, "meta": [Hostile(witness)]}
    path = save(content, tmp_path / "model.pth", how)
    assert model_weights(load_untrusted(path), path)["a"].tolist() == [1, 1]
    assert not witness.exists()


class HistoryBuffer:
    """As mmengine's: of a module that is not there when the file is read."""

    def __init__(self):
        self.history = np.arange(3.0)


class Log(dict):
    pass


class Epochs(list):
    pass


@pytest.fixture
def foreign(monkeypatch):
    module = ModuleType("foreign_project")
    for cls in (HistoryBuffer, Log, Epochs):
        monkeypatch.setattr(cls, "__module__", module.__name__)
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    beside = {
        "message_hub": {"loss": HistoryBuffer()},
        "log": Log(a=1, b=2),
        "epochs": Epochs([1, 2]),
        "best": np.float64(0.4),
        "random": np.random.get_state(),
        "args": argparse.Namespace(lr=0.1),
    }
    return beside, lambda: monkeypatch.delitem(sys.modules, module.__name__)


@pytest.mark.parametrize("how", ["zip", "legacy"])
def test_other_projects_objects_beside_the_weights(tmp_path, foreign, how):
    beside, leave = foreign
    state = {
        "a": torch.rand(2, 3).half(),
        "b": torch.rand(4).bfloat16(),
        "n": torch.tensor(7),
        "parameter": nn.Parameter(torch.ones(2)),
        "transposed": torch.arange(6.0).view(2, 3).t(),
    }
    path = save({"state_dict": OrderedDict(state), **beside}, tmp_path / "x.pth", how)
    leave()
    weights = model_weights(load_untrusted(path), path)
    assert list(weights) == list(state)
    for name, value in state.items():
        assert torch.equal(weights[name], value.float() if name != "n" else value), name
    assert "foreign_project" not in sys.modules


@pytest.mark.parametrize("how", ["zip", "legacy"])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"model": m, "epoch": 1}])
def test_a_whole_module(tmp_path, how, wrap):
    path = save(wrap(nn.Sequential(nn.Linear(2, 2))), tmp_path / "x.pth", how)
    with pytest.raises(CheckpointError, match=r"a whole module \(torch.*Sequential\), not"):
        model_weights(load_untrusted(path), path)


def test_exported_model(tmp_path):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="x.pth is not a checkpoint: .*TorchScript"):
        load_untrusted(str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    "layout",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"model": {"type": "MaskRCNN"}, "state_dict": state},
        lambda state: {"model": nn.Linear(1, 1), "ema": state},
        lambda state: {"model_state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {"model": {f"_orig_mod.{name}": value for name, value in state.items()}},
    ],
)
def test_layouts(tmp_path, layout):
    state = {"a": torch.ones(2), "module_b": torch.zeros(1)}
    path = save(layout(state), tmp_path / "x.pth", "zip")
    assert model_weights(load_untrusted(path), path).keys() == state.keys()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "x.pth is not a checkpoint: the file is empty"),
        (b"\n<!DOCTYPE html><html>404", "x.pth is not a checkpoint: it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer; run git lfs"),
        (b"\x28\0\0\0\0\0\0\0{" + b" " * 99, "safetensors format.*package"),
    ],
)
def test_something_else(tmp_path, content, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_untrusted(str(tmp_path / "x.pth"))


def test_safetensors(tmp_path, monkeypatch):
    package, state = ModuleType("safetensors.torch"), {"a": torch.ones(2)}
    package.load_file = lambda path: state
    monkeypatch.setitem(sys.modules, "safetensors", ModuleType("safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", package)
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x02\0\0\0\0\0\0\0{} ")
    assert model_weights(load_untrusted(str(path)), str(path)).keys() == state.keys()


def test_folder(tmp_path):
    with pytest.raises(CheckpointError, match="is not a checkpoint: Is a directory"):
        load_untrusted(str(tmp_path))


def test_incomplete(tmp_path):
    (tmp_path / "x.pth").write_bytes(truncated())
    with pytest.raises(CheckpointError, match="its end is missing; copy or download it again"):
        load_untrusted(str(tmp_path / "x.pth"))


def test_message_has_no_terminal_codes(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"ca\x1b[31mb\nc\n(tR.")
    with pytest.raises(CheckpointError) as e:
        load_untrusted(str(tmp_path / "x.pkl"))
    assert str(e.value).isprintable()
    assert first_line(ValueError("\x1b[1mnot\x1b[0m this.\nmore")) == "not this"


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
