"""
A training loader whose n-th batch depends only on the seed. Neither resuming the run nor the number
of worker processes changes the batch.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import detectron2.utils.comm as comm
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, build_detection_train_loader
from torch.utils.data import Dataset, Sampler

from .._detectron2 import train_loader_from_config
from ..config import read_choice
from ..errors import ConfigError
from .augmentation import images_of_batch
from .check_records import check_records
from .dataset_mapper import NamedImageMapper

# Position in the stream of this process, index into the dataset, number of the batch.
Token = Tuple[int, int, int]


def seed_all(*entropy: int) -> None:
    """
    Seed the generators of Python, NumPy and torch, on the CPU and on CUDA.

    Args:
        entropy (int): any non-negative numbers; the state depends on each of them.
    """
    _seed_cpu(entropy, torch.manual_seed)


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed the generators of the CPU as :func:`seed_all` does, for the duration of a block."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed_cpu(entropy, torch.default_generator.manual_seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _seed_cpu(entropy: Sequence[int], seed_torch: Callable[[int], Any]) -> None:
    # SeedSequence makes unrelated states from related numbers, such as successive steps.
    state = np.random.SeedSequence(entropy).generate_state(2)
    random.seed(int(state[0]))
    np.random.seed(state[0])
    seed_torch(int(state[1]))


class StreamSampler(Sampler):
    """
    Another sampler's infinite stream of indices, starting at any batch. Each index has its position
    and batch number. With grouped images, the batch numbers are in no order.
    """

    def __init__(
        self,
        sampler: Iterable[int],
        batch_size: int,
        start: int = 0,
        groups: Optional[Sequence[int]] = None,
        num_workers: int = 0,
    ):
        """
        Args:
            sampler (iterable[int]): an infinite sampler of Detectron2.
            batch_size (int): images in a batch of this process.
            start (int): batches to skip.
            groups (sequence[int] or None): 0 or 1 for each index, if images of different groups
                never share a batch (Detectron2's aspect ratio grouping).
            num_workers (int): number of the loader's workers.
        """
        self.sampler = sampler
        self.batch_size = batch_size
        self.start = start
        self.groups = groups
        self.num_workers = num_workers

    def __iter__(self) -> Iterator[Token]:
        if self.groups is None:
            numbered = ((p, i, p // self.batch_size) for p, i in enumerate(self.sampler))
            return islice(numbered, self.start * self.batch_size, None)
        stream = self._numbered(self.groups)
        stream = chain(self._left_over(stream, self.groups), stream)
        return self._dealt_out(stream) if self.num_workers > 1 else stream

    def _numbered(self, groups: Sequence[int]) -> Iterator[Token]:
        seen = [0, 0]
        for position, index in enumerate(self.sampler):
            group = groups[index]
            yield position, index, 2 * (seen[group] // self.batch_size) + group
            seen[group] += 1

    def _left_over(self, stream: Iterator[Token], groups: Sequence[int]) -> List[Token]:
        """Consume the batches to skip, and return the images of incomplete batches."""
        buckets: Tuple[List[Token], List[Token]] = ([], [])
        batches = 0
        while batches < self.start:
            token = next(stream)
            bucket = buckets[groups[token[1]]]
            bucket.append(token)
            if len(bucket) == self.batch_size:
                bucket.clear()
                batches += 1
        return buckets[0] + buckets[1]  # one is empty, because its batch was the last

    def _dealt_out(self, stream: Iterator[Token]) -> Iterator[Token]:
        """
        Reorder the stream so that grouped images leave the loader in the stream's order. Detectron2
        gives each worker ``batch_size`` images in a row, and takes one from each worker in turn.
        """
        while True:
            block = list(islice(stream, self.num_workers * self.batch_size))
            for worker in range(self.num_workers):
                yield from block[worker :: self.num_workers]


class _MappedStream(Dataset):
    """A dataset of mapped images by token. The position in the stream seeds the augmentation."""

    def __init__(self, dataset: DatasetFromList, mapper: Callable[[dict], dict], seed: int):
        self.dataset = dataset
        self.mapper = mapper
        self.entropy = (seed, comm.get_rank())

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, token: Token) -> dict:
        position, index, batch = token
        with seeded(*self.entropy, position), images_of_batch(*self.entropy, batch):
            return self.mapper(self.dataset[index])


def _checked_arguments(cfg: CfgNode, mapper: Callable[[dict], dict]) -> Dict[str, Any]:
    """Return the arguments of Detectron2's loader, whose images the mapper can use."""
    if not isinstance(mapper, NamedImageMapper):  # another mapper may need other keys
        return train_loader_from_config(cfg, mapper=mapper)
    names = [name for name in cfg.DATASETS.TRAIN if name in DatasetCatalog]
    try:
        args = train_loader_from_config(cfg, mapper=mapper)
    except Exception:
        for name in names:  # the message about an image is better
            check_records(cfg, [name], DatasetCatalog.get(name))
        raise
    check_records(cfg, names, args["dataset"])
    return args


def build_train_loader(
    cfg: CfgNode, mapper: Callable[[dict], dict], start: int = 0
) -> Iterable[List[dict]]:
    """
    Build Detectron2's loader of ``DATASETS.TRAIN``. With a ``SEED``, order and augmentation are
    reproducible, and the loader can start at any batch.

    Args:
        cfg (CfgNode): the config of the run. If ``SEED`` is negative, ``start`` is ignored, and the
            loader is Detectron2's, except with ``INPUT.SAME_SIZE_PER_BATCH``.
        mapper (callable): from an image in Detectron2's dataset format to the model's input.
        start (int): batches to skip.

    Returns:
        iterable[list[dict]]: batches of this process.

    Raises:
        ConfigError: if the batch cannot be split among the processes, or images without a
            registered size cannot be grouped.
        DataError: see :func:`check_records`, for a :class:`NamedImageMapper`.
    """
    processes = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % processes:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}; it must be a multiple of the "
            f"number of processes, which is {processes}."
        )
    seed, same_size = cfg.SEED, read_choice(cfg, "INPUT.SAME_SIZE_PER_BATCH", (True, False))
    if seed < 0:
        if not same_size:
            return build_detection_train_loader(**_checked_arguments(cfg, mapper))
        seed, start = comm.shared_random_seed(), 0
    with seeded(seed):  # the sampler draws its seed from NumPy's generator
        args = _checked_arguments(cfg, mapper)
    dicts, workers = args["dataset"], args["num_workers"]
    grouped = args["aspect_ratio_grouping"]
    if grouped and not all("width" in d and "height" in d for d in dicts):
        other = f"SEED {cfg.SEED}" if cfg.SEED >= 0 else "INPUT.SAME_SIZE_PER_BATCH True"
        raise ConfigError(
            f"DATALOADER.ASPECT_RATIO_GROUPING is True and {other}, but DATASETS.TRAIN has images "
            "registered without width and height; register them with both, or switch one key off."
        )
    batch_size = args["total_batch_size"] // processes
    args["dataset"] = _MappedStream(DatasetFromList(dicts, copy=False), args.pop("mapper"), seed)
    args["sampler"] = StreamSampler(
        args["sampler"],
        batch_size,
        start,
        [int(d["width"] <= d["height"]) for d in dicts] if grouped else None,
        workers,
    )
    # With a seed the loader draws no number from torch's global generator.
    return build_detection_train_loader(**args, mapper=None, seed=seed)
