"""The released checkpoints: every name of the three models, and the recorded modules' outputs."""

import json
import re

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.roi_heads import FastRCNNConvFCHead

from panet_d2 import PAFPN, PANetMaskHead
from panet_d2.checkpoint.convert import convert
from panet_d2.checkpoint.release import release_rules
from panet_d2.checkpoint.rules import apply_rules
from panet_d2.engine import load_strict, setup_config
from panet_d2.errors import CheckpointError
from panet_d2.modeling import FastRCNNConvFCNormHead

from ..modeling import golden
from ..modeling.test_golden import CHANNELS, Stages, pooler_and_inputs

pytestmark = golden.needs_golden

MODELS = {
    "e2e_panet_R-50-FPN_2x_mask": "COCO-InstanceSegmentation/release_panet_R_50_FPN_2x_gn",
    "e2e_panet_R-50-FPN_1x_det": "COCO-Detection/release_panet_R_50_FPN_1x_4conv1fc_gn",
    "e2e_panet_R-50-FPN_1x_det_2fc": "COCO-Detection/release_panet_R_50_FPN_1x_2fc_gn",
}


def converted(weights, prefix):
    """A module's weights by the rules, below ``prefix`` in our model."""
    state = apply_rules(weights, release_rules()).state
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


@pytest.mark.parametrize("name, norm", [("official_neck_gn", "GN"), ("official_neck_plain", "")])
def test_neck(name, norm):
    weights, inputs, outputs = golden.load(name)
    neck = PAFPN(
        Stages(inputs),
        list(inputs),
        CHANNELS,
        norm=norm,
        top_block=LastLevelMaxPool(),
        activation="relu" if norm else "",
        bias_before_norm=True,
    )
    neck.load_state_dict(converted(weights, "backbone."))
    with torch.no_grad():
        result = neck(inputs)
    for level, n in result.items():
        torch.testing.assert_close(n, outputs[level.replace("p", "n")], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["4conv1fc", "2fc"])
def test_box_head(kind):
    weights, inputs, outputs = golden.load(f"official_box_head_{kind}_gn")
    weights = {f"Box_Head.{k}": v for k, v in weights.items()}
    pooler, features, boxes = pooler_and_inputs(
        inputs, 7, adaptation="conv" if kind == "4conv1fc" else "fc", norm="GN"
    )
    if kind == "4conv1fc":
        head = FastRCNNConvFCHead(
            pooler.output_shape, conv_dims=[CHANNELS] * 3, fc_dims=[96], conv_norm="GN"
        )
    else:
        head = FastRCNNConvFCNormHead(
            pooler.output_shape, conv_dims=[], fc_dims=[CHANNELS], conv_norm="GN"
        )
    pooler.load_state_dict(converted(weights, "roi_heads.box_pooler."))
    head.load_state_dict(converted(weights, "roi_heads.box_head."))
    with torch.no_grad():
        result = head(pooler(features, boxes))
    torch.testing.assert_close(result, outputs["features"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fc_fusion", [False, True])
def test_mask_head(fc_fusion):
    weights, inputs, outputs = golden.load(f"official_mask_head_{'ff' if fc_fusion else 'afp'}_gn")
    if fc_fusion:
        # A third conv is recorded beside the released module's two; mask_conv4 stands for it.
        weights = {k: v for k, v in weights.items() if not k.startswith("Mask_Head.conv_fcn.6")}
        weights = {k: v for k, v in weights.items() if not k.startswith("Mask_Head.conv_fcn.7")}
    pooler, features, boxes = pooler_and_inputs(inputs, 7, adaptation="conv", norm="GN")
    head = PANetMaskHead(
        ShapeSpec(channels=CHANNELS, height=7, width=7),
        num_classes=5,
        conv_dims=[CHANNELS] * 4,
        conv_norm="GN",
        fc_fusion=fc_fusion,
        fc_relu=True,
    )
    pooler.load_state_dict(converted(weights, "roi_heads.mask_pooler."))
    head.load_state_dict(converted(weights, "roi_heads.mask_head."))
    with torch.no_grad():
        result = head.layers(pooler(features, boxes))
    # The first of the six is background, which ours does not predict.
    torch.testing.assert_close(result, outputs["mask_logits"][:, 1:], rtol=1e-4, atol=1e-4)


def random_release(name):
    names = json.loads((golden.FOLDER / f"state_dict_{name}.json").read_text())
    return {k: torch.randn(shape) for k, shape in names.items()}


def release_config(name):
    return setup_config(
        str(golden.CONFIGS / f"{MODELS[name]}.yaml"), ["MODEL.DEVICE", "cpu"], needed=()
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_name_of_the_released_models(name, tmp_path):
    source, cfg = random_release(name), release_config(name)
    torch.save({"model": source, "step": 7}, tmp_path / "in.pth")
    result = convert("release", str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), cfg)

    assert {row.source for row in result.rows} - {""} == set(source)
    # Four tensors of the release make up one adaptation layer.
    targets = {re.sub(r"\[[0-3]\]$", "", row.target) for row in result.rows}
    assert targets - {""} == set(result.state)
    assert {row.action for row in result.rows} == {"carried", "initialized"}
    initialized = [row.target for row in result.rows if row.action == "initialized"]
    assert all("running_" in target for target in initialized)

    model = build_model(cfg)
    load_strict(model, str(tmp_path / "out.pth"))  # raises on any name or shape
    box = model.roi_heads.box_predictor
    assert torch.equal(box.cls_score.weight[-1], source["Box_Outs.cls_score.weight"][0])
    assert torch.equal(box.cls_score.weight[:-1], source["Box_Outs.cls_score.weight"][1:])
    assert torch.equal(box.bbox_pred.bias, source["Box_Outs.bbox_pred.bias"][4:])

    # The frozen norms are exactly the affine pairs.
    norm = model.backbone.bottom_up.res3[1].conv2.norm
    assert isinstance(norm, FrozenBatchNorm2d)
    weight, bias = (
        source[f"Conv_Body.conv_body.res3.1.bn2.{k}"][:, None, None] for k in ("weight", "bias")
    )
    x = torch.randn(1, 128, 4, 4)
    torch.testing.assert_close(norm(x), x * weight + bias, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: s.update({"Keypoint_Outs.weight": torch.zeros(1)}), "no rule matches 1.*Keyp"),
        (
            lambda s: s.pop("Mask_Head.mask_conv1.2.0.weight"),
            r"mask_pooler.adaptation_layers.weight\[2\] is missing from the checkpoint",
        ),
        (
            lambda s: s.pop("Mask_Head.mask_conv1.3.0.weight"),
            r"1 of another shape: .*adaptation_layers.weight \(checkpoint .*, model .*\)",
        ),
        (lambda s: s.pop("Mask_Head.mask_fc.0.bias"), "1 not in the ch.*: .*fc_fusion.fc.bias"),
        (
            lambda s: s.update({"Box_Outs.cls_score.weight": torch.zeros(21, 1024)}),
            r"of classes.*cls_score.weight \(checkpoint \(21, 1024\), model \(81, 1024\)\)",
        ),
    ],
)
def test_what_does_not_fit_leaves_no_file(spoil, message, tmp_path):
    source = random_release("e2e_panet_R-50-FPN_2x_mask")
    spoil(source)
    torch.save({"model": source}, tmp_path / "in.pth")
    cfg = release_config("e2e_panet_R-50-FPN_2x_mask")
    with pytest.raises(CheckpointError, match=message):
        convert("release", str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), cfg)
    assert [p.name for p in tmp_path.iterdir()] == ["in.pth"]
    if "Keypoint_Outs.weight" in source:
        result = convert(
            "release",
            str(tmp_path / "in.pth"),
            str(tmp_path / "out.pth"),
            cfg,
            allow_unmatched=["Keypoint_*"],
        )
        assert [r.source for r in result.rows if r.action == "left out"] == ["Keypoint_Outs.weight"]


def test_models_do_not_pass_for_one_another(tmp_path):
    torch.save({"model": random_release("e2e_panet_R-50-FPN_1x_det_2fc")}, tmp_path / "in.pth")
    cfg = release_config("e2e_panet_R-50-FPN_1x_det")
    with pytest.raises(CheckpointError, match="another architecture"):
        convert("release", str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), cfg)
