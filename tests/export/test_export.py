import sys
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from panet_d2.errors import ConfigError, ExportError
from panet_d2.export import FORMATS, Agreement, check_exportable, export_model
from panet_d2.export.export import _detect, _load_onnx, _load_torchscript

from ..common import tiny_cfg
from ..test_configs import configs, load, shrink, skip_without_compiled_operators

LOAD = {"torchscript": _load_torchscript, "onnx": _load_onnx}
# An image of the mean colour has no features, and then each of four classes has 0.25.
THRESHOLD = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.26)

GROUP_NORM = (
    *("MODEL.FPN.NORM", "GN", "MODEL.ROI_BOX_HEAD.NORM", "GN", "MODEL.ROI_MASK_HEAD.NORM", "GN"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 64, "MODEL.ROI_MASK_HEAD.CONV_DIM", 64),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCNormHead"),
)
MASK_RCNN = (
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_BOX_HEAD.AFP.ENABLED", False, "MODEL.ROI_MASK_HEAD.AFP.ENABLED", False),
)
CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "PANetCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
)
FOUR_CONV = (
    *("MODEL.ROI_BOX_HEAD.AFP.ADAPTATION", "conv", "MODEL.ROI_BOX_HEAD.AFP.FUSION", "sum"),
    *("MODEL.ROI_BOX_HEAD.NUM_CONV", 3, "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign"),
)
RETINANET = (
    *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 3),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", 0.1),
    *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_pafpn_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]),
    *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
    *("TEST.DETECTIONS_PER_IMAGE", 1000),
)
KEYPOINTS = (
    *("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16]),
    *("MODEL.ROI_KEYPOINT_HEAD.AFP.ENABLED", True),
)
MODELS = {
    "panet": (),
    "group_norm": GROUP_NORM,
    "four_conv": FOUR_CONV,
    "contiguous": ("MODEL.PAFPN.MEMORY_FORMAT", "contiguous"),
    "cascade": CASCADE,
    "mask_rcnn": MASK_RCNN,
    "no_masks": ("MODEL.MASK_ON", False),
    "retinanet": RETINANET,
}


def confident(model: nn.Module) -> nn.Module:
    """Make the scores of a model with random weights as far apart as a trained one's are."""
    model.eval()
    classifiers = [layer for n, layer in model.named_modules() if n.endswith("cls_score")]
    for classifier in classifiers:
        logits = []
        bias = classifier.bias.data.clone()
        classifier.bias.data.zero_()
        hook = classifier.register_forward_hook(
            # A copy, because RetinaNet makes probabilities of them in place.
            lambda *call, into=logits: into.append(call[2].clone())
        )
        with torch.no_grad():
            model([{"image": picture(96, 128)}])
        hook.remove()
        classifier.bias.data.copy_(bias)
        size = torch.cat([x.flatten() for x in logits]).square().mean().sqrt()
        classifier.weight.data.mul_(1.5 / size)
    return model


def tiny(*opts) -> nn.Module:
    return confident(build_model(tiny_cfg(*THRESHOLD, *opts)))


def picture(height: int, width: int) -> torch.Tensor:
    return torch.rand(3, height, width) * 255


@pytest.fixture
def images() -> list:
    return [picture(96, 128), picture(70, 101)]


def check(model: nn.Module, images: list, path: str, format: str) -> None:
    """Export, and run what was written on images that the export has not seen."""
    agreement = export_model(model, images, path, format)
    assert agreement.images == len(images) + 1 and agreement.empty_images == 1
    assert agreement.detections > 10 and agreement.unmatched == 0
    run = LOAD[format](path)
    counts = set()
    for image in (picture(128, 64), picture(57, 190)):
        expected = _detect(model, image)
        counts.add(len(expected["scores"]))
        agreement = Agreement()
        agreement.add(expected, dict(zip(expected, run(image))))
        assert agreement.complaint() == "" and agreement.unmatched == 0
    assert len(counts) == 2  # the count is not the example's


# What the other cases of the format have too.
SLOW = {
    *(("torchscript", name) for name in ("contiguous", "mask_rcnn", "no_masks")),
    *(("onnx", name) for name in ("contiguous", "mask_rcnn", "four_conv")),
}


@pytest.mark.parametrize(
    "format, name",
    [
        pytest.param(*case, marks=pytest.mark.slow if case in SLOW else ())
        for case in product(FORMATS, MODELS)
    ],
)
def test_finds_the_same(name, format, images, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    if name == "group_norm":
        # With other random weights a norm divides the features of a box by almost nothing. The
        # rounding, which differs between processors, then exceeds the tolerance.
        torch.manual_seed(1)
    check(tiny(*MODELS[name]), images, str(tmp_path / "model"), format)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_keypoints(images, tmp_path):
    path = str(tmp_path / "model")
    agreement = export_model(tiny(*KEYPOINTS), images, path, "torchscript")
    assert agreement.differences.keys() >= {"pred_keypoints", "pred_masks"}
    assert _load_torchscript(path)(images[1])[4].shape[1:] == (17, 3)


@pytest.mark.parametrize("format", FORMATS)
def test_no_proposals(format, images, tmp_path):
    """Only images that are large enough have proposals."""
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    model = tiny(*GROUP_NORM, "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 40)
    path = str(tmp_path / "model")
    export_model(model, images, path, format)
    run = LOAD[format](path)
    assert len(run(images[0])[0]) > 0
    masks = run(picture(32, 32))[3]
    assert masks.shape == (0, 1, 28, 28)


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_left_of_a_wrong_export(format, images, tmp_path, monkeypatch):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    pooling = sys.modules["panet_d2.layers.multilevel_roi_align"]
    name = "multilevel_roi_align_reference"  # what a trace takes
    reference = getattr(pooling, name)
    monkeypatch.setattr(pooling, name, lambda *args: reference(*args) * 1.1)
    (tmp_path / "model").write_text("from an earlier export")
    with pytest.raises(ExportError, match=f"export to {format} differ"):
        export_model(tiny(), images, str(tmp_path / "model"), format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", FORMATS)
def test_a_fixed_number_of_detections_is_noticed(format, images, tmp_path, monkeypatch):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    monkeypatch.setattr("detectron2.export.flatten.patch_builtin_len", nullcontext)
    with pytest.raises(ExportError):
        export_model(tiny(), images, str(tmp_path / "model"), format)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_compare(images, tmp_path):
    with pytest.raises(ExportError, match="finds nothing in any of the 2 images"):
        model = tiny("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0)
        export_model(model, images, str(tmp_path / "model"), "torchscript")


def test_unknown_format(images, tmp_path):
    with pytest.raises(ValueError, match="'caffe2'; it must be one of torchscript, onnx"):
        export_model(tiny(), images, str(tmp_path / "model"), "caffe2")


def test_group_norm_is_exported_as_before():
    """Elsewhere in the program, exports are PyTorch's."""
    pytest.importorskip("onnx")
    from torch.onnx._internal.torchscript_exporter.registration import registry

    from panet_d2.export.export import _group_norm_of_nothing
    from panet_d2.layers.multilevel_roi_align import ONNX_OPSET

    group = registry.get_function_group("aten::group_norm")
    before = group.get(ONNX_OPSET)
    with _group_norm_of_nothing():
        assert group.get(ONNX_OPSET) is not before
    assert group.get(ONNX_OPSET) is before


REFUSED = {
    "panet_R_50_FPN_dconv_c3-c5_3x": "MODEL.RESNETS.DEFORM_ON_PER_STAGE",
    "oriented_panet_R_50_FPN": "MODEL.PROPOSAL_GENERATOR.NAME",
    "panoptic_panet_R_50_1x": "MODEL.META_ARCHITECTURE",
    "panoptic_panet_R_50_instant_test": "MODEL.META_ARCHITECTURE",
}
ONLY_TORCHSCRIPT = ("keypoint_panet_R_50_FPN_1x", "keypoint_panet_R_50_FPN_instant_test")


@configs()
def test_which_configs_can_be_exported(path):
    pytest.importorskip("onnxruntime")
    for format in FORMATS:
        key = REFUSED.get(path.stem)
        if path.stem in ONLY_TORCHSCRIPT and format == "onnx":
            key = "MODEL.KEYPOINT_ON"
        with pytest.raises(ConfigError, match=key) if key else nullcontext():
            check_exportable(load(path), [format])


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignRotated"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"),
        ("MODEL.META_ARCHITECTURE", "SemanticSegmentor"),
        ("TEST.AUG.ENABLED", True),
        ("TEST.SOFT_NMS.ENABLED", True),
        ("TEST.BOX_VOTING.ENABLED", True),
    ],
)
def test_refused_by_key(key, value):
    with pytest.raises(ConfigError, match=f"{key} is {value!r}"):
        check_exportable(tiny_cfg(key, value), ["torchscript"])


def test_missing_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_exportable(tiny_cfg(), ["torchscript"])
    with pytest.raises(ExportError, match="pip install onnx onnxruntime"):
        check_exportable(tiny_cfg(), ["onnx"])


@pytest.mark.slow
@configs()
def test_config_is_exported(path, tmp_path):
    """At its size, but with few proposals."""
    if path.stem in REFUSED:
        pytest.skip(f"refused: {REFUSED[path.stem]}")
    pytest.importorskip("onnxruntime")
    cfg = shrink(load(path))
    skip_without_compiled_operators(cfg)
    model = build_model(cfg)
    for module in model.backbone.bottom_up.modules():
        # Without statistics, each residual block doubles the variance.
        if isinstance(module, (FrozenBatchNorm2d, nn.SyncBatchNorm)):
            module.weight.data.fill_(0.5)
    confident(model)
    for format in FORMATS[: 1 if path.stem in ONLY_TORCHSCRIPT else 2]:
        agreement = export_model(
            model, [picture(96, 128), picture(70, 101)], str(tmp_path / format), format
        )
        assert agreement.detections > 0
