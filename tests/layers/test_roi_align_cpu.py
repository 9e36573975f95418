"""Against torchvision, which is the definition."""

import pytest
import torch

from panet_d2.layers.multilevel_roi_align import multilevel_roi_align_reference
from panet_d2.layers.roi_align_cpu import roi_align_levels_cpu as levels_cpu

SCALES = [1 / 4, 1 / 8, 1 / 16]


def roi_align_levels_cpu(*args):
    return torch.stack(list(levels_cpu(*args)))


def features(dtype, channels=3):
    sizes = [(24, 32), (12, 16), (6, 8)]
    return [torch.randn(2, channels, *size, dtype=dtype, requires_grad=True) for size in sizes]


def random_boxes(dtype, count=200):
    """Of all sizes, a third of them across the border of the 96 x 128 image or outside of it."""
    corner = torch.rand(count, 2, dtype=dtype) * torch.tensor([160, 128]) - 24
    size = 2 ** (torch.rand(count, 2, dtype=dtype) * 8)
    image = torch.randint(0, 2, (count, 1)).to(dtype)
    return torch.cat([image, corner, corner + size], dim=1)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("output_size", [(7, 7), (14, 14), (3, 5), (1, 1)])
def test_values_and_gradients(aligned, ratio, output_size):
    x, boxes = features(torch.float32), random_boxes(torch.float32)
    args = (boxes, SCALES, output_size, ratio, aligned)
    ours, theirs = roi_align_levels_cpu(x, *args), multilevel_roi_align_reference(x, *args)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x, upstream),
        torch.autograd.grad(theirs, x, upstream),
        rtol=1e-5,
        atol=1e-4,  # up to thousands of terms a pixel
    )


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(
    "box",
    [
        [10, 10, 10, 10],  # no area
        [40, 40, 20, 20],  # turned inside out
        [-100, -100, -50, -50],
        [500, 500, 600, 600],
        [-1000, -1000, 2000, 2000],
        [0, 0, 128, 96],
        [126, 94, 128, 96],
        [-4, -4, 0, 0],  # samples up to a pixel outside take the border's value
        [128, 96, 132, 100],
    ],
)
def test_boxes_at_the_border(box, aligned):
    x = features(torch.float64)
    boxes = torch.tensor([[1, *box]], dtype=torch.float64)
    args = (boxes, SCALES, (7, 7), 2, aligned)
    torch.testing.assert_close(
        roi_align_levels_cpu(x, *args), multilevel_roi_align_reference(x, *args)
    )


@pytest.mark.parametrize("low", [-1.0, -1.0 - 1e-9])
def test_a_sample_exactly_one_pixel_outside(low):
    """It takes the border's value, and one further out is zero."""
    x = [torch.ones(1, 1, 6, 8, dtype=torch.float64)]
    # One sample, in the middle of the box; without the shift by half a pixel.
    boxes = torch.tensor([[0, low - 0.5, 2.0, low + 0.5, 3.0]], dtype=torch.float64)
    args = (x, boxes, [1.0], (1, 1), 1, False)
    expected = multilevel_roi_align_reference(*args)
    assert expected.item() == (1.0 if low == -1.0 else 0.0)
    torch.testing.assert_close(roi_align_levels_cpu(*args), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_no_harm(value):
    boxes = torch.tensor([[0, value, 3, 20, 30], [0, 4, 4, 20, 20]])
    x = features(torch.float32)
    result = roi_align_levels_cpu(x, boxes, SCALES, (7, 7), 2, True)
    expected = multilevel_roi_align_reference(x, boxes[1:], SCALES, (7, 7), 2, True)
    torch.testing.assert_close(result[:, 1:], expected)


def test_gradcheck():
    boxes = random_boxes(torch.float64, 4)

    def pool(*x):
        return roi_align_levels_cpu(list(x), boxes, SCALES, (2, 2), 2, True)

    assert torch.autograd.gradcheck(pool, features(torch.float64, 1), fast_mode=True)


def test_no_boxes():
    x = features(torch.float32)
    result = roi_align_levels_cpu(x, torch.zeros(0, 5), SCALES, (7, 7), 2, True)
    assert result.shape == (3, 0, 3, 7, 7)
    assert all((g == 0).all() for g in torch.autograd.grad(result.sum(), x))


def test_channels_last_features():
    x, boxes = features(torch.float32), random_boxes(torch.float32, 20)
    last = [f.to(memory_format=torch.channels_last) for f in x]
    args = (boxes, SCALES, (7, 7), 2, True)
    assert torch.equal(roi_align_levels_cpu(x, *args), roi_align_levels_cpu(last, *args))
