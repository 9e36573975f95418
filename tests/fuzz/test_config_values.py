"""Whatever stands in one of our config keys works, or ends in a ConfigError that names the key."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from panet_d2 import add_panet_config
from panet_d2.check_config import check_values
from panet_d2.data import NamedImageMapper, setup_datasets
from panet_d2.data.check import check_training_images
from panet_d2.engine import Trainer, setup_config
from panet_d2.errors import ConfigError
from panet_d2.layers import FUSIONS

from ..common import leaves, tiny_cfg


def _added_keys() -> dict[str, Any]:
    cfg = get_cfg()
    before = leaves(cfg)
    add_panet_config(cfg)
    return {key: value for key, value in leaves(cfg).items() if key not in before}


DEFAULTS = _added_keys()

# The words that a key accepts. A key that is not listed accepts True and False if that is what its
# default is, or nothing but its default: a new one is listed here, or refuses everything else.
WORDS = {
    "MODEL.PAFPN.ACTIVATION": ("relu", ""),
    "MODEL.PAFPN.BOTTOM_UP_INPUT": ("output", "sum"),
    **{f"MODEL.ROI_{head}_HEAD.AFP.FUSION": FUSIONS for head in ("BOX", "MASK", "KEYPOINT")},
    "MODEL.ROI_BOX_HEAD.AFP.ADAPTATION": ("conv", "fc", "none"),
    "MODEL.ROI_MASK_HEAD.AFP.ADAPTATION": ("conv", "none"),
    "MODEL.ROI_KEYPOINT_HEAD.AFP.ADAPTATION": ("conv", "none"),
    "SOLVER.OPTIMIZER": ("SGD", "ADAMW"),
    "TEST.AUG.MERGE": ("nms", "wbf"),
    "TEST.AUG.MASKS": ("probabilities", "logits"),
    "TEST.SOFT_NMS.METHOD": ("linear", "gaussian"),
    "TEST.BOX_VOTING.SCORES": ("id", "avg", "temp_avg"),
}


def is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high


def is_positive(value: Any) -> bool:
    return is_number(value, 0, math.inf) and 0 < value < math.inf


def is_list(value: Any, accepts) -> bool:
    return isinstance(value, (list, tuple)) and all(map(accepts, value))


# The keys that accept numbers, or lists of them.
NUMBERS = {
    "MODEL.ROI_MASK_HEAD.FC_FUSION.LR_FACTOR": is_positive,
    "TEST.AUG.ROTATIONS": lambda v: is_list(v, lambda a: type(a) is int and a in (90, 180, 270)),
    "TEST.AUG.ASPECT_RATIOS": lambda v: is_list(v, is_positive),
    "TEST.AUG.BOX_SIZES": lambda v: (
        is_list(v, is_positive) and len(v) in (0, 2) and list(v) == sorted(v)
    ),
    "TEST.SOFT_NMS.SIGMA": is_positive,
    "TEST.SOFT_NMS.SCORE_THRESH": lambda v: is_number(v, 0, 1),
    "TEST.BOX_VOTING.THRESH": lambda v: is_number(v, 0, 1),
    "TEST.BOX_VOTING.TEMPERATURE": is_positive,
}


def everything_on() -> CfgNode:
    """A model that reads every key."""
    return tiny_cfg(
        *("MODEL.KEYPOINT_ON", True),
        *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16, 24]),
        *("MODEL.ROI_KEYPOINT_HEAD.AFP.ENABLED", True),
    )


def use(cfg: CfgNode) -> None:
    """All that reads one of our keys, short of training."""
    setup_datasets(cfg)
    check_training_images(cfg)
    without_keypoints = cfg.clone()  # whose names it would take from a data set
    without_keypoints.MODEL.KEYPOINT_ON = False
    NamedImageMapper(without_keypoints, True)
    cfg.MODEL.DEVICE = "meta"  # parameters without values: nothing is run here
    with torch.device("meta"):
        build_model(cfg)
    Trainer.build_optimizer(cfg, nn.Linear(1, 1))
    check_values(cfg)  # the keys of inference are read after training


def is_valid(key: str, value: Any) -> bool:
    if key == "DATASETS.REGISTER_COCO":
        return isinstance(value, (list, tuple)) and all(
            isinstance(entry, (list, tuple)) and [type(e) for e in entry] == [str] * 3
            for entry in value
        )
    if key == "DATASETS.CATEGORIES":
        return value in ([], ())  # others must also have as many classes as the model
    if key in NUMBERS:
        return NUMBERS[key](value)
    default = DEFAULTS[key]
    accepted = WORDS.get(key, (True, False) if isinstance(default, bool) else (default,))
    return type(value) is type(default) and value in accepted


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([word for words in WORDS.values() for word in words])
    | st.sampled_from([0.5, 2.0, 90, 180, 270])
    | st.sampled_from(["Max", "relu ", "yes", "on", "null", "True", "1", "[]", "{}", "None"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


def check(key: str, value: Any, decoded: Any, apply) -> None:
    """``apply`` makes a config with the value, as a user may; ``decoded`` is what it then reads."""
    if type(decoded) is int and type(DEFAULTS[key]) is float and is_valid(key, decoded):
        try:  # yacs merges no int into a float, but one may be assigned
            use(apply())
        except ConfigError as e:
            assert f"values ({DEFAULTS[key]} vs. {decoded}) for config key: {key}" in str(e)
    elif is_valid(key, decoded):
        use(apply())
    else:
        with pytest.raises(ConfigError) as caught:
            use(apply())
        assert key in str(caught.value), (value, str(caught.value))


def decode(value: Any) -> Any:
    """yacs reads strings as Python, where it can."""
    return CfgNode._decode_cfg_value(value)


def nested(values: dict[str, Any]) -> dict:
    """Full keys as the mapping in mappings that a YAML file is."""
    tree: dict = {}
    for key, value in values.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """What the file of such a model has, beside what is fuzzed."""
    defaults = get_cfg()
    add_panet_config(defaults)
    defaults = leaves(defaults)
    return {k: v for k, v in leaves(everything_on()).items() if v != defaults[k]}


def every_key(test):
    few_and_many = [5, pytest.param(200, marks=pytest.mark.slow)]
    return pytest.mark.parametrize("key", DEFAULTS)(
        pytest.mark.parametrize("examples", few_and_many)(test)
    )


@every_key
def test_in_a_file(tmp_path, content, key, examples):
    path = tmp_path / "fuzzed.yaml"

    @settings(max_examples=examples)
    @example(None)
    @given(VALUES)
    def holds(value):
        text = yaml.safe_dump({"VERSION": 2, **nested({**content, key: value})}, width=10**6)
        path.write_text(text)
        read = yaml.safe_load(text)
        for part in key.split("."):  # YAML has no tuples of its own
            read = read[part]
        check(key, value, decode(read), lambda: setup_config(str(path)))

    holds()


@every_key
def test_on_the_command_line(tmp_path, content, key, examples):
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump({"VERSION": 2, **nested(content)}))

    @settings(max_examples=examples)
    @example("None")
    @given(VALUES.map(str))
    def holds(value):
        check(key, value, decode(value), lambda: setup_config(str(path), [key, value]))

    holds()


@every_key
def test_assigned_in_python(key, examples):
    @settings(max_examples=examples)
    @example(None)
    @example(1)
    @given(VALUES)
    def holds(value):
        def apply() -> CfgNode:
            cfg = everything_on()
            *path, last = key.split(".")
            node = cfg
            for part in path:
                node = node[part]
            node[last] = value
            return cfg

        check(key, value, value, apply)

    holds()


def test_python_that_fails():
    """yacs evaluates a value as Python; a set of a dict is a TypeError."""
    key = "MODEL.PAFPN.ACTIVATION"
    with pytest.raises(ConfigError, match=key):
        setup_config("", [key, "{{}}"])
