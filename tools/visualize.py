#!/usr/bin/env python
"""Pictures that show what a model does; each sub-command writes PNGs into a folder."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from typing import List, Optional

import cv2
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from pycocotools.coco import COCO
from tqdm import tqdm

from panet_d2 import ConfigError
from panet_d2.data import DataError
from panet_d2.engine import setup_config
from panet_d2.evaluation import average_precision, draw_comparison, match_predictions


def predictions(args: argparse.Namespace) -> int:
    """Draw the predictions of an evaluation beside the ground truth, the worst images first."""
    cfg = setup_config(args.config_file, args.opts, needed=("TEST",))
    name = cfg.DATASETS.TEST[0]
    results_file = args.results or os.path.join(
        cfg.OUTPUT_DIR, "inference", "coco_instances_results.json"
    )
    if not os.path.isfile(results_file):
        raise DataError(f"there are no results {results_file}; train_net.py --eval-only makes them")
    DatasetCatalog.get(name)  # a data set that is generated is made here
    metadata = MetadataCatalog.get(name)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(metadata.json_file)
    with open(results_file) as f:
        results = json.load(f)

    matches = match_predictions(coco, results, args.score_threshold)
    worst_first = sorted(matches, key=lambda i: -matches[i].error_rate)
    # Evenly from the worst to the best, so that a few pictures give a fair impression.
    step = max(1, len(worst_first) / args.number)
    chosen = [worst_first[int(i * step)] for i in range(min(args.number, len(worst_first)))]
    os.makedirs(args.output, exist_ok=True)
    for rank, image_id in enumerate(tqdm(chosen, desc="pictures", unit="image")):
        record = coco.loadImgs([image_id])[0]
        image = read_image(os.path.join(metadata.image_root, record["file_name"]), "RGB")
        picture = draw_comparison(image, coco.imgToAnns[image_id], matches[image_id], coco)
        stem = os.path.splitext(os.path.basename(record["file_name"]))[0]
        path = os.path.join(args.output, f"{rank:03d}_{stem}.png")
        if not cv2.imwrite(path, picture[:, :, ::-1]):
            raise DataError(f"cannot write {path}")

    print(f"{len(chosen)} pictures of {name}, worst first: {args.output}")
    limit = max(100, cfg.TEST.DETECTIONS_PER_IMAGE)
    has_masks = bool(results) and "segmentation" in results[0]
    for kind, iou_type in (("box", "bbox"), ("mask", "segm"))[: 1 + has_masks]:
        ap = average_precision(coco, results, iou_type, limit)
        print(f"{kind:>4} " + "  ".join(f"{key} {value:.1f}" for key, value in ap.items()))
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("predictions", help=predictions.__doc__)
    sub.add_argument("--config-file", required=True, help="YAML file, or config.yaml of a run")
    sub.add_argument("--results", help="COCO results; those in OUTPUT_DIR/inference by default")
    sub.add_argument("--output", required=True, help="folder for the pictures")
    sub.add_argument("--number", type=int, default=12, help="how many images")
    sub.add_argument("--score-threshold", type=float, default=0.5)
    sub.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE …")
    sub.set_defaults(run=predictions)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ConfigError, DataError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
