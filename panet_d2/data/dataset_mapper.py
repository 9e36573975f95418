"""A dataset mapper that says which image it could not read."""

from __future__ import annotations

from detectron2.data import DatasetMapper

from .register import DataError

__all__ = ["NamedImageMapper"]


class NamedImageMapper(DatasetMapper):
    """Detectron2's mapper; what goes wrong with an image is reported with the image's name."""

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Args:
            dataset_dict (dict): one image in Detectron2's dataset format.

        Returns:
            dict: what Detectron2's models accept.

        Raises:
            DataError: if the image cannot be read.
        """
        try:
            return super().__call__(dataset_dict)
        # PIL raises OSError for what it cannot identify, SyntaxError for some broken PNGs, and
        # Detectron2 a ValueError for a size that is not the annotated one.
        except (OSError, SyntaxError, ValueError) as e:
            raise DataError(f"cannot use image {dataset_dict['file_name']}: {e}") from e
