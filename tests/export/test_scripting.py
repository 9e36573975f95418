"""Detectron2's scripting with the classes of this package, as its own tests do it with its own."""

import copy
import io

import pytest
import torch
from detectron2.export import scripting_with_instances
from detectron2.export.torchscript_patch import freeze_training_mode, patch_instances
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model, detector_postprocess
from detectron2.modeling.roi_heads import build_mask_head
from detectron2.structures import Boxes, Instances
from detectron2.utils.testing import assert_instances_allclose, convert_scripted_instances
from torch import Tensor

from panet_d2 import AdaptiveROIPooler, ExportError, PANetMaskHead

from ..common import tiny_cfg

BOX, MASK = "MODEL.ROI_BOX_HEAD", "MODEL.ROI_MASK_HEAD"
FIELDS = {
    "proposal_boxes": Boxes,
    "objectness_logits": Tensor,
    "pred_boxes": Boxes,
    "scores": Tensor,
    "pred_classes": Tensor,
    "pred_masks": Tensor,
}
CASES = {
    "2fc": (),
    "4conv1fc_gn": (
        *("MODEL.FPN.NORM", "GN"),
        *(f"{BOX}.NORM", "GN", f"{BOX}.NUM_CONV", 3, f"{BOX}.CONV_DIM", 32),
        *(f"{BOX}.AFP.ADAPTATION", "conv", f"{MASK}.NORM", "GN", f"{MASK}.CONV_DIM", 64),
    ),
    "release": (
        *("MODEL.PAFPN.ACTIVATION", "", f"{BOX}.NAME", "FastRCNNConvFCNormHead"),
        *(f"{BOX}.NORM", "BN", f"{MASK}.NORM", "LN", f"{MASK}.FC_FUSION.RELU", True),
    ),
    "mmdet": ("MODEL.PAFPN.BOTTOM_UP_INPUT", "sum", f"{MASK}.FC_FUSION.ENABLED", False),
    "fusions": (
        *(f"{BOX}.AFP.FUSION", "sum", f"{MASK}.AFP.FUSION", "product"),
        *(f"{MASK}.AFP.ADAPTATION", "none", "MODEL.PAFPN.MEMORY_FORMAT", "contiguous"),
    ),
    "without_afp": (f"{BOX}.AFP.ENABLED", False, f"{MASK}.AFP.FUSION", "mean"),
}


def reloaded(script):
    file = io.BytesIO()
    torch.jit.save(script, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_model(case):
    model = build_model(tiny_cfg("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, *CASES[case])).eval()
    before = copy.deepcopy(model)
    script = reloaded(scripting_with_instances(model, FIELDS))
    inputs = [{"image": 255 * torch.rand(3, *size)} for size in ((64, 96), (96, 50))]
    expected = before.inference(inputs, do_postprocess=False)
    assert all(len(instances) for instances in expected)
    # Scripting replaces parts of the model itself, stock ones too. It must go on working.
    for result in (script, model):
        for ours, theirs in zip(result.inference(inputs, do_postprocess=False), expected):
            assert_instances_allclose(ours, theirs, rtol=1e-3, msg=case)


@torch.no_grad()
def test_retinanet():
    cfg = tiny_cfg(
        *("MODEL.META_ARCHITECTURE", "RetinaNet"),
        *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_pafpn_backbone"),
        *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
        *("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
        *("MODEL.RETINANET.TOPK_CANDIDATES_TEST", 20),
    )
    model = build_model(cfg).eval()
    fields = {name: FIELDS[name] for name in ("pred_boxes", "scores", "pred_classes")}
    before = copy.deepcopy(model)
    script = scripting_with_instances(model, fields)
    image = 255 * torch.rand(3, 64, 96)
    expected = before([{"image": image}])
    result = convert_scripted_instances(script([{"image": image}])[0])
    result = detector_postprocess(result, *image.shape[1:])
    assert_instances_allclose(result, expected[0]["instances"], rtol=1e-3)


@torch.no_grad()
def test_backbone():
    model = build_backbone(tiny_cfg()).eval()
    x = torch.rand(2, 3, 64, 96)
    expected = copy.deepcopy(model)(x)
    result = torch.jit.script(model)(x)
    assert list(result) == list(expected)
    for name in expected:
        torch.testing.assert_close(result[name], expected[name])


@pytest.mark.parametrize("pooler_type", ["ROIAlignV2", "ROIAlign", "ROIPool"])
@pytest.mark.parametrize("adaptation", ["conv", "fc", "none"])
@torch.no_grad()
def test_pooler(pooler_type, adaptation):
    model = AdaptiveROIPooler(
        7, [1 / 4, 1 / 8], 2, pooler_type, in_channels=8, adaptation=adaptation
    ).eval()
    script = torch.jit.script(model)
    features = [torch.rand(2, 8, 32, 32), torch.rand(2, 8, 16, 16)]
    boxes = [
        Boxes(torch.tensor([[3.0, 4, 40, 50], [60, 10, 90, 100]])),
        Boxes(torch.zeros(0, 4)),
    ]
    torch.testing.assert_close(script(features, boxes), model(features, boxes))
    none = [boxes[1], boxes[1]]
    assert script(features, none).shape == model(features, none).shape


@torch.no_grad()
def test_mask_head():
    head = build_mask_head(tiny_cfg(), ShapeSpec(channels=32, height=14, width=14)).eval()
    assert isinstance(head, PANetMaskHead)
    fields = {"pred_classes": Tensor, "pred_masks": Tensor}
    with freeze_training_mode(head), patch_instances(fields) as NewInstances:
        script = torch.jit.script(head)
        x, classes = torch.rand(3, 32, 14, 14), torch.tensor([0, 2, 1])
        instances = Instances((10, 10), pred_classes=classes)
        new = NewInstances((10, 10))
        new.pred_classes = classes
        expected = head(x, [instances])[0].pred_masks
        torch.testing.assert_close(script(x, [new])[0].pred_masks, expected)


def test_cascade_is_refused():
    cfg = tiny_cfg(
        "MODEL.ROI_HEADS.NAME", "PANetCascadeROIHeads", f"{BOX}.CLS_AGNOSTIC_BBOX_REG", True
    )
    with pytest.raises(ExportError, match="PANetCascadeROIHeads cannot be scripted, because"):
        scripting_with_instances(build_model(cfg).eval(), FIELDS)


@pytest.mark.parametrize("key", ["TEST.SOFT_NMS.ENABLED", "TEST.BOX_VOTING.ENABLED"])
def test_suppression_is_refused(key):
    model = build_model(tiny_cfg(key, True)).eval()
    with pytest.raises(ExportError, match="Soft-NMS or box voting cannot be scripted"):
        scripting_with_instances(model, FIELDS)
