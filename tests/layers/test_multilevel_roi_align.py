from importlib import import_module

import pytest
import torch
from torchvision.ops import roi_align

from panet_d2.layers import FUSIONS, fuse_levels, multilevel_roi_align
from panet_d2.layers.multilevel_roi_align import multilevel_roi_align_reference

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
BOXES = [
    [0, 10, 12, 60, 44],
    [1, 0, 0, 128, 96],
    [0, -20, -20, 30, 30],  # partly outside
    [1, 300, 300, 340, 330],  # outside
    [0, 50, 50, 50, 50],  # no area
]


def pyramid(dtype=torch.float64, channels=5):
    return [torch.randn(2, channels, int(96 * s), int(128 * s), dtype=dtype) for s in SCALES]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_all_levels_are_torchvisions(aligned, sampling_ratio):
    features, boxes = pyramid(), torch.tensor(BOXES, dtype=torch.float64)
    result = multilevel_roi_align(features, boxes, SCALES, (7, 5), sampling_ratio, aligned)
    assert result.shape == (4, len(BOXES), 5, 7, 5)
    for level, feature, scale in zip(result, features, SCALES):
        expected = roi_align(feature, boxes, (7, 5), scale, sampling_ratio, aligned)
        torch.testing.assert_close(level, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fuse", FUSIONS)
def test_fusion_values_and_gradients(fuse):
    features = [f.requires_grad_() for f in pyramid(channels=1)]
    boxes = torch.tensor(BOXES[:3], dtype=torch.float64)

    def fused(*features):
        return multilevel_roi_align(list(features), boxes, SCALES, (2, 2), 1, True, fuse)

    levels = multilevel_roi_align(features, boxes, SCALES, (2, 2), 1, True)
    expected = {
        "max": levels.amax(0),
        "sum": levels.sum(0),
        "mean": levels.mean(0),
        "product": levels.prod(0),
    }[fuse]
    torch.testing.assert_close(fused(*features), expected)
    assert torch.autograd.gradcheck(fused, features, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_pooled_in_float32(dtype):
    features = pyramid(dtype)
    # In half precision this box would move by up to a pixel.
    boxes = torch.tensor([[0, 2051.3, 1033.7, 2083.9, 1065.1]])
    features[0] = torch.randn(2, 5, 300, 600).to(dtype)
    features[1:] = [torch.randn(2, 5, 300 >> i, 600 >> i).to(dtype) for i in (1, 2, 3)]
    result = multilevel_roi_align(features, boxes, SCALES, (7, 7), 2, True)
    exact = multilevel_roi_align(
        [f.double() for f in features], boxes.double(), SCALES, (7, 7), 2, True
    )
    assert result.dtype == dtype
    # Half a unit in the last place of the result, and float32's error below that.
    ulp = torch.finfo(dtype).eps * exact.abs() / 2
    assert ((result.double() - exact).abs() <= ulp + 1e-4).all()


def test_reference_can_be_chosen(monkeypatch):
    args = pyramid(torch.float32), torch.tensor(BOXES).float(), SCALES, (7, 7), 2, True
    expected = multilevel_roi_align_reference(*args)
    called = []
    # By import_module, because the package has a function of the module's name.
    module = import_module("panet_d2.layers.multilevel_roi_align")
    monkeypatch.setattr(
        module, "roi_align_levels_cpu", lambda *a: called.append(a) or iter(expected)
    )
    multilevel_roi_align(*args)
    assert len(called) == 1
    monkeypatch.setenv("PANET_D2_ROI_ALIGN", "reference")
    assert torch.equal(multilevel_roi_align(*args), expected)
    assert len(called) == 1


def test_no_boxes():
    for fuse, shape in [(None, (4, 0, 5, 7, 7)), ("max", (0, 5, 7, 7))]:
        result = multilevel_roi_align(
            pyramid(torch.float32), torch.zeros(0, 5), SCALES, (7, 7), 2, True, fuse
        )
        assert result.shape == shape


def test_unknown_fusion():
    with pytest.raises(ValueError, match="median.*max, sum, mean, product"):
        fuse_levels([torch.zeros(1)] * 2, "median")
