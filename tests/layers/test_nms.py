"""Against plain loops over pairs of boxes, and against the package ensemble-boxes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from panet_d2.layers import box_voting, soft_nms

from ..common import DEVICES

SETTINGS = dict(max_examples=60)


def iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / area if both > 0 else 0.0


def slow_soft_nms(boxes, scores, classes, method, iou_threshold, sigma, score_threshold):
    """
    Class by class, as the paper's pseudocode. Returns indices and scores, and the least difference
    of scores that decided which box came first: rounding can decide otherwise.
    """
    found, margin = [], math.inf
    for c in set(classes):
        left = {i: s for i, s in enumerate(scores) if classes[i] == c}
        while left:
            best = max(left, key=lambda i: (left[i], -i))
            score = left.pop(best)
            for i, other in left.items():
                if (score, other) != (scores[best], scores[i]):  # not a tie of unchanged scores
                    margin = min(margin, score - other)
            if score > score_threshold:
                found.append((best, score))
            for i in left:
                overlap = iou(boxes[best], boxes[i])
                if method == "gaussian":
                    left[i] *= math.exp(-(overlap**2) / sigma)
                elif overlap > iou_threshold:
                    left[i] *= 1 - overlap
    return sorted(found, key=lambda pair: (-pair[1], pair[0])), margin


def slow_voting(boxes, scores, classes, keep, threshold, method, temperature):
    new_boxes, new_scores = [], []
    for k in keep:
        voters = [
            i
            for i in range(len(boxes))
            if i == k or (classes[i] == classes[k] and iou(boxes[i], boxes[k]) >= threshold)
        ]
        weights = [scores[i] for i in voters]
        if not sum(weights):
            weights = [1.0] * len(voters)
        new_boxes.append(np.average([boxes[i] for i in voters], axis=0, weights=weights))
        if method == "id":
            new_scores.append(scores[k])
            continue
        chances = [scores[i] for i in voters]
        if method == "temp_avg":
            yes = [p ** (1 / temperature) for p in chances]
            no = [(1 - p) ** (1 / temperature) for p in chances]
            chances = [y / (y + n) for y, n in zip(yes, no)]
        new_scores.append(np.mean(chances))
    return new_boxes, new_scores


@st.composite
def detections(draw, least=0):
    """Boxes on a coarse grid, so that many are equal, touch or have no area; with tied scores."""
    count = draw(st.integers(least, 14))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    corners = rng.integers(0, 7, (count, 4)).astype(float) * 8
    corners = np.sort(corners.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
    scores = rng.integers(0, 9, count) / 8
    if draw(st.booleans()):  # no ties
        scores = rng.random(count)
    return corners, scores, rng.integers(0, 1 + draw(st.integers(0, 2)), count)


def tensors(boxes, scores, classes, device="cpu"):
    kinds = (torch.float64, torch.float64, torch.long)
    return [
        torch.as_tensor(x, dtype=t, device=device) for x, t in zip((boxes, scores, classes), kinds)
    ]


def assert_same_soft_nms(found, expected):
    """Up to the order of scores that are equal but for rounding."""
    keep, scores = found[0].cpu(), found[1].cpu().double()
    assert sorted(keep.tolist()) == sorted(i for i, _ in expected)
    by_index = dict(zip(keep.tolist(), scores.tolist()))
    assert [by_index[i] for i, _ in expected] == pytest.approx([s for _, s in expected], abs=1e-5)
    assert (scores[1:] <= scores[:-1] + 1e-6).all()


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@settings(**SETTINGS)
@given(data=detections(), iou_threshold=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_soft_nms_is_the_plain_loop(method, data, iou_threshold):
    options = dict(method=method, iou_threshold=iou_threshold, sigma=0.4, score_threshold=0.03)
    expected, margin = slow_soft_nms(*data, **options)
    assume(margin > 1e-6 and all(abs(s - 0.03) > 1e-4 for _, s in expected))
    assert_same_soft_nms(soft_nms(*tensors(*data), **options), expected)


@settings(**SETTINGS)
@given(
    data=detections(),
    method=st.sampled_from(["id", "avg", "temp_avg"]),
    threshold=st.sampled_from([0.01, 0.5, 0.8, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_voting_is_the_plain_loop(data, method, threshold, temperature):
    boxes, scores, classes = data
    keep = np.argsort(-scores)[::2].copy()
    new_boxes, new_scores = slow_voting(*data, keep, threshold, method, temperature)
    found = box_voting(
        *tensors(*data),
        torch.as_tensor(keep),
        torch.as_tensor(scores[keep]),
        iou_threshold=threshold,
        method=method,
        temperature=temperature,
    )
    assert found[0].shape == (len(keep), 4)
    np.testing.assert_allclose(found[0], np.reshape(new_boxes, (-1, 4)), atol=1e-5)
    np.testing.assert_allclose(found[1], new_scores, atol=1e-6)


def crowd(count=1000, seed=0):
    rng = np.random.default_rng(seed)
    corner = rng.random((count, 2)) * 0.8
    size = 0.05 + rng.random((count, 2)) * 0.15
    return np.hstack([corner, corner + size]), rng.random(count), rng.integers(0, 3, count)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_a_thousand_boxes(method, device):
    data = crowd()
    options = dict(method=method, iou_threshold=0.3, sigma=0.5, score_threshold=0.01)
    expected, _ = slow_soft_nms(*data, **options)
    assert_same_soft_nms(soft_nms(*tensors(*data, device), **options), expected)
    keep, scores = soft_nms(*tensors(*data, device), **options, limit=100)
    assert keep.tolist() == [i for i, _ in expected[:100]]
    new_boxes, new_scores = box_voting(
        *tensors(*data, device), keep, scores, iou_threshold=0.5, method="avg"
    )
    expected = slow_voting(*data, keep.tolist(), 0.5, "avg", 1.0)
    np.testing.assert_allclose(new_boxes.cpu(), expected[0], atol=1e-6)
    np.testing.assert_allclose(new_scores.cpu(), expected[1], atol=1e-6)


@pytest.mark.parametrize("number, method", [(1, "linear"), (2, "gaussian")])
def test_soft_nms_is_that_of_ensemble_boxes(number, method):
    library = pytest.importorskip("ensemble_boxes.ensemble_boxes_nms")
    boxes, scores, _ = crowd(300)
    options = dict(iou_threshold=0.3, sigma=0.5, score_threshold=0.01)
    changed = scores.copy()  # it returns the indices and changes the scores in place
    keep = library.cpu_soft_nms_float(boxes.copy(), changed, 0.3, 0.5, 0.01, number)
    expected = list(zip(keep.tolist(), changed[changed > 0.01].tolist()))
    assert len(expected) > 50
    one_class = np.zeros(len(boxes))
    assert_same_soft_nms(
        soft_nms(*tensors(boxes, scores, one_class), method=method, **options), expected
    )


def test_one_box_and_none():
    for count in (0, 1):
        data = tensors(*(x[:count] for x in crowd()))
        keep, scores = soft_nms(*data)
        assert keep.tolist() == list(range(count)) and torch.equal(scores, data[1])
        boxes, scores = box_voting(*data, keep, scores)
        assert torch.equal(boxes, data[0]) and torch.equal(scores, data[1])


def test_duplicates():
    boxes = torch.tensor([[0.0, 0, 8, 8]]).repeat(5, 1)
    scores, classes = torch.tensor([0.5, 0.9, 0.9, 0.2, 0.9]), torch.tensor([0, 0, 0, 0, 1])
    keep, kept = soft_nms(boxes, scores, classes)
    assert keep.tolist() == [1, 4] and kept.tolist() == pytest.approx([0.9, 0.9])
    voted, mean = box_voting(boxes, scores, classes, keep, kept, method="avg")
    torch.testing.assert_close(voted, boxes[:2])
    assert mean.tolist() == pytest.approx([0.625, 0.9])


def test_half_precision_does_not_limit_the_scores():
    boxes, scores, classes = (torch.as_tensor(x) for x in crowd(50))
    keep, new = soft_nms(boxes.half(), scores.half(), classes)
    assert new.dtype == torch.float32 and len(keep)
    assert box_voting(boxes.half(), scores.half(), classes, keep, new)[0].dtype == torch.float32


def test_voting_keeps_its_precision_under_autocast():
    boxes = torch.tensor([[1000.25, 900.5, 1300.75, 1200.5], [1001.0, 901.0, 1301.0, 1201.0]])
    scores, classes, keep = torch.tensor([0.9, 0.6]), torch.zeros(2), torch.tensor([0])
    expected, _ = box_voting(boxes, scores, classes, keep, scores[keep])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        voted, _ = box_voting(boxes, scores, classes, keep, scores[keep])
    assert torch.equal(voted, expected)


def test_what_is_wrong_is_rejected():
    boxes, scores, classes = tensors(*crowd(4))
    keep = torch.arange(2)
    scores[3] = math.nan
    for reject in (
        lambda: soft_nms(boxes, scores, classes),
        lambda: box_voting(boxes, scores, classes, keep, scores[keep]),
    ):
        with pytest.raises(ValueError, match="NaN"):
            reject()
    with pytest.raises(ValueError, match="'hard'.*linear, gaussian"):
        soft_nms(boxes, scores, classes, method="hard")
    with pytest.raises(ValueError, match="'max'.*id, avg"):
        box_voting(boxes, scores, classes, keep, scores[keep], method="max")
