import pytest
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import BACKBONE_REGISTRY, build_model, build_resnet_backbone
from torch import nn

from panet_d2.build import build
from panet_d2.errors import ConfigError

from .common import tiny_cfg


@pytest.fixture
def register(monkeypatch):
    """Register a backbone of the user's for one test."""

    def add(function):
        monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, function.__name__, function)
        return function.__name__

    return add


@pytest.mark.parametrize(
    "opts, message",
    [
        # The message of Detectron2 or torch has the value, the key, or neither.
        (["MODEL.BACKBONE.NAME", "lost"], "with MODEL.BACKBONE.NAME 'lost': No object"),
        (["MODEL.RPN.HEAD_NAME", "lost"], "with MODEL.RPN.HEAD_NAME 'lost'"),
        (["MODEL.ROI_MASK_HEAD.NORM", "lost"], "MODEL.ROI_MASK_HEAD.NORM 'lost'"),
        (["MODEL.RESNETS.RES2_OUT_CHANNELS", 256], "built: .*RES2_OUT_CHANNELS = 64"),
        (["MODEL.FPN.OUT_CHANNELS", 48, "MODEL.FPN.NORM", "GN"], "MODEL.FPN.OUT_CHANNELS 48"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16]]], r"MODEL.ANCHOR_GENERATOR.SIZES \[\[8\]"),
        (["MODEL.RPN.IOU_LABELS", [0, 1]], r"MODEL.RPN.IOU_LABELS \[0, 1\].*: assert len\("),
        (["MODEL.RPN.IN_FEATURES", ["p2", "p7"]], "RPN.IN_FEATURES names p7, but .* p2, p3"),
        (["MODEL.FPN.IN_FEATURES", ["res2", "res4"]], "MODEL.FPN.IN_FEATURES"),
    ],
)
def test_value_that_a_builder_rejects_is_named(opts, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build("the model", build_model, tiny_cfg(*opts))
    assert "\n" not in str(caught.value)


def test_cause_is_kept_for_debugging():
    with pytest.raises(ConfigError) as caught:
        build("the model", build_model, tiny_cfg("MODEL.BACKBONE.NAME", "lost"))
    assert isinstance(caught.value.__cause__, KeyError)


def test_other_backbone_for_retinanet_is_named():
    opts = ("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.MASK_ON", False)
    with pytest.raises(ConfigError, match="RETINANET.IN_FEATURES names p7.*build_retinanet_resnet"):
        build("the model", build_model, tiny_cfg(*opts))


def test_error_in_code_of_the_user_stays(register):
    def with_a_bug(cfg, input_shape):
        return {}["bug"]

    name = register(with_a_bug)
    with pytest.raises(KeyError, match="bug"):
        build("the model", build_model, tiny_cfg("MODEL.BACKBONE.NAME", name))


def test_value_that_code_of_the_user_passes_on_is_named(register):
    def passes_on(cfg, input_shape):
        return build_resnet_backbone(cfg, input_shape)

    cfg = tiny_cfg("MODEL.BACKBONE.NAME", register(passes_on), "MODEL.RESNETS.NORM", "lost")
    with pytest.raises(ConfigError, match="MODEL.RESNETS.NORM 'lost'"):
        build("the model", build_model, cfg)


def test_result_is_that_of_the_function():
    cfg = tiny_cfg()
    layer = build("a layer", lambda cfg, size: nn.Linear(cfg.SOLVER.MAX_ITER, size), cfg, 3)
    assert layer.weight.shape == (3, cfg.SOLVER.MAX_ITER)


def test_error_of_a_file_is_not_its_number():
    register_coco_instances("file_that_is_not_there", {}, "/none/such.json", "/none")
    cfg = tiny_cfg("DATASETS.TRAIN", ["file_that_is_not_there"])
    try:
        with pytest.raises(ConfigError, match="loader cannot .*No such file.*'/none/such.json'"):
            build("the loader", build_detection_train_loader, cfg)
    finally:
        DatasetCatalog.remove("file_that_is_not_there")
