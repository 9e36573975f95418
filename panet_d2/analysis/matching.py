"""Which predictions found which objects, image by image, from COCO results."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from typing import Dict, List, Tuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..errors import DataError

__all__ = [
    "ImageMatch",
    "average_precision",
    "ground_truth",
    "match_predictions",
    "object_recall",
    "precision_recall",
]


@dataclass
class ImageMatch:
    """
    The predictions and objects of one image. Predictions are COCO results, objects COCO
    annotations, both as dicts.
    """

    found: List[dict] = field(default_factory=list)  # predictions that match an object
    objects: List[dict] = field(default_factory=list)  # the objects that these match, in order
    false_positives: List[dict] = field(default_factory=list)  # predictions that match none
    missed: List[dict] = field(default_factory=list)  # objects that no prediction matches

    @property
    def error_rate(self) -> float:
        """Share of what is wrong among all that is there: 0 for a perfect image, at most 1."""
        wrong = len(self.false_positives) + len(self.missed)
        return wrong / max(wrong + len(self.found), 1)


def ground_truth(name: str) -> COCO:
    """
    Args:
        name (str): a registered data set in COCO format.

    Returns:
        COCO: its annotations.

    Raises:
        DataError: if it is in another format.
    """
    DatasetCatalog.get(name)  # a data set that is generated is made here
    json_file = MetadataCatalog.get(name).get("json_file")
    if json_file is None:
        raise DataError(f"the data set {name} has no annotation file in COCO's format.")
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(json_file)


def _evaluate(coco: COCO, results: List[dict], iou_type: str, max_detections: int) -> COCOeval:
    unknown = {result["image_id"] for result in results} - set(coco.getImgIds())
    if unknown:
        raise DataError(
            f"the results are of images that the data set does not have, such as {min(unknown)}."
        )
    found = coco.loadRes(results) if results else COCO()  # which cannot load an empty list
    evaluator = COCOeval(coco, found, iou_type)
    evaluator.params.maxDets = [1, 10, max_detections]
    return evaluator


def match_predictions(
    coco: COCO, results: List[dict], score_threshold: float = 0.5, iou_threshold: float = 0.5
) -> Dict[int, ImageMatch]:
    """
    Match as the COCO evaluation does: within a category, by falling score, each object once.

    Args:
        coco (COCO): the ground truth.
        results (list[dict]): predictions in COCO's result format; with masks if they have any.
        score_threshold (float): leave out predictions below this score.
        iou_threshold (float): overlap from which a prediction has found an object.

    Returns:
        dict[int, ImageMatch]: by image id, for all images of ``coco``. Matches with crowd regions
        are neither right nor wrong and appear nowhere.

    Raises:
        DataError: if there are results of other images.
    """
    matches = {image_id: ImageMatch() for image_id in coco.getImgIds()}
    kept = [r for r in results if r["score"] >= score_threshold]
    if not kept:
        for image_id, match in matches.items():
            match.missed = [a for a in coco.imgToAnns[image_id] if not a.get("iscrowd", 0)]
        return matches
    with contextlib.redirect_stdout(io.StringIO()):
        iou_type = "segm" if "segmentation" in kept[0] else "bbox"
        evaluator = _evaluate(coco, kept, iou_type, len(kept))
        evaluator.params.iouThrs = np.array([iou_threshold])
        evaluator.params.areaRng = evaluator.params.areaRng[:1]
        evaluator.evaluate()
    for entry in filter(None, evaluator.evalImgs):
        match = matches[entry["image_id"]]
        for prediction, matched, ignored in zip(
            entry["dtIds"], entry["dtMatches"][0], entry["dtIgnore"][0]
        ):
            if ignored:
                continue
            if matched:
                match.found.append(evaluator.cocoDt.anns[prediction])
                match.objects.append(coco.anns[int(matched)])
            else:
                match.false_positives.append(evaluator.cocoDt.anns[prediction])
        for annotation, matched, ignored in zip(
            entry["gtIds"], entry["gtMatches"][0], entry["gtIgnore"]
        ):
            if not matched and not ignored:
                match.missed.append(coco.anns[annotation])
    return matches


def object_recall(
    coco: COCO,
    results: List[dict],
    iou_type: str = "segm",
    iou_threshold: float = 0.5,
    use_categories: bool = True,
) -> Dict[str, float]:
    """
    How many of the objects are found, whatever the scores and however many predictions find none.

    Args:
        coco, results, iou_type: see :func:`average_precision`.
        iou_threshold (float): overlap from which a prediction has found an object. Each finds one
            at most.
        use_categories (bool): whether it must have the object's category.

    Returns:
        dict[str, float]: in percent, of "all" objects and of those that are "small", "medium" and
        "large" in COCO's sense; NaN where there are none. Crowd regions do not count.

    Raises:
        DataError: if there are results of other images.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = _evaluate(coco, results, iou_type, max(len(results), 1))
        evaluator.params.iouThrs = np.array([iou_threshold])
        evaluator.params.useCats = int(use_categories)
        evaluator.evaluate()
    sizes = dict(zip(map(tuple, evaluator.params.areaRng), evaluator.params.areaRngLbl))
    objects, found = dict.fromkeys(sizes.values(), 0), dict.fromkeys(sizes.values(), 0)
    for entry in filter(None, evaluator.evalImgs):
        size = sizes[tuple(entry["aRng"])]
        counted = np.logical_not(entry["gtIgnore"])
        objects[size] += int(counted.sum())
        found[size] += int((entry["gtMatches"][0, counted] > 0).sum())
    return {s: 100 * found[s] / objects[s] if objects[s] else float("nan") for s in objects}


def average_precision(
    coco: COCO, results: List[dict], iou_type: str = "segm", max_detections: int = 100
) -> Dict[str, float]:
    """
    Args:
        coco (COCO): the ground truth.
        results (list[dict]): predictions in COCO's result format.
        iou_type (str): "segm" or "bbox".
        max_detections (int): how many predictions of an image count.

    Returns:
        dict[str, float]: AP (over IoU 0.5 to 0.95), AP50 and AP75, in percent; NaN where the
        ground truth is empty.

    Raises:
        DataError: if there are results of other images.
    """
    if not results:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    precision, thresholds, _ = _accumulated(coco, results, iou_type, max_detections)

    def mean(values: np.ndarray) -> float:
        known = values[values > -1]
        return float(100 * known.mean()) if known.size else float("nan")

    return {
        "AP": mean(precision),
        "AP50": mean(precision[np.isclose(thresholds, 0.5)]),
        "AP75": mean(precision[np.isclose(thresholds, 0.75)]),
    }


def precision_recall(
    coco: COCO,
    results: List[dict],
    iou_type: str = "segm",
    max_detections: int = 100,
    iou_threshold: float = 0.5,
) -> Tuple[np.ndarray, np.ndarray]:
    """
    Args:
        coco, results, iou_type, max_detections: see :func:`average_precision`.
        iou_threshold (float): overlap from which a prediction counts, 0.5, 0.55, … 0.95.

    Returns:
        tuple[np.ndarray, np.ndarray]: recalls from 0 to 1, and the precision at each, the mean of
        all categories that have objects.

    Raises:
        DataError: if there are results of other images.
    """
    precision, thresholds, recalls = _accumulated(coco, results, iou_type, max_detections)
    at = precision[int(np.abs(thresholds - iou_threshold).argmin())]
    known = at[:, (at > -1).all(axis=0)]
    return recalls, known.mean(axis=1)


def _accumulated(
    coco: COCO, results: List[dict], iou_type: str, max_detections: int
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision by IoU threshold, recall and category; the thresholds; the recalls."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = _evaluate(coco, results, iou_type, max_detections)
        evaluator.evaluate()
        evaluator.accumulate()
    # All areas; the last of the limits.
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    return precision, evaluator.params.iouThrs, evaluator.params.recThrs
