import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, build_box_head

from panet_d2.modeling import FastRCNNConvFCNormHead

from ..common import tiny_cfg

SHAPE = ShapeSpec(channels=8, height=3, width=3)


def test_norm_follows_every_fc():
    head = FastRCNNConvFCNormHead(SHAPE, conv_dims=[32], fc_dims=[64, 96], conv_norm="GN")
    assert [name for name, _ in head.named_children()] == [
        *("conv1", "flatten", "fc1", "fc_relu1", "fc2", "fc_relu2")
    ]
    x = torch.randn(5, 8, 3, 3)
    hidden = head.conv1(x).flatten(1)
    for fc in (head.fc1, head.fc2):
        hidden = torch.nn.functional.linear(hidden, fc.weight, fc.bias)
        hidden = fc.norm(hidden).relu()
    torch.testing.assert_close(head(x), hidden)
    assert head.output_shape == ShapeSpec(channels=96)


def test_without_norm_it_is_the_stock_head():
    stock = FastRCNNConvFCHead(SHAPE, conv_dims=[32], fc_dims=[64])
    head = FastRCNNConvFCNormHead(SHAPE, conv_dims=[32], fc_dims=[64])
    head.load_state_dict(stock.state_dict())
    x = torch.randn(5, 8, 3, 3)
    torch.testing.assert_close(head(x), stock(x), rtol=0, atol=0)


def test_from_config():
    cfg = tiny_cfg(
        *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCNormHead"),
        *("MODEL.ROI_BOX_HEAD.NORM", "GN"),
        *("MODEL.ROI_BOX_HEAD.FC_DIM", 64),
    )
    head = build_box_head(cfg, SHAPE)
    assert isinstance(head.fc1.norm, torch.nn.GroupNorm)
