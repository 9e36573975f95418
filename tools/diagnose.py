#!/usr/bin/env python
"""
Show where a trained model loses objects: in proposals, boxes, masks or classes. The first row,
"anchors", is the recall that tools/plan_config.py predicts for the proposals. The tool also prints
the model's mask AP with ground-truth boxes, its mask AP with the boxes of another run, and the
share of dead units in its box head.
"""

from __future__ import annotations

import argparse
import os
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
from panet_d2.checkpoint import write_json
from panet_d2.data import NamedImageMapper, first_test_set, spread_evenly
from panet_d2.engine import load_run, read_config, setup_config
from panet_d2.errors import ConfigError
from panet_d2.modeling.check_model import finds_oriented_boxes
from panet_d2.planning import anchor_recall, measure

AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, help="config.yaml of a run")
    parser.add_argument("--number", type=int, default=12, help="images for the share of dead units")
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
    if args.output:  # now, not after minutes of evaluation
        os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
    if args.boxes_of:
        _check_same_images(args.config_file, args.boxes_of)
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
    predicted = anchor_recall(cfg, measure(ground_truth(name).dataset))
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


def _check_same_images(config_file: str, other: str) -> None:
    """Raise a ConfigError if two runs read the images in different ways."""
    ours, theirs = (read_config(path).INPUT for path in (config_file, other))
    for key in ("FORMAT", "MIN_SIZE_TEST", "MAX_SIZE_TEST"):
        if ours[key] != theirs[key]:
            raise ConfigError(
                f"INPUT.{key} is {ours[key]!r}, but {theirs[key]!r} in {other}; --boxes-of needs "
                "runs that read the images in the same way."
            )


if __name__ == "__main__":
    sys.exit(cli.run(main))
