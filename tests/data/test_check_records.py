"""Images of datasets that a user's own function makes."""

from __future__ import annotations

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from torch.utils.data import Dataset

from panet_d2 import ConfigError, DataError
from panet_d2.data import NamedImageMapper, register_coco_file
from panet_d2.data.check_records import check_records
from panet_d2.data.train_loader import build_train_loader
from panet_d2.engine import Trainer
from panet_d2.evaluation import check_evaluators

from ..common import tiny_cfg, write_coco


@pytest.fixture
def records(tmp_path):
    """What the function of the dataset "own" returns."""
    register_coco_file("own_file", *write_coco(tmp_path))
    records = DatasetCatalog.get("own_file")
    DatasetCatalog.register("own", lambda: records)
    metadata = MetadataCatalog.get("own")
    metadata.set(thing_classes=["a", "b", "c"], evaluator_type="coco")
    yield records
    DatasetCatalog.remove("own")
    MetadataCatalog.remove("own")


def config(*opts):
    names = "DATASETS.TRAIN", ["own"], "DATASETS.TEST", ["own"]
    return tiny_cfg(*names, "SOLVER.IMS_PER_BATCH", 1, *opts)


FAULTS = {
    "category_id is 3; it must be from 0 to 2": {"category_id": 3},
    "category_id is -1": {"category_id": -1},
    "category_id is 0.5": {"category_id": 0.5},
    "category_id is 'a'": {"category_id": "a"},
    "category_id is None": {"category_id": None},
    "bbox is \\[nan": {"bbox": [float("nan"), 0, 1, 1]},
    "bbox is None": {"bbox": None},
    "bbox is \\[1, 2, 3\\]": {"bbox": [1, 2, 3]},
    "bbox is array": {"bbox": np.ones(4)},
    "bbox is \\['1'": {"bbox": ["1", "2", "3", "4"]},
    "bbox_mode is None": {"bbox_mode": None},
    "bbox_mode is 'XYWH_ABS'": {"bbox_mode": "XYWH_ABS"},
    "without 'segmentation', which MODEL.MASK_ON True needs": {"segmentation": None},
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults_are_named_with_the_image(records, message):
    records[1]["annotations"][1].update(FAULTS[message])
    expected = f"dataset 'own': image .*002.png has an object .*{message}"
    for seed in (3, -1):
        with pytest.raises(DataError, match=expected):
            cfg = config("SEED", seed)
            build_train_loader(cfg, NamedImageMapper(cfg, True))
    with pytest.raises(DataError, match=expected):
        check_evaluators(config())


@pytest.mark.parametrize("message", FAULTS)
def test_crowds_may_have_them(records, message):
    records[1]["annotations"][1].update(FAULTS[message], iscrowd=1)
    check_records(config(), ["own"], records)


def test_semantic_labels(records):
    opts = ("MODEL.META_ARCHITECTURE", "PanopticFPN")
    with pytest.raises(DataError, match="001.png has no 'sem_seg_file_name'"):
        check_records(config(*opts), ["own"], records)
    check_records(config(*opts), ["own"], records, evaluated=True)
    labelled = [{**record, "sem_seg_file_name": "labels.png"} for record in records]
    check_records(config(*opts), ["own"], labelled)


@pytest.mark.parametrize("key", ["annotations", "file_name"])
def test_missing_keys(records, key):
    del records[1][key]
    cfg = config()
    with pytest.raises(DataError, match=f"dataset 'own': image .* has no '{key}'"):
        build_train_loader(cfg, NamedImageMapper(cfg, True))


def test_only_evaluation_needs_an_id(records):
    del records[0]["image_id"]
    check_records(config(), ["own"], records)
    with pytest.raises(DataError, match="001.png has no 'image_id'"):
        check_evaluators(config())


def test_what_detectron2_accepts(records):
    first, second = records[0]["annotations"]
    first.update(category_id=np.int64(2), bbox=tuple(first["bbox"]), bbox_mode=1)
    second.update(bbox=[9, 9, 5, 5, 45], bbox_mode=BoxMode.XYWHA_ABS)
    check_records(config(), ["own"], records)
    first["segmentation"] = None
    check_records(config("MODEL.MASK_ON", False), ["own"], records)
    check_records(config(), ["own"], [{"file_name": "a.png"}])  # no annotations at all


def test_other_mappers_may_need_other_keys(records):
    for record in records:
        for annotation in record["annotations"]:
            del annotation["segmentation"]
    cfg = config()
    build_train_loader(cfg, lambda record: record)


def test_a_dataset_that_reads_each_image_is_not_read(records):
    class Slow(Dataset):
        def __getitem__(self, index):
            raise AssertionError("read")

    check_records(config(), ["own"], Slow())


def test_before_the_first_step(records):
    """In a program that makes the trainer itself."""
    del MetadataCatalog.get("own").evaluator_type
    with pytest.raises(ConfigError, match=r"'own', which has no evaluator_type; .* = 'coco'"):
        Trainer(config())
    MetadataCatalog.get("own").evaluator_type = "coco"
    del MetadataCatalog.get("own").thing_classes
    with pytest.raises(ConfigError, match="'own', which has no names of its classes"):
        Trainer(config())


def test_who_evaluates_otherwise_needs_no_type(records):
    class Own(Trainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            raise NotImplementedError

    class Derived(Own):
        pass

    del MetadataCatalog.get("own").evaluator_type
    Derived(config())
