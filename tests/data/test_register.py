import json
import logging
import os
from contextlib import nullcontext

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from panet_d2.data import (
    check,
    check_coco,
    check_dataset_files,
    check_training_images,
    register,
    setup_datasets,
)
from panet_d2.errors import ConfigError, DataError

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
    records = DatasetCatalog.get("squares_train")
    assert {a["category_id"] for r in records for a in r["annotations"]} == {0, 1, 2}


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


def with_keypoints(names, edit=None):
    """All objects get these keypoints, near a corner of theirs; then ``edit`` changes them."""

    def change(content):
        for category in content["categories"]:
            category["keypoints"] = names
        for a in content["annotations"]:
            a["keypoints"] = [a["bbox"][0] + 3, a["bbox"][1] + 3, 2] * len(names)
            a["num_keypoints"] = len(names)
        if edit:
            edit(content)

    return change


NAMES = ["nose", "left_eye", "right_eye"]
KEYPOINTS = ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3)


def test_classes_of_all_sets_must_agree(data, tmp_path):
    """Not their number alone: what one calls its second class the other calls its third."""
    other = write_coco(tmp_path / "other")[0]
    with open(other) as f:
        content = json.load(f)
    with open(other, "w") as f:
        json.dump({**content, "categories": with_names(content, "class0 class2 class1")}, f)
    entries = [list(ENTRY), ["squares_val", "other/instances.json", "other/images"]]
    opts = ("DATASETS.REGISTER_COCO", entries, "DATASETS.TEST", ["squares_val"])
    message = "class 2 is 'class1' in 'squares_train', but 'class2' in 'squares_val'"
    with pytest.raises(ConfigError, match=message):
        setup_datasets(config(*opts))
    with open(other, "w") as f:
        json.dump(content, f)
    setup_datasets(config(*opts))


def test_one_class_may_have_any_name(data, tmp_path):
    files = [write_coco(tmp_path / name, classes=1)[0] for name in ("first", "second")]
    with open(files[1]) as f:
        content = json.load(f)
    with open(files[1], "w") as f:
        json.dump({**content, "categories": with_names(content, "cell")}, f)
    entries = [[n, f"{n}/instances.json", f"{n}/images"] for n in ("first", "second")]
    cfg = tiny_cfg(
        *("DATASETS.REGISTER_COCO", entries, "MODEL.ROI_HEADS.NUM_CLASSES", 1),
        *("DATASETS.TRAIN", ["first"], "DATASETS.TEST", ["second"]),
    )
    setup_datasets(cfg)


def with_names(content, names):
    return [{**c, "name": name} for c, name in zip(content["categories"], names.split())]


def test_keypoints_from_the_categories(data):
    data(with_keypoints(NAMES))
    setup_datasets(config(*KEYPOINTS, "DATASETS.TEST", ["squares_train"]))
    metadata = MetadataCatalog.get("squares_train")
    assert metadata.keypoint_names == NAMES
    assert metadata.keypoint_flip_map == [("left_eye", "right_eye")]


@pytest.mark.parametrize(
    "names, pairs",
    [
        (["Nose", "Left_Eye", "Right_Eye"], [("Left_Eye", "Right_Eye")]),
        (["EYE LEFT", "EYE RIGHT", "tail"], [("EYE LEFT", "EYE RIGHT")]),
        (["l_ear", "r_ear", "l_paw"], [("l_ear", "r_ear")]),
        (["ear.L", "ear.R", "ear.l2"], [("ear.L", "ear.R")]),
        (["lear", "rear", "leftover"], []),
    ],
)
def test_keypoints_that_mirror_each_other(data, caplog, names, pairs):
    data(with_keypoints(names))
    with caplog.at_level(logging.WARNING, "panet_d2"):
        logging.getLogger("panet_d2").propagate = True
        setup_datasets(config(*KEYPOINTS))
    assert MetadataCatalog.get("squares_train").keypoint_flip_map == pairs
    assert bool(caplog.records) != bool(pairs)
    caplog.clear()
    setup_datasets(config(*KEYPOINTS, "INPUT.RANDOM_FLIP", "none"))
    assert not caplog.records


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda c: c["annotations"][2].pop("keypoints"), "annotation 3 .*has no keypoints"),
        (
            lambda c: c["annotations"][2].update(keypoints=[1, 2, 2] * 2 + [1]),
            "annotation 3 .*not as many keypoints.*7 numbers",
        ),
        (
            lambda c: c["annotations"][2].update(keypoints=["1"] * 9),
            "annotation 3 .*keypoints are not a list of numbers",
        ),
        (
            lambda c: c["annotations"][2].update(num_keypoints=0),
            "annotation 3 .*num_keypoints is 0, but keypoints are visible",
        ),
        (
            lambda c: [a.update(keypoints=[0.5, 0.25, 2] * 3) for a in c["annotations"]],
            "keypoints look like fractions",
        ),
        (
            lambda c: c["categories"][1].update(keypoints=NAMES[::-1]),
            "category 2 .*has other keypoints than the category before",
        ),
        (
            lambda c: [category.pop("keypoints") for category in c["categories"]],
            "none of its categories names them",
        ),
        (
            lambda c: c["annotations"][2].pop("num_keypoints"),
            "annotation 3 .*has no num_keypoints",
        ),
    ],
)
def test_bad_keypoints(data, edit, message):
    data(with_keypoints(NAMES, edit))
    if "not a list" not in message:
        setup_datasets(config())  # where they are not used
    with pytest.raises(DataError, match=message):
        setup_datasets(config(*KEYPOINTS, "DATASETS.TEST", ["squares_train"]))


@pytest.mark.parametrize("points", [[None, None, 0], [[1, 2, 2]], "1 2 2", {"x": 1}, [1, True]])
@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_keypoints_of_a_model_without(data, points, split):
    """Detectron2 reads them for any model."""
    data(lambda c: c["annotations"][2].update(keypoints=points))
    cfg = config("DATASETS.TRAIN", [], f"DATASETS.{split}", ["squares_train"])
    with pytest.raises(DataError, match="annotation 3 .*keypoints are not a list of numbers"):
        setup_datasets(cfg)


@pytest.mark.parametrize("names", [[1, 2, 3], 17, {"nose": 1}, [{"name": "nose"}]])
def test_names_of_keypoints_that_are_none(data, names):
    """Models without keypoints do not need them."""

    def edit(content):
        content["categories"][0].update(keypoints=names)

    data(edit)
    setup_datasets(config())
    data(with_keypoints(NAMES, edit))
    with pytest.raises(DataError, match="category 1 .*keypoints are not a list of names"):
        setup_datasets(config(*KEYPOINTS))


def test_keypoints_beside_the_image(data):
    data(with_keypoints(NAMES, lambda c: c["annotations"][2].update(keypoints=[500, 5, 2] * 3)))
    cfg = config(*KEYPOINTS)
    setup_datasets(cfg)
    metadata = MetadataCatalog.get("squares_train")
    found = check_coco(metadata.json_file, metadata.image_root, keypoints=3)
    assert ["annotation 3 (image 2): keypoints are outside the image"] == [
        f"{p.where}: {p.what}" for p in found
    ]


def test_objects_that_are_left_out_are_logged(data, caplog):
    data(lambda c: c["annotations"][2].update(bbox=[5, 5, 0, 9]))
    with caplog.at_level(logging.WARNING, "panet_d2"):
        logging.getLogger("panet_d2").propagate = True
        setup_datasets(config())
    assert "annotation 3 (image 2): box of no area" in caplog.text


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_files_of_detectron2s_datasets(split, monkeypatch):
    """Those to evaluate on are needed only after the training, but looked for before it."""
    cfg = tiny_cfg(f"DATASETS.{split}", ["coco_2017_val"], "MODEL.ROI_HEADS.NUM_CLASSES", 80)
    with pytest.raises(DataError, match="'coco_2017_val': .*val2017.json does not exist.*DATASETS"):
        setup_datasets(cfg)
    setup_datasets(cfg, needed=())
    paths = []
    monkeypatch.setattr(PathManager, "exists", lambda path: paths.append(path) or True)
    setup_datasets(cfg)
    assert [os.path.basename(p) for p in paths] == ["instances_val2017.json", "val2017"]


def test_a_coco_file_has_no_semantic_labels(data):
    opts = ("MODEL.META_ARCHITECTURE", "PanopticFPN")
    with pytest.raises(ConfigError, match="'PanopticFPN', which trains on semantic labels, but"):
        setup_datasets(config(*opts))
    setup_datasets(config(*opts, "DATASETS.TRAIN", []))


def test_files_of_registered_datasets(data, tmp_path):
    """Image folders may be "", and datasets of a user's own function may have any path."""
    setup_datasets(config())
    metadata = MetadataCatalog.get("squares_train")
    register_coco_instances("by_hand", {}, metadata.json_file, "")
    register_coco_instances("lost_by_hand", {}, str(tmp_path / "none.json"), "")
    DatasetCatalog.register("own_records", [].copy)
    MetadataCatalog.get("own_records").set(json_file="/none")
    try:
        check_dataset_files("by_hand")
        check_dataset_files("own_records")
        with pytest.raises(DataError, match="none.json does not exist"):
            check_dataset_files("lost_by_hand")
    finally:
        for name in ("by_hand", "lost_by_hand", "own_records"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.mark.parametrize("number, message", [(2, "is 2, but .* has 3 classes"), (3, ""), (0, "")])
def test_classes_of_a_dataset_that_detectron2_has_not_read(data, number, message):
    """Of `register_coco_instances`, which names the classes when it loads the data."""
    setup_datasets(config())
    metadata = MetadataCatalog.get("squares_train")
    register_coco_instances("by_hand", {}, metadata.json_file, metadata.image_root)
    cfg = config("DATASETS.TRAIN", ("by_hand",), "DATASETS.TEST", ())
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = number
    try:
        with pytest.raises(ConfigError, match=message) if message else nullcontext():
            setup_datasets(cfg)
            assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
            names = [name for _, name in cfg.DATASETS.CATEGORIES]
            assert names == ["class0", "class1", "class2"]
            assert len(DatasetCatalog.get("by_hand")) > 0  # Detectron2 finds the same names
    finally:
        DatasetCatalog.remove("by_hand")
        MetadataCatalog.remove("by_hand")


def test_panoptic_files_are_needed_to_evaluate_only(monkeypatch):
    monkeypatch.setattr(PathManager, "exists", lambda path: "panoptic_val2017" not in path)
    check_dataset_files("coco_2017_val_panoptic_separated", evaluated=False)
    check_dataset_files("coco_2017_val_panoptic_stuffonly")
    with pytest.raises(DataError, match="panoptic_val2017"):
        check_dataset_files("coco_2017_val_panoptic_separated")


def test_number_of_keypoints_must_agree(data):
    data(with_keypoints(NAMES[:2]))
    with pytest.raises(ConfigError, match="NUM_KEYPOINTS is 3.*'squares_train' has 2.*be 2"):
        setup_datasets(config(*KEYPOINTS))


def test_crowds_need_no_keypoints_to_train(data):
    def edit(content):
        content["annotations"][2].update(iscrowd=1, keypoints=[])

    data(with_keypoints(NAMES, edit))
    setup_datasets(config(*KEYPOINTS))


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


def _to_polygons(content):
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        a["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]


def test_cropped_polygons_need_shapely(data, monkeypatch):
    """Also with bitmasks, because Detectron2 crops polygons before it draws them."""
    found = [None]
    monkeypatch.setattr(register.importlib.util, "find_spec", lambda name: found[0])
    crop = ("INPUT.CROP.ENABLED", True)
    setup_datasets(config(*crop))  # RLE
    data(_to_polygons)
    setup_datasets(config())
    setup_datasets(config(*crop, "MODEL.MASK_ON", False))
    setup_datasets(config(*crop, "DATASETS.TEST", ["squares_train"]), needed=["TEST"])
    message = "INPUT.CROP.ENABLED is True, and .*instances.json .*INPUT.MASK_FORMAT.*shapely"
    for mask_format in ("polygon", "bitmask"):
        with pytest.raises(ConfigError, match=message):
            setup_datasets(config(*crop, "INPUT.MASK_FORMAT", mask_format))
    registered = ("DATASETS.TRAIN", ["coco_2017_val"], "MODEL.ROI_HEADS.NUM_CLASSES", 80)
    with pytest.raises(ConfigError, match="'coco_2017_val' has polygon masks.*shapely"):
        setup_datasets(config(*crop, *registered, "INPUT.MASK_FORMAT", "polygon"))
    found[0] = "a package"
    setup_datasets(config(*crop))


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
@pytest.mark.parametrize("names", ["squares_train", None, ["squares_train", 1]])
def test_names_must_be_a_list(data, split, names):
    cfg = config()
    cfg.DATASETS[split] = names
    with pytest.raises(ConfigError, match=f"DATASETS.{split} is .*it must be a list of names"):
        setup_datasets(cfg)


def test_one_name_for_two_files(data):
    entries = [list(ENTRY), ["squares_train", "other/instances.json", "other/images"]]
    with pytest.raises(ConfigError, match="REGISTER_COCO names 'squares_train' more than once"):
        setup_datasets(config("DATASETS.REGISTER_COCO", entries))


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
    cfg.DATASETS.TEST, cfg.DATASETS.CATEGORIES = ["lost_train"], []
    setup_datasets(cfg, needed=[])


@pytest.fixture
def checks(monkeypatch, tmp_path):
    """The numbers of annotations that were checked, however few are remembered as right."""
    monkeypatch.setenv("PANET_D2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(register, "_WORTH_REMEMBERING", 1)
    found, original = [], register.check_annotations

    def counted(content, *args):
        found.append(len(content["annotations"]))
        return original(content, *args)

    monkeypatch.setattr(register, "check_annotations", counted)
    return found


def test_what_was_right_is_not_checked_again(data, checks):
    setup_datasets(config())
    setup_datasets(config())
    assert checks == [8]
    setup_datasets(config("DATASETS.TEST", ["squares_train"]))  # which needs more
    setup_datasets(config("MODEL.MASK_ON", False))
    assert checks == [8] * 3
    data(lambda content: content["annotations"].pop())
    setup_datasets(config())
    setup_datasets(config())
    assert checks == [8] * 3 + [7]


def test_what_was_wrong_is_checked_again(data, checks):
    data(lambda content: content["annotations"][0].update(category_id=99))
    for _ in range(2):
        with pytest.raises(DataError, match="unknown category"):
            setup_datasets(config())
    assert checks == [8, 8]


def test_few_annotations_leave_nothing_in_the_cache(data, checks, monkeypatch, tmp_path):
    monkeypatch.setattr(register, "_WORTH_REMEMBERING", 9)
    setup_datasets(config())
    setup_datasets(config())
    assert checks == [8, 8] and not (tmp_path / "cache").exists()


def test_the_check_can_be_left_out(data, checks):
    off = ("DATASETS.CHECK_ANNOTATIONS", False)

    def edit(content):
        content["annotations"][0].update(category_id=99)
        content["annotations"].append("annotation")
        content["images"].append("image")

    data(edit)
    with pytest.raises(DataError, match="unknown category"):
        setup_datasets(config())
    setup_datasets(config(*off))
    assert checks == [9]
    with pytest.raises(ConfigError, match="NUM_CLASSES is 7"):
        setup_datasets(config(*off, "MODEL.ROI_HEADS.NUM_CLASSES", 7))
    data(lambda content: content["images"][0].update(file_name="lost.png"))
    with pytest.raises(DataError, match="1 of 4 images are missing.*lost.png"):
        setup_datasets(config(*off))
    cfg = config()
    cfg.DATASETS.CHECK_ANNOTATIONS = 1
    with pytest.raises(ConfigError, match="DATASETS.CHECK_ANNOTATIONS is 1"):
        setup_datasets(cfg)


def test_each_file_is_parsed_once(data, monkeypatch):
    """By two names, and by both checks."""
    parsed, load = [], json.load
    monkeypatch.setattr(check.json, "load", lambda f: parsed.append(f.name) or load(f))
    cfg = config("DATASETS.TEST", ["squares_val"])
    cfg.DATASETS.REGISTER_COCO = [list(ENTRY), ["squares_val", *ENTRY[1:]]]
    setup_datasets(cfg)
    check_training_images(cfg)
    assert len(parsed) == 1
    assert not check._kept_images  # while a model trains
    check_training_images(cfg)
    assert len(parsed) == 3
    setup_datasets(cfg, needed=["TEST"])
    assert not check._kept_images


def test_the_main_process_checks_for_all(data, checks, tmp_path):
    """And every process raises its error."""
    wrong = json.loads((tmp_path / ENTRY[1]).read_text())
    wrong["annotations"][0]["category_id"] = 99
    (tmp_path / "squares/wrong.json").write_text(json.dumps(wrong))
    entries = [["right", *ENTRY[1:]], ["wrong", "squares/wrong.json", ENTRY[2]]]
    cfg = tiny_cfg("DATASETS.REGISTER_COCO", entries, "DATASETS.TRAIN", ["right"])

    def child(rank):
        dist.init_process_group("gloo", f"file://{tmp_path}/group", rank=rank, world_size=2)
        setup_datasets(cfg)
        kept = len(check._kept_images)
        cfg.DATASETS.TRAIN = ["wrong"]
        with pytest.raises(DataError) as caught:
            setup_datasets(cfg)
        (tmp_path / f"{rank}.json").write_text(json.dumps([str(caught.value), len(checks), kept]))
        dist.destroy_process_group()

    mp.start_processes(child, nprocs=2, start_method="fork")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first[0] == second[0] and "unknown category" in first[0]
    assert first[1:] == [2, 1] and second[1:] == [0, 0]
