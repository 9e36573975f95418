#!/usr/bin/env python
"""
What holds a trained model back: how many objects its proposals, boxes, masks and classes lose, its
mask AP with the boxes and classes of the truth, where only masks can be wrong, and with those that
another run detects, and how much of its box head is dead.
"""

from __future__ import annotations

import argparse
import sys
from typing import Dict, List, Optional

from detectron2.data import get_detection_dataset_dicts
from tabulate import tabulate
from tqdm import tqdm

from panet_d2 import cli
from panet_d2.data import NamedImageMapper, first_test_set, spread_evenly
from panet_d2.engine import load_run, setup_config
from panet_d2.evaluation import (
    dead_units,
    detection_stages,
    evaluate_boxes_of,
    evaluate_true_boxes,
)


def print_ap(ap: Dict[str, float]) -> None:
    keys = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    print("  ".join(f"{key} {ap[key]:.1f}" for key in keys))


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, help="config.yaml of a run")
    parser.add_argument("--number", type=int, default=12, help="of images whose proposals count")
    parser.add_argument(
        "--boxes-of",
        metavar="CONFIG",
        help="config.yaml of another run on the same data, whose boxes this one puts its masks in",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE …")
    args = parser.parse_args(argv)
    cfg = setup_config(args.config_file, args.opts, needed=("TEST",))
    name = first_test_set(cfg)
    model, mapper = load_run(cfg, args.opts), NamedImageMapper(cfg, False)
    records = spread_evenly(get_detection_dataset_dicts([name]), args.number)
    inputs = ([mapper(record)] for record in tqdm(records, desc="images", unit="image"))
    for head, dead in dead_units(model, inputs).items():
        print(
            f"{head}: {100 * dead.float().mean():.0f} % of {dead.numel()} outputs are zero for "
            f"all proposals of {len(records)} images of {name}"
        )
    print(f"objects of {name} that are overlapped by half, in percent: by a proposal, then by")
    print("what is detected, with its box, its mask, and with the right class as well")
    stages = detection_stages(cfg, model, name)
    rows = [
        [stage, *(f"{v:.1f}" if v == v else "-" for v in shares.values())]
        for stage, shares in stages.items()
    ]
    print(tabulate(rows, ["", *stages["proposals"]], "plain", disable_numparse=True))
    if cfg.MODEL.MASK_ON:
        print(f"mask AP with the boxes and classes of the truth, all of {name}:")
        print_ap(evaluate_true_boxes(cfg, model, name))
    if args.boxes_of:
        other = load_run(setup_config(args.boxes_of, needed=("TEST",)))
        print(f"mask AP with what {args.boxes_of} detects:")
        print_ap(evaluate_boxes_of(cfg, model, other, name))


if __name__ == "__main__":
    sys.exit(cli.run(main))
