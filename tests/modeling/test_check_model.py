"""What a config asks for and the model would not do, through Detectron2's own builders."""

import logging

import pytest
import torch
from detectron2.config import configurable, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    ROI_HEADS_REGISTRY,
    DatasetMapperTTA,
    GeneralizedRCNN,
    RetinaNet,
    StandardROIHeads,
    build_model,
)

from panet_d2 import AdaptivePoolingMixin, add_panet_config
from panet_d2.engine import Predictor, Trainer
from panet_d2.errors import ConfigError
from panet_d2.modeling.check_model import num_classes_node, warn_once

from ..common import tiny_cfg

BOX, MASK = "MODEL.ROI_BOX_HEAD", "MODEL.ROI_MASK_HEAD"
STOCK = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", f"{MASK}.NAME")
STOCK += ("MaskRCNNConvUpsampleHead", "MODEL.ROI_HEADS.NAME", "StandardROIHeads")
NO_AFP = (f"{BOX}.AFP.ENABLED", False, f"{MASK}.AFP.ENABLED", False)


@pytest.fixture(autouse=True)
def warnings_anew(caplog):
    warn_once.cache_clear()
    caplog.set_level(logging.WARNING, "panet_d2")


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "panet_d2"]


@pytest.mark.parametrize(
    "opts, words",
    [
        (NO_AFP, ("PANetROIHeads", "no adaptive feature pooling")),
        (STOCK, (f"{BOX}.AFP.ENABLED is True", "'StandardROIHeads'", "ignores")),
        ((f"{BOX}.POOLER_SAMPLING_RATIO", 0), (f"{BOX}.POOLER_SAMPLING_RATIO is 0", "set 2")),
    ],
)
def test_said_once(opts, words, caplog):
    for _ in range(2):
        build_model(tiny_cfg(*opts))
    (warning,) = warnings(caplog)
    assert all(word in warning for word in words), warning


@pytest.mark.parametrize("opts", [(), (*STOCK, *NO_AFP)])
def test_nothing_is_said_of_what_is_right(opts, caplog):
    build_model(tiny_cfg(*opts))
    assert not warnings(caplog)


def test_a_config_without_our_keys_is_left_alone(caplog):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 18])
    cfg.merge_from_list(["MODEL.RESNETS.RES2_OUT_CHANNELS", 64])
    cfg.merge_from_list(["MODEL.ROI_HEADS.IN_FEATURES", ["res4"], "MODEL.BACKBONE.FREEZE_AT", 0])
    build_model(cfg)
    assert not warnings(caplog)


def test_own_heads_with_the_mixin(caplog):
    class Heads(AdaptivePoolingMixin, StandardROIHeads):
        pass

    Heads.__name__ = "HeadsOfThisTest"
    ROI_HEADS_REGISTRY.register(Heads)
    model = build_model(tiny_cfg("MODEL.ROI_HEADS.NAME", "HeadsOfThisTest"))
    assert model.roi_heads.box_pooler.fusion == "max" and not warnings(caplog)


@pytest.mark.parametrize("opts", [(), STOCK])
def test_no_classes(opts):
    cfg = tiny_cfg(*opts, "MODEL.ROI_HEADS.NUM_CLASSES", 0)
    with pytest.raises(ConfigError, match="MODEL.ROI_HEADS.NUM_CLASSES is 0.*setup_datasets"):
        DefaultTrainer.build_model(cfg)


def test_no_classes_of_retinanet():
    cfg = tiny_cfg(
        *("MODEL.META_ARCHITECTURE", "RetinaNet"),
        *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_pafpn_backbone"),
        *("MODEL.RETINANET.NUM_CLASSES", 0),
    )
    with pytest.raises(ConfigError, match="MODEL.RETINANET.NUM_CLASSES is 0"):
        build_model(cfg)


def test_architectures_by_what_they_derive_from():
    class Own(GeneralizedRCNN):
        pass

    Own.__name__ = "ArchitectureOfThisTest"
    META_ARCH_REGISTRY.register(Own)
    cfg = tiny_cfg("MODEL.META_ARCHITECTURE", "ArchitectureOfThisTest")
    assert num_classes_node(cfg) == "ROI_HEADS"


@pytest.mark.parametrize(
    "key, value",
    [
        ("SOLVER.OPTIMIZER", "ADAMW"),
        ("MODEL.ROI_MASK_HEAD.FC_FUSION.LR_FACTOR", 0.5),
        ("INPUT.SAME_SIZE_PER_BATCH", True),
        ("DATASETS.REGISTER_COCO", [["nowhere", "a.json", "images"]]),
        ("DATASETS.CHECK_IMAGES", False),
    ],
)
def test_keys_of_our_trainer_in_another(key, value, caplog):
    cfg = tiny_cfg(key, value)
    DefaultTrainer.build_model(cfg).eval().train()  # predicts, or evaluates
    Trainer.build_model(cfg).train()
    assert not warnings(caplog)
    DefaultTrainer.build_model(cfg).train()
    (warning,) = warnings(caplog)
    assert f"{key} {value!r}".split(" (")[0][:40].rstrip("[") in warning.replace("(", "[")
    assert "ignores" in warning


@pytest.mark.parametrize("opts", [(), STOCK[:2], (*NO_AFP, *STOCK[2:])])
def test_add_panet_config_forgotten(opts):
    cfg, full = get_cfg(), tiny_cfg(*opts)
    cfg.MODEL.update({k: v.clone() if hasattr(v, "clone") else v for k, v in full.MODEL.items()})
    del cfg.MODEL["PAFPN"]
    for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD"):
        del cfg.MODEL[head]["AFP"]
    del cfg.MODEL.ROI_MASK_HEAD["FC_FUSION"]
    if opts:
        cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    with pytest.raises(ConfigError, match="does not have the key MODEL.*add_panet_config"):
        build_model(cfg)
    add_panet_config(cfg)
    build_model(cfg)


@pytest.mark.parametrize("opts", [(), STOCK])
def test_names_for_other_programs(opts, tmp_path):
    """Where the dataset is not at hand; a program that has other names keeps them."""
    cfg = tiny_cfg(*opts, "DATASETS.TRAIN", ["gone"], "DATASETS.TEST", ["own"])
    cfg.DATASETS.CATEGORIES = [[7, "a"], [9, "b"], [1, "c"]]
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": {}}, cfg.MODEL.WEIGHTS)
    MetadataCatalog.get("own").thing_classes = ["x", "y", "z"]
    try:
        assert DefaultPredictor(cfg).metadata.thing_classes == ["x", "y", "z"]
        metadata = MetadataCatalog.get("gone")
        assert metadata.thing_classes == ["a", "b", "c"]
        assert metadata.thing_dataset_id_to_contiguous_id == {7: 0, 9: 1, 1: 2}
        build_model(tiny_cfg(*opts, "DATASETS.TRAIN", ["gone"]))
        assert not MetadataCatalog.get("gone").get("thing_classes")
    finally:
        MetadataCatalog.remove("own")
        MetadataCatalog.remove("gone")


def test_names_for_another_number_of_classes():
    cfg = tiny_cfg("DATASETS.TRAIN", ["gone"])
    cfg.DATASETS.CATEGORIES = [[7, "a"], [9, "b"]]
    build_model(cfg)
    assert not MetadataCatalog.get("gone").get("thing_classes")


def test_the_stock_predictor_ignores_test_time_augmentation(caplog):
    cfg = tiny_cfg("TEST.AUG.ENABLED", True)
    DefaultPredictor(cfg)
    (warning,) = warnings(caplog)
    assert "TEST.AUG.ENABLED is True" in warning and "panet_d2.engine.Predictor" in warning


def test_ours_does_not(caplog, tmp_path):
    cfg = tiny_cfg("TEST.AUG.ENABLED", True)
    Trainer.build_model(cfg).eval()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    Predictor(cfg)
    assert not warnings(caplog)


def test_arguments_override_the_config():
    """As in Detectron2, also where this package reads the config first."""

    class Heads(StandardROIHeads):
        @configurable
        def __init__(self, *, extra=0, **kwargs):
            super().__init__(**kwargs)
            self.extra = extra

    cfg = tiny_cfg(*STOCK, *NO_AFP)
    shapes = {f"p{i}": ShapeSpec(channels=32, stride=2**i) for i in range(2, 7)}
    heads = Heads(cfg, shapes, extra=5, batch_size_per_image=3)
    assert heads.extra == 5 and heads.batch_size_per_image == 3
    assert DatasetMapperTTA(cfg, flip=False).flip is False
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    levels = [f"p{i}" for i in range(3, 8)]
    cfg.MODEL.RETINANET.IN_FEATURES = levels
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    assert RetinaNet(cfg, test_topk_candidates=7).test_topk_candidates == 7
