"""Models for prediction, from a config and its checkpoint."""

from __future__ import annotations

import logging
import os
from typing import Any, Dict, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image
from torch import nn

from ..build import build
from ..categories import as_categories, model_metadata, read_categories, resolve_categories
from ..checkpoint.strict_checkpoint import join_names
from ..data.augmentation import leaves_nothing
from ..errors import DataError
from ..modeling import RCNNWithTTA
from .defaults import latest_checkpoint, load_strict

_COLORS = ("BGR", "RGB")  # formats to which the parent converts a BGR image

logger = logging.getLogger("panet_d2")


def run_folder(cfg: CfgNode, opts: Sequence[str] = (), config_file: str = "") -> str:
    """
    Return the folder of a run: that of its ``config.yaml``, because ``OUTPUT_DIR`` may be relative
    to another folder, or the run's folder may have been moved.

    Args:
        cfg (CfgNode): the run's config.
        opts (sequence[str]): the overrides in ``cfg``.
        config_file (str): where ``cfg`` is from. For other files than ``config.yaml``, and if
            ``opts`` set it, the folder is ``OUTPUT_DIR``.
    """
    is_run = os.path.basename(config_file) == "config.yaml" and "OUTPUT_DIR" not in opts
    return os.path.dirname(config_file) if is_run else cfg.OUTPUT_DIR


def load_run(cfg: CfgNode, opts: Sequence[str] = (), config_file: str = "") -> nn.Module:
    """
    Build the model of a run for inference, and print which weights it has.

    Args:
        cfg, opts, config_file: see :func:`run_folder`. The model gets the last checkpoint in this
            folder. If ``opts`` set ``MODEL.WEIGHTS``, or if the folder has no checkpoint, the model
            gets ``MODEL.WEIGHTS``.

    Raises:
        CheckpointError: see :func:`load_strict`.
    """
    weights = _weights(cfg, opts, run_folder(cfg, opts, config_file))
    model = build("the model", build_model, cfg).eval()
    in_checkpoint = load_strict(model, weights)
    print(f"weights: {weights}")
    warn_of_other_classes(cfg, in_checkpoint.get("categories"), weights)
    return model


def _weights(cfg: CfgNode, opts: Sequence[str], folder: str) -> str:
    final = os.path.join(folder, "model_final.pth")
    last = latest_checkpoint(folder) or (final if os.path.isfile(final) else None)
    return last if last and "MODEL.WEIGHTS" not in opts else cfg.MODEL.WEIGHTS


def use_run_weights(cfg: CfgNode, opts: Sequence[str], config_file: str) -> str:
    """
    Set ``MODEL.WEIGHTS`` for predictions. The ``config.yaml`` of a run names the weights that the
    training started from, so its last checkpoint replaces these, unless ``opts`` set the key.

    Args:
        cfg, opts, config_file: see :func:`run_folder`; ``cfg`` is changed in place.

    Returns:
        str: ``MODEL.WEIGHTS``.
    """
    if os.path.basename(config_file) == "config.yaml":
        cfg.MODEL.WEIGHTS = _weights(cfg, opts, os.path.dirname(config_file))
    return cfg.MODEL.WEIGHTS


def warn_of_other_classes(cfg: CfgNode, in_checkpoint: Any, weights: str) -> None:
    """
    Warn if a checkpoint was trained for other classes, or for another order of them, than those
    that config and data name.

    Args:
        cfg (CfgNode): its ``DATASETS`` name the classes.
        in_checkpoint: the checkpoint's "categories"; None if it has none.
        weights (str): the checkpoint, for the message.
    """
    ours, theirs = read_categories(cfg), as_categories(in_checkpoint) or []
    names, trained = ([name for _, name in categories] for categories in (ours, theirs))
    if names and len(trained) > 1 and names != trained:
        logger.warning(
            "%s was trained for the classes %s, but config and data name them %s.",
            weights,
            join_names(trained),
            join_names(names),
        )


class Predictor(DefaultPredictor):
    """
    A :class:`DefaultPredictor` that rejects weights which do not match the model, and images which
    the parent would misread. ``TEST.AUG.ENABLED`` turns test-time augmentation on.

    Attributes:
        cfg (CfgNode): the config; its ``DATASETS.CATEGORIES`` has the ids and names of the classes,
            if the dataset, the config or the checkpoint knows them.
        metadata (Metadata): the names of the classes as Detectron2's visualizers read them.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg (CfgNode): the config of the model; ``MODEL.WEIGHTS`` is its checkpoint.

        Raises:
            CheckpointError: see :func:`load_strict`.
            ConfigError: if a value cannot be used.
        """
        bare = cfg.clone()
        bare.defrost()
        bare.MODEL.WEIGHTS = ""
        bare.TEST.AUG.ENABLED = False  # no warning, because this class augments
        self.channels = len(cfg.MODEL.PIXEL_MEAN)
        if self.channels != 3 or bare.INPUT.FORMAT != "RGB":
            bare.INPUT.FORMAT = "BGR"  # the parent knows no other formats
        build("the model", super().__init__, bare)
        self.cfg = cfg.clone()
        self.cfg.defrost()
        self.takes_gray = self.channels == 1 or cfg.INPUT.FORMAT == "L"
        self._name_classes(load_strict(self.model, cfg.MODEL.WEIGHTS).get("categories"))
        self.metadata = model_metadata(self.cfg)
        self.tta = RCNNWithTTA(self.cfg, self.model) if cfg.TEST.AUG.ENABLED else None

    def _name_classes(self, in_checkpoint: Any) -> None:
        """Set ``DATASETS.CATEGORIES``, from the checkpoint if nothing else names the classes."""
        resolve_categories(self.cfg)
        theirs = as_categories(in_checkpoint) or []
        if theirs and not read_categories(self.cfg):
            self.cfg.DATASETS.CATEGORIES = [list(category) for category in theirs]
            resolve_categories(self.cfg)
        warn_of_other_classes(self.cfg, in_checkpoint, self.cfg.MODEL.WEIGHTS)

    def __call__(self, original_image: np.ndarray) -> Dict[str, Any]:
        """
        Args:
            original_image (np.ndarray): a uint8 BGR image of shape (H, W, 3); float32 and float64
                from 0 to 255 are possible. A model of one channel also takes shapes (H, W)
                and (H, W, 1). A model of other channels takes images of shape (H, W, C) in its own
                channels.

        Returns:
            dict: the model's output for the image, see :class:`DefaultPredictor`.

        Raises:
            DataError: if the image is anything else, has no pixels, or is too narrow to be resized.
        """
        image = self._check(original_image)
        if self.tta is not None:
            return self._augmented(self.tta, image)
        resize = self.aug.get_transform(image)
        if leaves_nothing(resize):
            size = "x".join(str(side) for side in image.shape[1::-1])
            raise DataError(
                f"the image of {size} pixels is too narrow: INPUT.MIN_SIZE_TEST "
                f"{self.cfg.INPUT.MIN_SIZE_TEST} and INPUT.MAX_SIZE_TEST "
                f"{self.cfg.INPUT.MAX_SIZE_TEST} resize it to {resize.new_w}x{resize.new_h}."
            )
        return super().__call__(image)

    @torch.no_grad()
    def _augmented(self, tta: RCNNWithTTA, image: np.ndarray) -> Dict[str, Any]:
        """Predict with views of the image at its own size, like :meth:`Trainer.test_with_tta`."""
        if self.input_format == "RGB":
            image = image[:, :, ::-1]
        height, width = image.shape[:2]
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return tta([{"image": tensor, "height": height, "width": width}])[0]

    def _check(self, image: Any) -> np.ndarray:
        """Return an image as :class:`DefaultPredictor` handles it, or raise a DataError."""
        if self.takes_gray and isinstance(image, np.ndarray) and image.ndim == 2:
            image = image[:, :, None]
        problem = self._problem(image)
        if problem:
            wanted = f"an array of shape (H, W, {self.channels}) in the model's own channels"
            if self.takes_gray:
                wanted = "a uint8 array of shape (H, W) or (H, W, 1), or a BGR one of (H, W, 3)"
            elif self.channels == 3:
                wanted = "a uint8 BGR array of shape (H, W, 3)"
            raise DataError(f"the image is {problem}; it must be {wanted}.")
        if not self.takes_gray and self.channels != 3:
            # The parent resizes uint8 images with Pillow, which has at most four channels.
            if image.dtype != np.uint8 or self.channels > 4:
                image = image.astype(np.float32)
        elif image.shape[2] == 3 and (self.takes_gray or self.cfg.INPUT.FORMAT not in _COLORS):
            rgb = np.ascontiguousarray(image[:, :, ::-1]).round().astype(np.uint8)
            image_format = "L" if self.takes_gray else self.cfg.INPUT.FORMAT
            image = convert_PIL_to_numpy(Image.fromarray(rgb), image_format)
        if image.dtype == np.float64:
            image = image.astype(np.float32)  # the type of the model
        return np.ascontiguousarray(image)

    def _problem(self, image: Any) -> str:
        """Return what is wrong with an image, such as "an array of …", or ""."""
        if image is None:
            return "None, which cv2.imread returns for a file that it cannot read"
        if not isinstance(image, np.ndarray):
            kind = type(image).__name__
            if isinstance(image, (str, os.PathLike)):
                return f"the {kind} {os.fspath(image)!r}"
            has_shape = hasattr(image, "shape") and hasattr(image, "dtype")
            details = f" ({image.dtype}, shape {tuple(image.shape)})" if has_shape else ""
            return f"of type {kind}{details}"
        found = f"an array of {image.dtype} and shape {image.shape}"
        color = self.takes_gray or self.channels == 3
        channels = (1, 3) if self.takes_gray else (self.channels,)
        if image.ndim != 3 or image.shape[2] not in channels or not image.size:
            return found
        if image.dtype == np.uint8:
            return ""
        if not color:  # in the image's own units
            return "" if image.dtype.kind in "uif" else found
        if image.dtype not in (np.float32, np.float64):
            return found
        low, high = image.min(), image.max()
        # Images from 0 to 1 suit a model whose mean and deviation are in this range.
        bytes_expected = max(*self.cfg.MODEL.PIXEL_MEAN, *self.cfg.MODEL.PIXEL_STD) > 1
        if not 0 <= low <= high <= 255 or (0 < high <= 1 and bytes_expected):
            return f"{found} with values from {low:g} to {high:g}, not 0 to 255"
        return ""
