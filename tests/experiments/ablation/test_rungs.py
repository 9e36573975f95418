import pytest
import torch
from detectron2.modeling import FPN, StandardROIHeads, build_model

from experiments.ablation.rungs import GROUPS, LADDER, PARTS, RUNGS, overrides
from panet_d2 import PAFPN, AdaptiveROIPooler
from panet_d2.engine import setup_config

from ...common import ROOT

CONFIG = str(ROOT / "configs/DSB2018/mask_rcnn_R_18_FPN_gn.yaml")


def config(name):
    opts = [str(o) for o in overrides(RUNGS[name])]
    return setup_config(CONFIG, [*opts, "MODEL.DEVICE", "cpu"], needed=())


def test_ladder_is_the_papers():
    assert list(LADDER) == ["baseline", "+mst", "+norm", "+bpa", "+afp", "+ff", "+hhd"]
    for previous, name in zip(list(LADDER), list(LADDER)[1:]):
        assert LADDER[name].compared_with == previous
        assert LADDER[name].parts - LADDER[previous].parts == {name[1:]}
    assert LADDER["+hhd"].parts == set(PARTS)


def test_groups():
    assert sum(len(group) for group in GROUPS.values()) == len(RUNGS)
    assert {frozenset(PARTS) - r.parts for r in GROUPS["without"].values()} == {
        frozenset([part]) for part in PARTS
    }
    assert all(
        len(r.parts) == 1 and r.compared_with == "baseline" for r in GROUPS["alone"].values()
    )
    for rung in GROUPS["ideas"].values():
        assert rung.parts - RUNGS[rung.compared_with].parts == {"bpa", "afp", "ff"}
    kinds = {(r.fusion, r.fuse_first) for r in GROUPS["fusion"].values()} | {("max", False)}
    fusions = ("max", "sum", "mean", "product")
    assert kinds == {(fusion, first) for fusion in fusions for first in (True, False)}


@pytest.mark.parametrize("name", RUNGS)
def test_model_has_the_parts(name):
    rung, cfg = RUNGS[name], config(name)
    model = build_model(cfg)
    heads, norms = model.roi_heads, [m for m in model.backbone.fpn_output2.children()]
    assert type(model.backbone) is (PAFPN if "bpa" in rung.parts else FPN)
    assert any(isinstance(n, torch.nn.GroupNorm) for n in norms) == ("norm" in rung.parts)
    sizes, stride = cfg.INPUT.MIN_SIZE_TRAIN, model.backbone.size_divisibility
    assert cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "choice"
    assert len(sizes) == (5 if "mst" in rung.parts else 1) and 256 in sizes
    assert all(size % stride == 0 for size in sizes)
    assert cfg.INPUT.SAME_SIZE_PER_BATCH == ("mst" in rung.parts)
    for pooler in (heads.box_pooler, heads.mask_pooler):
        assert isinstance(pooler, AdaptiveROIPooler) == ("afp" in rung.parts)
        if "afp" in rung.parts:
            assert pooler.fusion == rung.fusion
            assert (pooler.adaptation == "none") == rung.fuse_first
    assert hasattr(heads.mask_head, "fc_fusion") == ("ff" in rung.parts)
    # With the adaptation layer each branch has as many layers before its predictor as without it.
    moved = "afp" in rung.parts and not rung.fuse_first
    convs, fcs = cfg.MODEL.ROI_BOX_HEAD.NUM_CONV, cfg.MODEL.ROI_BOX_HEAD.NUM_FC
    assert convs + fcs + moved == (5 if "hhd" in rung.parts else 2)
    assert cfg.MODEL.ROI_MASK_HEAD.NUM_CONV + moved == 4
    # As in the release, no norm after the fc layer that follows convs.
    normed = [getattr(fc, "norm", None) is not None for fc in heads.box_head.fcs]
    assert set(normed) == {"norm" in rung.parts and "hhd" not in rung.parts}
    assert all(
        (conv.norm is not None) == ("norm" in rung.parts) for conv in heads.box_head.conv_norm_relus
    )
    assert type(heads) is StandardROIHeads or "afp" in rung.parts


def test_norm_of_several_gpus():
    opts = overrides(LADDER["+norm"], norm="SyncBN")
    assert opts[opts.index("MODEL.FPN.NORM") + 1] == "SyncBN"


@pytest.mark.parametrize("name", RUNGS)
def test_norms_of_a_pretrained_resnet_are_trained_with_the_others(name):
    """As in the paper: with its own norms frozen, the ResNet's features grow without bounds."""
    opts = overrides(RUNGS[name], resnet_norm="BN")
    trained = "norm" in RUNGS[name].parts
    assert opts[opts.index("MODEL.RESNETS.NORM") + 1] == ("BN" if trained else "FrozenBN")
    cfg = setup_config(CONFIG, [*map(str, opts), "MODEL.DEVICE", "cpu"], needed=())
    norm = build_model(cfg).backbone.bottom_up.res5[0].conv1.norm
    assert isinstance(norm, torch.nn.BatchNorm2d) == trained
