"""Whatever the boxes, the pooler agrees with torchvision's RoIAlign, level by level in double."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align

from panet_d2 import AdaptiveROIPooler
from panet_d2.layers import FUSIONS, multilevel_roi_align

CHANNELS = 3
FEW_AND_MANY = pytest.mark.parametrize("examples", [25, pytest.param(2000, marks=pytest.mark.slow)])


@st.composite
def coordinates(draw, size: int, huge: float):
    """
    Both ends of a box along one axis of an image: anywhere, on the border, in the middle of a
    pixel, in any order, as far away as ``huge``.
    """
    anywhere = st.floats(-huge, huge, width=32) | st.floats(-8, size + 8, width=32)
    special = st.sampled_from([0, size, size - 1, -1, -4, -32, size + 32, 0.5, size - 0.5, 1e-30])
    first = draw(anywhere | special)
    side = st.floats(2**-20, 2 * size, width=32)
    second = draw(anywhere | special | st.just(first) | side.map(lambda s: first + s))
    return float(first), float(second)


@st.composite
def problems(draw):
    """Feature maps, boxes and what to do with them."""
    levels = draw(st.integers(1, 4))
    first_level = draw(st.integers(0, 3))
    strides = [2 ** (first_level + i) for i in range(levels)]
    # The stride of the coarsest level divides an image that Detectron2 has padded.
    height, width = (strides[-1] * draw(st.integers(1, max(1, 64 // strides[-1]))) for _ in "hw")
    ratio, aligned = draw(st.integers(0, 3)), draw(st.booleans())
    # An adaptive number of samples takes one for every pixel of a box, in torchvision too, which
    # then has no answer for aligned boxes that are turned inside out.
    huge = 300.0 if ratio == 0 else 1e6
    ends = [coordinates(side, huge) for side in (width, height)]
    if ratio == 0 and aligned:
        ends = [axis.map(sorted) for axis in ends]
    num_images = draw(st.integers(1, 2))
    box_lists = [
        [[x0, y0, x1, y1] for (x0, x1), (y0, y1) in draw(st.lists(st.tuples(*ends), max_size=4))]
        for _ in range(num_images)
    ]
    return {
        "strides": strides,
        "size": (height, width),
        "boxes": [torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in box_lists],
        "output_size": (draw(st.integers(1, 7)), draw(st.integers(1, 7))),
        "ratio": ratio,
        "aligned": aligned,
        "fusion": draw(st.sampled_from(FUSIONS)),
        "seed": draw(st.integers(0, 99)),
    }


def features_of(problem, dtype=torch.float64):
    generator = torch.Generator().manual_seed(problem["seed"])
    height, width = problem["size"]
    return [
        torch.randn(
            len(problem["boxes"]),
            CHANNELS,
            height // stride,
            width // stride,
            dtype=dtype,
            generator=generator,
        ).requires_grad_()
        for stride in problem["strides"]
    ]


def reference_levels(problem, features):
    """torchvision's, of shape (L, M, C, h, w)."""
    boxes = [b.to(features[0].dtype) for b in problem["boxes"]]
    return torch.stack(
        [
            roi_align(f, boxes, problem["output_size"], 1 / s, problem["ratio"], problem["aligned"])
            for f, s in zip(features, problem["strides"])
        ]
    )


def fuse(levels, fusion):
    reduce = {"max": torch.amax, "sum": torch.sum, "mean": torch.mean, "product": torch.prod}
    return reduce[fusion](levels, dim=0)


def assert_same(ours, expected, features, tolerance):
    """Values, and the gradients of all features for a random gradient of the result."""
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, **tolerance)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(r, features, upstream, True) for r in (ours, expected)]
    torch.testing.assert_close(*gradients, **tolerance)


EXACT = {"rtol": 1e-9, "atol": 1e-9}


@FEW_AND_MANY
def test_levels_and_fusions(examples):
    @settings(max_examples=examples)
    @given(problems())
    def holds(problem):
        features = features_of(problem)
        index = torch.repeat_interleave(
            torch.arange(len(problem["boxes"])), torch.tensor([len(b) for b in problem["boxes"]])
        )
        boxes = torch.cat([index[:, None], torch.cat(problem["boxes"])], dim=1).double()
        args = (
            features,
            boxes,
            [1 / s for s in problem["strides"]],
            problem["output_size"],
            problem["ratio"],
            problem["aligned"],
        )
        levels = reference_levels(problem, features)
        assert_same(multilevel_roi_align(*args), levels, features, EXACT)
        fused = multilevel_roi_align(*args, problem["fusion"])
        assert_same(fused, fuse(levels, problem["fusion"]), features, EXACT)

    holds()


@FEW_AND_MANY
@pytest.mark.parametrize("adaptation", ["conv", "fc", "none"])
def test_pooler(adaptation, examples):
    @settings(max_examples=examples)
    @given(problems())
    def holds(problem):
        torch.manual_seed(problem["seed"])
        model = AdaptiveROIPooler(
            problem["output_size"],
            [1 / s for s in problem["strides"]],
            problem["ratio"],
            "ROIAlignV2" if problem["aligned"] else "ROIAlign",
            in_channels=CHANNELS,
            fusion=problem["fusion"],
            adaptation=adaptation,
            adaptation_dim=4,
        ).double()
        features = features_of(problem)
        levels = reference_levels(problem, features)
        if adaptation != "none":
            layers = model.adaptation_layers
            torch.nn.init.normal_(layers.bias)  # as built it is zero, and would not be seen
            weights, biases = (p.chunk(len(levels)) for p in (layers.weight, layers.bias))
            if adaptation == "conv":
                adapted = [
                    F.conv2d(x, weight, bias, padding=1)
                    for x, weight, bias in zip(levels, weights, biases)
                ]
            else:
                adapted = [
                    F.linear(x.flatten(1), weight, bias)[:, :, None, None]
                    for x, weight, bias in zip(levels, weights, biases)
                ]
            levels = torch.stack(adapted).relu()
        ours = model(features, [Boxes(b) for b in problem["boxes"]])
        assert_same(ours, fuse(levels, problem["fusion"]), features, EXACT)

    holds()
