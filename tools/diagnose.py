#!/usr/bin/env python
"""
Show where a trained model loses objects: in proposals, boxes, masks or classes. The first row,
"anchors", is the recall that tools/plan_config.py predicts for the proposals. The tool also prints
the model's mask AP with ground-truth boxes, its mask AP with the boxes of another run, and the
share of dead units in its box head.
"""

from __future__ import annotations

import argparse
import sys
from typing import Dict, List, Optional

from detectron2.data import get_detection_dataset_dicts
from tabulate import tabulate
from tqdm import tqdm

from panet_d2 import cli
from panet_d2.analysis import (
    dead_units,
    detection_stages,
    evaluate_boxes_of,
    evaluate_true_boxes,
    ground_truth,
)
from panet_d2.categories import read_categories
from panet_d2.checkpoint import write_json
from panet_d2.data import NamedImageMapper, first_test_set, spread_evenly
from panet_d2.data.register import coco_entries
from panet_d2.engine import load_run, read_config, setup_config
from panet_d2.errors import ConfigError, DataError
from panet_d2.modeling.check_model import finds_oriented_boxes
from panet_d2.planning import anchor_recall, measure

AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, help="config.yaml of a run")
    text = "images for the share of dead units"
    parser.add_argument("--number", type=cli.positive, default=12, help=text)
    parser.add_argument(
        "--boxes-of",
        metavar="CONFIG",
        help="config.yaml of another run on the same data; its boxes are given to this run's masks",
    )
    parser.add_argument("--output", metavar="JSON", help="also write the values to this file")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE …")
    args = parser.parse_args(argv)
    cfg = setup_config(args.config_file, args.opts, needed=("TEST",))
    if finds_oriented_boxes(cfg):
        raise ConfigError(
            f"MODEL.PROPOSAL_GENERATOR.NAME is {cfg.MODEL.PROPOSAL_GENERATOR.NAME!r}; diagnose.py "
            "compares upright boxes only."
        )
    name = first_test_set(cfg)
    coco = ground_truth(name)
    if not any(not a.get("iscrowd") for a in coco.anns.values()):
        raise DataError(f"dataset {name} has no objects.")
    if args.output:  # now, not after minutes of evaluation
        cli.make_way([args.output], [args.config_file, *filter(None, [args.boxes_of])])
    if args.boxes_of:
        _check_same_data(args.config_file, args.boxes_of, name)
    model, mapper = load_run(cfg, args.opts, args.config_file), NamedImageMapper(cfg, False)
    records = spread_evenly(get_detection_dataset_dicts([name]), args.number)
    inputs = ([mapper(record)] for record in tqdm(records, desc="images", unit="image"))
    shares_dead = {}
    for head, dead in dead_units(model, inputs).items():
        shares_dead[head] = 100 * float(dead.float().mean())
        print(
            f"{head}: {shares_dead[head]:.0f} % of {dead.numel()} outputs are zero for "
            f"all proposals of {len(records)} images of {name}"
        )
    print(f"recall of the objects of {name} at IoU 0.5, in percent:")
    stages = {}
    predicted = anchor_recall(cfg, measure(coco.dataset))
    if predicted:
        stages["anchors"] = predicted
    stages.update(detection_stages(cfg, model, name))
    rows = [
        [stage, *(f"{v:.1f}" if v == v else "-" for v in shares.values())]
        for stage, shares in stages.items()
    ]
    print(tabulate(rows, ["", *stages["proposals"]], "plain", disable_numparse=True))
    masks: Dict[str, Dict[str, float]] = {}

    def report(given: str, ap: Dict[str, float]) -> None:
        masks[given] = {key: ap[key] for key in AP}
        print(f"mask AP on {name} with {given}:")
        print("  ".join(f"{key} {value:.1f}" for key, value in masks[given].items()))

    if cfg.MODEL.MASK_ON:
        report("ground-truth boxes and classes", evaluate_true_boxes(cfg, model, name))
    if args.boxes_of:
        other_cfg = setup_config(
            args.boxes_of, ["MODEL.DEVICE", cfg.MODEL.DEVICE], needed=("TEST",)
        )
        other = load_run(other_cfg, config_file=args.boxes_of)
        ap = evaluate_boxes_of(cfg, model, other, name)
        report(f"the boxes, classes and scores of {args.boxes_of}", ap)
    if args.output:
        content = {"dataset": name, "dead units": shares_dead}
        write_json(args.output, {**content, "recall": stages, "mask AP with": masks})


def _check_same_data(config_file: str, other: str, name: str) -> None:
    """Raise a ConfigError if two runs have other classes or files, or read images in other ways."""
    ours, theirs = map(read_config, (config_file, other))
    for key in ("FORMAT", "MIN_SIZE_TEST", "MAX_SIZE_TEST"):
        if ours.INPUT[key] != theirs.INPUT[key]:
            raise ConfigError(
                f"INPUT.{key} is {ours.INPUT[key]!r}, but {theirs.INPUT[key]!r} in {other}; "
                "--boxes-of needs runs that read the images in the same way."
            )
    classes = [[name for _, name in read_categories(cfg)] for cfg in (ours, theirs)]
    # A single class cannot be mistaken for another.
    if all(classes) and max(map(len, classes)) > 1 and classes[0] != classes[1]:
        raise ConfigError(
            f"DATASETS.CATEGORIES names {', '.join(classes[0])}, but {', '.join(classes[1])} in "
            f"{other}; --boxes-of needs runs with the same classes."
        )
    files = [[e for e in coco_entries(cfg) if e[0] == name] for cfg in (ours, theirs)]
    if all(files) and files[0] != files[1]:
        raise ConfigError(
            f"DATASETS.REGISTER_COCO has {files[0][0]}, but {files[1][0]} in {other}; --boxes-of "
            "needs runs with the same data."
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
