"""Loaders beside those that Detectron2 builds from a config."""

from __future__ import annotations

from typing import List, Sequence, TypeVar

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from torch.utils.data import DataLoader

from ..errors import ConfigError
from .dataset_mapper import NamedImageMapper

__all__ = ["build_training_sample_loader", "first_test_set", "spread_evenly"]

T = TypeVar("T")


def build_training_sample_loader(cfg: CfgNode, count: int) -> DataLoader:
    """
    Load some of the training images the way they are loaded for inference.

    Args:
        cfg (CfgNode): its ``DATASETS.TRAIN``, without images that have no annotations.
        count (int): how many images, spread evenly over the data; all if there are fewer.

    Returns:
        DataLoader: of batches of one image, as the model takes them.

    Raises:
        ConfigError: if ``DATASETS.TRAIN`` is empty.
    """
    if not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is []; it must name the data to take images from.")
    dicts = get_detection_dataset_dicts(cfg.DATASETS.TRAIN)
    sample = spread_evenly(dicts, count)
    return build_detection_test_loader(sample, mapper=NamedImageMapper(cfg, False))


def first_test_set(cfg: CfgNode) -> str:
    """
    Args:
        cfg (CfgNode): the config of a run.

    Returns:
        str: the first of its ``DATASETS.TEST``.

    Raises:
        ConfigError: if there is none.
    """
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty; it must name a data set.")
    return cfg.DATASETS.TEST[0]


def spread_evenly(items: Sequence[T], count: int) -> List[T]:
    """
    Args:
        items (sequence): what to choose from.
        count (int): how many of them; all if there are fewer.

    Returns:
        list: the first, and others at equal distances.
    """
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
