import json
import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from panet_d2 import ConfigError
from panet_d2.data import DataError, setup_datasets

from ..common import tiny_cfg, write_coco


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data set below DETECTRON2_DATASETS, and a function that changes its annotations."""
    json_file, root = write_coco(tmp_path / "squares")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))

    def change(edit):
        with open(json_file) as f:
            content = json.load(f)
        edit(content)
        with open(json_file, "w") as f:
            json.dump(content, f)

    return change


ENTRY = ("squares_train", "squares/instances.json", "squares/images")


def config(*opts):
    return tiny_cfg(
        *("DATASETS.REGISTER_COCO", [list(ENTRY)]), *("DATASETS.TRAIN", ["squares_train"]), *opts
    )


def test_registers_what_the_file_says(data, tmp_path):
    setup_datasets(config())
    metadata = MetadataCatalog.get("squares_train")
    assert metadata.thing_classes == ["class0", "class1", "class2"]
    assert metadata.evaluator_type == "coco"
    assert metadata.json_file == str(tmp_path / "squares/instances.json")
    records = DatasetCatalog.get("squares_train")
    assert len(records) == 4 and os.path.isfile(records[0]["file_name"])


def test_category_ids_need_not_be_contiguous_or_sorted(data):
    def edit(content):
        for a in content["annotations"]:
            a["category_id"] *= 10
        content["categories"] = [
            {"id": 10 * c["id"], "name": c["name"]} for c in content["categories"][::-1]
        ]

    data(edit)
    setup_datasets(config())
    metadata = MetadataCatalog.get("squares_train")
    assert metadata.thing_classes == ["class0", "class1", "class2"]
    assert metadata.thing_dataset_id_to_contiguous_id == {10: 0, 20: 1, 30: 2}
    assert {a["category_id"] for r in DatasetCatalog.get("squares_train") for a in r["annotations"]}


def test_again_with_other_files(data, tmp_path):
    setup_datasets(config())
    write_coco(tmp_path / "other", classes=2)
    entry = ["squares_train", "other/instances.json", "other/images"]
    cfg = tiny_cfg(
        *("DATASETS.REGISTER_COCO", [entry]),
        *("DATASETS.TRAIN", ["squares_train"]),
        *("MODEL.ROI_HEADS.NUM_CLASSES", 2),
    )
    setup_datasets(cfg)
    assert len(MetadataCatalog.get("squares_train").thing_classes) == 2


def test_absolute_paths(data, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/nowhere")
    entry = ["squares_train", *(str(tmp_path / p) for p in ENTRY[1:])]
    setup_datasets(tiny_cfg("DATASETS.REGISTER_COCO", [entry]))


def test_the_users_own_folder(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("DETECTRON2_DATASETS", f"~/{tmp_path.name}")
    setup_datasets(config())


def test_number_of_classes_from_the_data(data):
    cfg = config("MODEL.ROI_HEADS.NUM_CLASSES", 0)
    setup_datasets(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    cfg = config("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", 0)
    setup_datasets(cfg)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3


def test_number_of_classes_must_agree(data):
    with pytest.raises(ConfigError, match="ROI_HEADS.NUM_CLASSES is 7.*'squares_train' has 3"):
        setup_datasets(config("MODEL.ROI_HEADS.NUM_CLASSES", 7))
    with pytest.raises(ConfigError, match="RETINANET.NUM_CLASSES is 80.*has 3"):
        setup_datasets(config("MODEL.META_ARCHITECTURE", "RetinaNet"))
    # Data that Detectron2 knows is checked too.
    with pytest.raises(ConfigError, match="NUM_CLASSES is 3.*'coco_2017_val' has 80"):
        setup_datasets(config("DATASETS.TEST", ["coco_2017_val"]))
    with pytest.raises(ConfigError, match="NUM_CLASSES is 0"):
        setup_datasets(tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 0))


def test_keypoints_from_the_categories(data):
    def edit(content):
        names = ["nose", "left_eye", "right_eye"]
        content["categories"][0]["keypoints"] = names
        for a in content["annotations"]:
            a["keypoints"] = [a["bbox"][0] + 3, a["bbox"][1] + 3, 2] * 3

    data(edit)
    setup_datasets(config("MODEL.KEYPOINT_ON", True))
    metadata = MetadataCatalog.get("squares_train")
    assert metadata.keypoint_names == ["nose", "left_eye", "right_eye"]
    assert metadata.keypoint_flip_map == [("left_eye", "right_eye")]


@pytest.mark.parametrize(
    "edit, opts, error, message",
    [
        (lambda c: c["images"].clear(), (), DataError, "instances.json has no images"),
        (lambda c: c["categories"].clear(), (), DataError, "instances.json has no categories"),
        (lambda c: c.pop("images"), (), DataError, "instances.json is not a COCO.*images"),
        (lambda c: c["annotations"].clear(), (), DataError, "instances.json has no annotations"),
        (
            lambda c: [a.pop("segmentation") for a in c["annotations"]],
            (),
            DataError,
            "instances.json has no masks; MODEL.MASK_ON must be False",
        ),
        (
            lambda c: None,
            ("INPUT.MASK_FORMAT", "polygon"),
            ConfigError,
            "INPUT.MASK_FORMAT is 'polygon'.*instances.json.*'bitmask'",
        ),
        (
            lambda c: None,
            ("MODEL.KEYPOINT_ON", True),
            DataError,
            "instances.json has no keypoints; MODEL.KEYPOINT_ON must be False",
        ),
        (
            lambda c: c["images"][2].update(file_name="lost.png"),
            (),
            DataError,
            "1 of 4 images are missing.*lost.png",
        ),
        (
            lambda c: None,
            ("DATASETS.TEST", ["unheard_of"]),
            ConfigError,
            "DATASETS.TEST names 'unheard_of'.*DATASETS.REGISTER_COCO",
        ),
    ],
)
def test_bad_data(data, edit, opts, error, message):
    data(edit)
    with pytest.raises(error, match=message):
        setup_datasets(config(*opts))


def test_boxes_alone_will_do_without_masks(data):
    data(lambda c: [a.pop("segmentation") for a in c["annotations"]])
    setup_datasets(config("MODEL.MASK_ON", False))


@pytest.mark.parametrize(
    "entry, error, message",
    [
        (
            ["a", "b"],
            ConfigError,
            "DATASETS.REGISTER_COCO has.*name, annotation file, image folder",
        ),
        (["a", 1, "c"], ConfigError, "DATASETS.REGISTER_COCO"),
        (["a", "no.json", "squares/images"], DataError, "'a'.*no.json.*DETECTRON2_DATASETS"),
        (
            ["a", "squares/instances.json", "no"],
            DataError,
            "'a'.*image folder.*DETECTRON2_DATASETS",
        ),
        (["a", "squares/images/001.png", "squares/images"], DataError, "001.png is not a COCO"),
    ],
)
def test_bad_entries(data, entry, error, message):
    with pytest.raises(error, match=message):
        setup_datasets(tiny_cfg("DATASETS.REGISTER_COCO", [entry], "DATASETS.TRAIN", ["a"]))


def test_data_that_is_not_needed_may_be_missing(data):
    lost = ["lost_train", "lost/instances.json", "lost/images"]
    cfg = config()
    cfg.DATASETS.REGISTER_COCO = [lost, list(ENTRY)]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ["lost_train"], ["squares_train"]
    setup_datasets(cfg, needed=["TEST"])
    assert "lost_train" not in DatasetCatalog
    with pytest.raises(DataError, match="lost_train"):
        setup_datasets(cfg)
    # Nothing at all is needed to predict; classes that are known must still agree.
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    with pytest.raises(ConfigError, match="NUM_CLASSES is 4.*'squares_train' has 3"):
        setup_datasets(cfg, needed=[])
    cfg.DATASETS.TEST = ["lost_train"]
    setup_datasets(cfg, needed=[])
