#!/usr/bin/env python
"""
Find all errors in datasets in COCO format. The tool checks all annotations and reads all images.
Exit status: 0 if nothing is wrong, 1 if something is wrong or the datasets cannot be checked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from typing import List, NamedTuple, Optional

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from panet_d2 import cli
from panet_d2.data import Problem, check_coco
from panet_d2.data.register import coco_entries, dataset_names, find_coco_files
from panet_d2.engine import read_config
from panet_d2.errors import ConfigError


class Source(NamedTuple):
    """A dataset to check, and the other arguments of check_coco."""

    name: str
    json_file: str
    image_root: str
    masks: Optional[bool] = None
    evaluated: bool = True
    image_format: str = "BGR"
    keypoints: int = 0
    trained: Optional[bool] = None
    cfg: Optional[CfgNode] = None


def sources(cfg: CfgNode) -> List[Source]:
    """Return the datasets of DATASETS.TRAIN and TEST, including faulty ones."""
    listed = {name: files for name, *files in coco_entries(cfg)}
    found = []
    train, test = dataset_names(cfg, "TRAIN"), dataset_names(cfg, "TEST")
    for name in dict.fromkeys((*train, *test)):
        if name in listed:
            files = find_coco_files(name, *listed[name])
        elif name not in DatasetCatalog:
            raise ConfigError(
                f"DATASETS names {name!r}, which is neither known to Detectron2 nor listed in "
                "DATASETS.REGISTER_COCO."
            )
        else:
            metadata = MetadataCatalog.get(name)
            if metadata.get("evaluator_type") != "coco":
                raise ConfigError(f"DATASETS names {name!r}, which is not in COCO format.")
            files = metadata.json_file, metadata.image_root
            if not os.path.isfile(files[0]):
                DatasetCatalog.get(name)  # makes a generated dataset
        keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0
        found.append(
            Source(
                *(name, *files, cfg.MODEL.MASK_ON, name in test),
                *(cfg.INPUT.FORMAT, keypoints, name in train, cfg),
            )
        )
    if not found:
        raise ConfigError("DATASETS.TRAIN and DATASETS.TEST are empty; there is nothing to check.")
    return found


def report(source: Source, problems: List[Problem]) -> dict:
    """Return what --json writes for one dataset."""
    severities = Counter(p.severity for p in problems)
    return {
        "name": source.name,
        "annotations": source.json_file,
        "images": source.image_root,
        "errors": severities["error"],
        "warnings": severities["warning"],
        "problems": [asdict(p) for p in problems],
    }


def print_report(source: Source, problems: List[Problem]) -> None:
    for problem in problems:
        print(f"{problem.severity}: {problem}")
    severities = Counter(p.severity for p in problems)
    print(f"{source.name}: {severities['error']} errors, {severities['warning']} warnings")
    for (severity, what), count in Counter((p.severity, p.what) for p in problems).most_common():
        print(f"{count:>8} {severity:<7} {what}")


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", help="check its DATASETS.TRAIN and TEST")
    parser.add_argument("--annotations", metavar="FILE", help="check this annotation file …")
    parser.add_argument("--images", metavar="FOLDER", help="… with the images in this folder")
    parser.add_argument("--json", action="store_true", help="write the report as JSON")
    parser.add_argument("--workers", type=int, help="threads that read images; one per core")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides")
    args = parser.parse_args(argv)
    if bool(args.config_file) == bool(args.annotations) or bool(args.annotations) != bool(
        args.images
    ):
        parser.error("give either --config-file, or --annotations and --images")
    if args.opts and not args.config_file:
        parser.error("--opts needs --config-file")
    if args.workers is not None and args.workers < 1:
        parser.error("--workers must be at least 1")
    if args.config_file:
        found = sources(read_config(args.config_file, args.opts))
    else:
        found = [Source(args.annotations, args.annotations, args.images)]
    results = []
    for source in found:
        problems = check_coco(*source[1:], workers=args.workers)
        results.append((source, problems))
        if not args.json:
            print_report(source, problems)
    if args.json:
        print(json.dumps({"datasets": [report(*result) for result in results]}, indent=2))
    return int(any(problems for _, problems in results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
