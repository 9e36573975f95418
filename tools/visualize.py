#!/usr/bin/env python
"""Draw a model's predictions and its training. Each command writes PNGs to a folder."""

from __future__ import annotations

import argparse
import os
import sys
from math import ceil
from typing import List, Optional, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from panet_d2 import cli
from panet_d2.analysis import (
    RESULTS,
    annotation_mask,
    average_precision,
    draw_comparison,
    draw_mask_paths,
    ground_truth,
    level_shares,
    mask_paths,
    match_predictions,
    plot_level_shares,
    plot_precision_recall,
    plot_training,
    precision_recall,
    read_history,
    read_results,
)
from panet_d2.checkpoint import write_json
from panet_d2.data import NamedImageMapper, first_test_set, spread_evenly
from panet_d2.engine import load_run, read_config, run_folder, setup_config
from panet_d2.errors import ConfigError, DataError, PanetError
from panet_d2.evaluation import detection_limit, inference_folder
from panet_d2.modeling.check_model import finds_oriented_boxes


def write_png(path: str, image: np.ndarray) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(image).save(path)


def results_of(folder: str, cfg: CfgNode, name: str) -> str:
    """Return the file with a run's results on a dataset, one of those that it was evaluated on."""
    evaluated = cfg  # overrides may name other datasets
    if os.path.isfile(os.path.join(folder, "config.yaml")):
        evaluated = read_config(os.path.join(folder, "config.yaml"))
    if name not in evaluated.DATASETS.TEST:
        raise DataError(
            f"{folder} was evaluated on {', '.join(evaluated.DATASETS.TEST) or 'no dataset'}, not "
            f"on {name}; run train_net.py --eval-only with this dataset, or give its results with "
            "--results."
        )
    return os.path.join(
        inference_folder(evaluated, name, os.path.join(folder, "inference")), RESULTS
    )


def predictions(args: argparse.Namespace) -> None:
    """Draw the predictions of an evaluation next to the ground truth, worst images first."""
    cfg = setup_config(args.config_file, args.opts, needed=("TEST",))
    if finds_oriented_boxes(cfg):
        raise ConfigError(
            f"MODEL.PROPOSAL_GENERATOR.NAME is {cfg.MODEL.PROPOSAL_GENERATOR.NAME!r}; "
            "visualize.py draws upright boxes only."
        )
    name = first_test_set(cfg)
    coco, metadata = ground_truth(name), MetadataCatalog.get(name)
    results_file = args.results
    if not results_file:
        results_file = results_of(run_folder(cfg, args.opts, args.config_file), cfg, name)
    if not os.path.isfile(results_file):
        raise DataError(f"{results_file} does not exist; train_net.py --eval-only writes it.")
    results = read_results(results_file)

    matches = match_predictions(coco, results, args.score_threshold)
    worst_first = sorted(matches, key=lambda i: -matches[i].error_rate)
    # Bad, average and good images, so that a few pictures are representative.
    chosen = spread_evenly(worst_first, args.number)
    for rank, image_id in enumerate(tqdm(chosen, desc="pictures", unit="image")):
        record = coco.loadImgs([image_id])[0]
        image = read_image(os.path.join(metadata.image_root, record["file_name"]), "RGB")
        picture = draw_comparison(image, coco.imgToAnns[image_id], matches[image_id], coco)
        stem = os.path.splitext(os.path.basename(record["file_name"]))[0]
        write_png(os.path.join(args.output, f"{rank:03d}_{stem}.png"), picture)

    print(f"{len(chosen)} pictures of {name}, worst first: {args.output}")
    limit = detection_limit(cfg.TEST.DETECTIONS_PER_IMAGE)
    has_masks = bool(results) and "segmentation" in results[0]
    for kind, iou_type in (("box", "bbox"), ("mask", "segm"))[: 1 + has_masks]:
        ap = average_precision(coco, results, iou_type, limit)
        print(f"{kind:>4} " + "  ".join(f"{key} {value:.1f}" for key, value in ap.items()))


def test_images(cfg: CfgNode, count: int) -> List[dict]:
    """Return evenly spread records of the first test set, in Detectron2's dataset format."""
    records = get_detection_dataset_dicts([first_test_set(cfg)], filter_empty=False)
    return spread_evenly(records, count)


def levels(args: argparse.Namespace) -> None:
    """
    Plot from which pyramid levels max fusion takes the features of a dataset, and write the shares
    as JSON. The proposals of each level of FPN's rule have a row of their own.
    """
    cfg = setup_config(args.config_file, args.opts, needed=("TEST",))
    model, mapper = load_run(cfg, args.opts, args.config_file), NamedImageMapper(cfg, False)
    dicts = test_images(cfg, args.number)
    inputs = ([mapper(record)] for record in tqdm(dicts, desc="images", unit="image"))
    shares = level_shares(model, inputs)
    if not shares:
        raise ConfigError(
            "no pooler fuses by 'max'; set AFP.ENABLED to True and AFP.FUSION to max."
        )
    names = [f.upper().replace("P", "N") for f in cfg.MODEL.ROI_HEADS.IN_FEATURES]
    os.makedirs(args.output, exist_ok=True)
    path = os.path.join(args.output, "levels.png")
    plot_level_shares(shares, names, path)
    keys = (*names, "proposals")
    found = {
        pooler: {
            name: dict(zip(keys, (*row[:-1].tolist(), int(row[-1]))))
            for name, row in zip(names, table)
        }
        for pooler, table in shares.items()
    }
    for pooler, rows in found.items():
        text = [
            [name, *(f"{100 * row[level]:.1f} %" for level in names), row["proposals"]]
            for name, row in rows.items()
        ]
        print(tabulate(text, [pooler, *keys]), end="\n\n")
    as_json = os.path.join(args.output, "levels.json")
    write_json(as_json, found)
    print(f"written: {path}, {as_json}")


def _has_pixels(record: dict, annotation: dict) -> bool:
    x0, y0, x1, y1 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    return ceil(min(x1, record["width"])) > max(x0, 0) and ceil(min(y1, record["height"])) > max(
        y0, 0
    )


def masks(args: argparse.Namespace) -> None:
    """Draw the masks of both paths of the mask head for ground-truth boxes of all sizes."""
    cfg = setup_config(args.config_file, args.opts, needed=("TEST",))
    model, mapper = load_run(cfg, args.opts, args.config_file), NamedImageMapper(cfg, False)
    objects = [
        (record, annotation)
        for record in test_images(cfg, args.images)
        for annotation in record["annotations"]
        if not annotation.get("iscrowd", 0) and _has_pixels(record, annotation)
    ]
    objects.sort(key=lambda o: o[1]["bbox"][2] * o[1]["bbox"][3])
    if not objects:
        raise DataError(f"dataset {first_test_set(cfg)} has no objects.")
    count = min(args.number, len(objects))
    drawn = []
    for i in range(count):
        record, annotation = objects[(2 * i + 1) * len(objects) // (2 * count)]
        image = read_image(record["file_name"], "RGB")
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        inputs = mapper(record)
        scale = inputs["image"].shape[1] / image.shape[0]
        boxes = torch.tensor([box], device=model.device) * scale
        classes = torch.tensor([annotation["category_id"]], device=model.device)
        fcn, fc = mask_paths(model, inputs, boxes, classes)
        x0, y0 = (max(int(v), 0) for v in box[:2])
        x1, y1 = (ceil(v) for v in box[2:])
        mask = annotation_mask(annotation, image.shape[:2])
        drawn.append((image[y0:y1, x0:x1], mask[y0:y1, x0:x1], fcn[0], fc[0]))
    path = os.path.join(args.output, "masks.png")
    write_png(path, draw_mask_paths(*zip(*drawn)))
    print(f"{count} objects: {path}")


def run_precision(folder: str) -> Optional[Tuple[np.ndarray, np.ndarray]]:
    """Return precision by recall of a run on its first test set, or None if not evaluated."""
    config = os.path.join(folder, "config.yaml")
    if not os.path.isfile(config):
        return None
    try:  # the machine may have neither the GPU nor the data of the run
        cfg = setup_config(config, ["MODEL.DEVICE", "cpu"], needed=("TEST",))
        if not cfg.DATASETS.TEST or finds_oriented_boxes(cfg):
            return None
        name = cfg.DATASETS.TEST[0]
        coco = ground_truth(name)
    except (PanetError, OSError) as e:
        print(f"no precision of {folder}: {e}")
        return None
    # Not OUTPUT_DIR, because the folder may have been moved.
    path = results_of(folder, cfg, name)
    if not os.path.isfile(path):
        return None
    results = read_results(path)
    if not results:
        return None
    kind = "segm" if "segmentation" in results[0] else "bbox"
    limit = detection_limit(cfg.TEST.DETECTIONS_PER_IMAGE)
    return precision_recall(coco, results, kind, limit)


def curves(args: argparse.Namespace) -> None:
    """Plot losses and AP by step, and precision by recall, of one or several runs."""
    runs, precisions = {}, {}
    names = [os.path.basename(os.path.normpath(folder)) for folder in args.runs]
    if len(set(names)) < len(names):
        names = args.runs
    for name, folder in zip(names, args.runs):
        metrics = os.path.join(folder, "metrics.json")
        if not os.path.isfile(metrics):
            raise DataError(f"{folder} is not the output folder of a run: metrics.json is missing.")
        runs[name] = read_history(metrics)
        precision = run_precision(folder)
        if precision:
            precisions[name] = precision
    os.makedirs(args.output, exist_ok=True)
    plot_training(runs, os.path.join(args.output, "training.png"))
    print(f"written: {os.path.join(args.output, 'training.png')}")
    if precisions:
        path = os.path.join(args.output, "precision_recall.png")
        plot_precision_recall(precisions, path)
        print(f"written: {path}, at IoU 0.5")


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("predictions", help=predictions.__doc__)
    sub.add_argument("--config-file", required=True, help="YAML file, or config.yaml of a run")
    sub.add_argument("--results", help="COCO results file; default: that in OUTPUT_DIR/inference")
    sub.add_argument("--output", required=True, help="folder for the PNGs")
    sub.add_argument("--number", type=cli.positive, default=12, help="number of images")
    sub.add_argument("--score-threshold", type=float, default=0.5)
    sub.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE …")
    sub.set_defaults(run=predictions)
    for command, run, number in (("levels", levels, 100), ("masks", masks, 8)):
        sub = commands.add_parser(command, help=run.__doc__)
        sub.add_argument("--config-file", required=True, help="config.yaml of a run")
        sub.add_argument("--output", required=True, help="folder for the files")
        what = "images" if command == "levels" else "objects"
        sub.add_argument("--number", type=cli.positive, default=number, help=f"number of {what}")
        if command == "masks":
            text = "images that have the objects"
            sub.add_argument("--images", type=cli.positive, default=20, help=text)
        sub.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE …")
        sub.set_defaults(run=run)
    sub = commands.add_parser("curves", help=curves.__doc__)
    sub.add_argument("runs", nargs="+", help="output folders")
    sub.add_argument("--output", required=True, help="folder for the PNGs")
    sub.set_defaults(run=curves)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(cli.run(main))
