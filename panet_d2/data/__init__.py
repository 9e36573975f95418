from .build import build_training_sample_loader, spread_evenly
from .dataset_mapper import NamedImageMapper
from .datasets import register_shapes
from .register import DataError, register_coco_file, setup_datasets

__all__ = [
    "DataError",
    "NamedImageMapper",
    "build_training_sample_loader",
    "register_coco_file",
    "register_shapes",
    "setup_datasets",
    "spread_evenly",
]
