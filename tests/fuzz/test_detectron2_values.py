"""A wrong value of any key, Detectron2's too, works or ends in one sentence that names a key."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.config import get_cfg

from panet_d2 import add_panet_config
from panet_d2.engine import Trainer, setup_config
from panet_d2.errors import ConfigError, PanetError

from ..common import leaves, tiny_cfg, write_coco
from .test_config_values import nested

MODELS: dict[str, dict[str, Any]] = {
    "mask": {},
    "fpn": {"MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone"},
    "cascade": {
        "MODEL.ROI_HEADS.NAME": "PANetCascadeROIHeads",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    },
    "keypoint": {
        "MODEL.MASK_ON": False,
        "MODEL.KEYPOINT_ON": True,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [16, 24],
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 2,
        "TEST.KEYPOINT_OKS_SIGMAS": [0.1, 0.1],
    },
    "retinanet": {
        "MODEL.META_ARCHITECTURE": "RetinaNet",
        "MODEL.BACKBONE.NAME": "build_retinanet_resnet_pafpn_backbone",
        "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
        "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
        "MODEL.MASK_ON": False,
        "MODEL.RETINANET.NUM_CLASSES": 3,
    },
}
SWITCHES: list[dict[str, Any]] = [
    {},
    {"INPUT.CROP.ENABLED": True},
    {"SOLVER.CLIP_GRADIENTS.ENABLED": True},
    {"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR"},
    {"SOLVER.LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR"},
    {"DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler"},
    {"TEST.PRECISE_BN.ENABLED": True, "TEST.EVAL_PERIOD": 1},
    {"TEST.AUG.ENABLED": True},
    {"TEST.SOFT_NMS.ENABLED": True, "TEST.BOX_VOTING.ENABLED": True},
    {"INPUT.SAME_SIZE_PER_BATCH": True},
]
# Not drawn from: a wrong value of these ends in the test's own datasets or on another device.
LEFT_OUT = ("VERSION", "MODEL.DEVICE", "OUTPUT_DIR", "DATASETS.REGISTER_COCO")


def _defaults() -> dict[str, Any]:
    cfg = get_cfg()
    add_panet_config(cfg)
    return leaves(cfg)


def wrong_value(rng: random.Random, default: Any) -> Any:
    """A value that a user may write for another one: of another kind, size, sign or spelling."""
    if isinstance(default, (list, tuple)) and default and rng.random() < 0.7:
        values = list(default)
        index = rng.randrange(len(values))
        change = rng.choice(["drop", "repeat", "replace", "replace", "reverse"])
        if change == "drop":
            del values[index]
        elif change == "repeat":
            values.append(values[index])
        elif change == "reverse":
            values.reverse()
        else:
            values[index] = wrong_value(rng, values[index])
        return values
    if isinstance(default, str) and rng.random() < 0.7:
        return rng.choice([default.lower(), default.upper(), default + "s", "", "none", "auto"])
    if type(default) in (int, float) and rng.random() < 0.7:
        number = rng.choice([0, -1, 1, 2, 3, 7, 1000, 10**9, -default, default * 3 + 1, 0.5])
        return type(default)(number)
    return rng.choice(
        [None, True, False, 0, -1, 1, 5, 0.5, -0.5, 1.5, math.inf, math.nan, "", "x", "1"]
        + [[], [0], [-1], [1, 2], [0.5, 0.5], [1e9], ["x"], [None], [[1]], [[]], {}, {"A": 1}]
    )


def write_keypoints(folder: Path) -> tuple[str, str]:
    """Data for every model of these."""
    json_file, root = write_coco(folder)
    content = json.loads(Path(json_file).read_text())
    for category in content["categories"]:
        category["keypoints"] = ["left", "right"]
    for a in content["annotations"]:
        x, y = a["bbox"][:2]
        a.update(keypoints=[x + 3, y + 3, 2, x + 9, y + 3, 2], num_keypoints=2)
    Path(json_file).write_text(json.dumps(content))
    return json_file, root


def build_all(path: str) -> None:
    """Build everything that a run has before its first step, without the memory of a model."""
    cfg = setup_config(path)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        trainer = Trainer(cfg)
    Trainer.check_test_aug(cfg)
    trainer.build_evaluator(trainer.cfg, "fuzzed_values")
    trainer.build_test_loader(trainer.cfg, "fuzzed_values")


@pytest.mark.parametrize("draws", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_one_sentence(tmp_path, draws):
    json_file, root = write_keypoints(tmp_path / "data")
    base = tiny_cfg(
        *("DATASETS.REGISTER_COCO", [["fuzzed_values", json_file, root]]),
        *("DATASETS.TRAIN", ["fuzzed_values"]),
        *("DATASETS.TEST", ["fuzzed_values"]),
        *("DATASETS.CHECK_IMAGES", False),
        *("OUTPUT_DIR", str(tmp_path)),
        *("SOLVER.IMS_PER_BATCH", 2),
    )
    defaults = _defaults()
    given = {k: v for k, v in leaves(base).items() if v != defaults[k]}
    keys = [k for k in defaults if k not in LEFT_OUT]
    rng = random.Random(0)
    path = tmp_path / "fuzzed.yaml"
    rejected = 0
    for draw in range(draws):
        # Every key before any is drawn again.
        key = keys[draw % len(keys)] if draws > len(keys) else rng.choice(keys)
        values = {**given, **rng.choice(list(MODELS.values())), **rng.choice(SWITCHES)}
        values[key] = wrong_value(rng, values.get(key, defaults[key]))
        tree = nested({k: list(v) if isinstance(v, tuple) else v for k, v in values.items()})
        path.write_text(yaml.safe_dump({"VERSION": 2, **tree}))
        try:
            build_all(str(path))
        except PanetError as e:
            rejected += 1
            message = str(e)
            assert "\n" not in message and len(message) < 700, (key, values[key], message)
            last = key.rpartition(".")[2]
            assert re.search(rf"{last}|[A-Z]+\.[A-Z]", message), (key, values[key], message)
        except Exception as e:
            raise AssertionError(f"{key} = {values[key]!r} ended in {type(e).__name__}") from e
    assert draws / 4 < rejected < draws


def test_config_of_everything_is_accepted(tmp_path):
    """Or the fuzzed ones would be rejected because of something else."""
    json_file, root = write_keypoints(tmp_path / "data")
    path = tmp_path / "config.yaml"
    for model in MODELS.values():
        for switches in SWITCHES:
            opts = {**model, **switches, "DATASETS.REGISTER_COCO": [["plain", json_file, root]]}
            opts.update({"DATASETS.TRAIN": ["plain"], "DATASETS.TEST": ["plain"]})
            opts.update({"OUTPUT_DIR": str(tmp_path), "SOLVER.IMS_PER_BATCH": 2})
            cfg = tiny_cfg(*(x for pair in opts.items() for x in pair))
            path.write_text(cfg.dump())
            try:
                with torch.device("meta"):
                    cfg = setup_config(str(path))
                    cfg.MODEL.DEVICE = "meta"
                    Trainer(cfg)
            except ConfigError as e:
                assert "TEST.AUG" in str(e) or "TEST.SOFT_NMS" in str(e)
