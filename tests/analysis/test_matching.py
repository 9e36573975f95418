import contextlib
import io
import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from panet_d2.analysis import (
    average_precision,
    draw_comparison,
    ground_truth,
    match_predictions,
    object_recall,
    precision_recall,
)
from panet_d2.data import register_coco_file
from panet_d2.errors import DataError

from ..common import write_coco


@pytest.fixture
def coco(tmp_path):
    json_file, _ = write_coco(tmp_path, num_images=3)
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(json_file)


def prediction(annotation, score=0.9, **changes):
    keys = ("image_id", "category_id", "bbox", "segmentation")
    return {**{k: annotation[k] for k in keys}, "score": score, **changes}


def test_ground_truth(tmp_path):
    register_coco_file("true", *write_coco(tmp_path, num_images=3))
    assert len(ground_truth("true").anns) == 6
    DatasetCatalog.register("true_otherwise", list)
    with pytest.raises(DataError, match="'true_otherwise' has no annotation file in COCO format"):
        ground_truth("true_otherwise")


def test_perfect(coco):
    results = [prediction(a) for a in coco.anns.values()]
    matches = match_predictions(coco, results)
    assert {i: len(m.found) for i, m in matches.items()} == {1: 2, 2: 2, 3: 2}
    assert all(m.error_rate == 0 for m in matches.values())
    for iou_type in ("segm", "bbox"):
        ap = average_precision(coco, results, iou_type)
        assert ap == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})


def test_wrong_class_low_score_duplicate_and_miss(coco):
    first, second = (a for a in coco.anns.values() if a["image_id"] == 1)
    results = [
        prediction(first),
        prediction(first, score=0.8),  # found already
        prediction(second, category_id=1 + second["category_id"] % 3),
        prediction(second, score=0.4),  # below the threshold
    ]
    matches = match_predictions(coco, results)
    match = matches[1]
    assert [p["score"] for p in match.found] == [0.9]
    assert sorted(p["score"] for p in match.false_positives) == [0.8, 0.9]
    assert [a["id"] for a in match.missed] == [second["id"]]
    assert match.error_rate == pytest.approx(3 / 4)
    assert len(matches[2].missed) == 2 and matches[2].error_rate == 1


def test_found_objects_are_those_of_the_predictions(coco):
    results = [prediction(a, score=0.5 + a["id"] / 100) for a in coco.anns.values()]
    for match in match_predictions(coco, results).values():
        assert [o["bbox"] for o in match.objects] == [p["bbox"] for p in match.found]


def test_precision_by_recall(coco):
    """Of the two objects of one class, the better scored prediction is right and half are found."""
    kept = [a for a in coco.anns.values() if a["category_id"] == 1]
    results = [prediction(kept[0]), prediction(kept[0], score=0.5)]
    recall, precision = precision_recall(coco, results)
    classes = 3  # none of the other classes' objects is found
    assert recall[0] == 0 and recall[-1] == 1 and len(recall) == len(precision)
    assert precision[0] == pytest.approx(1 / classes)
    reached = 1 / len(kept)
    assert (precision[recall <= reached] > 0).all() and not precision[recall > reached].any()


def test_overlap_decides(coco):
    annotation = coco.anns[1]
    x, y, w, h = annotation["bbox"]
    mask = np.zeros((64, 96), np.uint8)
    mask[y : y + h, x : x + int(0.6 * w)] = 1
    part = mask_util.encode(np.asfortranarray(mask))
    part["counts"] = part["counts"].decode()
    results = [prediction(annotation, segmentation=part)]
    assert len(match_predictions(coco, results, iou_threshold=0.5)[1].found) == 1
    assert len(match_predictions(coco, results, iou_threshold=0.75)[1].found) == 0


def test_no_predictions(coco):
    matches = match_predictions(coco, [])
    assert [len(m.missed) for m in matches.values()] == [2, 2, 2]
    assert average_precision(coco, [])["AP"] == 0


def test_crowds_are_neither_right_nor_wrong(coco):
    coco.anns[1]["iscrowd"] = 1
    matches = match_predictions(coco, [prediction(coco.anns[1])])
    assert not matches[1].found and not matches[1].false_positives
    assert len(matches[1].missed) == 1


@pytest.mark.parametrize("find", [match_predictions, object_recall, average_precision])
def test_results_of_other_images_are_refused(coco, find):
    results = [prediction(coco.anns[1], image_id=77)]
    with pytest.raises(DataError, match="not in the dataset.*77"):
        find(coco, results)


def test_recall_by_size(coco):
    """Six objects of 24 x 24 pixels, small ones, of which one is called large and one a crowd."""
    coco.anns[2]["area"] = 100**2
    coco.anns[6]["iscrowd"] = 1
    kept = [coco.anns[i] for i in (1, 2, 3, 6)]
    recall = object_recall(coco, [prediction(a, score=0.01) for a in kept])
    expected = {"all": 60, "small": 50, "medium": np.nan, "large": 100}  # 3 of 5, 2 of 4, 1 of 1
    assert recall == pytest.approx(expected, nan_ok=True)


def test_each_prediction_finds_one_object(coco):
    coco.anns[2].update(bbox=coco.anns[1]["bbox"], category_id=coco.anns[1]["category_id"])
    once, twice = ([prediction(coco.anns[1])] * n for n in (1, 2))
    assert object_recall(coco, once, "bbox")["all"] == pytest.approx(100 / 6)
    assert object_recall(coco, twice, "bbox")["all"] == pytest.approx(200 / 6)


def test_recall_of_any_class(coco):
    results = [prediction(a, category_id=1) for a in coco.anns.values()]
    assert object_recall(coco, results)["all"] == pytest.approx(100 * 2 / 6)
    assert object_recall(coco, results, use_categories=False)["all"] == pytest.approx(100)


@pytest.mark.parametrize("iou_threshold, found", [(0.5, 1), (0.6, 0)])
def test_recall_by_overlap(coco, iou_threshold, found):
    x, y, w, h = coco.anns[1]["bbox"]
    results = [prediction(coco.anns[1], bbox=[x, y, 13 * w / 24, h])]  # 0.54
    recall = object_recall(coco, results, "bbox", iou_threshold)
    assert recall["all"] == pytest.approx(100 * found / 6)


def test_recall_without_predictions(coco):
    recall = object_recall(coco, [])
    assert recall["all"] == recall["small"] == 0 and np.isnan(recall["large"])


def test_agrees_with_the_evaluator(coco, tmp_path):
    """With detections of every kind, against pycocotools' own summary."""
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    results = [prediction(a, score=rng.random()) for a in coco.anns.values() for _ in range(2)]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(coco, coco.loadRes(json.loads(json.dumps(results))), "segm")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    ap = average_precision(coco, results)
    assert [ap["AP"], ap["AP50"], ap["AP75"]] == pytest.approx(list(100 * evaluator.stats[:3]))


def test_pictures_show_the_errors(coco):
    image = np.zeros((64, 96, 3), np.uint8)
    first, second = (a for a in coco.anns.values() if a["image_id"] == 1)
    empty = {**first, "bbox": [70, 50, 10, 10]}
    empty.pop("segmentation")
    results = [prediction(first), prediction(second, category_id=1 + second["category_id"] % 3)]
    match = match_predictions(coco, results)[1]
    picture = draw_comparison(image, coco.imgToAnns[1], match, coco)
    panel = picture.shape[1] // 2 - 3
    assert picture.shape == (64 * 6 + 26, 2 * 96 * 6 + 6, 3)  # enlarged six times
    right = picture[26:, panel + 6 :].astype(int)

    def centre(annotation):
        x, y, w, h = annotation["bbox"]
        return right[6 * (y + h // 2) + 3, 6 * (x + w // 2) + 3]

    assert centre(first)[1] > centre(first)[0]  # found: green
    assert centre(second)[0] > centre(second)[1]  # false positive: red
    assert right[3, 3].tolist() == [0, 0, 0]


def test_an_iou_between_the_thresholds(coco):
    """An IoU of 17 / 24 = 0.71 is right at five of ten thresholds."""
    results = [prediction(a, bbox=[*a["bbox"][:2], 17, 24]) for a in coco.anns.values()]
    ap = average_precision(coco, results, "bbox")
    assert ap == pytest.approx({"AP": 50, "AP50": 100, "AP75": 0})


def test_no_limit_of_what_is_found(coco):
    """COCO's limit of 100 is not for what is found and missed."""
    results = [prediction(coco.anns[1], score=0.99 - i / 1000) for i in range(150)]
    match = match_predictions(coco, results)[1]
    assert len(match.found) == 1 and len(match.false_positives) == 149


def test_no_limit_of_the_recall(coco):
    coco.anns[2]["category_id"] = coco.anns[1]["category_id"]
    results = [prediction(coco.anns[1], score=0.99 - i / 1000) for i in range(150)]
    results.append(prediction(coco.anns[2], score=0.1))
    assert object_recall(coco, results)["all"] == pytest.approx(100 * 2 / 6)


def test_results_without_masks_match_by_box(coco):
    x, y, w, h = coco.anns[1]["bbox"]
    quarter = np.zeros((64, 96), np.uint8, order="F")
    quarter[y : y + h // 2, x : x + w // 2] = 1
    coco.anns[1]["segmentation"] = mask_util.encode(quarter)
    box = prediction(coco.anns[1])
    del box["segmentation"]
    assert len(match_predictions(coco, [box])[1].found) == 1


def test_crowds_are_not_missed(coco):
    """A crowd that nothing has found is not missed."""
    coco.anns[1]["iscrowd"] = 1
    assert [a["id"] for a in match_predictions(coco, [])[1].missed] == [2]


def test_ap_of_classes_with_objects(coco):
    """Two of the three classes have no objects."""
    for annotation in coco.anns.values():
        annotation["category_id"] = 1
    results = [prediction(a) for a in coco.anns.values()]
    assert average_precision(coco, results)["AP"] == pytest.approx(100)


def test_precision_of_classes_with_objects(coco):
    """Two of the three classes have no objects."""
    for annotation in coco.anns.values():
        annotation["category_id"] = 1
    _, precision = precision_recall(coco, [prediction(a) for a in coco.anns.values()])
    assert precision == pytest.approx(np.ones(101))


def test_a_score_of_the_threshold_counts(coco):
    """A score of the threshold is not lower."""
    results = [prediction(coco.anns[1], score=0.5)]
    assert len(match_predictions(coco, results, score_threshold=0.5)[1].found) == 1
