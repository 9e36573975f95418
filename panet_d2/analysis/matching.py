"""Match COCO results with the ground truth, and compute recall and AP."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass, field
from typing import Any, Dict, List, Tuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..errors import DataError

RESULTS = "coco_instances_results.json"  # the file name of Detectron2's evaluator


@dataclass
class ImageMatch:
    """Matches of one image. Predictions are COCO results, objects are COCO annotations."""

    found: List[dict] = field(default_factory=list)  # predictions that match an object
    objects: List[dict] = field(default_factory=list)  # the objects of ``found``, in its order
    false_positives: List[dict] = field(default_factory=list)  # predictions without an object
    missed: List[dict] = field(default_factory=list)  # objects without a prediction

    @property
    def error_rate(self) -> float:
        """False positives and missed objects as a share of all entries: 0 is best, 1 is worst."""
        wrong = len(self.false_positives) + len(self.missed)
        return wrong / max(wrong + len(self.found), 1)


def ground_truth(name: str) -> COCO:
    """
    Load the ground truth of a registered dataset.

    Raises:
        DataError: if the dataset is not in COCO format.
    """
    DatasetCatalog.get(name)  # writes the files of a dataset that is generated on first use
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    if json_file is None or metadata.get("evaluator_type") == "lvis":
        raise DataError(f"dataset {name!r} has no annotation file in COCO format.")
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(json_file)


def read_results(path: str) -> List[dict]:
    """
    Read results in COCO's format.

    Raises:
        DataError: if the file cannot be read or holds something else.
    """
    try:
        with open(path, encoding="utf-8") as f:
            results = json.load(f)
        for result in results:
            result["image_id"], result["category_id"], result["score"]
            if "segmentation" not in result:
                result["bbox"]
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror or e}.") from e
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(
            f"{path} is not a file of COCO results ({type(e).__name__}: {e}), such as {RESULTS} of "
            "train_net.py --eval-only."
        ) from e
    return results


def match_predictions(
    coco: COCO, results: List[dict], score_threshold: float = 0.5, iou_threshold: float = 0.5
) -> Dict[int, ImageMatch]:
    """
    Match predictions with objects as the COCO evaluation does: within a category, by falling score,
    each object once.

    Args:
        coco (COCO): the ground truth.
        results (list[dict]): predictions in COCO's result format. Masks are compared if the
            predictions have masks, else boxes.
        score_threshold (float): predictions with a lower score are ignored.
        iou_threshold (float): the lowest IoU of a match.

    Returns:
        dict[int, ImageMatch]: matches by image id, for all images of ``coco``. Crowd regions and
        predictions that match them are left out.

    Raises:
        DataError: if an image of the results is not in ``coco``.
    """
    matches = {image_id: ImageMatch() for image_id in coco.getImgIds()}
    kept = [r for r in results if r["score"] >= score_threshold]
    iou_type = "segm" if kept and "segmentation" in kept[0] else "bbox"
    evaluator = _evaluate(
        coco, kept, iou_type, len(kept), iouThrs=[iou_threshold], areaRng=[[0, 1e10]]
    )
    for entry in filter(None, evaluator.evalImgs):
        match = matches[entry["image_id"]]
        for i, matched, ignored in zip(entry["dtIds"], entry["dtMatches"][0], entry["dtIgnore"][0]):
            if matched and not ignored:
                match.found.append(evaluator.cocoDt.anns[i])
                match.objects.append(coco.anns[int(matched)])
            elif not ignored:
                match.false_positives.append(evaluator.cocoDt.anns[i])
        for i, matched, ignored in zip(entry["gtIds"], entry["gtMatches"][0], entry["gtIgnore"]):
            if not (matched or ignored):
                match.missed.append(coco.anns[i])
    return matches


def object_recall(
    coco: COCO,
    results: List[dict],
    iou_type: str = "segm",
    iou_threshold: float = 0.5,
    use_categories: bool = True,
) -> Dict[str, float]:
    """
    Compute the share of objects that are found. Scores and false positives do not matter.

    Args:
        coco, results, iou_type: see :func:`average_precision`.
        iou_threshold (float): the lowest IoU of a match. A prediction matches one object at most.
        use_categories (bool): match only within a category.

    Returns:
        dict[str, float]: recall in percent of "all" objects and of COCO's "small", "medium" and
        "large" objects; NaN if there are none. Crowd regions do not count.

    Raises:
        DataError: if an image of the results is not in ``coco``.
    """
    params = {"iouThrs": [iou_threshold], "useCats": int(use_categories)}
    evaluator = _evaluate(coco, results, iou_type, len(results), **params)
    recall = {}
    for size, area in zip(evaluator.params.areaRngLbl, evaluator.params.areaRng):
        entries = [e for e in evaluator.evalImgs if e and e["aRng"] == area]
        objects = sum(int((e["gtIgnore"] == 0).sum()) for e in entries)
        found = sum(int((e["gtMatches"][0, e["gtIgnore"] == 0] > 0).sum()) for e in entries)
        recall[size] = 100 * found / objects if objects else float("nan")
    return recall


def average_precision(
    coco: COCO, results: List[dict], iou_type: str = "segm", max_detections: int = 100
) -> Dict[str, float]:
    """
    Compute the AP of predictions.

    Args:
        coco (COCO): the ground truth.
        results (list[dict]): predictions in COCO's result format.
        iou_type (str): "segm" or "bbox".
        max_detections (int): number of predictions per image that are evaluated, by falling score.

    Returns:
        dict[str, float]: AP (mean over IoU 0.5 to 0.95), AP50 and AP75, in percent; NaN if the
        ground truth is empty.

    Raises:
        DataError: if an image of the results is not in ``coco``.
    """
    evaluator = _evaluate(coco, results, iou_type, max_detections)
    # By IoU threshold (0.5, 0.55, … 0.95), recall and category, for objects of all sizes.
    precision = evaluator.eval["precision"][..., 0, -1]

    def mean(values: np.ndarray) -> float:
        known = values[values > -1]
        return float(100 * known.mean()) if known.size else float("nan")

    return {"AP": mean(precision), "AP50": mean(precision[0]), "AP75": mean(precision[5])}


def precision_recall(
    coco: COCO, results: List[dict], iou_type: str = "segm", max_detections: int = 100
) -> Tuple[np.ndarray, np.ndarray]:
    """
    Compute the precision-recall curve of predictions at an IoU of 0.5.

    Args:
        coco, results, iou_type, max_detections: see :func:`average_precision`.

    Returns:
        tuple[np.ndarray, np.ndarray]: recalls from 0 to 1, and the precision at each recall. The
        precision is the mean over the categories that have objects.

    Raises:
        DataError: if an image of the results is not in ``coco``.
    """
    evaluator = _evaluate(coco, results, iou_type, max_detections, iouThrs=[0.5])
    precision = evaluator.eval["precision"][0, ..., 0, -1]  # by recall and category
    known = precision[:, (precision > -1).all(axis=0)]
    return evaluator.params.recThrs, known.mean(axis=1)


def _evaluate(
    coco: COCO, results: List[dict], iou_type: str, max_detections: int, **params: Any
) -> COCOeval:
    """Run COCO's evaluation; ``params`` replace those of pycocotools."""
    unknown = {result["image_id"] for result in results} - set(coco.getImgIds())
    if unknown:
        raise DataError(
            f"the results name images that are not in the dataset, such as {min(unknown)}."
        )
    with contextlib.redirect_stdout(io.StringIO()):
        # loadRes adds keys to the results, and fails on an empty list.
        found = coco.loadRes([dict(r) for r in results]) if results else COCO()
        evaluator = COCOeval(coco, found, iou_type)
        vars(evaluator.params).update(maxDets=[1, 10, max_detections], **params)
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator
