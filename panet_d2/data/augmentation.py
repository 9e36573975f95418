"""Augmentation that the images of a batch share."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Iterator, Optional, Tuple

import numpy as np
from detectron2.data.transforms import ResizeShortestEdge
from fvcore.transforms.transform import Transform

from ..errors import ConfigError

__all__ = ["ResizeShortestEdgePerBatch", "images_of_batch"]

_batch: ContextVar[Optional[Tuple[int, ...]]] = ContextVar("batch", default=None)


@contextmanager
def images_of_batch(*entropy: int) -> Iterator[None]:
    """
    Within the block, :class:`ResizeShortestEdgePerBatch` draws the size of one certain batch.

    Args:
        entropy (int): non-negative numbers that name the batch; the size follows from them.
    """
    token = _batch.set(entropy)
    try:
        yield
    finally:
        _batch.reset(token)


class ResizeShortestEdgePerBatch(ResizeShortestEdge):
    """
    :class:`ResizeShortestEdge` that draws one size for all images of a batch, so that images of
    one shape are of one shape still and none is padded. Normalisation over the whole map, as
    GroupNorm's, sees that padding in training, and none of it when there is one image.
    """

    def get_transform(self, image: np.ndarray) -> Transform:
        """
        Args:
            image (ndarray): shape (H, W, C).

        Returns:
            Transform: the resizing.

        Raises:
            ConfigError: outside of :func:`images_of_batch`.
        """
        entropy = _batch.get()
        if entropy is None:
            raise ConfigError(
                "INPUT.SAME_SIZE_PER_BATCH is True; it must be False where the loader is "
                "not that of panet_d2.engine.Trainer, which says what images make a batch."
            )
        # The parent draws from NumPy's generator, where the image's own numbers come from.
        before = np.random.get_state()
        np.random.seed(np.random.SeedSequence(entropy).generate_state(1))
        try:
            return super().get_transform(image)
        finally:
            np.random.set_state(before)
