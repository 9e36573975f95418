from .build import build_training_sample_loader, first_test_set, spread_evenly
from .check import check_coco, check_images, check_training_images
from .check_annotations import check_annotations
from .dataset_mapper import NamedImageMapper
from .datasets import register_shapes
from .problem import Problem
from .register import check_dataset_files, register_coco_file, setup_datasets

__all__ = [
    "NamedImageMapper",
    "Problem",
    "build_training_sample_loader",
    "check_annotations",
    "check_coco",
    "check_dataset_files",
    "check_images",
    "check_training_images",
    "first_test_set",
    "register_coco_file",
    "register_shapes",
    "setup_datasets",
    "spread_evenly",
]
