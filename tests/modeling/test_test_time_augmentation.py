import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.structures import Boxes, Instances

from panet_d2.errors import ConfigError
from panet_d2.layers import box_voting, soft_nms
from panet_d2.modeling import RCNNWithTTA, check_test_aug
from panet_d2.modeling.roi_heads.suppression import Suppression

from ..common import batch, tiny_cfg

AUG = ("TEST.AUG.ENABLED", True, "TEST.AUG.MAX_SIZE", 400)
EVERY_VIEW = ("TEST.AUG.FLIP", True, "TEST.AUG.VFLIP", True, "TEST.AUG.ROTATIONS", [90, 180, 270])
KEYPOINTS = ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16])
KEYPOINTS += ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3, "DATASETS.TRAIN", ["tta_keypoints"])


@pytest.fixture(scope="module", autouse=True)
def dataset_of_keypoints():
    names = ["left", "right", "nose"]
    flips = [("left", "right")]
    MetadataCatalog.get("tta_keypoints").set(keypoint_names=names, keypoint_flip_map=flips)
    yield
    MetadataCatalog.remove("tta_keypoints")


def model_of(cfg):
    """Random weights, confident enough to find some boxes."""
    torch.manual_seed(0)
    return build_model(cfg).eval()


def predict(*opts, inputs=None, **kwargs):
    cfg = tiny_cfg(*AUG, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.2, *opts)
    with torch.no_grad():
        found = RCNNWithTTA(cfg, model_of(cfg), **kwargs)(inputs or batch(1))
    return found[0]["instances"]


def assert_same(a, b):
    assert len(a) == len(b) > 0
    for name, value in a.get_fields().items():
        other = b.get(name)
        assert torch.equal(getattr(value, "tensor", value), getattr(other, "tensor", other)), name


@pytest.mark.parametrize("masks", [True, False])
def test_with_detectron2s_keys_as_detectron2(masks):
    """To the bit, if the views of a batch have one shape."""
    cfg = tiny_cfg(*AUG, "TEST.AUG.MIN_SIZES", [64], "MODEL.MASK_ON", masks)
    model, inputs = model_of(cfg), batch(2)
    with torch.no_grad():
        ours, theirs = RCNNWithTTA(cfg, model)(inputs), GeneralizedRCNNWithTTA(cfg, model)(inputs)
    for a, b in zip(ours, theirs):
        assert_same(a["instances"], b["instances"])


def test_views_of_other_shapes_are_not_padded():
    cfg = tiny_cfg(*AUG, "TEST.AUG.MIN_SIZES", [64, 96], *EVERY_VIEW)
    model = model_of(cfg)
    shapes, inference = [], model.inference

    def seen(inputs, *args, **kwargs):
        shapes.append([tuple(x["image"].shape[1:]) for x in inputs])
        return inference(inputs, *args, **kwargs)

    model.inference = seen
    with torch.no_grad():
        RCNNWithTTA(cfg, model)(batch(1))
    assert all(len(set(group)) == 1 for group in shapes)
    assert sum(map(len, shapes)) == 32 and max(map(len, shapes)) == 3


def test_cost(caplog):
    caplog.set_level(logging.INFO, "panet_d2")
    cfg = tiny_cfg(*AUG, "TEST.AUG.MIN_SIZES", [64, 96], *EVERY_VIEW)
    assert RCNNWithTTA(cfg, model_of(cfg)).passes == 32
    assert "16 views of an image, 32 forward passes" in caplog.text
    cfg.MODEL.MASK_ON = False
    assert RCNNWithTTA(cfg, model_of(cfg)).passes == 16


def test_heads_are_on_again_after_an_error():
    """Such as too little memory for an image."""
    cfg = tiny_cfg(*AUG)
    tta = RCNNWithTTA(cfg, model_of(cfg))

    def inference(*args, **kwargs):
        assert not tta.model.roi_heads.mask_on
        raise RuntimeError("out of memory")

    tta.model.inference = inference
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
        tta(batch(1))
    assert tta.model.roi_heads.mask_on


def test_threads():
    """None sees heads that another has switched off."""
    cfg = tiny_cfg(*AUG, "TEST.AUG.MIN_SIZES", [64], "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.2)
    tta, inputs = RCNNWithTTA(cfg, model_of(cfg)), batch(1)
    with torch.no_grad():
        expected = tta(inputs)[0]["instances"]

    def predict_once(_):
        with torch.no_grad():
            return tta(inputs)[0]["instances"]

    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(predict_once, range(8)):
            assert_same(found, expected)


def with_detector(cfg, detect):
    """A model whose detector is a function of a view; its boxes are those of bright pixels."""
    model = model_of(cfg)

    def inference(inputs, detected_instances=None, do_postprocess=True):
        assert not do_postprocess
        if detected_instances is not None:
            for x, found in zip(inputs, detected_instances):
                detect(x["image"].float().mean(0), found)
            return detected_instances
        outputs = []
        for picture in (x["image"].float().mean(0) for x in inputs):
            bright = (picture > 60).nonzero()
            (y0, x0), (y1, x1) = bright.min(0).values, bright.max(0).values + 1
            found = Instances(tuple(picture.shape))
            found.pred_boxes = Boxes(torch.stack([x0, y0, x1, y1]).float()[None])
            found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([1])
            outputs.append(found)
        return outputs

    model.inference = inference
    return model


def crop(picture, found):
    x0, y0, x1, y1 = found.pred_boxes.tensor[0].round().int().tolist()
    return picture[y0:y1, x0:x1]


def drawing(*marks):
    """A rectangle with marks in it: (y0, y1, x0, x1, value)."""
    picture = torch.zeros(3, 64, 96)
    for y0, y1, x0, x1, value in ((10, 42, 20, 84, 100), *marks):
        picture[:, y0:y1, x0:x1] = value
    return [{"image": picture, "height": 64, "width": 96}]


def test_boxes_and_masks_are_turned_back():
    def detect(picture, found):
        part = torch.nn.functional.interpolate(crop(picture, found)[None, None], (28, 28))
        found.pred_masks = (part > 150).float()

    opts = ("TEST.AUG.MIN_SIZES", [64, 128], "TEST.AUG.ASPECT_RATIOS", [2.0], *EVERY_VIEW)
    cfg = tiny_cfg(*AUG, *opts)
    with torch.no_grad():
        model = RCNNWithTTA(cfg, with_detector(cfg, detect))
        found = model(drawing((10, 26, 20, 52, 250)))[0]["instances"]
    assert len(found) == 1 and found.pred_classes.tolist() == [1]
    assert found.pred_boxes.tensor[0].tolist() == pytest.approx([20, 10, 84, 42], abs=2)
    expected = torch.zeros(64, 96, dtype=torch.bool)
    expected[10:26, 20:52] = True
    assert (found.pred_masks[0] != expected).sum() < 0.1 * expected.sum()


@pytest.mark.parametrize("masks, is_object", [("probabilities", False), ("logits", True)])
def test_masks_are_averaged_as_asked(masks, is_object):
    probabilities = iter([0.99999, 0.3, 0.3, 0.3])  # their mean is 0.47

    def detect(picture, found):
        found.pred_masks = torch.full((1, 1, 28, 28), next(probabilities))

    cfg = tiny_cfg(*AUG, "TEST.AUG.MIN_SIZES", [64, 128], "TEST.AUG.MASKS", masks)
    with torch.no_grad():
        found = RCNNWithTTA(cfg, with_detector(cfg, detect))(drawing())[0]["instances"]
    assert found.pred_masks.any() == is_object


def test_keypoints_are_turned_back_and_exchanged():
    """A nose and two equal eyes: only where they are to each other says which is the left one."""

    def detect(picture, found):
        part = crop(picture, found)
        size = torch.tensor(part.shape)
        eyes = (part == 200).nonzero()
        near = (eyes - eyes[0]).abs().amax(1) < 6  # the pixels of one of them
        places = ((part == 250).nonzero(), eyes[near], eyes[~near])
        nose, a, b = ((p.float() + 0.5).mean(0) for p in places)
        to_a, to_b = a - nose, b - nose
        left, right = (a, b) if to_a[0] * to_b[1] - to_a[1] * to_b[0] > 0 else (b, a)
        maps = torch.zeros(1, 3, 56, 56)
        for channel, point in enumerate((left, right, nose)):
            y, x = (point / size * 56).int().tolist()
            maps[0, channel, y, x] = 10
        found.pred_keypoint_heatmaps = maps

    opts = ("TEST.AUG.MIN_SIZES", [64], *EVERY_VIEW, "MODEL.MASK_ON", False, *KEYPOINTS)
    cfg = tiny_cfg(*AUG, *opts)
    eyes = ((13, 17, 30, 34, 200), (15, 19, 61, 65, 200))
    with torch.no_grad():
        model = RCNNWithTTA(cfg, with_detector(cfg, detect))
        found = model(drawing(*eyes, (31, 35, 45, 49, 250)))[0]["instances"]
    assert found.pred_keypoint_heatmaps.amax((2, 3)).min() == 10  # all views agree
    left, right, nose = found.pred_keypoints[0, :, :2].tolist()
    assert nose == pytest.approx([47, 33], abs=1.5)
    assert left == pytest.approx([63, 17], abs=1.5) and right == pytest.approx([32, 15], abs=1.5)


def test_keypoints_of_a_model():
    cfg = (
        *KEYPOINTS,
        "MODEL.ROI_HEADS.NUM_CLASSES",
        1,
        "TEST.AUG.MIN_SIZES",
        [64, 80],
        *EVERY_VIEW,
    )
    found = predict(*cfg)
    assert found.pred_keypoints.shape == (len(found), 3, 3) and len(found)
    boxes = found.pred_boxes.tensor
    assert (found.pred_keypoints[:, :, 0] >= boxes[:, None, 0]).all()
    assert (found.pred_keypoints[:, :, 1] <= boxes[:, None, 3] + 1).all()
    assert found.pred_masks.shape == (len(found), 64, 96)


def test_no_object_is_found():
    sizes = ("TEST.AUG.MIN_SIZES", [64, 80], *EVERY_VIEW)
    found = predict("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0, *sizes, "TEST.AUG.MERGE", "nms")
    assert len(found) == 0 and found.pred_masks.shape[1:] == (64, 96)


def instances(boxes, scores, classes=None):
    found = Instances((100, 200))
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.scores = torch.tensor(scores)
    found.pred_classes = torch.tensor(classes or [0] * len(scores))
    return found


class TestBoxSizes:
    @pytest.mark.parametrize(
        "min_sizes, small, medium, large",
        [
            ([64, 96], [96], [64, 96], [64]),
            ([96, 32, 64], [64, 96], [32, 64, 96], [32, 64]),
            ([1, 2, 3, 4], [3, 4], [1, 2, 3, 4], [1, 2]),
        ],
    )
    def test_halves(self, min_sizes, small, medium, large):
        cfg = tiny_cfg(*AUG, "TEST.AUG.MIN_SIZES", min_sizes, "TEST.AUG.BOX_SIZES", [20, 50])
        model = RCNNWithTTA(cfg, model_of(cfg))
        boxes = Boxes(torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 90], [0, 0, 90, 90]]))
        counts = {size: model.counts(boxes, size).tolist() for size in sorted(min_sizes)}
        for index, expected in enumerate((small, medium, large)):
            assert [size for size in counts if counts[size][index]] == expected

    def test_boxes_and_masks_of_other_sizes_do_not_count(self):
        cfg = tiny_cfg(*AUG, "TEST.AUG.MIN_SIZES", [64, 96], "TEST.AUG.BOX_SIZES", [20, 50])
        model = RCNNWithTTA(cfg, model_of(cfg))
        small, large = [0.0, 0, 10, 10], [100.0, 0, 190, 90]
        outputs = [instances([small, large], [0.9, 0.9]), instances([small, large], [0.8, 0.8])]
        found = model.merge(outputs, [64, 96], (100, 200))
        assert found.pred_boxes.tensor.tolist() == [large, small]
        assert found.scores.tolist() == pytest.approx([0.9, 0.8])

    def test_masks(self):
        opts = ("TEST.AUG.MIN_SIZES", [64, 96], "TEST.AUG.FLIP", False)
        only_large_scale = predict("TEST.AUG.MIN_SIZES", [96], "TEST.AUG.FLIP", False)
        assert_same(predict(*opts, "TEST.AUG.BOX_SIZES", [1000, 1000]), only_large_scale)


class TestMerge:
    def test_soft_nms_and_voting_of_all_boxes(self):
        """Once: the boxes of one view are not suppressed before."""
        limit = ("TEST.DETECTIONS_PER_IMAGE", 40, "MODEL.MASK_ON", False)
        everything = ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0, "TEST.DETECTIONS_PER_IMAGE", -1)
        views = ("TEST.AUG.MIN_SIZES", [64, 96])
        candidates = predict(*views, "MODEL.MASK_ON", False, *everything)
        soft = ("TEST.SOFT_NMS.ENABLED", True, "TEST.BOX_VOTING.ENABLED", True)
        found = predict(*views, *limit, *soft)
        data = candidates.pred_boxes.tensor, candidates.scores, candidates.pred_classes
        keep, scores = soft_nms(*data, limit=40)
        boxes, scores = box_voting(*data, keep, scores)
        torch.testing.assert_close(found.scores, scores)
        torch.testing.assert_close(found.pred_boxes.tensor, boxes)
        assert len(data[1]) > 200

    def test_heads_suppress_again_afterwards(self):
        cfg = tiny_cfg(*AUG, "TEST.AUG.MIN_SIZES", [64], "TEST.SOFT_NMS.ENABLED", True)
        model = model_of(cfg)
        suppression = model.roi_heads.box_predictor.suppression
        with torch.no_grad():
            RCNNWithTTA(cfg, model)(batch(1))
        assert suppression and model.roi_heads.box_predictor.suppression is suppression

    def test_weighted_boxes_fusion(self):
        pytest.importorskip("ensemble_boxes")
        cfg = tiny_cfg(*AUG, "TEST.AUG.MIN_SIZES", [64], "TEST.AUG.MERGE", "wbf")
        model = RCNNWithTTA(cfg, model_of(cfg))
        outputs = [
            instances([[0.0, 0, 50, 50], [100, 0, 300, 50], [7, 7, 7, 90]], [0.9, 0.6, 0.5]),
            instances([[0.0, 0, 60, 50], [0, 0, 50, 50]], [0.3, 0.8], [0, 1]),
        ]
        found = model.merge(outputs, [64, 64], (100, 200))
        assert found.pred_classes.tolist() == [0, 1, 0]
        # Boxes: weighted by score. Scores: their mean, halved for what one of two views has found.
        assert found.scores.tolist() == pytest.approx([0.6, 0.4, 0.3])
        expected = [[0, 0, 52.5, 50], [0, 0, 50, 50], [100, 0, 200, 50]]
        torch.testing.assert_close(found.pred_boxes.tensor, torch.tensor(expected).float())
        assert len(model.merge([instances([], [])] * 2, [64, 64], (100, 200))) == 0

    def test_fused_scores_count_the_views_that_count(self):
        pytest.importorskip("ensemble_boxes")
        opts = ("TEST.AUG.MIN_SIZES", [64, 96], "TEST.AUG.BOX_SIZES", [20, 50])
        cfg = tiny_cfg(*AUG, *opts, "TEST.AUG.MERGE", "wbf")
        model = RCNNWithTTA(cfg, model_of(cfg))
        outputs = [instances([[0.0, 0, 10, 10]], [0.9]), instances([[0.0, 0, 10, 10]], [0.7])]
        found = model.merge(outputs, [64, 96], (100, 200))
        assert found.scores.tolist() == pytest.approx([0.7])

    def test_fusion_of_a_model(self):
        pytest.importorskip("ensemble_boxes")
        found = predict("TEST.AUG.MIN_SIZES", [64, 80], *EVERY_VIEW, "TEST.AUG.MERGE", "wbf")
        assert 0 < len(found) <= 100 and found.pred_masks.shape == (len(found), 64, 96)


class TestRejected:
    @pytest.mark.parametrize(
        "opts, message",
        [
            (("MODEL.META_ARCHITECTURE", "RetinaNet"), "TEST.AUG.ENABLED.*ARCHITECTURE RetinaNet"),
            (("MODEL.META_ARCHITECTURE", "PanopticFPN"), "TEST.AUG.ENABLED.*PanopticFPN"),
            (("MODEL.LOAD_PROPOSALS", True), "TEST.AUG.ENABLED.*MODEL.LOAD_PROPOSALS"),
            (("MODEL.KEYPOINT_ON", True), "TEST.AUG.FLIP is True.*keypoints"),
            (
                ("MODEL.KEYPOINT_ON", True, "TEST.AUG.FLIP", False, "TEST.AUG.VFLIP", True),
                "TEST.AUG.VFLIP is True.*keypoints",
            ),
            (("TEST.AUG.MERGE", "soft"), "TEST.AUG.MERGE is 'soft'.*'wbf'"),
            (("TEST.AUG.MASKS", "max"), "TEST.AUG.MASKS is 'max'"),
        ],
    )
    def test_by_key(self, opts, message):
        check_test_aug(tiny_cfg(*opts))  # not enabled
        with pytest.raises(ConfigError, match=message):
            check_test_aug(tiny_cfg(*AUG, *opts))

    def test_keypoints_whose_sides_are_known_or_do_not_matter(self):
        check_test_aug(tiny_cfg(*AUG, *KEYPOINTS, *EVERY_VIEW))
        turns = ("TEST.AUG.FLIP", False, "TEST.AUG.ROTATIONS", [90])
        check_test_aug(tiny_cfg(*AUG, *KEYPOINTS, "DATASETS.TRAIN", [], *turns))

    def test_missing_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ensemble_boxes", None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="pip install ensemble-boxes"):
            check_test_aug(tiny_cfg(*AUG, "TEST.AUG.MERGE", "wbf"))


def wbf(monkeypatch, fused, *opts):
    """RCNNWithTTA.merge with a library that records its options and gives back ``fused``."""

    library, options = ModuleType("ensemble_boxes"), []
    library.weighted_boxes_fusion = lambda *args, **kw: options.append(kw) or fused
    monkeypatch.setitem(sys.modules, "ensemble_boxes", library)
    cfg = tiny_cfg("TEST.AUG.MERGE", "wbf", *opts)
    tta = RCNNWithTTA.__new__(RCNNWithTTA)
    torch.nn.Module.__init__(tta)
    tta.cfg, tta.suppression = cfg, Suppression.from_config(cfg)
    view = Instances((100, 200), pred_boxes=Boxes(torch.tensor([[0.0, 0, 20, 20]])))
    view.scores, view.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    return tta.merge([view, view[:]], cfg.TEST.AUG.MIN_SIZES, (100, 200)), options


NONE = (np.zeros((0, 4)), np.zeros(0), np.zeros(0))


def test_fusion_has_the_threshold_of_nms(monkeypatch):
    opts = ("TEST.AUG.MIN_SIZES", [64, 96], "MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.3)
    assert wbf(monkeypatch, NONE, *opts)[1] == [{"iou_thr": 0.3}]


def test_a_fused_score_is_at_most_one(monkeypatch):
    """A box of 20 pixels that both views have found becomes one of 19, for which one counts."""
    fused = (np.array([[0.0, 0, 0.095, 0.19]]), np.array([0.9]), np.zeros(1))
    opts = ("TEST.AUG.MIN_SIZES", [64, 96], "TEST.AUG.BOX_SIZES", [20, 50])
    assert wbf(monkeypatch, fused, *opts)[0].scores.tolist() == [1.0]


def test_fusion_keeps_as_many_as_are_wanted(monkeypatch):
    fused = (np.tile([[0.0, 0, 0.2, 0.4]], (5, 1)), np.linspace(0.1, 0.5, 5), np.zeros(5))
    opts = ("TEST.AUG.MIN_SIZES", [64, 96], "TEST.DETECTIONS_PER_IMAGE", 2)
    assert wbf(monkeypatch, fused, *opts)[0].scores.tolist() == pytest.approx([0.5, 0.4])
