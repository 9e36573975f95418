import pytest
import torch
from detectron2.modeling import build_model

from panet_d2.data import register_coco_file
from panet_d2.evaluation import dead_units, evaluate_true_boxes, level_shares, mask_paths

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
        from detectron2.structures import Boxes, Instances

        given = Instances(image["image"].shape[1:], pred_boxes=Boxes(boxes), pred_classes=classes)
        (predicted,) = model.roi_heads.forward_with_given_boxes(features, [given])
    torch.testing.assert_close((fcn + fc).sigmoid(), predicted.pred_masks[:, 0])


def test_a_model_without_the_path():
    cfg = tiny_cfg("MODEL.ROI_MASK_HEAD.FC_FUSION.ENABLED", False)
    with pytest.raises(ValueError, match="no fully-connected path"):
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


@pytest.mark.parametrize("bias, ap", [(50.0, 100.0), (-50.0, 0.0)])
def test_masks_in_true_boxes(bias, ap, squares):
    """The objects are squares, so that a mask that fills its box is right."""
    cfg = tiny_cfg("MODEL.ROI_MASK_HEAD.FC_FUSION.ENABLED", False)
    model = build_model(cfg).eval()
    predictor = model.roi_heads.mask_head.predictor
    with torch.no_grad():
        predictor.weight.zero_()
        predictor.bias.fill_(bias)
    result = evaluate_true_boxes(cfg, model, squares)
    assert result["AP"] == pytest.approx(ap) and result["AP75"] == pytest.approx(ap)
    assert result["AP-class1"] == pytest.approx(ap)


def test_masks_in_true_boxes_need_masks(squares):
    cfg = tiny_cfg("MODEL.MASK_ON", False)
    with pytest.raises(ValueError, match="no masks"):
        evaluate_true_boxes(cfg, build_model(cfg), squares)
