"""Comparison of an exported model with the original."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, List, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.transforms import ResizeShortestEdge

from ..data import first_test_set, spread_evenly
from ..data.augmentation import leaves_nothing
from ..data.image_file import read_image_file
from ..errors import ConfigError, DataError

# The largest allowed difference of the outputs for one detection: boxes and keypoints in pixels,
# scores and masks as probabilities. A keypoint's score may differ by this share of the score.
TOLERANCES = {"pred_boxes": 0.05, "scores": 1e-3, "pred_masks": 5e-3, "pred_keypoints": 0.05}
# The share of detections that only one of the models may have, because rounding can decide whether
# NMS keeps a box. With fewer than 100 detections, no detection may.
MAX_UNMATCHED = 0.01
# Sizes of the sample images, relative to the test size.
_SCALES = (1.0, 0.75, 0.5)


@dataclass
class Agreement:
    """The differences between an exported model and the original on the same images."""

    images: int = 0
    empty_images: int = 0  # in which the original finds nothing
    detections: int = 0  # of the original
    unmatched: int = 0  # detections that only one of the models has
    # The largest difference between matching detections, for each output in TOLERANCES.
    differences: Dict[str, float] = field(default_factory=dict)

    def add(self, expected: Dict[str, torch.Tensor], found: Dict[str, torch.Tensor]) -> None:
        """
        Compare the detections in one image.

        Args:
            expected, found (dict[str, Tensor]): the outputs of the original and of the exported
                model, of shapes (N, ...) and (M, ...), in any order.
        """
        count = len(expected["scores"])
        self.images += 1
        self.empty_images += count == 0
        self.detections += count
        ours, theirs = _same_detections(expected, found)
        self.unmatched += count + len(found["scores"]) - 2 * len(ours)
        for name in TOLERANCES.keys() & expected.keys():
            apart = (expected[name][ours].double() - found[name][theirs].double()).abs()
            if name == "pred_keypoints":
                # The third value is a score without an upper bound.
                apart[..., 2] /= expected[name][ours, :, 2].abs().clamp(min=1)
            largest = apart.max().item() if apart.numel() else 0.0
            # Unlike max(), numpy's maximum keeps a NaN.
            self.differences[name] = float(np.maximum(self.differences.get(name, 0.0), largest))

    def complaint(self) -> str:
        """Return what is outside the tolerances, or "" if nothing is."""
        complaints = []
        if self.unmatched > MAX_UNMATCHED * self.detections:
            complaints.append(
                f"{self.unmatched} detections are found by only one of them, the original finds "
                f"{self.detections}"
            )
        for name, value in self.differences.items():
            if not value <= TOLERANCES[name]:  # true for NaN
                complaints.append(f"{name} differ by {value:.2g}, more than {TOLERANCES[name]:g}")
        return "; ".join(complaints)

    def __str__(self) -> str:
        values = ", ".join(f"{n} {self.differences[n]:.1g}" for n in sorted(self.differences))
        return (
            f"{self.images} images, {self.empty_images} of them without detections; "
            f"{self.detections} detections, {self.unmatched} unmatched; largest differences: "
            f"{values}"
        )


def _same_detections(
    a: Dict[str, torch.Tensor], b: Dict[str, torch.Tensor]
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the detections of ``a`` and ``b`` with the same class and box."""
    if not (len(a["scores"]) and len(b["scores"])):
        none = torch.zeros(0, dtype=torch.long)
        return none, none
    apart = torch.cdist(a["pred_boxes"].double(), b["pred_boxes"].double(), p=float("inf"))
    apart[a["pred_classes"][:, None] != b["pred_classes"]] = float("inf")
    apart, nearest = apart.min(dim=1)
    ours = (apart <= TOLERANCES["pred_boxes"]).nonzero()[:, 0]
    theirs, first = np.unique(nearest[ours].numpy(), return_index=True)
    return ours[torch.from_numpy(first)], torch.from_numpy(theirs)


def sample_images(cfg: CfgNode, files: Sequence[str] = (), count: int = 3) -> List[torch.Tensor]:
    """
    Load images of several sizes to check an exported model with.

    Args:
        cfg (CfgNode): the model's config.
        files (sequence[str]): image files. If empty, a sample of the first dataset of
            ``DATASETS.TEST`` is used.
        count (int): minimum number of images. Fewer files are repeated at other sizes.

    Returns:
        list[Tensor]: of shape (C, H, W), float32 from 0 to 255, in ``INPUT.FORMAT``. The first has
        the test size, the next two are smaller.

    Raises:
        ConfigError: if there are neither files nor a dataset, or images have other channels than
            the model.
        DataError: if an image cannot be used.
    """
    if not files:
        dicts = get_detection_dataset_dicts([first_test_set(cfg)], filter_empty=False)
        files = [record["file_name"] for record in spread_evenly(dicts, count)]
    images, channels = [], len(cfg.MODEL.PIXEL_MEAN)
    for i in range(max(count, len(files))):
        file = files[i % len(files)]
        image = read_image_file(file, cfg.INPUT.FORMAT)
        if image.shape[2] != channels:
            raise ConfigError(
                f"MODEL.PIXEL_MEAN has {channels} values, but images in INPUT.FORMAT "
                f"{cfg.INPUT.FORMAT!r} have {image.shape[2]} channels; only models of such images "
                "can be checked."
            )
        short = round(cfg.INPUT.MIN_SIZE_TEST * _SCALES[i % len(_SCALES)])
        resize = ResizeShortestEdge(short, cfg.INPUT.MAX_SIZE_TEST).get_transform(image)
        if leaves_nothing(resize):
            raise DataError(f"cannot use image {file}: it is too narrow to be resized.")
        image = resize.apply_image(image).astype("float32")
        images.append(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))))
    return images


def blank_images(mean: torch.Tensor) -> List[torch.Tensor]:
    """Return three images (C, H, W): of color ``mean``, of shape (C, 1, 1); black; and white."""
    size = (len(mean), 96, 160)
    return [mean.expand(size).clone(), torch.zeros(size), torch.full(size, 255.0)]
