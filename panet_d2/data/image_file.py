"""Read image files for a model."""

from __future__ import annotations

import logging

import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import DataError

logger = logging.getLogger("panet_d2")


def is_deep(mode: str) -> bool:
    """Whether Pillow's mode has more than 8 bits per channel. Values above 255 would be clipped."""
    return mode.startswith(("I", "F"))


def page_count(image: Image.Image) -> int:
    """Return the number of pages or frames of an open image. Detectron2 reads only the first."""
    if image.format == "MPO":  # a photo; the other pictures are its previews
        return 1
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # a broken page after the first
        return 1


def read_image_file(path: str, image_format: str = "BGR") -> np.ndarray:
    """
    Read an image as Detectron2 does. If the image has several pages, warn that the first is used.

    Args:
        path (str): the file.
        image_format (str): as in ``INPUT.FORMAT``.

    Returns:
        np.ndarray: of shape (H, W, C).

    Raises:
        DataError: if the image cannot be read or has more than 8 bits per channel.
    """
    try:
        with PathManager.open(path, "rb") as f, Image.open(f) as image:
            mode = image.mode
            pages = page_count(image)
        pixels = read_image(path, image_format)
    except Exception as e:  # Pillow raises almost any error for broken files
        raise DataError(f"cannot read image {path}: {e or type(e).__name__}") from e
    if is_deep(mode):
        raise DataError(
            f"cannot use image {path}: it has more than 8 bits per channel (Pillow's mode {mode}); "
            "scale it to 8 bits first."
        )
    if pages > 1:
        logger.warning("%s has %d pages; only the first is used.", path, pages)
    return pixels
