"""Whatever is switched on together trains and predicts."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from hypothesis import event, given, settings
from hypothesis import strategies as st

from panet_d2.errors import ConfigError
from panet_d2.layers import FUSIONS

from ..common import batch, tiny_cfg

# Wide enough for a GroupNorm's 32 groups; the mask head halves what it reads.
WIDTH, BOX_WIDTH = 64, 32
NORMS = st.sampled_from(["", "GN", "BN", "FrozenBN", "SyncBN", "naiveSyncBN", "LN"])
# Detectron2's Conv2d refuses to train SyncBN on nothing, so heads that may have no proposals.
HEAD_NORMS = st.sampled_from(["", "GN", "FrozenBN", "LN"])


def options(**values) -> list:
    """Strategies for config values, by keys with a double underscore for the dot."""
    return [(key.replace("__", "."), strategy) for key, strategy in values.items()]


def afp(head: str, adaptations: list[str]) -> dict:
    prefix = f"MODEL__ROI_{head}_HEAD"
    return {
        f"{prefix}__AFP__ENABLED": st.booleans(),
        f"{prefix}__AFP__FUSION": st.sampled_from(FUSIONS),
        f"{prefix}__AFP__ADAPTATION": st.sampled_from(adaptations),
        f"{prefix}__POOLER_TYPE": st.sampled_from(["ROIAlignV2", "ROIAlign", "ROIPool"]),
        f"{prefix}__POOLER_SAMPLING_RATIO": st.integers(0, 3),
    }


# What can be chosen each for itself.
FREE = options(
    MODEL__RESNETS__NORM=st.sampled_from(["GN", "BN", "FrozenBN"]),
    MODEL__FPN__NORM=NORMS,
    MODEL__FPN__FUSE_TYPE=st.sampled_from(["sum", "avg"]),
    MODEL__PAFPN__ACTIVATION=st.sampled_from(["relu", ""]),
    MODEL__PAFPN__BOTTOM_UP_INPUT=st.sampled_from(["output", "sum"]),
    MODEL__PAFPN__BIAS_BEFORE_NORM=st.booleans(),
    MODEL__PAFPN__MEMORY_FORMAT=st.sampled_from(["auto", "contiguous", "channels_last"]),
    **afp("BOX", ["conv", "fc", "none"]),
    MODEL__ROI_BOX_HEAD__NAME=st.sampled_from(["FastRCNNConvFCHead", "FastRCNNConvFCNormHead"]),
    MODEL__ROI_BOX_HEAD__NORM=HEAD_NORMS,
    MODEL__ROI_BOX_HEAD__NUM_CONV=st.integers(0, 2),
    MODEL__ROI_BOX_HEAD__NUM_FC=st.integers(0, 2),
    MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG=st.booleans(),
    **afp("MASK", ["conv", "none"]),
    MODEL__ROI_MASK_HEAD__NAME=st.sampled_from(["PANetMaskHead", "MaskRCNNConvUpsampleHead"]),
    MODEL__ROI_MASK_HEAD__NORM=HEAD_NORMS,
    MODEL__ROI_MASK_HEAD__NUM_CONV=st.integers(1, 3),
    MODEL__ROI_MASK_HEAD__CLS_AGNOSTIC_MASK=st.booleans(),
    MODEL__ROI_MASK_HEAD__FC_FUSION__ENABLED=st.booleans(),
    MODEL__ROI_MASK_HEAD__FC_FUSION__RELU=st.booleans(),
    **afp("KEYPOINT", ["conv", "none"]),
    MODEL__MASK_ON=st.booleans(),
    MODEL__KEYPOINT_ON=st.booleans(),
    MODEL__ROI_HEADS__NAME=st.sampled_from(["PANetROIHeads", "PANetCascadeROIHeads"]),
    INPUT__MASK_FORMAT=st.sampled_from(["bitmask", "polygon"]),
)


@st.composite
def pyramids(draw) -> dict:
    """Backbone and levels, which depend on each other."""
    retinanet = draw(st.booleans())
    first = draw(st.integers(2, 5))
    last = 5 if retinanet else draw(st.integers(first, 5))
    extra = 2 if retinanet else 1  # P6 and P7 from res5, or the level above the last
    roi_first = draw(st.integers(first, last))
    roi_last = draw(st.integers(roi_first, last))
    path = draw(st.sampled_from(["pafpn", "pafpn", "fpn"]))
    if path == "fpn" and not retinanet:
        last = 5  # Detectron2's extra level is P6 whatever the pyramid
    levels = range(first, last + extra + 1)
    return {
        "MODEL.BACKBONE.NAME": f"build_{'retinanet_' * retinanet}resnet_{path}_backbone",
        "MODEL.RESNETS.OUT_FEATURES": [f"res{i}" for i in range(first, last + 1)],
        "MODEL.FPN.IN_FEATURES": [f"res{i}" for i in range(first, last + 1)],
        # The RPN reads every level, so that every parameter of the neck has something to learn.
        "MODEL.RPN.IN_FEATURES": [f"p{i}" for i in levels],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[2 ** (i + 1)] for i in levels],
        "MODEL.ROI_HEADS.IN_FEATURES": [f"p{i}" for i in range(roi_first, roi_last + 1)],
    }


@st.composite
def configs(draw) -> dict:
    opts = {key: draw(strategy) for key, strategy in FREE}
    opts.update(draw(pyramids()))
    if opts["MODEL.ROI_BOX_HEAD.AFP.ENABLED"] and opts["MODEL.ROI_BOX_HEAD.AFP.ADAPTATION"] == "fc":
        opts["MODEL.ROI_BOX_HEAD.NUM_CONV"] = 0  # no grid is left for a conv
    if opts["MODEL.ROI_BOX_HEAD.NUM_CONV"] + opts["MODEL.ROI_BOX_HEAD.NUM_FC"] == 0:
        opts["MODEL.ROI_BOX_HEAD.NUM_FC"] = 1  # Detectron2's head has at least one layer
    if opts["MODEL.ROI_HEADS.NAME"] == "PANetCascadeROIHeads":
        opts["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"] = True  # as Detectron2's cascade wants
    if opts["MODEL.KEYPOINT_ON"]:
        opts["MODEL.ROI_HEADS.NUM_CLASSES"] = 1
    opts.update(
        {
            "MODEL.FPN.OUT_CHANNELS": WIDTH,
            "MODEL.ROI_BOX_HEAD.CONV_DIM": BOX_WIDTH,
            "MODEL.ROI_BOX_HEAD.FC_DIM": BOX_WIDTH,
            "MODEL.ROI_MASK_HEAD.CONV_DIM": WIDTH,
            "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 7,
            "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": 7,
            "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [16, 16],
            "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 4,
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
            "TEST.DETECTIONS_PER_IMAGE": 5,
        }
    )
    return opts


def inputs_for(opts: dict) -> list[dict]:
    """Two images, with the masks and keypoints that the config asks for."""
    inputs = batch(num_classes=opts.get("MODEL.ROI_HEADS.NUM_CLASSES", 3))
    for image in inputs:
        instances: Instances = image["instances"]
        boxes = instances.gt_boxes.tensor
        if opts["INPUT.MASK_FORMAT"] == "polygon":
            corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()
            instances.gt_masks = PolygonMasks([[c] for c in corners])
        if opts["MODEL.KEYPOINT_ON"]:
            points = boxes[:, None, :2] + torch.tensor([[2.0, 3], [9, 5], [4, 20], [20, 20]])
            visible = torch.full((len(boxes), 4, 1), 2.0)
            instances.gt_keypoints = Keypoints(torch.cat([points, visible], dim=2))
    return inputs


def train_and_predict(opts: dict) -> None:
    cfg = tiny_cfg(*(part for pair in opts.items() for part in pair))
    torch.manual_seed(0)
    model, inputs = build_model(cfg), inputs_for(opts)
    with EventStorage():
        losses = model.train()(copy.deepcopy(inputs))
    cascade = opts["MODEL.ROI_HEADS.NAME"] == "PANetCascadeROIHeads"
    branches = opts["MODEL.MASK_ON"] + opts["MODEL.KEYPOINT_ON"]
    assert len(losses) == 2 + (6 if cascade else 2) + branches, losses
    assert all(torch.isfinite(v) for v in losses.values()), losses
    sum(losses.values()).backward()
    trained = [(n, p.grad) for n, p in model.named_parameters() if p.requires_grad]
    assert [n for n, grad in trained if grad is None] == []
    assert [n for n, grad in trained if not torch.isfinite(grad).all()] == []
    # Each part learns something: a detached one would have a gradient of zeros at most.
    for part in ("backbone.bottom_up", "backbone", "proposal_generator", "roi_heads"):
        assert any(grad.any() for n, grad in trained if n.startswith(part)), part
    if opts["MODEL.KEYPOINT_ON"]:
        # Nothing has kept the features of this network small, and Detectron2 refuses heatmaps that
        # are so steep that a softmax of them is zero somewhere.
        torch.nn.init.zeros_(model.roi_heads.keypoint_head.score_lowres.weight)
    with torch.no_grad():
        outputs = model.eval()(
            [{k: image[k] for k in ("image", "height", "width")} for image in inputs]
        )
    for output, image in zip(outputs, inputs):
        instances = output["instances"]
        assert instances.image_size == (image["height"], image["width"])
        assert torch.isfinite(instances.scores).all()
        assert torch.isfinite(instances.pred_boxes.tensor).all()
        assert instances.has("pred_masks") == opts["MODEL.MASK_ON"]
        assert instances.has("pred_keypoints") == opts["MODEL.KEYPOINT_ON"]
        event(f"detections: {len(instances) > 0}")


@pytest.mark.parametrize("examples", [15, pytest.param(500, marks=pytest.mark.slow)])
def test_every_combination_trains_and_predicts(examples):
    @settings(max_examples=examples)
    @given(configs())
    def holds(opts):
        train_and_predict(opts)

    holds()


def test_group_norm_and_a_single_conv():
    """Then the fully-connected path halves what is pooled, whose width is another key's."""
    cfg = tiny_cfg(
        *("MODEL.ROI_MASK_HEAD.NORM", "GN"),
        *("MODEL.ROI_MASK_HEAD.CONV_DIM", 64),
        *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1),
        *("MODEL.ROI_MASK_HEAD.AFP.ENABLED", False),
        *("MODEL.FPN.OUT_CHANNELS", 32),
    )
    with pytest.raises(ConfigError, match="MODEL.ROI_MASK_HEAD.NUM_CONV is 1.*32.*multiple of 64"):
        build_model(cfg)
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 96  # the conv itself has 32 groups of 3
    build_model(cfg)
