"""Against one layer for each level."""

import pytest
import torch
from detectron2.layers import get_norm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from panet_d2.layers import LevelwiseConv2d, LevelwiseLinear, levelwise

LEVELS, IN, OUT = 3, 4, 64
WAYS = pytest.mark.parametrize("loop_on", [("cpu",), ()])
NORMS = ["", "GN", "BN", "FrozenBN", "LN", lambda channels: nn.GroupNorm(8, channels)]


def single_norms(norm, model):
    """The norm of each level, with the parameters that it has in ``model``."""
    if not norm:
        return [nn.Identity()] * LEVELS
    singles = [get_norm(norm, OUT).double() for _ in range(LEVELS)]
    parts = list(model.norm.children()) or [model.norm]
    for i, single in enumerate(singles):
        if len(parts) == LEVELS:
            single.load_state_dict(parts[i].state_dict())
            continue
        state = model.norm.state_dict().items()
        single.load_state_dict({k: v.chunk(LEVELS)[i] if v.dim() else v for k, v in state})
    return singles


def randomised(model):
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1.0)
    return model.double()


@WAYS
@pytest.mark.parametrize("norm", NORMS)
def test_conv_is_a_conv_for_each_level(norm, loop_on, monkeypatch):
    monkeypatch.setattr(levelwise, "LOOP_ON", loop_on)
    model = randomised(LevelwiseConv2d(IN, OUT, LEVELS, norm))
    x = torch.randn(LEVELS, 2, IN, 5, 7, dtype=torch.float64, requires_grad=True)
    singles = single_norms(norm, model)
    weights = model.weight.chunk(LEVELS)
    biases = model.bias.chunk(LEVELS) if model.bias is not None else [None] * LEVELS
    expected = torch.stack(
        [singles[i](torch.conv2d(x[i], weights[i], biases[i], padding=1)) for i in range(LEVELS)]
    )
    result = model(x)
    torch.testing.assert_close(result, expected)
    upstream = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(y, [x, model.weight], upstream) for y in (result, expected))
    torch.testing.assert_close(ours, theirs)


@WAYS
@pytest.mark.parametrize("norm", NORMS)
def test_linear_is_a_linear_layer_for_each_level(norm, loop_on, monkeypatch):
    monkeypatch.setattr(levelwise, "LOOP_ON", loop_on)
    model = randomised(LevelwiseLinear(IN, OUT, LEVELS, norm))
    x = torch.randn(LEVELS, 2, IN, dtype=torch.float64, requires_grad=True)
    singles = single_norms(norm, model)
    weights, biases = model.weight.chunk(LEVELS), model.bias.chunk(LEVELS)
    expected = torch.stack(
        [
            singles[i]((x[i] @ weights[i].T + biases[i])[:, :, None, None])[:, :, 0, 0]
            for i in range(LEVELS)
        ]
    )
    result = model(x)
    torch.testing.assert_close(result, expected)
    upstream = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(y, [x, model.weight], upstream) for y in (result, expected))
    torch.testing.assert_close(ours, theirs)


def test_weights_start_as_those_of_single_layers():
    conv = LevelwiseConv2d(64, 128, LEVELS)
    for weight in conv.weight.chunk(LEVELS):  # fan out 128 * 9, gain of a ReLU
        assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    linear = LevelwiseLinear(500, 100, LEVELS)
    bound = (3 / 500) ** 0.5
    assert 0.99 * bound < linear.weight.abs().max().item() <= bound
    assert not linear.bias.any() and not conv.bias.any()


@pytest.mark.parametrize("norm", ["", "GN", "BN", "FrozenBN"])
def test_a_conv_before_a_norm_has_no_bias(norm):
    assert (LevelwiseConv2d(IN, OUT, LEVELS, norm).bias is None) == bool(norm)


class Convolutions(TorchDispatchMode):
    """Keeps the inputs of all convolutions."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.inputs.append(args[0])
        return func(*args, **(kwargs or {}))


@WAYS
def test_conv_reads_pooled_grids_as_they_are(loop_on, monkeypatch):
    """In the memory of the pooled grids, levels are channels; nothing is copied."""
    monkeypatch.setattr(levelwise, "LOOP_ON", loop_on)
    pooled = torch.randn(2, 5, 7, LEVELS, IN).permute(3, 0, 4, 1, 2)
    conv = LevelwiseConv2d(IN, OUT, LEVELS)
    with torch.no_grad(), Convolutions() as seen:
        conv(pooled)
    if loop_on:
        assert [x.data_ptr() for x in seen.inputs] == [x.data_ptr() for x in pooled]
    else:
        (read,) = seen.inputs
        assert read.data_ptr() == pooled.data_ptr()
        assert read.is_contiguous(memory_format=torch.channels_last)


@WAYS
@pytest.mark.parametrize("norm", ["", "GN", "BN", "naiveSyncBN_N"])
def test_nothing(norm, loop_on, monkeypatch):
    monkeypatch.setattr(levelwise, "LOOP_ON", loop_on)
    for model, shape in [
        (LevelwiseConv2d(IN, OUT, LEVELS, norm), (IN, 5, 7)),
        (LevelwiseLinear(IN, OUT, LEVELS, norm), (IN,)),
    ]:
        model.train()
        result = model(torch.randn(LEVELS, 0, *shape))
        assert result.shape == (LEVELS, 0, OUT, *shape[1:])
        result.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
