import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torchvision.ops import roi_align

from panet_d2 import AdaptiveROIPooler
from panet_d2.errors import ConfigError
from panet_d2.layers import FUSIONS

from ..common import DEVICES, needs_cuda, tiny_cfg

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
CHANNELS = 6
CUDA_HALF = pytest.param("cuda", torch.float16, marks=needs_cuda)


def pooler(**kwargs):
    args = dict(output_size=7, scales=SCALES, sampling_ratio=2, pooler_type="ROIAlignV2")
    args.update(in_channels=CHANNELS, **kwargs)
    return AdaptiveROIPooler(**args)


def features(dtype=torch.float32, scales=SCALES, device="cpu"):
    return [
        torch.randn(2, CHANNELS, int(96 * s), int(128 * s), dtype=dtype, device=device)
        for s in scales
    ]


def boxes(*counts, device="cpu"):
    lists = []
    for count in counts:
        corner = torch.rand(count, 2) * 60
        lists.append(Boxes(torch.cat([corner, corner + 4 + 60 * torch.rand(count, 2)], 1)))
    return [b.to(device) for b in lists]


def flat(box_lists):
    """(M, 5) as torchvision takes them."""
    return torch.cat(
        [
            torch.cat([torch.full((len(b), 1), float(i)), b.tensor], 1)
            for i, b in enumerate(box_lists)
        ]
    )


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("adaptation", ["conv", "fc", "none"])
def test_is_pool_adapt_fuse(fusion, adaptation):
    model = pooler(fusion=fusion, adaptation=adaptation, adaptation_dim=5).double()
    x, box_lists = features(torch.float64), boxes(3, 4)
    if adaptation != "none":
        weights = model.adaptation_layers.weight.chunk(len(SCALES))
        biases = model.adaptation_layers.bias.chunk(len(SCALES))
    levels = []
    for level, (feature, scale) in enumerate(zip(x, SCALES)):
        grid = roi_align(feature, flat(box_lists).double(), (7, 7), scale, 2, True)
        if adaptation == "conv":
            grid = torch.conv2d(grid, weights[level], biases[level], padding=1).relu()
        elif adaptation == "fc":
            grid = (grid.flatten(1) @ weights[level].T + biases[level]).relu()[:, :, None, None]
        levels.append(grid)
    levels = torch.stack(levels)
    expected = {
        "max": levels.amax(0),
        "sum": levels.sum(0),
        "mean": levels.mean(0),
        "product": levels.prod(0),
    }[fusion]
    result = model(x, box_lists)
    torch.testing.assert_close(result, expected)
    assert result.is_contiguous()
    shape = model.output_shape
    assert result.shape == (7, shape.channels, shape.height, shape.width)
    assert shape.channels == (CHANNELS if adaptation == "none" else 5)


def test_every_level_counts_and_has_its_own_weights():
    model = pooler(fusion="sum")
    x, box_lists = [f.requires_grad_() for f in features()], boxes(4, 4)
    model(x, box_lists).square().sum().backward()
    assert all(f.grad.abs().sum() > 0 for f in x)
    weight = model.adaptation_layers.weight
    assert weight.shape == (len(SCALES) * CHANNELS, CHANNELS, 3, 3)
    assert all(grad.abs().sum() > 0 for grad in weight.grad.chunk(len(SCALES)))
    assert not torch.equal(*weight.chunk(len(SCALES))[:2])


def test_one_level_without_adaptation_is_the_stock_pooler():
    model = pooler(scales=[1 / 8], adaptation="none")
    stock = ROIPooler(7, [1 / 8], 2, "ROIAlignV2")
    x, box_lists = features(scales=[1 / 8]), boxes(3, 2)
    torch.testing.assert_close(model(x, box_lists), stock(x, box_lists), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adaptation", ["conv", "fc", "none"])
# Not SyncBN: Detectron2's Conv2d refuses to train it on nothing, and has naiveSyncBN_N for that.
@pytest.mark.parametrize("norm", ["", "GN", "BN", "naiveSyncBN_N"])
def test_no_proposals(adaptation, norm):
    model = pooler(adaptation=adaptation, adaptation_dim=32, norm=norm).train()
    x = [f.requires_grad_() for f in features()]
    shape = model.output_shape
    result = model(x, boxes(0, 0))
    assert result.shape == (0, shape.channels, shape.height, shape.width)
    # The features and the layers must stay in the graph: a process without proposals still takes
    # part in the gradients of all processes.
    result.sum().backward()
    assert all(f.grad is not None for f in x)
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.isfinite(b).all() for b in model.buffers() if b.is_floating_point())
    assert model(features(), boxes(0, 3)).shape[0] == 3


def test_no_images():
    x = [f[:0] for f in features()]
    assert pooler(adaptation="fc", adaptation_dim=5)(x, []).shape == (0, 5, 1, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adaptation", ["conv", "fc", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype, adaptation, device):
    model = pooler(adaptation=adaptation, adaptation_dim=5).to(device)
    x, box_lists = features(device=device), boxes(3, 4, device=device)
    x = [f.to(dtype).float() for f in x]
    expected = model(x, box_lists)
    result = model.to(dtype)([f.to(dtype) for f in x], box_lists)
    assert result.dtype == dtype
    # Weights, grid and result are each rounded once; sums run over 54 or 294 products.
    torch.testing.assert_close(result.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("device, dtype", [("cpu", torch.bfloat16), CUDA_HALF])
@pytest.mark.parametrize("adaptation", ["conv", "fc", "none"])
def test_autocast(adaptation, device, dtype):
    """What comes in half precision is pooled, adapted and fused in it."""
    model = pooler(adaptation=adaptation, adaptation_dim=5).to(device)
    x, box_lists = features(device=device), boxes(3, 4, device=device)
    x = [f.to(dtype) for f in x]
    with torch.autocast(device, dtype=dtype):
        assert model.pool_levels(x, box_lists).dtype == dtype
        result = model(x, box_lists)
    assert result.dtype == dtype
    expected = model([f.float() for f in x], box_lists)
    torch.testing.assert_close(result.float(), expected, rtol=0.05, atol=0.05)


@needs_cuda
@pytest.mark.parametrize("adaptation", ["conv", "fc", "none"])
def test_does_not_wait_for_the_device(adaptation):
    model = pooler(adaptation=adaptation).to("cuda")
    x, box_lists = features(device="cuda"), boxes(3, 4, device="cuda")
    x = [f.requires_grad_() for f in x]
    model(x, box_lists).sum().backward()  # checks and compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x, box_lists).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pooler_type, aligned", [("ROIAlign", False), ("ROIAlignV2", True)])
def test_pooler_types(pooler_type, aligned):
    x, box_lists = features(), boxes(3, 4)
    result = pooler(pooler_type=pooler_type, adaptation="none", fusion="sum")(x, box_lists)
    expected = sum(roi_align(f, flat(box_lists), (7, 7), s, 2, aligned) for f, s in zip(x, SCALES))
    torch.testing.assert_close(result, expected)


def test_roi_pool_on_every_level():
    model = pooler(pooler_type="ROIPool", adaptation="none")
    x, box_lists = features(), boxes(3, 4)
    expected = torch.stack([p(f, flat(box_lists)) for p, f in zip(model.level_poolers, x)])
    torch.testing.assert_close(model(x, box_lists), expected.amax(0))
    assert pooler(pooler_type="ROIPool")(x, box_lists).shape == (7, CHANNELS, 7, 7)


def test_grid_need_not_be_square():
    assert pooler(output_size=(7, 3))(features(), boxes(2, 2)).shape == (4, CHANNELS, 7, 3)
    fc = pooler(output_size=(7, 3), adaptation="fc")
    assert fc(features(), boxes(2, 2)).shape == (4, CHANNELS, 1, 1)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"fusion": "median"}, "fusion.*'median'.*max, sum, mean, product"),
        ({"adaptation": "mlp"}, "adaptation.*'mlp'.*conv, fc, none"),
        ({"scales": [1 / 4, 1 / 16]}, "scales.*half"),
        ({"scales": [1 / 8, 1 / 4]}, "scales.*half"),
        ({"scales": [1 / 3]}, "scales"),
        ({"scales": []}, "scales"),
        ({"pooler_type": "Crop"}, "Crop"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        pooler(**kwargs)


def test_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match="4 feature maps, got 3"):
        pooler()(features()[:3], boxes(1, 1))
    with pytest.raises(ValueError, match="2 images, but boxes for 1"):
        pooler()(features(), boxes(1))


SHAPES = {f"p{i}": ShapeSpec(channels=32, stride=2**i) for i in (2, 3, 4, 5, 6)}


def test_from_config():
    cfg = tiny_cfg(
        *("MODEL.ROI_BOX_HEAD.AFP.ADAPTATION", "conv"),
        *("MODEL.ROI_BOX_HEAD.AFP.FUSION", "mean"),
        *("MODEL.ROI_BOX_HEAD.CONV_DIM", 64),
        *("MODEL.ROI_BOX_HEAD.NORM", "GN"),
        *("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign"),
        *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [48, 16]),
    )
    box = AdaptiveROIPooler(cfg, SHAPES, "ROI_BOX_HEAD")
    assert (box.fusion, box.adaptation, box.pooler_type) == ("mean", "conv", "ROIAlign")
    assert box.output_shape == ShapeSpec(channels=64, height=7, width=7)
    assert box.adaptation_layers.norm.num_groups == 4 * 32
    mask = AdaptiveROIPooler(cfg, SHAPES, "ROI_MASK_HEAD")
    assert mask.output_shape == ShapeSpec(channels=24, height=14, width=14)
    keypoint = AdaptiveROIPooler(cfg, SHAPES, "ROI_KEYPOINT_HEAD")
    assert keypoint.output_shape.channels == 48
    assert keypoint.adaptation_layers.norm is None


@pytest.mark.parametrize(
    "head, key, value, message",
    [
        ("BOX", "AFP.FUSION", "min", "MODEL.ROI_BOX_HEAD.AFP.FUSION.*'min'.*'max'"),
        ("BOX", "AFP.ADAPTATION", "x", "MODEL.ROI_BOX_HEAD.AFP.ADAPTATION.*'conv', 'fc', 'none'"),
        ("MASK", "AFP.ADAPTATION", "fc", "MODEL.ROI_MASK_HEAD.AFP.ADAPTATION.*'conv', 'none'"),
        ("KEYPOINT", "AFP.ADAPTATION", "fc", "MODEL.ROI_KEYPOINT_HEAD.AFP.ADAPTATION"),
        ("MASK", "POOLER_TYPE", "", "MODEL.ROI_MASK_HEAD.POOLER_TYPE.*'ROIAlignV2'"),
        ("KEYPOINT", "CONV_DIMS", [], "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS is empty.*'conv'"),
        ("BOX", "NUM_CONV", 2, "ADAPTATION is 'fc'.*MODEL.ROI_BOX_HEAD.NUM_CONV is 2.*must be 0"),
    ],
)
def test_bad_config_values(head, key, value, message):
    cfg = tiny_cfg(f"MODEL.ROI_{head}_HEAD.{key}", value)
    with pytest.raises(ConfigError, match=message):
        AdaptiveROIPooler(cfg, SHAPES, f"ROI_{head}_HEAD")


@pytest.mark.parametrize(
    "in_features, message",
    [
        (["p2", "p4"], "without a gap"),
        (["p3", "p2"], "fine to coarse"),
        (["p2", "c3"], "p2, p3, p4, p5, p6"),
        ([], "must list"),
    ],
)
def test_bad_levels(in_features, message):
    cfg = tiny_cfg("MODEL.ROI_HEADS.IN_FEATURES", in_features)
    with pytest.raises(ConfigError, match=f"MODEL.ROI_HEADS.IN_FEATURES.*{message}"):
        AdaptiveROIPooler(cfg, SHAPES, "ROI_BOX_HEAD")


def test_levels_of_different_width():
    shapes = {**SHAPES, "p3": ShapeSpec(channels=16, stride=8)}
    with pytest.raises(ConfigError, match="MODEL.ROI_HEADS.IN_FEATURES.*width"):
        AdaptiveROIPooler(tiny_cfg(), shapes, "ROI_BOX_HEAD")


def test_sampling_ratio_of_the_config():
    shapes = {f"p{i}": ShapeSpec(channels=32, stride=2**i) for i in (2, 3, 4, 5)}
    cfg = tiny_cfg("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 3)
    box = AdaptiveROIPooler(cfg, shapes, "ROI_BOX_HEAD")
    assert box.sampling_ratio == 3 and box.scales == SCALES
