import pytest
import torch
from detectron2.modeling import FPN, build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from panet_d2 import AdaptiveROIPooler
from panet_d2.checkpoint import calibration
from panet_d2.checkpoint.calibration import _rows, _scale_outputs, calibrate
from panet_d2.checkpoint.convert import convert
from panet_d2.checkpoint.mask_rcnn import warm_start
from panet_d2.engine import load_strict
from panet_d2.layers import LevelwiseConv2d

from ..common import batch, tiny_cfg
from .test_mask_rcnn import DONOR, state

# Features that come out of a norm, as those of a trained model have their scale.
NORM = ("MODEL.FPN.NORM", "GN")


def started(*opts):
    """A donor's weights and a PANet made of it."""
    donor = state(*DONOR, *NORM, *opts)
    model = build_model(tiny_cfg(*NORM, *opts))
    model.load_state_dict(warm_start(donor, model.state_dict()).state)
    return donor, model.eval()


def inputs(count):
    return [[image] for image in batch(count)]


@torch.no_grad()
def error(model, donor, branch):
    """How far what a head gets is from what the donor's first layer gave, as a share of that."""
    pooler = getattr(model.roi_heads, f"{branch}_pooler")
    left, whole = 0.0, 0.0
    for images in inputs(8):
        x = model.preprocess_image(images)
        features = model.backbone(x.tensor)
        boxes = [p.proposal_boxes[:32] for p in model.proposal_generator(x, features)[0]]
        maps = [features[f] for f in model.roi_heads.in_features]
        stock = ROIPooler(pooler.output_size, pooler.scales, 2, "ROIAlignV2")(maps, boxes)
        name = {"box": "box_head.fc1", "mask": "mask_head.mask_fcn1"}[branch]
        weight, bias = (donor[f"roi_heads.{name}.{kind}"] for kind in ("weight", "bias"))
        if branch == "box":
            expected = torch.nn.functional.linear(stock.flatten(1), weight, bias)[:, :, None, None]
        else:
            expected = torch.conv2d(stock, weight, bias, padding=1)
        expected = expected.relu()
        left += (pooler(maps, boxes) - expected).square().sum().item()
        whole += expected.square().sum().item()
    return left / whole


def test_fused_levels_come_near_to_the_donors_layer():
    donor, model = started("MODEL.PAFPN.ACTIVATION", "")
    before = {branch: error(model, donor, branch) for branch in ("box", "mask")}
    left = calibrate(model, inputs(8))
    assert left.keys() == {"box_pooler", "mask_pooler"}
    # The target is not negative, as what is fused: it is taken after the ReLU.
    assert all(share < 0.01 for share in left.values())
    for branch in ("box", "mask"):
        after = error(model, donor, branch)
        assert after < 0.2 * before[branch], (branch, before[branch], after)


# Each norm and each fusion; a case takes ten seconds.
@pytest.mark.parametrize(
    "norm, fusion",
    [
        ("", "max"),
        ("GN", "sum"),
        pytest.param("GN", "max", marks=pytest.mark.slow),
        pytest.param("BN", "mean", marks=pytest.mark.slow),
    ],
)
def test_only_scales_and_shifts(fusion, norm):
    opts = []
    for head in ("BOX", "MASK"):
        opts += [f"MODEL.ROI_{head}_HEAD.AFP.FUSION", fusion]
    opts += ["MODEL.ROI_MASK_HEAD.NORM", norm, "MODEL.ROI_MASK_HEAD.CONV_DIM", 64]
    _, model = started(*opts)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calibrate(model, inputs(2))
    after = model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    box = {f"roi_heads.box_pooler.adaptation_layers.{kind}" for kind in ("weight", "bias")}
    mask = {k.replace("box", "mask") for k in box}
    if norm:
        mask = {k.replace("layers.", "layers.norm.") for k in mask}
    assert changed == box | mask
    # Each output channel of each level by one factor.
    weight = "roi_heads.box_pooler.adaptation_layers.weight"
    factors = after[weight] / before[weight]
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), rtol=1e-3, atol=1e-3)


def test_from_file_to_file(tmp_path):
    cfg = tiny_cfg()
    torch.save({"model": state(*DONOR)}, tmp_path / "donor.pth")
    paths = [str(tmp_path / name) for name in ("donor.pth", "plain.pth", "calibrated.pth")]
    images = inputs(2)
    torch.manual_seed(0)  # of what is initialized
    plain = convert("mask-rcnn", paths[0], paths[1], cfg)
    torch.manual_seed(0)
    result = convert("mask-rcnn", paths[0], paths[2], cfg, calibration=images)
    load_strict(build_model(cfg), paths[2])
    notes = {row.target for row in result.rows if row.note.endswith(", calibrated")}
    assert notes == {k for k in plain.state if not torch.equal(plain.state[k], result.state[k])}
    assert "roi_heads.box_pooler.adaptation_layers.weight" in notes


@pytest.mark.parametrize("norm", ["", "GN", "LN"])
def test_outputs_are_scaled_and_shifted(norm):
    layers = LevelwiseConv2d(3, 32, 2, norm)
    for parameter in layers.parameters():  # as built, all biases are zero
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 4, 3, 5, 5)
    scale, shift = torch.rand(2, 32) + 0.5, torch.randn(2, 32)
    expected = layers(x) * scale[:, None, :, None, None] + shift[:, None, :, None, None]
    _scale_outputs(layers, scale.flatten(), shift.flatten())
    torch.testing.assert_close(layers(x), expected, rtol=1e-4, atol=1e-4)


def test_a_target_is_the_level_of_fpns_rule():
    pooler = AdaptiveROIPooler(
        *(2, SCALES, 2, "ROIAlignV2"), in_channels=3, adaptation="fc", adaptation_dim=5
    )
    maps = [torch.randn(1, 3, int(512 * s), int(512 * s)) for s in SCALES]
    boxes = [Boxes(torch.tensor([[0.0, 0, 40, 40], [0, 0, 300, 300]]))]
    levels = pooler.adapt(pooler.pool_levels(maps, boxes))
    target = _rows(pooler, maps, maps, boxes)[-1]
    # FPN's rule: 300 pixels are for the third level.
    torch.testing.assert_close(target, torch.stack([levels[0, 0], levels[2, 1]]).relu())


def test_the_donors_levels_are_those_of_its_fpn(monkeypatch):
    model, image, seen = build_model(tiny_cfg()).eval(), batch(1), []

    def rows(pooler, ours, donors, boxes):
        seen.append((ours, donors))
        return torch.zeros(2, 1, 1)

    monkeypatch.setattr(calibration, "_rows", rows)
    monkeypatch.setattr(calibration, "_fit", lambda *args: (torch.ones(1), torch.zeros(1), 0.0))
    monkeypatch.setattr(calibration, "_scale_outputs", lambda *args: None)
    calibration.calibrate(model, [image], ["mask_pooler"])
    ((ours, donors),) = seen
    with torch.no_grad():
        p = FPN.forward(model.backbone, model.preprocess_image(image).tensor)
    assert all(torch.equal(found, p[level]) for found, level in zip(donors, ("p2", "p3")))
    assert not torch.equal(ours[1], donors[1])  # N3 is not P3


SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
