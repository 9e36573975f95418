import cv2
import numpy as np
import pytest
import torch

from panet_d2.errors import ConfigError, DataError
from panet_d2.export import Agreement, sample_images
from panet_d2.export.verify import TOLERANCES, blank_images

from ..common import tiny_cfg


def detections(count: int) -> dict:
    corner = torch.arange(count)[:, None] * 20.0
    return {
        "pred_boxes": torch.cat([corner, corner, corner + 30, corner + 30], dim=1),
        "pred_classes": torch.arange(count) % 3,
        "scores": torch.linspace(0.9, 0.1, count),
        "pred_masks": torch.rand(count, 1, 28, 28),
    }


def compare(expected: dict, found: dict) -> Agreement:
    agreement = Agreement()
    agreement.add(expected, found)
    return agreement


def test_order_does_not_matter():
    expected, order = detections(8), torch.randperm(8)
    agreement = compare(expected, {name: value[order] for name, value in expected.items()})
    assert agreement.complaint() == "" and agreement.unmatched == 0
    assert set(agreement.differences.values()) == {0.0}


@pytest.mark.parametrize("name", ["scores", "pred_masks"])
@pytest.mark.parametrize("error, ok", [(0.9, True), (1.1, False), (float("nan"), False)])
def test_one_value_that_differs(name, error, ok):
    expected, found = detections(8), detections(8)
    found[name] = expected[name].double()
    found[name].view(-1)[5] += error * TOLERANCES[name]
    if name == "scores":
        found["pred_masks"] = expected["pred_masks"]
    agreement = compare(expected, found)
    assert (agreement.complaint() == "") == ok
    assert ok or f"{name} differ" in agreement.complaint()
    # What agrees afterwards takes nothing back.
    agreement.add(expected, expected)
    assert (agreement.complaint() == "") == ok


@pytest.mark.parametrize(
    "column, error, ok", [(0, 0.04, True), (1, 0.06, False), (2, 4.0, True), (2, 6.0, False)]
)
def test_keypoints(column, error, ok):
    """Their scores are compared relative to their size."""
    expected = {**detections(8), "pred_keypoints": torch.full((8, 17, 3), 100.0)}
    found = {**expected, "pred_keypoints": expected["pred_keypoints"].clone()}
    found["pred_keypoints"][3, 5, column] += error
    assert (compare(expected, found).complaint() == "") == ok


@pytest.mark.parametrize("change", ["box", "class", "missing", "twice", "none"])
def test_another_detection(change):
    expected = detections(8)
    found = {name: value.clone() for name, value in expected.items()}
    if change == "box":
        found["pred_boxes"][2, 1] += 0.06
    elif change == "class":
        found["pred_classes"][2] += 1
    else:
        index = {"missing": range(7), "twice": [*range(8), 2], "none": []}[change]
        found = {name: value[list(index)] for name, value in found.items()}
    agreement = compare(expected, found)
    count = {"box": 2, "class": 2, "missing": 1, "twice": 1, "none": 8}[change]
    assert agreement.unmatched == count
    assert f"{count} detections are found by only one" in agreement.complaint()


def test_one_in_a_hundred_may_be_another():
    expected = detections(200)
    found = {name: value[:-2] for name, value in expected.items()}
    assert compare(expected, found).complaint() == ""
    found = {name: value[:-3] for name, value in expected.items()}
    assert compare(expected, found).complaint() != ""


def test_images_without_detections():
    agreement = compare(detections(0), detections(0))
    assert (agreement.images, agreement.empty_images, agreement.complaint()) == (1, 1, "")
    assert "1 of them without detections" in str(agreement)
    agreement.add(detections(0), detections(1))
    assert agreement.complaint() != ""


@pytest.fixture
def files(tmp_path) -> list:
    for i in range(2):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((40, 60, 3), (10 * i, 20, 30), np.uint8))
    return [str(tmp_path / f"{i}.png") for i in range(2)]


def test_images_of_several_sizes(files):
    images = sample_images(tiny_cfg("INPUT.MIN_SIZE_TEST", 64), files)
    assert [tuple(i.shape) for i in images] == [(3, 64, 96), (3, 48, 72), (3, 32, 48)]
    assert images[1][:, 0, 0].tolist() == [10, 20, 30] and images[1].dtype == torch.float32
    rgb = sample_images(tiny_cfg("INPUT.FORMAT", "RGB"), files)
    assert rgb[1][:, 0, 0].tolist() == [30, 20, 10]


def test_no_images(tmp_path):
    with pytest.raises(ConfigError, match="DATASETS.TEST"):
        sample_images(tiny_cfg())
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="broken.png"):
        sample_images(tiny_cfg(), [str(tmp_path / "broken.png")])


def test_blank_images():
    mean = torch.tensor([1.0, 2, 3])[:, None, None]
    first, *others = blank_images(mean)
    assert (first - mean).abs().max() == 0 and all(o.unique().numel() == 1 for o in others)


def test_sample_images_of_one_channel(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((64, 96, 3), 9, np.uint8))
    cfg = tiny_cfg("INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [9.0], "MODEL.PIXEL_STD", [1.0])
    assert [i.shape[0] for i in sample_images(cfg, [str(tmp_path / "a.png")])] == [1, 1, 1]
    assert [i.shape for i in blank_images(torch.tensor([[[9.0]]]))] == [(1, 96, 160)] * 3
    cfg.MODEL.PIXEL_MEAN = [9.0] * 4
    with pytest.raises(ConfigError, match="PIXEL_MEAN has 4 values, but images .*'L' have 1"):
        sample_images(cfg, [str(tmp_path / "a.png")])


@pytest.mark.parametrize(
    "picture, message",
    [
        (np.zeros((4, 12000, 3), np.uint8), "a.png: it is too narrow"),
        (np.zeros((40, 60), np.uint16), "a.png: it has more than 8 bits per channel"),
    ],
)
def test_sample_images_that_cannot_be_used(tmp_path, picture, message):
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    with pytest.raises(DataError, match=message):
        sample_images(tiny_cfg(), [str(tmp_path / "a.png")])
