#!/usr/bin/env python
"""Convert checkpoints of other programs to PANet, and print what became of each tensor."""

from __future__ import annotations

import argparse
import os
import sys
from typing import List, Optional

from panet_d2 import cli
from panet_d2.checkpoint.convert import KINDS, convert
from panet_d2.data import build_training_sample_loader
from panet_d2.engine import setup_config

CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "configs")
DEFAULT_CONFIGS = {
    "release": "COCO-InstanceSegmentation/release_panet_R_50_FPN_2x_gn.yaml",
    "mmdet": "COCO-Detection/mmdet_faster_rcnn_R_50_PAFPN_1x.yaml",
    "mask-rcnn": "COCO-InstanceSegmentation/panet_R_50_FPN_3x.yaml",
}


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS, help="where the checkpoint comes from")
    parser.add_argument("input", metavar="IN", help="the checkpoint to read")
    parser.add_argument("output", metavar="OUT", help="the .pth to write")
    parser.add_argument("--config-file", help="the model's config; one of R-50 by default")
    parser.add_argument(
        "--allow-unmatched",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="release, mmdet: names that may be left out without a rule, e.g. 'Keypoint_*'",
    )
    parser.add_argument(
        "--calibrate",
        type=int,
        metavar="IMAGES",
        help="mask-rcnn: fit the copied layers to so many images of the config's DATASETS.TRAIN",
    )
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides")
    args = parser.parse_args(argv)
    if args.calibrate is not None and (args.kind != "mask-rcnn" or args.calibrate < 1):
        parser.error("--calibrate is for mask-rcnn, and takes at least one image")
    if args.allow_unmatched and args.kind == "mask-rcnn":
        parser.error("--allow-unmatched is for release and mmdet, whose names have rules")
    cli.make_way([args.output], [args.input, *filter(None, [args.config_file])])
    config_file = args.config_file or os.path.join(CONFIGS, DEFAULT_CONFIGS[args.kind])
    cfg = setup_config(config_file, args.opts, needed=("TRAIN",) if args.calibrate else ())
    images = build_training_sample_loader(cfg, args.calibrate) if args.calibrate else None
    result = convert(args.kind, args.input, args.output, cfg, args.allow_unmatched, images)
    print(result.report())
    print(f"written: {args.output}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
