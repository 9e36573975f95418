"""The mask head in C4 models and without a size; what counts and exports see."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import build_mask_head
from fvcore.nn import FlopCountAnalysis

from panet_d2 import PANetMaskHead
from panet_d2.errors import ExportError
from panet_d2.layers import LevelwiseLinear, levelwise, multilevel_roi_align

from ..common import tiny_cfg


def test_c4_head_gets_half_the_grid():
    cfg = tiny_cfg("MODEL.ROI_HEADS.NAME", "Res5ROIHeads")
    head = build_mask_head(cfg, ShapeSpec(channels=8, height=14, width=14))
    assert head.layers(torch.randn(1, 8, 7, 7)).shape[2:] == (14, 14)


def test_shape_without_size():
    with pytest.raises(ValueError, match="needs its height and width"):
        PANetMaskHead(ShapeSpec(channels=8), num_classes=2, conv_dims=[8] * 3)


def test_every_product_is_counted(monkeypatch):
    monkeypatch.setattr(levelwise, "LOOP_ON", ())
    layer = LevelwiseLinear(8, 16, 4)
    assert FlopCountAnalysis(layer, torch.randn(4, 10, 8)).total() == 4 * 10 * 8 * 16


def test_old_onnx_opset(tmp_path):
    class Pool(torch.nn.Module):
        def forward(self, x, boxes):
            return multilevel_roi_align([x], boxes, [0.25], (7, 7), 2, True, "max")

    args = (torch.randn(1, 4, 16, 16), torch.tensor([[0.0, 0, 0, 32, 32]]))
    for opset in (11, 16):
        export = dict(f=str(tmp_path / "a.onnx"), opset_version=opset, dynamo=False)
        if opset == 16:
            torch.onnx.export(Pool(), args, **export)
            continue
        with pytest.raises(ExportError, match="ONNX opset 11 has no RoIAlign"):
            torch.onnx.export(Pool(), args, **export)
