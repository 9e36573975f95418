import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import build_mask_head
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead

from panet_d2 import PANetMaskHead
from panet_d2.errors import ConfigError

from ..common import tiny_cfg

SHAPE = ShapeSpec(channels=8, height=6, width=5)


def mask_head(**kwargs):
    kwargs = dict(num_classes=3, conv_dims=[16] * 5, **kwargs)
    return PANetMaskHead(SHAPE, **kwargs)


def test_fc_path_leaves_after_the_third_of_four_convs():
    head, x = mask_head().double(), torch.randn(4, 8, 6, 5, dtype=torch.float64)

    def conv(layer, x):
        return torch.conv2d(x, layer.weight, layer.bias, padding=1).relu()

    shared = conv(head.mask_fcn3, conv(head.mask_fcn2, conv(head.mask_fcn1, x)))
    fcn = head.deconv(conv(head.mask_fcn4, shared)).relu()
    fcn = head.predictor(fcn)
    branch = head.fc_fusion
    fc = conv(branch.conv2, conv(branch.conv1, shared)).flatten(1)
    assert branch.conv2.out_channels == 8  # half
    fc = (fc @ branch.fc.weight.T + branch.fc.bias).reshape(4, 1, 12, 10)
    torch.testing.assert_close(head.forward_paths(x), [fcn, fc])
    logits = head.layers(x)
    assert logits.shape == (4, 3, 12, 10)
    torch.testing.assert_close(logits, fcn + fc)


def test_fc_path_is_the_same_for_every_class():
    head, x = mask_head(), torch.randn(2, 8, 6, 5)
    fcn, _ = head.forward_paths(x)
    difference = head.layers(x) - fcn
    torch.testing.assert_close(difference[:, :1].expand(-1, 3, -1, -1), difference)


def test_relu_lets_it_only_add():
    x = torch.randn(4, 8, 6, 5)
    assert (mask_head().forward_paths(x)[1] < 0).any()
    assert (mask_head(fc_relu=True).forward_paths(x)[1] >= 0).all()


def test_switched_off_it_is_the_stock_head():
    stock = MaskRCNNConvUpsampleHead(SHAPE, num_classes=3, conv_dims=[16] * 5)
    head = mask_head(fc_fusion=False)
    head.load_state_dict(stock.state_dict())
    x = torch.randn(4, 8, 6, 5)
    torch.testing.assert_close(head.layers(x), stock.layers(x), rtol=0, atol=0)


def test_stock_weights_fit():
    stock = MaskRCNNConvUpsampleHead(SHAPE, num_classes=3, conv_dims=[16] * 5)
    result = mask_head().load_state_dict(stock.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("fc_fusion.") for name in result.missing_keys)


@pytest.mark.parametrize("norm", ["", "GN", "BN", "SyncBN", "naiveSyncBN"])
def test_norms_and_no_proposals(norm):
    head = PANetMaskHead(SHAPE, num_classes=2, conv_dims=[64] * 3, conv_norm=norm).train()
    assert head.layers(torch.randn(3, 8, 6, 5)).shape == (3, 2, 12, 10)
    if norm == "SyncBN":  # Detectron2's Conv2d refuses to train it on nothing
        head.eval()
    assert head.layers(torch.randn(0, 8, 6, 5)).shape == (0, 2, 12, 10)


def test_a_single_conv():
    head = PANetMaskHead(SHAPE, num_classes=2, conv_dims=[16] * 2)
    assert head.fc_fusion.conv1.in_channels == 8  # leaves before the only conv
    assert head.layers(torch.randn(1, 8, 6, 5)).shape == (1, 2, 12, 10)
    with pytest.raises(ValueError, match="at least one conv"):
        PANetMaskHead(SHAPE, num_classes=2, conv_dims=[16])


def test_from_config():
    cfg = tiny_cfg(
        *("MODEL.ROI_MASK_HEAD.NORM", "GN"),
        *("MODEL.ROI_MASK_HEAD.CONV_DIM", 64),
        *("MODEL.ROI_MASK_HEAD.FC_FUSION.RELU", True),
        *("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True),
    )
    head = build_mask_head(cfg, SHAPE)
    assert isinstance(head, PANetMaskHead) and head.fc_fusion_on
    assert isinstance(head.fc_fusion.relu, torch.nn.ReLU)
    assert head.layers(torch.randn(1, 8, 6, 5)).shape[1] == 1
    cfg.MODEL.ROI_MASK_HEAD.FC_FUSION.ENABLED = False
    assert not build_mask_head(cfg, SHAPE).fc_fusion_on


@pytest.mark.parametrize(
    "opts, shape, message",
    [
        (("NUM_CONV", 0), SHAPE, "NUM_CONV is 0.*at least 1"),
        (("NORM", "GN", "CONV_DIM", 96), SHAPE, "CONV_DIM is 96.*multiple of 64"),
        ((), {"p2": SHAPE}, "POOLER_TYPE"),
    ],
)
def test_bad_config_values(opts, shape, message):
    pairs = zip(opts[::2], opts[1::2])
    cfg = tiny_cfg(*(x for k, v in pairs for x in (f"MODEL.ROI_MASK_HEAD.{k}", v)))
    with pytest.raises(ConfigError, match=f"MODEL.ROI_MASK_HEAD.{message}"):
        build_mask_head(cfg, shape)


def test_fc_path_starts_small():
    """As in the release; its convs as those of Detectron2's mask head (c2_msra_fill)."""
    shape = ShapeSpec(channels=64, height=7, width=7)
    branch = PANetMaskHead(shape, num_classes=2, conv_dims=[64] * 3).fc_fusion
    assert branch.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not branch.fc.bias.any()
    for conv in (branch.conv1, branch.conv2):
        fan_out = 9 * conv.out_channels
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        assert not conv.bias.any()
