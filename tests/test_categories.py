"""Names and ids of the classes, from the dataset to the run's config and back."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from panet_d2.categories import dataset_categories, read_categories
from panet_d2.data import setup_datasets
from panet_d2.errors import ConfigError

from .common import tiny_cfg, write_coco

NAMES = [[1, "class0"], [2, "class1"], [3, "class2"]]


@pytest.fixture
def cfg(tmp_path):
    """A config with a dataset, which is not registered any more afterwards."""
    json_file, root = write_coco(tmp_path / "squares")
    yield tiny_cfg(
        *("DATASETS.REGISTER_COCO", [["named_squares", json_file, root]]),
        *("DATASETS.TRAIN", ["named_squares"]),
        *("MODEL.ROI_HEADS.NUM_CLASSES", 0),
    )
    if "named_squares" in DatasetCatalog:
        DatasetCatalog.remove("named_squares")
    MetadataCatalog.pop("named_squares", None)


def kept(cfg):
    """The config that a run writes, read again where the dataset is not at hand."""
    setup_datasets(cfg)
    DatasetCatalog.remove("named_squares")
    MetadataCatalog.remove("named_squares")
    again = tiny_cfg()
    again.merge_from_other_cfg(type(cfg).load_cfg(cfg.dump()))
    again.DATASETS.REGISTER_COCO = [["named_squares", "gone.json", "gone"]]
    return again


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_a_run_keeps_the_names(cfg, split):
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [], []
    cfg.DATASETS[split] = ["named_squares"]
    again = kept(cfg)
    again.MODEL.ROI_HEADS.NUM_CLASSES = 0
    setup_datasets(again, needed=())
    assert again.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert [list(c) for c in again.DATASETS.CATEGORIES] == NAMES
    metadata = MetadataCatalog.get("named_squares")
    assert metadata.thing_classes == ["class0", "class1", "class2"]
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 2: 1, 3: 2}


def test_the_dataset_may_come_back(cfg):
    again = kept(cfg)
    setup_datasets(again, needed=())
    again.DATASETS.REGISTER_COCO = cfg.DATASETS.REGISTER_COCO
    setup_datasets(again)
    assert len(DatasetCatalog.get("named_squares")) == 4


def test_other_order_of_classes(cfg):
    cfg.DATASETS.CATEGORIES = [[1, "class1"], [2, "class0"], [3, "class2"]]
    with pytest.raises(ConfigError, match="DATASETS.CATEGORIES: class 1 is 'class1'.*'class0'"):
        setup_datasets(cfg)
    cfg.DATASETS.CATEGORIES = [[5, "class0"], [6, "class1"], [7, "class2"]]
    setup_datasets(cfg)  # ids are each dataset's own
    assert cfg.DATASETS.CATEGORIES == NAMES


def test_other_number_of_classes(cfg):
    cfg.DATASETS.CATEGORIES = NAMES[:2]
    with pytest.raises(ConfigError, match="CATEGORIES has 2 classes.*'named_squares' has 3"):
        setup_datasets(cfg)
    cfg.DATASETS.TRAIN, cfg.MODEL.ROI_HEADS.NUM_CLASSES = [], 5
    with pytest.raises(ConfigError, match="NUM_CLASSES is 5, but DATASETS.CATEGORIES has 2"):
        setup_datasets(cfg)


@pytest.mark.parametrize(
    "value, message",
    [
        ("text", "'text'"),
        ([1, 2], "has 1; it must be a list of"),
        ([[1, "a"], [2]], r"has \[2\];"),
        ([[1.5, "a"]], r"has \[1.5, 'a'\]"),
        ([[1, 2]], r"has \[1, 2\]"),
        ([[True, "a"]], r"has \[True"),
        ([[1, "a"], [1, "b"]], "an id twice"),
    ],
)
def test_values_that_cannot_be(value, message):
    cfg = tiny_cfg()
    cfg.DATASETS.CATEGORIES = value
    with pytest.raises(ConfigError, match=f"DATASETS.CATEGORIES {message}|{message}"):
        read_categories(cfg)


def test_ids_of_other_types():
    MetadataCatalog.get("numpy_ids").set(
        thing_classes=["a", "b"], thing_dataset_id_to_contiguous_id={np.int64(7): 1, 9.0: 0}
    )
    assert dataset_categories("numpy_ids") == [(9, "a"), (7, "b")]
    MetadataCatalog.pop("numpy_ids")


def test_datasets_of_detectron2():
    coco = dataset_categories("coco_2017_val")
    assert len(coco) == 80 and coco[0] == (1, "person") and coco[-1][0] == 90
    lvis = dataset_categories("lvis_v1_val")
    assert len(lvis) == 1203 and lvis[0][0] == 1 and lvis[-1][0] == 1203
    assert dataset_categories("coco_2017_val_panoptic") == []  # "things" that are stuff


def test_ids_that_are_text(cfg, tmp_path):
    """A run keeps them, as numbers."""
    json_file = cfg.DATASETS.REGISTER_COCO[0][1]
    with open(json_file) as f:
        content = json.load(f)
    for record in (*content["categories"], *content["annotations"]):
        key = "category_id" if "category_id" in record else "id"
        record[key] = f"c{record[key]}"
    with open(json_file, "w") as f:
        json.dump(content, f)
    again = kept(cfg)
    setup_datasets(again, needed=())
    assert [c[0] for c in again.DATASETS.CATEGORIES] == ["c1", "c2", "c3"]


def test_ids_that_floats_cannot_tell_apart():
    ids = [2**64 + 1, 2**64 + 2]
    MetadataCatalog.get("large_ids").set(
        thing_classes=["a", "b"],
        thing_dataset_id_to_contiguous_id={i: n for n, i in enumerate(ids)},
    )
    assert [c[0] for c in dataset_categories("large_ids")] == ids


def test_a_program_may_name_the_classes(cfg):
    """Also after the model is built, and for the models that it builds later."""
    again = kept(cfg)
    build_model(again)
    own = ["first", "second", "third"]
    metadata = MetadataCatalog.get("named_squares")
    assert metadata.thing_classes[0] == "class0"
    metadata.set(thing_classes=own)
    build_model(again)
    assert MetadataCatalog.get("named_squares").thing_classes == own
