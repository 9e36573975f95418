import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, Backbone, build_backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7

from panet_d2 import PAFPN
from panet_d2.errors import ConfigError

from ..common import tiny_cfg

LEVELS = ["p2", "p3", "p4", "p5"]


class Pyramid(Backbone):
    """Four stages of a network that only resizes."""

    def __init__(self, channels=(3, 4, 5, 6)):
        super().__init__()
        self._out_features = ["res2", "res3", "res4", "res5"]
        self._out_feature_channels = dict(zip(self._out_features, channels))
        self._out_feature_strides = {f"res{i}": 2**i for i in (2, 3, 4, 5)}

    def forward(self, x):
        features = {}
        for name in self._out_features:
            stride = self._out_feature_strides[name]
            pooled = torch.nn.functional.avg_pool2d(x, stride)
            channels = self._out_feature_channels[name]
            features[name] = pooled[:, :1].expand(-1, channels, -1, -1).contiguous()
        return features


def neck(**kwargs):
    kwargs.setdefault("top_block", LastLevelMaxPool())
    return PAFPN(Pyramid(), ["res2", "res3", "res4", "res5"], 32, **kwargs)


def fpn_outputs(model, x):
    """P2…P5 by the parent's own forward."""
    return FPN.forward(model, x)


def test_path_is_the_papers():
    model, x = neck().double(), torch.randn(2, 1, 64, 96, dtype=torch.float64)
    p, n = fpn_outputs(model, x), model(x)
    assert list(n) == LEVELS + ["p6"]
    torch.testing.assert_close(n["p2"], p["p2"], rtol=0, atol=0)
    below = p["p2"]
    for stage in (3, 4, 5):
        down, out = (getattr(model, f"pafpn_{name}{stage}") for name in ("downsample", "output"))
        mid = torch.conv2d(below, down.weight, down.bias, stride=2, padding=1).relu()
        below = torch.conv2d(mid + p[f"p{stage}"], out.weight, out.bias, padding=1).relu()
        torch.testing.assert_close(n[f"p{stage}"], below)
    torch.testing.assert_close(n["p6"], n["p5"][:, :, ::2, ::2], rtol=0, atol=0)


def test_path_of_sums_skips_the_output_convs():
    model = neck(bottom_up_input="sum").double()
    x = torch.randn(2, 1, 64, 96, dtype=torch.float64)
    p, n = fpn_outputs(model, x), model(x)
    chain = p["p2"]
    for stage in (3, 4, 5):
        down, out = (getattr(model, f"pafpn_{name}{stage}") for name in ("downsample", "output"))
        chain = down(chain) + p[f"p{stage}"]
        torch.testing.assert_close(n[f"p{stage}"], out(chain))
    with pytest.raises(ValueError, match="bottom_up_input.*'both'.*'output', 'sum'"):
        neck(bottom_up_input="both")


def test_n2_is_the_same_tensor_as_p2():
    model = neck()
    seen = []
    model.fpn_output2.register_forward_hook(lambda module, args, output: seen.append(output))
    assert model(torch.randn(1, 1, 32, 32))["p2"] is seen[0]


@pytest.mark.parametrize("norm", ["", "GN", "BN", "SyncBN", "naiveSyncBN", "FrozenBN", "LN"])
def test_norms(norm):
    model = neck(norm=norm)
    # 64 pixels leave 2x2 on p5, enough for the statistics of a batch norm.
    outputs = model(torch.randn(2, 1, 64, 64))
    assert all(torch.isfinite(f).all() for f in outputs.values())
    assert (model.pafpn_output3.bias is None) == bool(norm)
    assert neck(norm=norm, bias_before_norm=True).pafpn_output3.bias is not None


def test_activation():
    x = torch.randn(1, 1, 64, 64)
    assert (neck()(x)["p5"] >= 0).all()
    assert (neck(activation="")(x)["p5"] < 0).any()
    with pytest.raises(ValueError, match="gelu.*relu"):
        neck(activation="gelu")


@pytest.mark.parametrize("size", [(32, 32), (96, 160), (224, 32)])
def test_shapes_are_what_output_shape_says(size):
    model = neck()
    outputs = model(torch.randn(1, 1, *size))
    assert model.size_divisibility == 32
    for name, shape in model.output_shape().items():
        # The max-pooled level of an odd one is rounded up.
        expected = tuple(-(-s // shape.stride) for s in size)
        assert outputs[name].shape == (1, shape.channels, *expected)


def test_gradients_reach_every_parameter():
    model = neck()
    sum(f.square().sum() for f in model(torch.randn(2, 1, 64, 64)).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_fpn_checkpoint_fits():
    fpn = FPN(Pyramid(), ["res2", "res3", "res4", "res5"], 32, top_block=LastLevelMaxPool())
    result = neck().load_state_dict(fpn.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("pafpn_") for name in result.missing_keys)


def test_top_block_reads_the_backbone_or_the_path():
    x = torch.randn(1, 1, 128, 128)
    model = neck(top_block=LastLevelP6P7(6, 32, in_feature="res5"))
    expected = model.top_block(model.bottom_up(x)["res5"])
    outputs = model(x)
    torch.testing.assert_close([outputs["p6"], outputs["p7"]], expected)

    model = neck(top_block=LastLevelP6P7(32, 32, in_feature="p5"))
    outputs = model(x)
    torch.testing.assert_close([outputs["p6"], outputs["p7"]], model.top_block(outputs["p5"]))


@pytest.mark.parametrize(
    "in_features", [["res3", "res2"], ["res2", "res4"], [], ["res2", "res3", "res9"]]
)
def test_levels_must_form_a_pyramid(in_features):
    with pytest.raises(ValueError, match="in_features"):
        PAFPN(Pyramid(), in_features, 32)
    with pytest.raises(ConfigError, match="MODEL.FPN.IN_FEATURES"):
        build_backbone(tiny_cfg("MODEL.FPN.IN_FEATURES", in_features))


def test_build_from_config():
    model = build_backbone(
        tiny_cfg(
            *("MODEL.FPN.NORM", "GN"),
            *("MODEL.PAFPN.ACTIVATION", ""),
            *("MODEL.PAFPN.BIAS_BEFORE_NORM", True),
        )
    )
    assert isinstance(model, PAFPN)
    conv = model.pafpn_downsample4
    assert conv.bias is not None and conv.activation is None
    assert isinstance(conv.norm, torch.nn.GroupNorm)
    with pytest.raises(ConfigError, match="MODEL.PAFPN.ACTIVATION.*'tanh'.*'relu', ''"):
        build_backbone(tiny_cfg("MODEL.PAFPN.ACTIVATION", "tanh"))
    with pytest.raises(ConfigError, match="MODEL.PAFPN.BOTTOM_UP_INPUT.*'x'.*'output', 'sum'"):
        build_backbone(tiny_cfg("MODEL.PAFPN.BOTTOM_UP_INPUT", "x"))
    assert build_backbone(tiny_cfg("MODEL.PAFPN.BOTTOM_UP_INPUT", "sum")).bottom_up_input == "sum"


def test_shorter_pyramid_has_its_extra_level():
    cfg = tiny_cfg("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4"])
    outputs = build_backbone(cfg)(torch.randn(1, 3, 64, 64))
    assert list(outputs) == ["p2", "p3", "p4", "p5"]
    torch.testing.assert_close(outputs["p5"], outputs["p4"][:, :, ::2, ::2])


def test_build_retinanet():
    cfg = tiny_cfg(
        *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_pafpn_backbone"),
        *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
    )
    model = build_backbone(cfg)
    outputs = model(torch.randn(1, 3, 128, 128))
    assert {k: v.shape[-1] for k, v in outputs.items()} == dict(p3=16, p4=8, p5=4, p6=2, p7=1)
    cfg = tiny_cfg(
        *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_pafpn_backbone"),
        *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4"]),
    )
    with pytest.raises(ConfigError, match="MODEL.RESNETS.OUT_FEATURES.*res5"):
        build_backbone(cfg)


def test_retinanet_levels_follow_on_res5():
    name = ("MODEL.BACKBONE.NAME", "build_retinanet_resnet_pafpn_backbone")
    with pytest.raises(ConfigError, match="FPN.IN_FEATURES is .*'res4'.*'res5'"):
        build_backbone(tiny_cfg(*name, "MODEL.FPN.IN_FEATURES", ["res3", "res4"]))
    neck = build_backbone(tiny_cfg(*name, "MODEL.FPN.IN_FEATURES", ["res4", "res5"]))
    with torch.no_grad():
        levels = neck(torch.zeros(1, 3, 128, 128))
    strides = {level: 128 // x.shape[-1] for level, x in levels.items()}
    assert strides == {level: s.stride for level, s in neck.output_shape().items()}


def test_dilation_names_levels_by_their_strides():
    opts = ("MODEL.RESNETS.RES5_DILATION", 2, "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res5"])
    neck = build_backbone(tiny_cfg("MODEL.RESNETS.DEPTH", 50, *opts))
    with torch.no_grad():
        levels = neck(torch.zeros(1, 3, 64, 64))
    strides = {level: 64 // x.shape[-1] for level, x in levels.items()}
    assert strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32}


def test_works_on_any_backbone():
    cfg = tiny_cfg()
    bottom_up = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    model = PAFPN(bottom_up=bottom_up, in_features=["res3", "res4"], out_channels=8)
    assert list(model(torch.randn(1, 3, 32, 32))) == ["p3", "p4"]


@pytest.mark.parametrize(
    "memory_format, device, last",
    [
        ("auto", "cpu", True),
        ("auto", "cuda", False),
        ("auto", "cuda:1", False),
        ("contiguous", "cpu", False),
        ("channels_last", "cuda", True),
    ],
)
def test_memory_format_of_each_device(memory_format, device, last):
    cfg = tiny_cfg("MODEL.PAFPN.MEMORY_FORMAT", memory_format, "MODEL.DEVICE", device)
    assert build_backbone(cfg).channels_last == last


@pytest.mark.parametrize("value", [True, "", "channels-last"])
def test_unknown_memory_format(value):
    cfg = tiny_cfg()
    cfg.MODEL.PAFPN.MEMORY_FORMAT = value
    with pytest.raises(ConfigError, match="MEMORY_FORMAT is .*'auto', 'contiguous', 'channels_las"):
        build_backbone(cfg)


def test_channels_last_and_deformable_convs():
    cfg = tiny_cfg("MODEL.PAFPN.MEMORY_FORMAT", "channels_last")
    bottom_up = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, False, True, True]
    with pytest.raises(ConfigError, match="MEMORY_FORMAT is 'channels.*DEFORM_ON_PER_STAGE"):
        PAFPN(cfg, bottom_up, None)
    cfg.MODEL.PAFPN.MEMORY_FORMAT = "auto"
    assert not PAFPN(cfg, bottom_up, None).channels_last


@pytest.mark.parametrize("norm", ["FrozenBN", "GN"])
def test_channels_last(norm):
    """The same numbers, in another order in memory."""
    opts = ("MODEL.RESNETS.NORM", norm, "MODEL.FPN.NORM", "GN" if norm == "GN" else "")
    key = "MODEL.PAFPN.MEMORY_FORMAT"
    plain = build_backbone(tiny_cfg(*opts, key, "contiguous")).eval()
    last = build_backbone(tiny_cfg(*opts, key, "channels_last")).eval()
    last.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, result = plain(x), last(x)
    for level in LEVELS:
        assert result[level].is_contiguous(memory_format=torch.channels_last), level
        assert not expected[level].is_contiguous(memory_format=torch.channels_last), level
        torch.testing.assert_close(result[level], expected[level], rtol=1e-4, atol=1e-4)
    assert last.pafpn_output3.weight.is_contiguous(memory_format=torch.channels_last)


def test_bottom_up_convs_start_as_those_of_fpn():
    """fvcore's c2_xavier_fill: uniform within sqrt(3 / fan in), without a bias."""
    model = PAFPN(
        bottom_up=build_resnet_backbone(tiny_cfg(), ShapeSpec(channels=3)),
        in_features=["res2", "res3", "res4"],
        out_channels=32,
    )
    bound = (3 / (9 * 32)) ** 0.5
    for conv in (*model.downsample_convs, *model.fusion_convs, model.fpn_output2):
        assert 0.95 * bound < conv.weight.abs().max().item() <= bound
        assert not conv.bias.any()


def test_channels_last_reaches_every_conv():
    """Weights are kept in that order too: otherwise each step would copy them."""
    model = build_backbone(tiny_cfg("MODEL.PAFPN.MEMORY_FORMAT", "channels_last")).eval()
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    seen = []
    hook = model.bottom_up.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    hook.remove()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert not seen[0].is_contiguous()


def test_the_top_block_runs_once():
    """A norm in it has the statistics of N5's features alone."""
    model = build_backbone(tiny_cfg())
    seen = []
    model.top_block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    outputs = model(torch.rand(1, 3, 64, 64))
    assert len(seen) == 1 and torch.equal(seen[0], outputs["p5"])


def test_fuse_type_of_the_config():
    assert build_backbone(tiny_cfg("MODEL.FPN.FUSE_TYPE", "avg"))._fuse_type == "avg"
