"""
What Detectron2's tests hold for its ROIPooler, held for AdaptiveROIPooler.

Scripting is tested in tests/export/test_scripting.py.
"""

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from detectron2.utils.testing import random_boxes
from torch import nn

from panet_d2 import AdaptiveROIPooler
from panet_d2.layers import FUSIONS

from ..common import DEVICES, needs_cuda
from .common import needs_rotated_ops, rotated

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
CHANNELS = 4
IMAGE = 128
ADAPTATIONS = ["conv", "fc", "none"]


def pooler(**kwargs):
    args = dict(output_size=7, scales=SCALES, sampling_ratio=2, pooler_type="ROIAlignV2")
    args.update(in_channels=CHANNELS, adaptation_dim=5)
    args.update(kwargs)
    return AdaptiveROIPooler(**args).eval()


def features(num_images=2, scales=SCALES, size=IMAGE):
    return [torch.randn(num_images, CHANNELS, int(size * s), int(size * s)) for s in scales]


def boxes(*counts):
    return [Boxes(random_boxes(count, IMAGE)) for count in counts]


@needs_rotated_ops
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_upright_rotated_boxes_are_boxes(adaptation, sampling_ratio, device):
    upright = pooler(adaptation=adaptation, sampling_ratio=sampling_ratio)
    turnable = pooler(
        adaptation=adaptation, sampling_ratio=sampling_ratio, pooler_type="ROIAlignRotated"
    )
    turnable.load_state_dict(upright.state_dict())
    x, box_lists = [f.to(device) for f in features()], boxes(10, 10)
    expected = upright.to(device)(x, [b.to(device) for b in box_lists])
    result = turnable.to(device)(x, [rotated(b).to(device) for b in box_lists])
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@needs_rotated_ops
def test_half_a_turn_turns_the_grid():
    model = pooler(adaptation="none", pooler_type="ROIAlignRotated")
    x, box_lists = features(), boxes(3, 4)
    upright = model(x, [rotated(b) for b in box_lists])
    turned = model(x, [rotated(b, 180.0) for b in box_lists])
    torch.testing.assert_close(turned, upright.flip(2, 3), rtol=1e-4, atol=1e-4)


@needs_cuda
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_devices_agree(adaptation, fusion):
    model, x, box_lists = pooler(adaptation=adaptation, fusion=fusion), features(), boxes(10, 10)
    expected = model(x, box_lists)
    result = model.to("cuda")([f.to("cuda") for f in x], [b.to("cuda") for b in box_lists])
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-3, atol=1e-3)


class Traceable(nn.Module):
    """Tensors in, a tensor out, as a tracer wants it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *tensors):
        *x, first, second = tensors
        return self.model(x, [Boxes(first), Boxes(second)])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("pooler_type", ["ROIAlign", "ROIAlignV2", "ROIPool"])
@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_trace_keeps_no_count_and_no_size(adaptation, pooler_type):
    model = Traceable(pooler(adaptation=adaptation, pooler_type=pooler_type))

    def inputs(size, *counts):
        return (*features(size=size), *(random_boxes(count, size) for count in counts))

    with torch.no_grad():
        traced = torch.jit.trace(model, inputs(64, 5, 3))
        for args in (inputs(128, 9, 2), inputs(96, 0, 4), inputs(64, 0, 0)):
            torch.testing.assert_close(traced(*args), model(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooler_type", ["ROIAlign", "ROIAlignV2", "ROIPool"])
@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_a_box_does_not_see_the_batch(adaptation, pooler_type):
    """Each result depends on its own image and box alone, whatever else is pooled with it."""
    model = pooler(adaptation=adaptation, pooler_type=pooler_type)
    x, box_lists = features(3), boxes(4, 0, 3)
    together = model(x, box_lists)
    alone = [
        model([f[i : i + 1] for f in x], [box_list[k]])
        for i, box_list in enumerate(box_lists)
        for k in range(len(box_list))
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_no_boxes_have_the_stock_poolers_shape(num_images):
    x, box_lists = features(num_images), boxes(*[0] * num_images)
    stock = ROIPooler(7, SCALES, 2, "ROIAlignV2")
    assert pooler(adaptation="none")(x, box_lists).shape == stock(x, box_lists).shape
    assert pooler(adaptation="fc")(x, box_lists).shape == (0, 5, 1, 1)


def test_fpn_levels_are_the_stock_poolers():
    """Maps that hold the number of their level: what the stock pooler returns is where it read."""
    sides = 2.0 ** torch.arange(3, 11)  # 8 to 1024 pixels
    corners = torch.zeros(len(sides), 2)
    box_lists = [Boxes(torch.cat([corners, sides[:, None].expand(-1, 2)], dim=1))]
    x = [
        torch.full((1, CHANNELS, int(2048 * s), int(2048 * s)), float(level))
        for level, s in enumerate(SCALES)
    ]
    read = ROIPooler(1, SCALES, 2, "ROIAlignV2")(x, box_lists)[:, 0, 0, 0]
    assert sorted(set(read.tolist())) == [0, 1, 2, 3]
    assert pooler().fpn_levels(box_lists).tolist() == read.tolist()
