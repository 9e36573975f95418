"""The views of an image for test-time augmentation."""

from __future__ import annotations

from itertools import product
from typing import Any, Dict, List, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data.transforms import (
    HFlipTransform,
    NoOpTransform,
    ResizeShortestEdge,
    ResizeTransform,
    Transform,
    TransformList,
)
from detectron2.modeling import DatasetMapperTTA

from ..errors import ConfigError, DataError
from .check_model import suppression_keys

# Keys of TEST.AUG that Detectron2 does not have, with the values that have no effect.
_OWN_KEYS = {
    "VFLIP": False,
    "ROTATIONS": (),
    "ASPECT_RATIOS": (),
    "BOX_SIZES": (),
    "MERGE": "nms",
    "MASKS": "probabilities",
}


class Rotate90Transform(Transform):
    """Rotate an image by quarter turns, exactly."""

    def __init__(self, h: int, w: int, quarter_turns: int):
        """
        Args:
            h, w (int): height and width of the image before the rotation, in pixels.
            quarter_turns (int): number of turns counterclockwise, as in :func:`numpy.rot90`.
        """
        super().__init__()
        self.h, self.w, self.quarter_turns = h, w, quarter_turns % 4

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        return np.rot90(img, self.quarter_turns)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        width, height = self.w, self.h
        for _ in range(self.quarter_turns):
            coords = np.stack([coords[:, 1], width - coords[:, 0]], axis=1)
            width, height = height, width
        return coords

    def inverse(self) -> Rotate90Transform:
        size = (self.w, self.h) if self.quarter_turns % 2 else (self.h, self.w)
        return Rotate90Transform(*size, -self.quarter_turns)


class MapperTTA(DatasetMapperTTA):
    """Make the views of an image; see ``TEST.AUG`` in ``panet_d2/config.py``."""

    @configurable
    def __init__(
        self,
        min_sizes: Sequence[int],
        max_size: int,
        flip: bool,
        vflip: bool = False,
        rotations: Sequence[int] = (),
        aspect_ratios: Sequence[float] = (),
    ):
        """
        Args:
            min_sizes, max_size, flip: see :class:`DatasetMapperTTA`.
            vflip (bool): also flip vertically.
            rotations (sequence[int]): degrees counterclockwise: 90, 180 or 270.
            aspect_ratios (sequence[float]): factors of the width, in addition to 1.
        """
        super().__init__(min_sizes, max_size, flip)
        self.aspect_ratios = list(dict.fromkeys([1.0, *map(float, aspect_ratios)]))
        # Each view is a horizontal flip or none, followed by quarter turns. A vertical flip is a
        # horizontal flip and a half turn, so many combinations are the same view.
        mirrors = [(0, False), *([(0, True)] if flip else []), *([(2, True)] if vflip else [])]
        if flip and vflip:
            mirrors.append((2, False))
        turns = [0, *(angle // 90 for angle in rotations)]
        views = {
            ((turn + half) % 4, mirrored) for turn, (half, mirrored) in product(turns, mirrors)
        }
        # Views of one shape follow each other, so that they make a batch.
        self.orientations = sorted(views, key=lambda view: (view[0] % 2, view))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        aug = cfg.TEST.AUG
        ret = super().from_config(cfg)
        own = {"vflip": aug.VFLIP, "rotations": aug.ROTATIONS, "aspect_ratios": aug.ASPECT_RATIOS}
        return {**ret, **own}

    def __len__(self) -> int:
        """Number of views of an image."""
        return len(self.min_sizes) * len(self.aspect_ratios) * len(self.orientations)

    def __call__(self, dataset_dict: dict) -> List[dict]:
        """
        Args:
            dataset_dict (dict): one image, the model's input.

        Returns:
            list[dict]: for each view a copy of ``dataset_dict`` with the view's "image" and
            "min_size", and "transforms", a :class:`TransformList` from the original image to the
            view.

        Raises:
            DataError: if a view has no pixels.
        """
        image = dataset_dict["image"].permute(1, 2, 0).numpy()
        height, width = image.shape[:2]
        original = (dataset_dict["height"], dataset_dict["width"])
        first: Transform = NoOpTransform()
        if original != (height, width):
            first = ResizeTransform(*original, height, width)
        views = []
        for min_size, ratio in product(self.min_sizes, self.aspect_ratios):
            new_h, new_w = ResizeShortestEdge.get_output_shape(
                height, max(1, round(width * ratio)), min_size, self.max_size
            )
            if 0 in (new_h, new_w):
                raise DataError(
                    f"the image of {width}x{height} pixels is too narrow: TEST.AUG.MIN_SIZES and "
                    f"MAX_SIZE resize it to {new_w}x{new_h}."
                )
            resize = ResizeTransform(height, width, new_h, new_w)
            resized = resize.apply_image(np.copy(image))
            resized = resized.reshape(new_h, new_w, -1)  # one channel
            for turns, mirrored in self.orientations:
                oriented = [HFlipTransform(new_w)] if mirrored else []
                oriented += [Rotate90Transform(new_h, new_w, turns)] if turns else []
                view = TransformList(oriented).apply_image(resized) if oriented else resized
                view = torch.from_numpy(np.ascontiguousarray(view.transpose(2, 0, 1)))
                transforms = TransformList([first, resize, *oriented])
                views.append({**dataset_dict, "image": view})
                views[-1].update(transforms=transforms, min_size=min_size)
        return views


_stock_mapper_from_config = DatasetMapperTTA.from_config.__func__


# The signature must be the stock one, see roi_heads._from_config.
def _mapper_from_config(cls: type, cfg: CfgNode) -> Dict[str, Any]:
    if cls is DatasetMapperTTA:
        aug = cfg.TEST.AUG
        asked = [f"TEST.AUG.{k}" for k, v in _OWN_KEYS.items() if aug.get(k, v) not in (v, [])]
        for key in (*asked, *suppression_keys(cfg)):
            raise ConfigError(
                f"{key} is set, but Detectron2's GeneralizedRCNNWithTTA ignores it; use "
                "panet_d2.modeling.RCNNWithTTA, or train_net.py, which does."
            )
    return _stock_mapper_from_config(cls, cfg)


# In a stock program with test-time augmentation, no other code of this package sees the config.
DatasetMapperTTA.from_config = classmethod(_mapper_from_config)
