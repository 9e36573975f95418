import re

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from panet_d2.checkpoint.convert import convert
from panet_d2.checkpoint.mask_rcnn import warm_start
from panet_d2.engine import load_strict
from panet_d2.errors import CheckpointError

from ..common import batch, tiny_cfg

DONOR = (
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.ROI_BOX_HEAD.NUM_FC", 2),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 4),
)
NO_AFP = (
    *("MODEL.ROI_BOX_HEAD.AFP.ENABLED", False),
    *("MODEL.ROI_MASK_HEAD.AFP.ENABLED", False),
)


def state(*opts):
    return {k: v.detach() for k, v in build_model(tiny_cfg(*opts)).state_dict().items()}


def outputs(cfg, weights, inputs):
    model = build_model(cfg).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return [x["instances"] for x in model(inputs)]


def test_layers_move_into_the_pooler():
    donor, model = state(*DONOR), state()
    result = warm_start(donor, model).state
    assert result.keys() == model.keys()
    for branch, first in (("box", "box_head.fc1"), ("mask", "mask_head.mask_fcn1")):
        for kind in ("weight", "bias"):
            layers = result[f"roi_heads.{branch}_pooler.adaptation_layers.{kind}"].chunk(4)
            assert all(torch.equal(x, donor[f"roi_heads.{first}.{kind}"]) for x in layers)
    for ours, theirs in [
        ("box_head.fc1", "box_head.fc2"),
        ("mask_head.mask_fcn1", "mask_head.mask_fcn2"),
        ("mask_head.mask_fcn3", "mask_head.mask_fcn4"),
        ("mask_head.deconv", "mask_head.deconv"),
        ("box_predictor.cls_score", "box_predictor.cls_score"),
    ]:
        assert torch.equal(
            result[f"roi_heads.{ours}.weight"], donor[f"roi_heads.{theirs}.weight"]
        ), ours
    same = [k for k in donor if not k.startswith("roi_heads.")]
    assert all(torch.equal(result[k], donor[k]) for k in same)


def test_account_has_every_tensor():
    donor, model = state(*DONOR), state()
    rows = warm_start(donor, model).rows
    assert {r.source for r in rows} - {""} == set(donor)
    assert sorted(r.target for r in rows if r.target) == sorted(model)
    assert {r.action for r in rows} == {"carried", "copied", "initialized"}
    new = [r.target for r in rows if r.action == "initialized"]
    assert all("pafpn_" in n or "fc_fusion" in n for n in new)


def test_without_relu_the_neck_and_the_masks_start_as_the_donor():
    """Without AFP, whose fusion is no identity, the whole model gives the donor's output."""
    opts = ("MODEL.PAFPN.ACTIVATION", "", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    donor_cfg, cfg = tiny_cfg(*DONOR, *NO_AFP, *opts), tiny_cfg(*NO_AFP, *opts)
    cfg.merge_from_list(["MODEL.ROI_BOX_HEAD.NUM_FC", 2, "MODEL.ROI_MASK_HEAD.NUM_CONV", 4])
    donor = build_model(donor_cfg).state_dict()
    # Without the hundredth, to the last bit.
    result = warm_start(donor, build_model(cfg).state_dict()).state
    result = {k: 0 * v if "downsample" in k else v for k, v in result.items()}
    inputs = batch()
    for a, b in zip(outputs(donor_cfg, donor, inputs), outputs(cfg, result, inputs)):
        torch.testing.assert_close(a.scores, b.scores)
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.pred_masks, b.pred_masks)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_group_norm_of_the_path_gives_back_what_it_takes(shift):
    """With shifts that differ within a group, which are a part of its spread."""
    opts = (
        *("MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", 64),
        *("MODEL.PAFPN.ACTIVATION", ""),
    )
    donor = state(*DONOR, *opts)
    for name, value in donor.items():
        if name.startswith("backbone.fpn_output") and ".norm." in name:
            noise = torch.rand_like(value)
            value.copy_(noise + 0.5 if name.endswith("weight") else shift * (noise - 0.5))
    donor_model, model = build_model(tiny_cfg(*DONOR, *opts)), build_model(tiny_cfg(*opts))
    donor_model.load_state_dict(donor)
    model.load_state_dict(warm_start(donor, model.state_dict()).state)
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        p, n = donor_model.backbone(x), model.backbone(x)
    for level in ("p3", "p4"):
        error = (n[level] - p[level]).square().mean() / p[level].var()
        assert error < 0.05, (level, error)


def test_new_layers_learn():
    """Nothing starts where its gradient is zero for good."""
    cfg = tiny_cfg("MODEL.ROI_MASK_HEAD.FC_FUSION.RELU", True)
    model = build_model(cfg).train()
    model.load_state_dict(warm_start(state(*DONOR), model.state_dict(), fc_relu=True).state)
    with EventStorage():
        sum(model(batch()).values()).backward()
    for name in ("backbone.pafpn_downsample3.weight", "backbone.pafpn_output4.weight"):
        assert model.get_parameter(name).grad.abs().sum() > 0, name
    assert model.roi_heads.mask_head.fc_fusion.fc.weight.grad.abs().sum() > 0


def test_other_classes_leave_the_predictors_out():
    donor, model = state(*DONOR, "MODEL.ROI_HEADS.NUM_CLASSES", 7), state()
    rows = warm_start(donor, model).rows
    left = [r for r in rows if r.action == "left out"]
    assert {r.source.rsplit(".", 1)[0] for r in left} == {
        *("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"),
        "roi_heads.mask_head.predictor",
    }
    assert all("number of classes" in r.note for r in left)


CONVS = ("MODEL.ROI_BOX_HEAD.CONV_DIM", 32, "MODEL.ROI_BOX_HEAD.NUM_FC", 1)
HEADS = {
    "2fc": (DONOR, ()),
    "convs": (
        (*DONOR, *CONVS, "MODEL.ROI_BOX_HEAD.NUM_CONV", 4),
        (*CONVS, "MODEL.ROI_BOX_HEAD.NUM_CONV", 3, "MODEL.ROI_BOX_HEAD.AFP.ADAPTATION", "conv"),
    ),
    "convs, no AFP": (
        (*DONOR, *CONVS, "MODEL.ROI_BOX_HEAD.NUM_CONV", 4),
        (*CONVS, *NO_AFP, "MODEL.ROI_BOX_HEAD.NUM_CONV", 4, "MODEL.ROI_MASK_HEAD.NUM_CONV", 4),
    ),
}


@pytest.mark.parametrize("donors, ours", [(a, b) for a in HEADS for b in HEADS])
def test_box_head_of_another_kind_starts_anew(donors, ours):
    """A layer of the same name and shape has learned to read something else."""
    donor, model = state(*HEADS[donors][0]), state(*HEADS[ours][1])
    rows = warm_start(donor, model).rows
    box = [r for r in rows if (r.target or r.source).startswith("roi_heads.box_")]
    notes = {(r.action, r.note) for r in box}
    if donors.split(",")[0] == ours.split(",")[0]:
        assert {action for action, _ in notes} <= {"carried", "copied"}
    else:
        assert notes == {
            ("initialized", "as for training from scratch"),
            ("left out", "another kind of box head"),
        }
    mask = {r.action for r in rows if (r.target or r.source).startswith("roi_heads.mask_")}
    assert mask == {"carried", "initialized"} | (set() if "no AFP" in ours else {"copied"})


def test_only_copies_are_calibrated(tmp_path):
    torch.manual_seed(0)
    donor, cfg = state(*HEADS["convs"][0]), tiny_cfg()
    torch.save({"model": donor}, tmp_path / "donor.pth")
    files = [str(tmp_path / name) for name in ("donor.pth", "panet.pth")]
    inputs = [[image] for image in batch(2)]
    rows = {r.target: r for r in convert("mask-rcnn", *files, cfg, calibration=inputs).rows}
    notes = [rows[f"roi_heads.{b}_pooler.adaptation_layers.weight"].note for b in ("box", "mask")]
    assert notes == ["as for training from scratch", "into every level, calibrated"]


@pytest.mark.parametrize(
    "donor_opts, opts, message",
    [
        ((*DONOR, "MODEL.FPN.OUT_CHANNELS", 16), (), "another architecture"),
        ((*DONOR, "MODEL.RESNETS.DEPTH", 34), (), "not in the model: backbone.*res2.2"),
        (DONOR, ("MODEL.RESNETS.DEPTH", 34), "not in the ch.*: backbone.bottom_up.res2.2"),
        ((*DONOR, "MODEL.ROI_BOX_HEAD.FC_DIM", 16), (), "another architecture"),
    ],
)
def test_other_architectures(donor_opts, opts, message):
    donor, model = state(*donor_opts), state(*opts)
    with pytest.raises(CheckpointError, match=message):
        warm_start(donor, model)


def test_a_panet_needs_no_conversion():
    with pytest.raises(CheckpointError, match="not a Mask R-CNN, but a PANet"):
        warm_start(state(), state())


def test_from_file_to_file(tmp_path):
    cfg = tiny_cfg()
    torch.save({"model": state(*DONOR)}, tmp_path / "donor.pth")
    convert("mask-rcnn", str(tmp_path / "donor.pth"), str(tmp_path / "panet.pth"), cfg)
    load_strict(build_model(cfg), str(tmp_path / "panet.pth"))
    torch.save({"model": {"some.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other.pth: not a Detectron2 Mask R-CNN with FPN"):
        convert("mask-rcnn", str(tmp_path / "other.pth"), str(tmp_path / "x.pth"), cfg)
    assert not (tmp_path / "x.pth").exists()


def test_other_anchors_leave_the_rpns_predictor_out():
    more = ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.25, 0.5, 1.0, 2.0, 4.0]])
    donor, model = state(*DONOR), state(*more)
    result = warm_start(donor, model)
    rows = {r.source: r for r in result.rows if "rpn_head" in r.source}
    for name, row in rows.items():
        assert row.action == ("carried" if ".conv." in name else "left out"), name
    left = [name for name, row in rows.items() if row.action == "left out"]
    assert len(left) == 4 and all("number of anchors" in rows[name].note for name in left)
    assert all(torch.equal(result.state[name], model[name]) for name in left)


CASCADE = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)


@pytest.mark.parametrize("donor_is_cascade", [False, True])
@pytest.mark.parametrize("afp", [False, True])
def test_cascades(donor_is_cascade, afp):
    ours = (*CASCADE, "MODEL.ROI_HEADS.NAME", "PANetCascadeROIHeads")
    if not afp:
        ours = (*ours, *NO_AFP, "MODEL.ROI_BOX_HEAD.NUM_FC", 2)
    donors = (*DONOR, *CASCADE)
    if donor_is_cascade:
        donors = (*donors, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads")
    donor, model = state(*donors), state(*ours)
    result = warm_start(donor, model).state
    assert result.keys() == model.keys()
    for stage in range(3):
        theirs = f"roi_heads.box_head.{stage}" if donor_is_cascade else "roi_heads.box_head"
        second = result[f"roi_heads.box_head.{stage}.fc{1 if afp else 2}.weight"]
        assert torch.equal(second, donor[f"{theirs}.fc2.weight"])
    if afp:
        first = "roi_heads.box_head.0.fc1" if donor_is_cascade else "roi_heads.box_head.fc1"
        layers = result["roi_heads.box_pooler.adaptation_layers.weight"].chunk(4)
        assert all(torch.equal(layer, donor[f"{first}.weight"]) for layer in layers)


def test_a_cascade_starts_a_panet_without_stages():
    donor = state(*DONOR, *CASCADE, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads")
    result = warm_start(donor, state(*CASCADE))
    second = donor["roi_heads.box_head.0.fc2.weight"]
    assert torch.equal(result.state["roi_heads.box_head.fc1.weight"], second)
    notes = {r.note for r in result.rows if re.match(r"roi_heads.box_\w+\.[12]\.", r.source)}
    assert notes == {"a later stage of a cascade"}


def test_bias_before_a_relu(tmp_path):
    torch.save({"model": state(*DONOR)}, tmp_path / "donor.pth")
    files = [str(tmp_path / name) for name in ("donor.pth", "panet.pth")]
    cfg = tiny_cfg("MODEL.ROI_MASK_HEAD.FC_FUSION.RELU", True)
    bias = convert("mask-rcnn", *files, cfg).state["roi_heads.mask_head.fc_fusion.fc.bias"]
    assert (bias == 0.01).all()  # at 0 the ReLU would have no gradient


def test_first_convs_of_the_path_start_small():
    donor, model = state(*DONOR), state()
    result, name = warm_start(donor, model).state, "backbone.pafpn_downsample3.weight"
    torch.testing.assert_close(result[name], 0.01 * model[name])
