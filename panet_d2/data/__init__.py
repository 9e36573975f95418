from .dataset_mapper import NamedImageMapper
from .datasets import register_shapes
from .register import DataError, register_coco_file, setup_datasets

__all__ = [
    "DataError",
    "NamedImageMapper",
    "register_coco_file",
    "register_shapes",
    "setup_datasets",
]
