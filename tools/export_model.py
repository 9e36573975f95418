#!/usr/bin/env python
"""Export a trained model to TorchScript or ONNX, and check that both find the same objects."""

from __future__ import annotations

import argparse
import os
import sys
from typing import List, Optional

from detectron2.modeling import build_model

from panet_d2 import cli
from panet_d2.build import build
from panet_d2.engine import load_strict, setup_config, use_run_weights
from panet_d2.export import FORMATS, check_exportable, export_model, sample_images

FILES = {"torchscript": "model.ts", "onnx": "model.onnx"}


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, help="the model's config")
    parser.add_argument(
        "--output", required=True, help=f"folder for {' and '.join(FILES.values())}"
    )
    parser.add_argument(
        "--format", nargs="+", choices=FORMATS, default=FORMATS, help="both by default"
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="FILE",
        help="images to check with; by default three of the config's DATASETS.TEST",
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="config overrides, such as MODEL.WEIGHTS model_final.pth",
    )
    args = parser.parse_args(argv)
    cfg = setup_config(args.config_file, args.opts, needed=() if args.images else ("TEST",))
    check_exportable(cfg, args.format)
    cfg.MODEL.DEVICE = "cpu"
    model = build("the model", build_model, cfg)
    load_strict(model, use_run_weights(cfg, args.opts, args.config_file))
    print(f"weights: {cfg.MODEL.WEIGHTS}")
    images = sample_images(cfg, args.images)
    os.makedirs(args.output, exist_ok=True)
    for name in args.format:
        path = os.path.join(args.output, FILES[name])
        agreement = export_model(model, images, path, name)
        print(f"written: {path}\nchecked: {agreement}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
