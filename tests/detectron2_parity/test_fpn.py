"""
What Detectron2's tests hold for its FPN and for the models on it, held for PAFPN.

Scripting is tested in tests/export/test_scripting.py.
"""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, build_backbone, build_model, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from panet_d2 import PAFPN

from ..common import tiny_cfg

RES = ["res2", "res3", "res4", "res5"]
RETINANET = (
    *("MODEL.META_ARCHITECTURE", "RetinaNet"),
    *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_pafpn_backbone"),
    *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
    *("MODEL.RETINANET.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"]),
    *("MODEL.RETINANET.NUM_CLASSES", 3),
    *("MODEL.RETINANET.NUM_CONVS", 1),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
)
# Two sizes that need padding, to one that is no multiple of the coarsest strides.
SIZES = [(100, 125), (100, 124)]


class Levels(nn.Module):
    """A backbone whose outputs are a tuple, as a tracer wants them."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return tuple(self.backbone(x).values())


def with_gn(*opts):
    return tiny_cfg("MODEL.FPN.NORM", "GN", *opts)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("opts", [(), ("MODEL.PAFPN.BOTTOM_UP_INPUT", "sum"), RETINANET])
def test_trace_keeps_no_size(opts):
    model = Levels(build_backbone(with_gn(*opts))).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.rand(2, 3, 64, 64))
        for shape in ((1, 3, 128, 96), (3, 3, 32, 32)):
            x = torch.rand(shape)
            torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["build_resnet_pafpn_backbone", RETINANET])
def test_names_shapes_and_strides_are_the_fpns(name):
    """With the same ResNet and config, so that it can stand in for the FPN anywhere."""
    opts = name if isinstance(name, tuple) else ("MODEL.BACKBONE.NAME", name)
    cfg = tiny_cfg(*opts)
    ours = build_backbone(cfg)
    cfg.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME.replace("pafpn", "fpn")
    stock = build_backbone(cfg)
    assert type(stock) is FPN
    assert ours.output_shape() == stock.output_shape()
    assert list(ours.output_shape()) == list(stock.output_shape())
    assert ours.size_divisibility == stock.size_divisibility == 32
    assert ours.padding_constraints == stock.padding_constraints
    x = torch.rand(1, 3, 96, 64)
    shapes = [{k: f.shape for k, f in model(x).items()} for model in (ours, stock)]
    assert shapes[0] == shapes[1]


def neck(**kwargs):
    bottom_up = build_resnet_backbone(tiny_cfg(), ShapeSpec(channels=3))
    return PAFPN(bottom_up, RES, 32, top_block=LastLevelMaxPool(), **kwargs).eval()


def test_square_pad():
    model = neck(square_pad=160)
    images = [torch.rand(3, 64, 96), torch.rand(3, 90, 33)]
    x = ImageList.from_tensors(
        images, model.size_divisibility, padding_constraints=model.padding_constraints
    ).tensor
    assert x.shape == (2, 3, 160, 160)
    with torch.no_grad():
        sizes = [feature.shape[-2:] for feature in model(x).values()]
    assert sizes == [(160 // s, 160 // s) for s in (4, 8, 16, 32)] + [(3, 3)]


def test_average_of_lateral_and_top_down():
    """The FPN below is fuse_type's, the bottom-up path adds all the same."""
    model, x = neck(fuse_type="avg").double(), torch.rand(1, 3, 64, 64).double()
    with torch.no_grad():
        c5, c4 = (model.bottom_up(x)[name] for name in ("res5", "res4"))
        top_down = model.fpn_lateral5(c5)
        top_down = top_down.repeat_interleave(2, -1).repeat_interleave(2, -2)
        p4 = model.fpn_output4((model.fpn_lateral4(c4) + top_down) / 2)
        outputs = model(x)
        n4 = model.pafpn_output4(model.pafpn_downsample4(outputs["p3"]) + p4)
    torch.testing.assert_close(outputs["p4"], n4)


def test_unknown_fuse_type():
    with pytest.raises(AssertionError):  # the parent's own
        neck(fuse_type="max")


def test_retinanet_without_objects():
    model = build_model(with_gn(*RETINANET))
    inputs = []
    for height, width in SIZES:
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.zeros(0, 4))
        instances.gt_classes = torch.zeros(0, dtype=torch.int64)
        instances.gt_masks = BitMasks(torch.zeros(0, height, width))
        inputs.append({"image": torch.rand(3, height, width), "instances": instances})
    with EventStorage():
        losses = model.train()(inputs)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    with torch.no_grad():
        outputs = model.eval()(inputs)
    assert [o["instances"].image_size for o in outputs] == SIZES


def test_semantic_segmentation():
    cfg = with_gn(
        *("MODEL.META_ARCHITECTURE", "SemanticSegmentor"),
        *("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
        *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 6),
        *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 32),
    )
    model = build_model(cfg).eval()
    with torch.no_grad():
        outputs = model([{"image": torch.rand(3, *size)} for size in SIZES])
    assert [tuple(o["sem_seg"].shape) for o in outputs] == [(6, *size) for size in SIZES]
