import logging

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from panet_d2 import AdaptivePoolingMixin
from panet_d2.errors import ConfigError
from panet_d2.layers import box_voting, soft_nms
from panet_d2.modeling.check_model import warn_once
from panet_d2.modeling.roi_heads.suppression import Suppression

from ..common import batch, tiny_cfg

CASCADE = ("MODEL.ROI_HEADS.NAME", "PANetCascadeROIHeads")
CASCADE += ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
NO_MASKS = ("MODEL.MASK_ON", False, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.01)
SOFT = ("TEST.SOFT_NMS.ENABLED", True)
VOTING = ("TEST.BOX_VOTING.ENABLED", True)
NO_AFP = ("MODEL.ROI_BOX_HEAD.AFP.ENABLED", False, "MODEL.ROI_MASK_HEAD.AFP.ENABLED", False)


def predict(*opts, images=2):
    """The detections of a model with the weights of the others."""
    torch.manual_seed(0)
    model = build_model(tiny_cfg(*NO_MASKS, *opts)).eval()
    with torch.no_grad():
        return [output["instances"] for output in model(batch(images))]


def tensors(found):
    return found.pred_boxes.tensor, found.scores, found.pred_classes


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b)))


@pytest.mark.parametrize("heads", [(), CASCADE])
@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_of_all_boxes_above_the_threshold(heads, method):
    limit = 30
    everything = ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0, "TEST.DETECTIONS_PER_IMAGE", -1)
    candidates = predict(*heads, *everything)
    assert min(map(len, candidates)) > limit
    opts = ("TEST.SOFT_NMS.METHOD", method, "TEST.DETECTIONS_PER_IMAGE", limit)
    opts += ("TEST.SOFT_NMS.SIGMA", 0.2, "TEST.SOFT_NMS.SCORE_THRESH", 0.005)
    for found, given in zip(predict(*heads, *SOFT, *opts), candidates):
        boxes, scores, classes = tensors(given)
        keep, expected = soft_nms(
            boxes, scores, classes, method=method, sigma=0.2, score_threshold=0.005, limit=limit
        )
        assert found.image_size == (64, 96)
        assert torch.equal(found.scores, expected) and torch.equal(
            found.pred_classes, classes[keep]
        )
        assert torch.equal(found.pred_boxes.tensor, boxes[keep])


@pytest.mark.parametrize("heads", [(), CASCADE])
def test_voting_by_all_boxes_above_the_threshold(heads):
    everything = ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0, "TEST.DETECTIONS_PER_IMAGE", -1)
    opts = ("TEST.BOX_VOTING.THRESH", 0.3, "TEST.BOX_VOTING.SCORES", "temp_avg")
    opts += ("TEST.BOX_VOTING.TEMPERATURE", 2.0)
    all_of = zip(predict(*heads), predict(*heads, *VOTING, *opts), predict(*heads, *everything))
    for plain, found, given in all_of:
        boxes, scores, classes = tensors(given)
        keep = torch.tensor(
            [
                int((boxes == box).all(1).logical_and(classes == c).nonzero()[0])
                for box, c in zip(plain.pred_boxes.tensor, plain.pred_classes)
            ]
        )
        voted, means = box_voting(
            boxes,
            scores,
            classes,
            keep,
            scores[keep],
            iou_threshold=0.3,
            method="temp_avg",
            temperature=2.0,
        )
        order = means.argsort(descending=True, stable=True)
        assert torch.equal(found.scores, means[order])
        assert torch.equal(found.pred_boxes.tensor, voted[order])
        assert not torch.equal(voted, plain.pred_boxes.tensor)


def test_both_at_once():
    votes = ("TEST.BOX_VOTING.THRESH", 0.4)
    soft, both = predict(*SOFT), predict(*SOFT, *VOTING, *votes)
    for a, b in zip(soft, both):
        assert torch.equal(a.scores, b.scores) and not same(a, b)


@pytest.mark.parametrize("heads", ["StandardROIHeads", "CascadeROIHeads"])
def test_off_is_detectron2s_to_the_bit(heads):
    opts = (*NO_AFP, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", heads.startswith("Cascade"))
    ours = "PANetROIHeads" if heads == "StandardROIHeads" else "PANetCascadeROIHeads"
    stock = predict(*opts, "MODEL.ROI_HEADS.NAME", heads)
    for a, b in zip(stock, predict(*opts, "MODEL.ROI_HEADS.NAME", ours)):
        assert len(a) and same(a, b)


def test_masks_are_of_the_boxes_that_are_left():
    model = build_model(tiny_cfg(*SOFT, *VOTING, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.01)).eval()
    with torch.no_grad():
        for output in model(batch()):
            found = output["instances"]
            assert found.pred_masks.shape == (len(found), 64, 96) and len(found) == 100


def test_training_is_not_affected():
    losses = []
    for opts in ((), (*SOFT, *VOTING)):
        torch.manual_seed(0)
        model = build_model(tiny_cfg(*NO_MASKS, *opts)).train()
        with EventStorage():
            losses.append(model(batch()))
    assert losses[0] == losses[1]


def test_stock_predictor_reads_them():
    cfg = tiny_cfg(*NO_MASKS, *SOFT, "TEST.SOFT_NMS.METHOD", "gaussian")
    torch.manual_seed(0)
    soft = DefaultPredictor(cfg)(np.full((64, 96, 3), 90, np.uint8))["instances"]
    torch.manual_seed(0)
    plain = DefaultPredictor(tiny_cfg(*NO_MASKS))(np.full((64, 96, 3), 90, np.uint8))["instances"]
    assert len(plain) and not same(soft, plain)


def test_heads_without_afp_are_told_nothing(caplog):
    warn_once.cache_clear()
    caplog.set_level(logging.WARNING, "panet_d2")
    build_model(tiny_cfg(*NO_AFP, *SOFT))
    assert not caplog.records


RETINANET = (
    "MODEL.META_ARCHITECTURE",
    "RetinaNet",
    "MODEL.FPN.IN_FEATURES",
    ["res3", "res4", "res5"],
)
RETINANET += ("MODEL.RETINANET.NUM_CLASSES", 3, "MODEL.MASK_ON", False)


@pytest.mark.parametrize(
    "opts, message",
    [
        ((*SOFT, *NO_AFP, "MODEL.ROI_HEADS.NAME", "StandardROIHeads"), "SOFT_NMS.*'StandardROIH"),
        ((*VOTING, *NO_AFP, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads"), "VOTING.*'CascadeROIH"),
        (
            (*SOFT, *RETINANET, "MODEL.BACKBONE.NAME", "build_retinanet_resnet_pafpn_backbone"),
            "TEST.SOFT_NMS.ENABLED is True; .*RetinaNet",
        ),
        (
            (*VOTING, *RETINANET, "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
            "TEST.BOX_VOTING.ENABLED is True; .*RetinaNet",
        ),
        ((*SOFT, "TEST.SOFT_NMS.METHOD", "hard"), "TEST.SOFT_NMS.METHOD is 'hard'.*'gaussian'"),
        ((*VOTING, "TEST.BOX_VOTING.SCORES", "max"), "TEST.BOX_VOTING.SCORES is 'max'"),
    ],
)
def test_rejected_by_key(opts, message):
    with pytest.raises(ConfigError, match=message):
        build_model(tiny_cfg(*opts))


def test_another_box_predictor_is_rejected():
    class OtherPredictor(torch.nn.Module):
        pass

    class Base(StandardROIHeads):
        @classmethod
        def _init_box_head(cls, cfg, input_shape):
            return {**super()._init_box_head(cfg, input_shape), "box_predictor": OtherPredictor()}

    heads = type("HeadsOfAnotherPredictor", (AdaptivePoolingMixin, Base), {})
    ROI_HEADS_REGISTRY.register(heads)
    cfg = tiny_cfg(*SOFT, "MODEL.ROI_HEADS.NAME", heads.__name__)
    with pytest.raises(ConfigError, match="TEST.SOFT_NMS.ENABLED .*OtherPredictor"):
        build_model(cfg)


def test_linear_soft_nms_begins_at_the_threshold():
    found = Instances(
        (100, 100), pred_boxes=Boxes(torch.tensor([[0.0, 0, 30, 10], [15, 0, 45, 10]]))
    )
    found.scores, found.pred_classes = torch.tensor([0.9, 0.6]), torch.tensor([0, 0])
    for threshold, score in ((0.5, 0.6), (0.2, 0.4)):  # their IoU is a third
        result = Suppression(threshold, -1, soft_nms="linear")(found)
        assert result.scores.tolist() == pytest.approx([0.9, score])
