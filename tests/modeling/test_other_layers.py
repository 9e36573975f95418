"""Weights of a head whose layers have the same names, but another place in the network."""

import logging

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from panet_d2.checkpoint import StrictCheckpointer

from ..common import tiny_cfg

MASK_RCNN = (
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.ROI_BOX_HEAD.NUM_FC", 2),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 4),
)
WIDE = ("MODEL.ROI_MASK_HEAD.CONV_DIM", 32)  # as wide as the levels, so that all shapes match
CONV = ("MODEL.ROI_BOX_HEAD.AFP.ADAPTATION", "conv", "MODEL.ROI_BOX_HEAD.NUM_CONV", 1)


def start(tmp_path, theirs, ours, checkpointer, prefix=""):
    """Load the weights of one model into another; return those before, after and in the file."""
    donor, model = (build_model(tiny_cfg(*WIDE, *opts)) for opts in (theirs, ours))
    path = str(tmp_path / "donor.pth")
    weights = {prefix + name: value for name, value in donor.state_dict().items()}
    torch.save({"model": weights}, path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    checkpointer(model).load(path)
    return before, model.state_dict(), donor.state_dict()


def trainers(model):
    return StrictCheckpointer(model, required=("backbone.bottom_up.",))


@pytest.mark.parametrize("checkpointer", [trainers, DetectionCheckpointer])
def test_heads_of_a_mask_rcnn(tmp_path, checkpointer, caplog):
    caplog.set_level(logging.WARNING, "panet_d2")
    logging.getLogger("panet_d2").propagate = True
    before, after, donor = start(tmp_path, MASK_RCNN, (), checkpointer)
    name = "roi_heads.mask_head.mask_fcn2.weight"
    assert donor[name].shape == after[name].shape
    for name, value in after.items():
        same = before if "box_head" in name or "mask_head" in name else donor
        if name in same:
            assert torch.equal(value, same[name]), name
    (message,) = [m for m in caplog.messages if "other layers of this model" in m]
    assert "roi_heads.box_head, roi_heads.mask_head" in message


def test_heads_of_a_panet_for_a_mask_rcnn(tmp_path):
    before, after, _ = start(tmp_path, (), MASK_RCNN, trainers)
    name = "roi_heads.mask_head.mask_fcn2.weight"
    assert torch.equal(before[name], after[name])


def test_adaptation_layers_of_another_kind(tmp_path):
    before, after, donor = start(tmp_path, CONV, (), trainers)
    assert torch.equal(after["roi_heads.box_head.fc1.bias"], before["roi_heads.box_head.fc1.bias"])
    name = "roi_heads.mask_head.mask_fcn2.weight"
    assert torch.equal(after[name], donor[name])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_same_heads_are_loaded(tmp_path, caplog, prefix):
    """Also of a checkpoint of DistributedDataParallel."""
    _, after, donor = start(tmp_path, (), (), trainers, prefix)
    assert all(torch.equal(value, donor[name]) for name, value in after.items())
    assert not [m for m in caplog.messages if "other layers" in m]
