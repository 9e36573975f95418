"""Loader of sample images, and helpers to choose datasets and images."""

from __future__ import annotations

from typing import List, Sequence, TypeVar

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from torch.utils.data import DataLoader

from ..errors import ConfigError
from .dataset_mapper import NamedImageMapper

T = TypeVar("T")


def build_training_sample_loader(cfg: CfgNode, count: int) -> DataLoader:
    """
    Load some training images the way they are loaded for inference.

    Args:
        cfg (CfgNode): images with annotations are taken from ``DATASETS.TRAIN``.
        count (int): number of images, evenly spread over the datasets; all if there are fewer.

    Returns:
        DataLoader: batches of one image.

    Raises:
        ConfigError: if ``DATASETS.TRAIN`` is empty.
    """
    if not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is []; it must name the dataset to take images from.")
    sample = spread_evenly(get_detection_dataset_dicts(cfg.DATASETS.TRAIN), count)
    return build_detection_test_loader(sample, mapper=NamedImageMapper(cfg, False))


def first_test_set(cfg: CfgNode) -> str:
    """Return the first of ``DATASETS.TEST``; raise a ConfigError if there is none."""
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty; it must name a dataset.")
    return cfg.DATASETS.TEST[0]


def spread_evenly(items: Sequence[T], count: int) -> List[T]:
    """Return ``count`` items at equal distances, starting with the first, or all if fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
