"""A PANet small enough for tests, and data for it."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any, Dict

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import BitMasks, Boxes, Instances
from pycocotools import mask as mask_util

from panet_d2 import add_panet_config
from panet_d2.check_config import flatten

needs_cuda = pytest.mark.cuda  # left out by conftest.py where there is none

DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]

ROOT = Path(__file__).resolve().parents[1]


def load_script(path: str) -> ModuleType:
    """A command-line tool, by its path below the repository's root, without running its main."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def child_env(*paths: Path | str, **env: str) -> Dict[str, str]:
    """
    The environment of a Python process that a test starts. It imports from ``paths``, by default
    the repository, and then from where this process does.
    """
    path = [*map(str, paths or [ROOT]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path), **env}


def tiny_cfg(*opts) -> CfgNode:
    """The full PANet on a ResNet-18, narrow; ``opts`` override."""
    cfg = get_cfg()
    add_panet_config(cfg)
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu"),
            *("MODEL.WEIGHTS", ""),
            *("MODEL.MASK_ON", True),
            *("MODEL.BACKBONE.NAME", "build_resnet_pafpn_backbone"),
            *("MODEL.BACKBONE.FREEZE_AT", 0),
            *("MODEL.RESNETS.DEPTH", 18),
            *("MODEL.RESNETS.NORM", "GN"),
            *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
            *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.FPN.OUT_CHANNELS", 32),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]),
            *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
            *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 100),
            *("MODEL.RPN.PRE_NMS_TOPK_TEST", 100),
            *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 50),
            *("MODEL.RPN.POST_NMS_TOPK_TEST", 50),
            *("MODEL.ROI_HEADS.NAME", "PANetROIHeads"),
            *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
            *("MODEL.ROI_HEADS.NUM_CLASSES", 3),
            *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16),
            *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
            *("MODEL.ROI_BOX_HEAD.NUM_FC", 1),
            *("MODEL.ROI_BOX_HEAD.FC_DIM", 48),
            *("MODEL.ROI_BOX_HEAD.CONV_DIM", 40),
            *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
            *("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 2),
            *("MODEL.ROI_BOX_HEAD.AFP.ENABLED", True),
            *("MODEL.ROI_BOX_HEAD.AFP.ADAPTATION", "fc"),
            *("MODEL.ROI_MASK_HEAD.NAME", "PANetMaskHead"),
            *("MODEL.ROI_MASK_HEAD.NUM_CONV", 3),
            *("MODEL.ROI_MASK_HEAD.CONV_DIM", 24),
            *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14),
            *("MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", 2),
            *("MODEL.ROI_MASK_HEAD.AFP.ENABLED", True),
            *("INPUT.MASK_FORMAT", "bitmask"),
            *("INPUT.MIN_SIZE_TRAIN", [64]),
            *("INPUT.MIN_SIZE_TEST", 64),
            *("DATASETS.TRAIN", []),
            *("DATASETS.TEST", []),
            *("DATALOADER.NUM_WORKERS", 0),
        ]
    )
    cfg.merge_from_list(list(opts))
    return cfg


def leaves(cfg: CfgNode) -> Dict[str, Any]:
    """All values of a config, by their full keys."""
    return dict(flatten(cfg))


def batch(num_images: int = 2, empty: tuple[int, ...] = (), num_classes: int = 3) -> list[dict]:
    """Random images with two objects each, or none for the indices in ``empty``."""
    inputs = []
    for index in range(num_images):
        height, width = 64, 96
        instances = Instances((height, width))
        boxes = torch.tensor([[8.0, 8, 40, 40], [50, 20, 90, 60]])
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
            mask[y0:y1, x0:x1] = True
        keep = slice(0, 0) if index in empty else slice(None)
        instances.gt_boxes = Boxes(boxes[keep])
        instances.gt_classes = torch.tensor([0, num_classes - 1])[keep]
        instances.gt_masks = BitMasks(masks[keep])
        image = torch.randint(0, 256, (3, height, width)).float()
        inputs.append({"image": image, "height": height, "width": width, "instances": instances})
    return inputs


def write_coco(folder: Path, num_images: int = 4, classes: int = 3) -> tuple[str, str]:
    """
    A data set of bright squares in COCO format with RLE masks.

    Returns the paths of the annotation file and of the image folder.
    """
    rng = np.random.default_rng(0)
    root = folder / "images"
    root.mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        picture = rng.integers(0, 80, (64, 96, 3)).astype(np.uint8)
        for k in range(2):
            x, y = int(rng.integers(2, 20)) + 48 * k, int(rng.integers(2, 30))
            mask = np.zeros((64, 96), np.uint8)
            mask[y : y + 24, x : x + 24] = 1
            picture[mask > 0] = 200
            rle = mask_util.encode(np.asfortranarray(mask))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1 + (image_id + k) % classes,
                    "bbox": [x, y, 24, 24],
                    "area": 576,
                    "iscrowd": 0,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
        name = f"{image_id:03d}.png"
        cv2.imwrite(str(root / name), picture)
        images.append({"id": image_id, "file_name": name, "height": 64, "width": 96})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": f"class{i}"} for i in range(classes)],
    }
    json_file = folder / "instances.json"
    json_file.write_text(json.dumps(content))
    return str(json_file), str(root)
