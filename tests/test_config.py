import subprocess
import sys

import pytest
from detectron2.config import get_cfg

from panet_d2 import add_panet_config
from panet_d2.config import read_choice
from panet_d2.engine import setup_config
from panet_d2.errors import ConfigError

from .common import child_env, leaves, tiny_cfg


def test_only_adds():
    stock, cfg = get_cfg(), get_cfg()
    add_panet_config(cfg)
    before, after = leaves(stock), leaves(cfg)
    assert {k: after[k] for k in before} == before


def test_everything_is_off():
    cfg = get_cfg()
    add_panet_config(cfg)
    assert [cfg.MODEL[f"ROI_{h}_HEAD"].AFP.ENABLED for h in ("BOX", "MASK", "KEYPOINT")] == [
        False
    ] * 3
    assert cfg.MODEL.BACKBONE.NAME == get_cfg().MODEL.BACKBONE.NAME
    assert cfg.DATASETS.REGISTER_COCO == cfg.DATASETS.CATEGORIES == ()


def test_heads_do_not_share_a_node():
    cfg = get_cfg()
    add_panet_config(cfg)
    cfg.MODEL.ROI_BOX_HEAD.AFP.FUSION = "sum"
    assert cfg.MODEL.ROI_MASK_HEAD.AFP.FUSION == "max"


def test_old_keys_name_the_new_ones(tmp_path):
    (tmp_path / "old.yaml").write_text("MODEL: {PAFPN: {CHANNELS_LAST: True}}")
    for opts, config_file in ((["MODEL.PAFPN.CHANNELS_LAST", "False"], ""), ([], "old.yaml")):
        with pytest.raises(ConfigError, match="CHANNELS_LAST was renamed to .*MEMORY_FORMAT"):
            setup_config(str(tmp_path / config_file) if config_file else "", opts)


def test_checked():
    cfg = get_cfg()
    assert read_choice(cfg, "MODEL.FPN.FUSE_TYPE", ["sum", "avg"]) == "sum"
    with pytest.raises(ConfigError, match=r"MODEL.FPN.FUSE_TYPE is 'sum'.*one of 'avg', 'max'"):
        read_choice(cfg, "MODEL.FPN.FUSE_TYPE", ["avg", "max"])


def test_importing_the_package_registers_everything():
    """In a process of its own: the tests import the rest anyway."""
    script = (
        "import panet_d2\n"
        "from detectron2.data import DatasetCatalog\n"
        "from detectron2.modeling import BACKBONE_REGISTRY, ROI_BOX_HEAD_REGISTRY\n"
        "from detectron2.modeling import ROI_HEADS_REGISTRY, ROI_MASK_HEAD_REGISTRY\n"
        "assert 'panet_shapes_train' in DatasetCatalog and 'panet_shapes_val' in DatasetCatalog\n"
        "BACKBONE_REGISTRY.get('build_resnet_pafpn_backbone')\n"
        "ROI_HEADS_REGISTRY.get('PANetROIHeads')\n"
        "ROI_BOX_HEAD_REGISTRY.get('FastRCNNConvFCNormHead')\n"
        "ROI_MASK_HEAD_REGISTRY.get('PANetMaskHead')\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, env=child_env())


def test_only_what_is_missing_is_added():
    cfg = get_cfg()
    add_panet_config(cfg)
    cfg.merge_from_list(["MODEL.ROI_BOX_HEAD.AFP.ENABLED", True, "SOLVER.OPTIMIZER", "ADAMW"])
    del cfg.MODEL.PAFPN["MEMORY_FORMAT"]
    before = leaves(cfg)
    add_panet_config(cfg)
    assert leaves(cfg) == {**before, "MODEL.PAFPN.MEMORY_FORMAT": "auto"}
    cfg.freeze()
    add_panet_config(cfg)
    with pytest.raises(KeyError, match="renamed"):
        cfg.merge_from_list(["MODEL.PAFPN.CHANNELS_LAST", True])


PROGRAM = """
import multiprocessing, sys
{first}

def use():
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    cfg = get_cfg()
    cfg.merge_from_file(sys.argv[1])
    return type(build_model(cfg).roi_heads).__name__

if __name__ == "__main__":
    print(use())
    if {workers}:
        with multiprocessing.get_context("spawn").Pool({workers}) as pool:
            print(pool.apply(use))
"""


@pytest.mark.parametrize(
    "first, variable, workers",
    [
        ("import panet_d2; panet_d2.install(); panet_d2.install()", "", 1),
        ("import detectron2", "panet_d2.env", 1),
        ("import panet_d2", "panet_d2.env", 0),
        ("import panet_d2.config", "panet_d2.env", 0),
    ],
)
def test_programs_that_make_the_config_themselves(first, variable, workers, tmp_path):
    (tmp_path / "config.yaml").write_text(tiny_cfg().dump())
    (tmp_path / "program.py").write_text(PROGRAM.format(first=first, workers=workers))
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "program.py", "config.yaml"],
        cwd=tmp_path,
        env=child_env(DETECTRON2_ENV_MODULE=variable),
        capture_output=True,
        text=True,
    )
    assert printed.stdout.split() == ["PANetROIHeads"] * (1 + workers), printed.stderr
