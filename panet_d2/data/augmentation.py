"""Augmentation that the images of a batch share."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Iterator, Optional, Tuple

import numpy as np
from detectron2.data.transforms import ResizeShortestEdge
from fvcore.transforms.transform import Transform

from ..errors import ConfigError

_batch: ContextVar[Optional[Tuple[int, ...]]] = ContextVar("batch", default=None)


@contextmanager
def images_of_batch(*entropy: int) -> Iterator[None]:
    """
    Set the batch for which :class:`ResizeShortestEdgePerBatch` draws a size.

    Args:
        entropy (int): non-negative numbers that identify the batch and determine the size.
    """
    token = _batch.set(entropy)
    try:
        yield
    finally:
        _batch.reset(token)


def leaves_nothing(resize: Transform) -> bool:
    """Whether a resize of an image, or no resize, leaves a side without pixels."""
    return 0 in (getattr(resize, "new_h", 1), getattr(resize, "new_w", 1))


class ResizeShortestEdgePerBatch(ResizeShortestEdge):
    """
    :class:`ResizeShortestEdge` with one size for all images of a batch, so that images of the same
    shape are not padded. A norm over the full map, such as GroupNorm, would see the padding in
    training but not at inference, where there is one image.
    """

    def get_transform(self, image: np.ndarray) -> Transform:
        """
        Args:
            image (ndarray): shape (H, W, C).

        Raises:
            ConfigError: outside of :func:`images_of_batch`.
        """
        entropy = _batch.get()
        if entropy is None:
            raise ConfigError(
                "INPUT.SAME_SIZE_PER_BATCH is True, which only the loader of "
                "panet_d2.engine.Trainer supports; it must be False for another loader."
            )
        # The parent draws from NumPy's global generator, which is seeded for the single image.
        before = np.random.get_state()
        np.random.seed(np.random.SeedSequence(entropy).generate_state(1))
        try:
            return super().get_transform(image)
        finally:
            np.random.set_state(before)
