"""Datasets in COCO format whose measurements are known."""

from __future__ import annotations

from typing import Sequence, Tuple

Box = Sequence[float]


def content(
    images: Sequence[Tuple[int, int, Sequence[Box]]], classes: int = 1, masks: str = "polygon"
) -> dict:
    """
    Make the content of an annotation file.

    Args:
        images: height, width and boxes (x, y, w, h, and maybe a class index) of each image.
        classes (int): number of categories.
        masks (str): "polygon", "rle" or "none".
    """
    annotations = []
    for image_id, (height, width, boxes) in enumerate(images, 1):
        for x, y, w, h, *category in boxes:
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": 1 + (category[0] if category else 0),
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
            }
            if masks == "polygon":
                annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            elif masks == "rle":
                before, after = height * x + y, height * (width - x - w)
                column = [h, height - h] * (w - 1) + [h]
                counts = [before, *column, after + height - y - h]
                annotation["segmentation"] = {"size": [height, width], "counts": counts}
            annotations.append(annotation)
    return {
        "images": [
            {"id": i, "file_name": f"{i:04d}.png", "height": h, "width": w}
            for i, (h, w, _) in enumerate(images, 1)
        ],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": f"class{i}"} for i in range(classes)],
    }


def squares(sides: Sequence[float], size: Tuple[int, int] = (400, 400), number: int = 2) -> dict:
    """``number`` images of one size, each with a square of each side in the upper left corner."""
    return content([(*size, [(0, 0, s, s) for s in sides])] * number)
