import argparse
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

from panet_d2.checkpoint import StrictCheckpointer
from panet_d2.errors import CheckpointError


class Model(nn.Module):
    def __init__(self, width=3, extra=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, 2)
        if extra:
            self.extra = nn.Linear(1, 1)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": Model().state_dict(), "iteration": 7}, path)
    return str(path)


def test_loads_what_fits(path):
    model = Model()
    rest = StrictCheckpointer(model).load(path)
    assert rest["iteration"] == 7
    expected = torch.load(path)["model"]
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


def test_missing_names_are_listed(path):
    with pytest.raises(CheckpointError, match=r"2 not in the ch.*: extra.*bias|extra.*weight"):
        StrictCheckpointer(Model(extra=True)).load(path)


def test_the_checkpoint_is_named(path):
    """A program may load several, and a run that was not trained to its end has none of its own."""
    with pytest.raises(CheckpointError, match=re.escape(f"{path} does not match the model")):
        StrictCheckpointer(Model(extra=True)).load(path)


def test_unexpected_names_are_listed(tmp_path):
    torch.save({"model": Model(extra=True).state_dict()}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="2 not in the model: extra"):
        StrictCheckpointer(Model()).load(str(tmp_path / "model.pth"))


def test_other_shapes_are_listed(path):
    with pytest.raises(
        CheckpointError,
        match=r"of another shape.*head.weight \(checkpoint \(2, 3\), model \(2, 4\)\)",
    ):
        StrictCheckpointer(Model(width=4)).load(path)


def test_required_part_must_be_whole_and_the_rest_may_be_new(path):
    state = Model().state_dict()
    del state["head.bias"]
    state["head.weight"] = torch.zeros(5, 3)
    state["other.weight"] = state["body.other"] = torch.zeros(1)
    torch.save({"model": state}, path)
    StrictCheckpointer(Model(), required=["body."]).load(path)
    del state["body.0.bias"]
    torch.save({"model": state}, path)
    with pytest.raises(CheckpointError, match="1 not in the ch.*: body.0.bias"):
        StrictCheckpointer(Model(), required=["body."]).load(path)


def test_counts_of_batches_may_be_missing(path):
    state = Model().state_dict()
    del state["body.1.num_batches_tracked"]
    torch.save({"model": state}, path)
    StrictCheckpointer(Model()).load(path)


@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps([1])[:-1]])
def test_not_a_checkpoint(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is not a checkpoint"):
        StrictCheckpointer(Model()).load(str(tmp_path / name))


@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
def test_what_is_not_data_beside_the_weights(tmp_path, name):
    """As in mmengine's checkpoints; a .pkl with names of its own is not taken for Caffe2's."""
    state = {k: v.numpy() for k, v in Model().state_dict().items()}
    content = {"model": state, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.4)}
    if name.endswith("pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name)
    model = Model()
    StrictCheckpointer(model).load(str(tmp_path / name))
    assert all(torch.equal(v, torch.as_tensor(state[k])) for k, v in model.state_dict().items())


@pytest.mark.parametrize("blobs", [True, False])
def test_arrays_of_caffe2(tmp_path, blobs):
    """Detectron2 converts their names, as it does for ImageNet's R-50.pkl."""
    arrays = {"conv1_w": np.ones((2, 2), np.float32), "conv1_b_momentum": np.ones(2)}
    content = {"blobs": arrays, "cfg": "text"} if blobs else arrays
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content, protocol=2))
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential())
    model.stem.add_module("conv1", nn.Linear(2, 2, bias=False))
    StrictCheckpointer(model).load(str(tmp_path / "model.pkl"))
    assert model.stem.conv1.weight.tolist() == [[1, 1], [1, 1]]


def test_bare_and_wrapped_state_dicts(tmp_path):
    state = Model().half().state_dict()
    for content in (
        state,
        {"state_dict": state},
        {"model": None, "ema": state},
        {"model": {f"module.{k}": v for k, v in state.items()}},
        {"model": {k.replace(".", "._orig_mod.", 1): v for k, v in state.items()}},
    ):
        torch.save(content, tmp_path / "model.pth")
        model = Model()
        StrictCheckpointer(model).load(str(tmp_path / "model.pth"))
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name].to(value.dtype)), name


def test_compiled_model(tmp_path):
    """As docs/export.md compiles the backbone, before or after loading."""
    source, model = Model(), Model()
    torch.save({"model": source.state_dict()}, tmp_path / "model.pth")
    model.body = torch.compile(model.body)
    assert any("_orig_mod" in name for name in model.state_dict())
    StrictCheckpointer(model).load(str(tmp_path / "model.pth"))
    for ours, theirs in zip(model.state_dict().values(), source.state_dict().values()):
        assert torch.equal(ours, theirs)


def test_a_whole_module(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"model.pth holds a whole module \(torch"):
        StrictCheckpointer(Model()).load(str(tmp_path / "model.pth"))


def test_matching_heuristics(path):
    """Detectron2's own syntax, for names that end alike."""
    model = nn.Sequential()
    model.add_module("inner", Model())
    StrictCheckpointer(model).load(f"{path}?matching_heuristics=True")
    ours, theirs = model.state_dict(), torch.load(path)["model"]
    assert all(torch.equal(ours[f"inner.{name}"], torch.as_tensor(v)) for name, v in theirs.items())


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:9/model.pth",  # nobody listens there
        "catalog://no/such/model",
        "detectron2:/model.pth?matching_heuristics=True",
        "gopher://127.0.0.1/model.pth",
    ],
)
def test_what_cannot_be_fetched(address):
    with pytest.raises(
        CheckpointError,
        match=f"cannot get .{re.escape(address[:9])}.*, which MODEL.WEIGHTS.* names: ",
    ):
        StrictCheckpointer(Model()).load(address)


def test_no_checkpoint():
    with pytest.raises(CheckpointError, match="MODEL.WEIGHTS is empty"):
        StrictCheckpointer(Model()).load("")
    with pytest.raises(CheckpointError, match="'lost.pth', which MODEL.WEIGHTS.* no such file"):
        StrictCheckpointer(Model()).load("lost.pth")


def test_the_model_is_as_before_if_the_checkpoint_does_not_match(path, tmp_path):
    """And the checkpointer loads another one."""
    model = Model(extra=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    checkpointer = StrictCheckpointer(model)
    with pytest.raises(CheckpointError, match="not in the checkpoint"):
        checkpointer.load(path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torch.save({"model": Model(extra=True).state_dict()}, tmp_path / "other.pth")
    checkpointer.load(str(tmp_path / "other.pth"))


@pytest.mark.parametrize("mean, loads", [([1.0, 2.0, 3.0], True), ([1.0, 2.0, 4.0], False)])
def test_mean_of_the_pixels_in_old_checkpoints(tmp_path, mean, loads):
    model = Model()
    model.register_buffer("pixel_mean", torch.tensor([1.0, 2.0, 3.0]), persistent=False)
    weights = {**Model().state_dict(), "pixel_mean": torch.tensor(mean).view(3, 1, 1)}
    torch.save({"model": weights}, tmp_path / "model.pth")
    StrictCheckpointer(model, required=["body."]).load(str(tmp_path / "model.pth"))
    if loads:
        StrictCheckpointer(model).load(str(tmp_path / "model.pth"))
    else:
        with pytest.raises(CheckpointError, match=r"\[1.0, 2.0, 4.0\].*set MODEL.PIXEL_MEAN"):
            StrictCheckpointer(model).load(str(tmp_path / "model.pth"))
