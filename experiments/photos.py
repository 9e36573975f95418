"""
Comparisons by photo. Images that are crops of one photo are not independent, so a photo is never in
training and validation at once, and intervals come from drawing photos.

folds: split a dataset into folds, with a config for each. compare: pool the detections of all folds
for each model and seed, or those of the dataset's own validation images. Write the AP of each model
and the differences, with intervals, as JSON, and a plot of AP by IoU and by size beside it. Print a
table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from contextlib import redirect_stdout
from io import StringIO
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import yaml
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from experiments.ablation.report import Difference, markdown, with_interval
from experiments.ablation.rungs import RUNGS
from panet_d2 import cli
from panet_d2.analysis.plots import pyplot, save_figure
from panet_d2.checkpoint import atomic_open, write_json
from panet_d2.data.register import datasets_folder
from panet_d2.errors import DataError

__all__ = ["compare", "make_folds", "read_dataset"]

SPLITS = ("train", "val")
IOUS = [f"AP{iou}" for iou in range(50, 100, 5)]
TITLES = {"ideas": "PANet-2fc", "heavy_ideas": "PANet-4conv1fc"}  # other rungs have theirs
# Sides of an object as a multiple of the median side of its image's objects.
SIZES = {"all": (0.0, 1e5), "smaller": (0.0, 0.5), "similar": (0.5, 2.0), "larger": (2.0, 1e5)}


def read_dataset(name: str) -> Dict[str, Any]:
    """
    Read the training and validation data of a dataset below DETECTRON2_DATASETS as one dataset in
    COCO format, whose file names begin with the folder and whose ids are new.
    """
    folder = os.path.join(datasets_folder(), name)
    both: Dict[str, Any] = {"images": [], "annotations": []}
    for split in SPLITS:
        path = os.path.join(folder, "annotations", f"instances_{split}.json")
        if not os.path.isfile(path):
            raise DataError(f"{path} does not exist; set DETECTRON2_DATASETS to its top folder.")
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        both["categories"] = content["categories"]
        ids = {
            image["id"]: len(both["images"]) + 1 + i for i, image in enumerate(content["images"])
        }
        for image in content["images"]:
            file_name = f"{split}/{image['file_name']}"
            both["images"].append({**image, "id": ids[image["id"]], "file_name": file_name})
        for annotation in content["annotations"]:
            number = len(both["annotations"]) + 1
            image_id = ids[annotation["image_id"]]
            both["annotations"].append({**annotation, "id": number, "image_id": image_id})
    return both


def make_folds(data: Dict[str, Any], number: int) -> List[Tuple[Dict[str, Any], Dict[str, Any]]]:
    """
    Args:
        data (dict): from :func:`read_dataset`. Each image has a "photo" and may have a "crop".
        number (int): of folds.

    Returns:
        list[tuple[dict, dict]]: training and validation data of each fold, in COCO format. A photo
        is validated in one fold, and of augmented copies of a crop, one is. The folds have about
        the same number of objects.

    Raises:
        DataError: if there are fewer photos than folds.
    """
    objects: Dict[int, int] = defaultdict(int)
    for annotation in data["annotations"]:
        objects[annotation["image_id"]] += 1
    validated: Dict[str, Dict[str, Any]] = {}  # by crop
    for image in data["images"]:
        validated.setdefault(str(image.get("crop", image["file_name"])), image)
    photos: Dict[str, int] = defaultdict(int)
    for image in validated.values():
        photos[image["photo"]] += objects[image["id"]]
    if not 2 <= number <= len(photos):
        raise DataError(f"{len(photos)} photos cannot be split into {number} folds.")
    members: List[List[str]] = [[] for _ in range(number)]
    for photo in sorted(photos, key=lambda p: (-photos[p], p)):  # the largest first
        min(members, key=lambda fold: sum(photos[p] for p in fold)).append(photo)
    return [
        (
            _subset(data, [i for i in data["images"] if i["photo"] not in fold]),
            _subset(data, [i for i in validated.values() if i["photo"] in fold]),
        )
        for fold in members
    ]


def _subset(data: Dict[str, Any], images: List[Dict[str, Any]]) -> Dict[str, Any]:
    ids = {image["id"] for image in images}
    annotations = [a for a in data["annotations"] if a["image_id"] in ids]
    return {"categories": data["categories"], "images": images, "annotations": annotations}


class _Evaluated:
    """The detections of a model with one seed on the validation images of all folds, matched."""

    def __init__(
        self,
        truth: COCO,
        detections: Sequence[Dict[str, Any]],
        limit: int,
        categories: Optional[Sequence[str]] = None,
    ):
        sides = defaultdict(list)
        for annotation in truth.dataset["annotations"]:
            sides[annotation["image_id"]].append(annotation["area"])
        usual = {image: np.median(areas) for image, areas in sides.items()}
        of_all = np.median(list(usual.values()))  # for images without objects
        relative = [
            {**a, "area": a["area"] / usual[a["image_id"]]} for a in truth.dataset["annotations"]
        ]
        scaled = _coco({**truth.dataset, "annotations": relative})
        if detections:
            # Without boxes, because the area would be that of the box. loadRes changes them.
            found = scaled.loadRes(
                [{k: v for k, v in d.items() if k != "bbox"} for d in detections]
            )
        else:
            found = _coco({**truth.dataset, "annotations": []})
        for annotation in found.dataset["annotations"]:
            annotation["area"] /= usual.get(annotation["image_id"], of_all)
        self.evaluation = COCOeval(scaled, found, "segm")
        params = self.evaluation.params
        if categories is not None:
            params.catIds = truth.getCatIds(catNms=list(categories))
        params.maxDets = [limit]
        params.areaRng = [[low**2, high**2] for low, high in SIZES.values()]
        params.areaRngLbl = list(SIZES)
        self.evaluation.evaluate()
        self.images = list(params.imgIds)
        self.matched = np.array(self.evaluation.evalImgs, dtype=object).reshape(
            len(params.catIds), len(SIZES), len(self.images)
        )

    def precision(self, images: Optional[Sequence[int]] = None, sizes: int = len(SIZES)):
        """
        Return AP in percent, shape (IoUs, sizes): the mean over classes, for images by their
        index, which may repeat. NaN without objects.
        """
        places = range(len(self.images)) if images is None else images
        e = self.evaluation
        kept = e.params.areaRng
        e.evalImgs = list(self.matched[:, :sizes][:, :, list(places)].reshape(-1))
        e.params.imgIds = e._paramsEval.imgIds = [self.images[i] for i in places]
        e.params.areaRng = e._paramsEval.areaRng = kept[:sizes]
        e.accumulate()
        e.params.areaRng = e._paramsEval.areaRng = kept
        curves = e.eval["precision"][..., 0]  # IoUs, recalls, classes, sizes; -1 without objects
        curves = np.where(curves < 0, np.nan, curves).mean(axis=1)
        return 100 * _mean(curves, axis=1)


def _coco(content: Dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    return coco


def _mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean of what is not NaN; NaN where all is."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(axis=axis)
    return np.where(known.any(axis=axis), total / np.maximum(known.sum(axis=axis), 1), np.nan)


def compare(
    truth: Dict[str, Any],
    detections: Dict[str, Dict[int, List[Dict[str, Any]]]],
    baseline: str,
    limit: int,
    draws: int = 500,
    unit: str = "photo",
    categories: Optional[Sequence[str]] = None,
) -> Dict[str, Any]:
    """
    Args:
        truth (dict): validation data of all folds, in COCO format.
        detections (dict[str, dict[int, list]]): COCO results of all folds, by model and seed.
        baseline (str): the model that the others are compared with.
        limit (int): detections of an image that count.
        draws (int): number of times that as many units as there are, are drawn with replacement.
        unit (str): field of an image, such as "photo". Images with the same value are one unit.
        categories (sequence[str]): names of the categories that count; all by default.

    Returns:
        dict: "models" has the mean over seeds of mask AP at some IoUs and by size relative to the
        image's other objects, and the AP of each seed. "differences" has the mean difference from
        the baseline over the seeds that both have, and the 95 % interval over drawn units.

    Raises:
        DataError: if an image does not have the field, or a category does not exist.
    """
    coco = _coco(truth)
    known = [category["name"] for category in truth["categories"]]
    unknown = [name for name in categories or () if name not in known]
    if unknown:
        raise DataError(f"category {unknown[0]} does not exist; there are {', '.join(known)}.")
    for image in truth["images"]:
        if unit not in image:
            raise DataError(f"image {image['file_name']} has no field {unit}; choose another unit.")
    evaluated: Dict[str, Dict[int, _Evaluated]] = {}
    for name, seeds in detections.items():
        evaluated[name] = {
            s: _Evaluated(coco, found, limit, categories) for s, found in seeds.items()
        }
    models = {name: _summary(runs) for name, runs in evaluated.items()}
    units: Dict[Any, List[int]] = defaultdict(list)
    first = next(iter(evaluated[baseline].values()))
    for place, image_id in enumerate(first.images):
        units[coco.imgs[image_id][unit]].append(place)
    groups = list(units.values())
    generator = np.random.default_rng(0)
    drawn = [
        [place for g in generator.integers(len(groups), size=len(groups)) for place in groups[g]]
        for _ in range(draws)
    ]
    ap = {
        name: {
            seed: np.array([_mean(run.precision(places, 1)[:, 0]) for places in drawn])
            for seed, run in tqdm(runs.items(), desc=f"{unit}s drawn for {name}", unit="seed")
        }
        for name, runs in evaluated.items()
    }
    differences = {}
    for name in evaluated:
        seeds = sorted(evaluated[name].keys() & evaluated[baseline].keys())
        if name == baseline or not seeds:
            continue
        of_seeds = [models[name]["seeds"][s] - models[baseline]["seeds"][s] for s in seeds]
        sample = np.mean([ap[name][s] - ap[baseline][s] for s in seeds], axis=0)
        low, high = np.nanquantile(sample, [0.025, 0.975])
        differences[name] = {
            "seeds": seeds,
            "mean": float(np.mean(of_seeds)),
            "low": float(low),
            "high": float(high),
        }
    counts = {f"{unit}s": len(groups), "images": len(first.images), "draws": draws}
    counted = {"categories": list(categories or known)}
    return {"baseline": baseline, **counts, **counted, "models": models, "differences": differences}


def _summary(runs: Dict[int, _Evaluated]) -> Dict[str, Any]:
    tables = {seed: run.precision() for seed, run in runs.items()}
    table = np.mean(list(tables.values()), axis=0)
    ious = {name: float(ap) for name, ap in zip(IOUS, table[:, 0])}
    by_size = {f"AP {size}": float(ap) for size, ap in zip(SIZES, _mean(table, axis=0))}
    return {"seeds": {s: float(_mean(t[:, 0])) for s, t in tables.items()}, **by_size, **ious}


def title(model: str) -> str:
    """Name of a model in tables and plots."""
    return TITLES.get(model) or (RUNGS[model].title if model in RUNGS else model)


def table(result: Dict[str, Any]) -> str:
    """Markdown table of the models of :func:`compare`."""
    columns = ("AP50", "AP75", "AP90", *(f"AP {size}" for size in list(SIZES)[1:]))
    baseline = title(result["baseline"])
    rows = []
    for name, ap in result["models"].items():
        d = result["differences"].get(name)
        difference = Difference(d["mean"], d["low"], d["high"]) if d else None
        row = {"model": title(name), "mask AP": f"{ap['AP all']:.1f}"}
        row[f"from {baseline}"] = with_interval(difference)
        rows.append({**row, **{key.removeprefix("AP "): f"{ap[key]:.1f}" for key in columns}})
    return markdown(rows)


def plot(result: Dict[str, Any], path: str) -> None:
    """Plot the AP of each model of :func:`compare` by IoU and by size."""
    figure, (by_iou, by_size) = pyplot().subplots(1, 2, figsize=(10, 4))
    sizes = [f"AP {size}" for size in SIZES]
    width = 0.8 / len(result["models"])
    for i, (name, ap) in enumerate(result["models"].items()):
        aps = [ap[key] for key in IOUS]
        by_iou.plot(np.arange(50, 100, 5) / 100, aps, "-o", label=title(name))
        places = np.arange(len(sizes)) + (i + 0.5) * width - 0.4
        by_size.bar(places, [ap[key] for key in sizes], width)
    by_iou.set(xlabel="IoU", ylabel="mask AP")
    by_iou.set_ylim(bottom=0)
    by_iou.legend()
    by_size.set(xlabel="size relative to the image's other objects", ylabel="mask AP")
    by_size.set_xticks(range(len(sizes)), list(SIZES))
    save_figure(figure, path)


def write_folds(args: argparse.Namespace) -> None:
    folder = os.path.join(args.folds, args.dataset)
    os.makedirs(folder, exist_ok=True)
    images = os.path.abspath(os.path.join(datasets_folder(), args.dataset))
    for index, fold in enumerate(make_folds(read_dataset(args.dataset), args.number), 1):
        registered = []
        for split, content in zip(SPLITS, fold):
            path = os.path.join(folder, f"fold{index}_{split}.json")
            write_json(path, content)
            registered.append(
                [f"{args.dataset}_fold{index}_{split}", os.path.abspath(path), images]
            )
            photos = sorted({image["photo"] for image in content["images"]})
            print(f"{path}: {len(content['images'])} images of photos {', '.join(photos)}")
        (train, *_), (val, *_) = registered
        datasets = {"REGISTER_COCO": registered, "TRAIN": [train], "TEST": [val]}
        with atomic_open(os.path.join(folder, f"fold{index}.yaml")) as f:
            yaml.safe_dump({"_BASE_": os.path.abspath(args.base), "DATASETS": datasets}, f)


def _validation(args: argparse.Namespace) -> List[Tuple[str, str]]:
    """Annotation file and folder of the runs, of each fold or of the dataset's own split."""
    if args.number > 1:
        names = [f"fold{index}" for index in range(1, args.number + 1)]
        folder = os.path.join(args.folds, args.dataset)
        return [(os.path.join(folder, f"{n}_val.json"), f"{args.dataset}_{n}") for n in names]
    path = os.path.join(datasets_folder(), args.dataset, "annotations", "instances_val.json")
    return [(path, args.dataset)]


def write_comparison(args: argparse.Namespace) -> None:
    truth: Dict[str, Any] = {"images": [], "annotations": []}
    detections: Dict[str, Dict[int, List]] = {m: defaultdict(list) for m in args.models}
    for path, runs in _validation(args):
        if not os.path.isfile(path):
            raise DataError(
                f"{path} does not exist; see --folds, --dataset, --number and DETECTRON2_DATASETS."
            )
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        truth["categories"] = content["categories"]
        truth["images"] += content["images"]
        truth["annotations"] += content["annotations"]
        for model in args.models:
            for seed in args.seeds:
                run = os.path.join(args.work, runs, f"{model}_seed{seed}")
                path = os.path.join(run, "inference", "coco_instances_results.json")
                if not os.path.isfile(path):
                    raise DataError(f"{path} does not exist: train {model} with seed {seed} first.")
                with open(path, encoding="utf-8") as f:
                    detections[model][seed] += json.load(f)
    with redirect_stdout(StringIO()):  # pycocotools prints a line for each step
        result = compare(
            truth,
            detections,
            args.models[0],
            args.limit,
            args.draws,
            args.unit,
            args.categories,
        )
    os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
    write_json(args.output, result)
    plot(result, os.path.splitext(args.output)[0] + ".png")
    print(table(result))


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.photos", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    folds = commands.add_parser("folds", help="write the annotation files of the folds")
    folds.add_argument("--base", required=True, metavar="CONFIG", help="the folds' base config")
    folds.set_defaults(run=write_folds)
    comparison = commands.add_parser("compare", help="compare trained models")
    comparison.add_argument("--models", nargs="+", required=True, help="the baseline first")
    comparison.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    comparison.add_argument("--work", default="output/ablation", help="folder of the runs' output")
    comparison.add_argument("--limit", type=int, default=300, help="detections of an image")
    comparison.add_argument("--draws", type=int, default=500)
    comparison.add_argument(
        "--unit",
        default="photo",
        metavar="FIELD",
        help="field of an image; images with the same value are drawn together",
    )
    comparison.add_argument("--categories", nargs="+", help="those that count; all by default")
    comparison.add_argument("--output", required=True, metavar="JSON")
    comparison.set_defaults(run=write_comparison)
    for command in (folds, comparison):
        command.add_argument("--dataset", default="granular", help="its folder's name")
        command.add_argument(
            "--folds", default="output/folds", help="folder of the folds' annotation files"
        )
        command.add_argument(
            "--number", type=int, default=4, help="of folds; 1 compares on the dataset's own split"
        )
    args = parser.parse_args(argv)
    if args.number < 1:
        parser.error("--number must be at least 1")
    args.run(args)


if __name__ == "__main__":
    sys.exit(cli.run(main))
