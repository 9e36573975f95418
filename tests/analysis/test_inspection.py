import json

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from panet_d2.analysis import (
    dead_units,
    detection_stages,
    evaluate_boxes_of,
    evaluate_true_boxes,
    inspection,
    level_shares,
    mask_paths,
)
from panet_d2.data import register_coco_file

from ..common import batch, tiny_cfg, write_coco

INPUTS = [[image] for image in batch(2)]


def test_shares_of_levels():
    model = build_model(tiny_cfg()).eval()
    shares = level_shares(model, INPUTS, proposals=20)
    assert shares.keys() == {"box_pooler", "mask_pooler"}
    for table in shares.values():
        assert table.shape == (4, 5)
        assert table[:, -1].sum() <= 40
        there = table[:, -1] > 0
        torch.testing.assert_close(table[there, :-1].sum(dim=1), torch.ones(int(there.sum())))
        assert table[~there, :-1].isnan().all()


@pytest.mark.parametrize("level", [0, 2])
def test_the_level_that_wins_everywhere_has_it_all(level):
    """A bias that lifts one level above the others makes it the source of every feature."""
    model = build_model(tiny_cfg()).eval()
    for pooler in (model.roi_heads.box_pooler, model.roi_heads.mask_pooler):
        with torch.no_grad():
            pooler.adaptation_layers.bias.chunk(4)[level].fill_(1e4)
    for table in level_shares(model, INPUTS, proposals=20).values():
        there = table[:, -1] > 0
        assert (table[there, level] == 1).all()


def test_other_fusions_have_no_winner():
    cfg = tiny_cfg("MODEL.ROI_BOX_HEAD.AFP.FUSION", "sum")
    assert level_shares(build_model(cfg), INPUTS).keys() == {"mask_pooler"}


@pytest.mark.parametrize("agnostic", [True, False])
def test_paths_add_up_to_the_models_masks(agnostic):
    model = build_model(tiny_cfg("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", agnostic)).eval()
    image = INPUTS[0][0]
    boxes, classes = torch.tensor([[8.0, 8, 40, 40], [50, 20, 90, 60]]), torch.tensor([2, 0])
    fcn, fc = mask_paths(model, image, boxes, classes)
    assert fcn.shape == fc.shape == (2, 28, 28)
    with torch.no_grad():
        features = model.backbone(model.preprocess_image([image]).tensor)
        given = Instances(image["image"].shape[1:], pred_boxes=Boxes(boxes), pred_classes=classes)
        (predicted,) = model.roi_heads.forward_with_given_boxes(features, [given])
    torch.testing.assert_close((fcn + fc).sigmoid(), predicted.pred_masks[:, 0])


def test_a_model_without_the_path():
    cfg = tiny_cfg("MODEL.ROI_MASK_HEAD.FC_FUSION.ENABLED", False)
    with pytest.raises(ValueError, match="no fully-connected fusion"):
        mask_paths(build_model(cfg), INPUTS[0][0], torch.zeros(0, 4), torch.zeros(0).long())


def test_dead_units():
    model = build_model(tiny_cfg()).eval()
    layer = model.roi_heads.box_head.fc1
    with torch.no_grad():
        layer.bias.fill_(1e4)
        layer.bias[[3, 7]] = -1e4
    (dead,) = dead_units(model, INPUTS).values()
    assert dead.nonzero().flatten().tolist() == [3, 7]


def test_a_unit_that_one_image_needs_is_not_dead():
    model = build_model(tiny_cfg()).eval()
    one, other = (dead_units(model, [image])["box_head"] for image in INPUTS)
    both = dead_units(model, INPUTS)["box_head"]
    assert both.equal(one & other)
    assert not model.roi_heads.box_head._forward_hooks


def test_each_head_of_a_cascade_is_looked_at():
    cfg = tiny_cfg(
        *("MODEL.ROI_HEADS.NAME", "PANetCascadeROIHeads"),
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
    )
    assert set(dead_units(build_model(cfg), INPUTS)) == {"box_head.0", "box_head.1", "box_head.2"}


@pytest.fixture
def squares(tmp_path):
    json_file, root = write_coco(tmp_path)
    name = f"squares_{tmp_path.name}"
    register_coco_file(name, json_file, root)
    return name


@pytest.mark.parametrize(
    "architecture, bias, ap",
    [("GeneralizedRCNN", 50.0, 100.0), ("GeneralizedRCNN", -50.0, 0.0), ("PanopticFPN", 50.0, 100)],
)
def test_masks_in_true_boxes(architecture, bias, ap, squares):
    """The objects are squares, so that a mask that fills its box is right."""
    cfg = tiny_cfg(
        *("MODEL.ROI_MASK_HEAD.FC_FUSION.ENABLED", False),
        *("MODEL.META_ARCHITECTURE", architecture),
    )
    model = build_model(cfg).eval()
    predictor = model.roi_heads.mask_head.predictor
    with torch.no_grad():
        predictor.weight.zero_()
        predictor.bias.fill_(bias)
    result = evaluate_true_boxes(cfg, model, squares)
    assert result["AP"] == pytest.approx(ap) and result["AP75"] == pytest.approx(ap)
    assert result["AP-class1"] == pytest.approx(ap)


def test_images_without_objects_are_no_trouble(tmp_path):
    json_file, root = write_coco(tmp_path)
    with open(json_file) as f:
        content = json.load(f)
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]
    with open(json_file, "w") as f:
        json.dump(content, f)
    register_coco_file("squares_and_none", json_file, root)
    cfg = tiny_cfg()
    assert evaluate_true_boxes(cfg, build_model(cfg), "squares_and_none")["AP"] >= 0


def test_masks_in_true_boxes_need_masks(squares):
    cfg = tiny_cfg("MODEL.MASK_ON", False)
    with pytest.raises(ValueError, match="no masks"):
        evaluate_true_boxes(cfg, build_model(cfg), squares)


class Proposer(torch.nn.Module):
    """Proposes the boxes of the dataset's objects, moved to the right."""

    def __init__(self, name, shift):
        super().__init__()
        self.records, self.shift = iter(DatasetCatalog.get(name)), shift

    def forward(self, images, features, gt_instances=None):
        record, (size,) = next(self.records), images.image_sizes
        corners = [[x + self.shift, y, x + self.shift + w, y + h] for x, y, w, h in boxes(record)]
        found = Boxes(torch.tensor(corners))
        found.scale(size[1] / record["width"], size[0] / record["height"])
        proposals = Instances(size, proposal_boxes=found, objectness_logits=torch.ones(len(found)))
        return [proposals], {}


def boxes(record):
    return [[float(v) for v in a["bbox"]] for a in record["annotations"]]


@pytest.fixture
def model_that_says_class_1(squares):
    """Detects its proposals as they are, with masks that fill them."""
    cfg = tiny_cfg(
        *("MODEL.ROI_MASK_HEAD.FC_FUSION.ENABLED", False),
        *("INPUT.MIN_SIZE_TEST", 128),  # twice the images' size
    )
    model = build_model(cfg).eval()
    predictor, masks = model.roi_heads.box_predictor, model.roi_heads.mask_head.predictor
    with torch.no_grad():
        for layer in (predictor.cls_score, predictor.bbox_pred, masks):
            layer.weight.zero_()
            layer.bias.zero_()
        predictor.cls_score.bias[1] = 9.0
        masks.bias.fill_(50.0)
    return cfg, model


def test_stages_of_detection(squares, model_that_says_class_1):
    cfg, model = model_that_says_class_1
    model.proposal_generator = Proposer(squares, 0.0)
    stages = detection_stages(cfg, model, squares)
    assert list(stages) == ["proposals", "boxes", "masks", "classes"]
    classes = [a["category_id"] for r in DatasetCatalog.get(squares) for a in r["annotations"]]
    share = 100 * classes.count(1) / len(classes)
    assert 0 < share < 100
    for stage, expected in zip(stages.values(), (100, 100, 100, share)):
        assert stage["all"] == stage["small"] == pytest.approx(expected)
        assert stage["medium"] != stage["medium"]  # there are none
    assert not model.proposal_generator._forward_hooks


@pytest.mark.parametrize("shift, found", [(6.0, 100), (12.0, 0)])  # overlaps of 0.6 and 1 / 3
def test_objects_that_proposals_lose(shift, found, squares, model_that_says_class_1):
    cfg, model = model_that_says_class_1
    model.proposal_generator = Proposer(squares, shift)
    stages = detection_stages(cfg, model, squares)
    assert stages["proposals"]["all"] == stages["boxes"]["all"] == pytest.approx(found)


def test_masks_in_the_boxes_of_another_model(squares, model_that_says_class_1):
    """Whose own masks are empty; the boxes of the one that gives the masks are anywhere."""
    cfg, other = model_that_says_class_1
    other.proposal_generator = Proposer(squares, 0.0)
    model = build_model(cfg).eval()
    with torch.no_grad():
        for head, bias in ((model, 50.0), (other, -50.0)):
            head.roi_heads.mask_head.predictor.weight.zero_()
            head.roi_heads.mask_head.predictor.bias.fill_(bias)
    ap = evaluate_boxes_of(cfg, model, other, squares)
    assert ap["AP-class1"] > 50 and ap["AP-class0"] == ap["AP-class2"] == 0
    assert ap["AP"] == pytest.approx(ap["AP50"]) == pytest.approx(ap["AP75"])  # masks are exact
    other.proposal_generator = Proposer(squares, 0.0)
    assert evaluate_boxes_of(cfg, other, other, squares)["AP"] == 0


def test_boxes_of_a_model_with_other_classes(squares):
    models = [build_model(tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", n)) for n in (3, 4)]
    with pytest.raises(ValueError, match="NUM_CLASSES is 3, but 4 in the other model"):
        evaluate_boxes_of(tiny_cfg(), *models, squares)


def test_objects_that_masks_lose(squares, model_that_says_class_1):
    cfg, model = model_that_says_class_1
    model.proposal_generator = Proposer(squares, 0.0)
    with torch.no_grad():
        model.roi_heads.mask_head.predictor.bias.fill_(-50.0)
    stages = detection_stages(cfg, model, squares)
    assert stages["boxes"]["all"] == pytest.approx(100) and stages["masks"]["all"] == 0


def test_stages_of_a_detector_of_boxes(squares):
    cfg = tiny_cfg("MODEL.MASK_ON", False)
    stages = detection_stages(cfg, build_model(cfg), squares)
    assert list(stages) == ["proposals", "boxes", "classes"]


def test_stages_need_proposals(squares):
    cfg = tiny_cfg("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    with pytest.raises(ValueError, match="no proposals"):
        detection_stages(cfg, build_model(cfg), squares)


def test_a_model_without_roi_heads(squares):
    cfg = tiny_cfg(
        *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 3),
        *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_pafpn_backbone"),
        *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]),
        *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
    )
    model = build_model(cfg)
    assert level_shares(model, INPUTS) == {}
    for look, message in (
        (lambda: mask_paths(model, INPUTS[0][0], torch.zeros(0, 4), torch.zeros(0).long()), "FC_F"),
        (lambda: dead_units(model, INPUTS), "no box head"),
        (lambda: detection_stages(cfg, model, squares), "no proposals"),
        (lambda: evaluate_true_boxes(cfg, model, squares), "no masks"),
        (lambda: evaluate_boxes_of(cfg, model, model, squares), "no masks"),
        (lambda: evaluate_boxes_of(cfg, build_model(tiny_cfg()), model, squares), "no ROI heads"),
    ):
        with pytest.raises(ValueError, match=message):
            look()


class Fixed(torch.nn.Module):
    """Proposals of four sizes, one for each of FPN's levels."""

    def forward(self, images, features, gt_instances=None):
        boxes = torch.tensor([[0.0, 0, side, side] for side in (50, 150, 300, 600)])
        found = Instances(images.image_sizes[0], proposal_boxes=Boxes(boxes))
        found.objectness_logits = torch.ones(4)
        return [found], {}


def test_rows_are_the_levels_of_fpns_rule():
    model = build_model(tiny_cfg()).eval()
    model.proposal_generator = Fixed()
    for table in level_shares(model, [batch(1)]).values():
        assert table[:, -1].tolist() == [1, 1, 1, 1]


def test_features_that_are_zero_on_all_levels_are_of_none():
    model = build_model(tiny_cfg()).eval()
    bias = model.roi_heads.box_pooler.adaptation_layers.bias
    with torch.no_grad():
        bias.fill_(-1e4)
        bias.chunk(4)[2][0] = 1e4  # one feature of the third level; all others are 0
    table = level_shares(model, [batch(1)])["box_pooler"]
    there = table[:, -1] > 0
    assert there.any() and (table[there, 2] == 1).all()


def test_true_boxes_of_resized_images(tmp_path):
    register_coco_file("scaled_squares", *write_coco(tmp_path, num_images=1))
    cfg = tiny_cfg("MODEL.ROI_MASK_HEAD.FC_FUSION.ENABLED", False, "INPUT.MIN_SIZE_TEST", 128)
    model = build_model(cfg).eval()
    predictor = model.roi_heads.mask_head.predictor
    with torch.no_grad():
        predictor.weight.zero_()
        predictor.bias.fill_(50.0)
    assert evaluate_true_boxes(cfg, model, "scaled_squares")["AP"] == pytest.approx(100)


def test_all_true_boxes_are_evaluated(monkeypatch):
    asked = []

    def evaluator(*args, max_dets_per_image, **kwargs):
        asked.append(max_dets_per_image)

    monkeypatch.setattr(inspection, "COCOEvaluator", evaluator)
    monkeypatch.setattr(inspection, "build_detection_test_loader", lambda *args, **kwargs: [])
    monkeypatch.setattr(inspection, "NamedImageMapper", lambda *args: None)
    monkeypatch.setattr(inspection, "inference_on_dataset", lambda *args: {"segm": {}})
    for most in (50, 250):
        inspection._evaluate_masks(tiny_cfg(), torch.nn.Module(), "any", None, most)
    assert asked == [100, 250]
