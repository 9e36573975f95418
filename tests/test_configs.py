"""Every file in configs/ loads, holds what its name says, and its model infers and trains."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import reduce
from pathlib import Path
from typing import List, Set, Tuple, Union

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import (
    BitMasks,
    Boxes,
    Instances,
    Keypoints,
    PolygonMasks,
    RotatedBoxes,
)
from detectron2.utils.events import EventStorage
from torch.nn import SyncBatchNorm

from panet_d2 import ConfigError, add_panet_config
from panet_d2.check_config import check_values
from panet_d2.data import NamedImageMapper, setup_datasets
from panet_d2.data.check import check_training_images
from panet_d2.engine import Trainer
from panet_d2.modeling.check_model import finds_oriented_boxes

from .common import leaves, tiny_cfg
from .modeling import golden

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PARTS = {CONFIGS / "Base-AFP.yaml", CONFIGS / "Base-PANet.yaml"}  # to be added to a whole config
FILES = sorted({*CONFIGS.rglob("*.yaml")} - PARTS)
COCO, DETECTION = "COCO-InstanceSegmentation/", "COCO-Detection/"
LVIS, ABLATIONS = "LVISv1-InstanceSegmentation/", f"{COCO}ablations/"


def configs(pattern: str = "") -> pytest.MarkDecorator:
    """Runs a test with the path of every config whose file name has the pattern."""
    files = [f for f in FILES if re.search(pattern, f.name)]
    ids = [str(f.relative_to(CONFIGS).with_suffix("")) for f in files]
    return pytest.mark.parametrize("path", files, ids=ids)


def default_config() -> CfgNode:
    cfg = get_cfg()
    add_panet_config(cfg)
    return cfg


def load(path: Union[Path, str]) -> CfgNode:
    """A config by its path, or by its name below configs/."""
    cfg = default_config()
    cfg.merge_from_file(str(path if isinstance(path, Path) else CONFIGS / f"{path}.yaml"))
    return cfg


def changed(a: CfgNode, b: CfgNode) -> Set[str]:
    a, b = leaves(a), leaves(b)
    return {key for key in {*a, *b} if a.get(key) != b.get(key)}


def roi_branches(cfg: CfgNode) -> List[str]:
    """The ROI heads that a config's model has."""
    if cfg.MODEL.META_ARCHITECTURE not in ("GeneralizedRCNN", "PanopticFPN"):
        return []
    on = {"BOX": True, "MASK": cfg.MODEL.MASK_ON, "KEYPOINT": cfg.MODEL.KEYPOINT_ON}
    return [f"ROI_{branch}_HEAD" for branch in on if on[branch]]


# ------------------------------------------------------------------------------------------------ #
# What the files say
# ------------------------------------------------------------------------------------------------ #


def test_there_are_configs():
    assert len(FILES) > 40


@configs()
def test_values(path: Path):
    cfg = load(path)
    # The model of mmdetection was trained with adaptive sampling; it does not pool all levels. The
    # demo's grids are small.
    ratio = {"mmdet_faster_rcnn_R_50_PAFPN_1x": 0, "demo": 1}.get(path.stem, 2)
    for head in roi_branches(cfg):
        assert cfg.MODEL[head].POOLER_SAMPLING_RATIO in (ratio, 2), head
    steps = (0, *cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER)
    assert list(steps) == sorted(set(steps))
    known = {*DatasetCatalog.list(), *(entry[0] for entry in cfg.DATASETS.REGISTER_COCO)}
    assert {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} <= known
    if cfg.MODEL.WEIGHTS.startswith("catalog://"):
        assert ModelCatalog.get(cfg.MODEL.WEIGHTS[len("catalog://") :])
    else:
        # A backbone that starts at random must not be frozen.
        assert cfg.MODEL.WEIGHTS or cfg.MODEL.BACKBONE.FREEZE_AT == 0 or "Base" in path.name


@configs(r"_[123]x")
def test_schedule_is_the_one_in_the_name(path: Path):
    times = int(re.search(r"_([123])x", path.name)[1])
    if path.parent.name.startswith("LVIS"):
        times *= 2  # Detectron2's 1x of LVIS is as long as COCO's 2x
    assert load(path).SOLVER.MAX_ITER == 90000 * times


# What PANet changes in a model of Detectron2, whichever head it is.
PANET_KEYS = re.compile(
    r"MODEL\.(BACKBONE\.NAME|ROI_HEADS\.NAME|ROI_(BOX|MASK|KEYPOINT)_HEAD\."
    r"(NAME|NUM_FC|NUM_CONV|CONV_DIMS|POOLER_SAMPLING_RATIO|AFP\..*))"
)
COUNTERPARTS = {
    f"{COCO}panet_R_50_FPN_1x": f"{COCO}mask_rcnn_R_50_FPN_1x",
    f"{COCO}panet_R_50_FPN_3x": f"{COCO}mask_rcnn_R_50_FPN_3x",
    f"{COCO}panet_R_101_FPN_3x": f"{COCO}mask_rcnn_R_101_FPN_3x",
    f"{COCO}panet_X_101_32x8d_FPN_3x": f"{COCO}mask_rcnn_X_101_32x8d_FPN_3x",
    f"{COCO}panet_R_50_FPN_dconv_c3-c5_3x": "Misc/mask_rcnn_R_50_FPN_3x_dconv_c3-c5",
    f"{DETECTION}faster_panet_R_50_FPN_1x_2fc": f"{DETECTION}faster_rcnn_R_50_FPN_1x",
    f"{DETECTION}retinanet_R_50_PAFPN_1x": f"{DETECTION}retinanet_R_50_FPN_1x",
    f"{LVIS}panet_R_50_FPN_1x": f"{LVIS}mask_rcnn_R_50_FPN_1x",
    f"{LVIS}panet_R_101_FPN_1x": f"{LVIS}mask_rcnn_R_101_FPN_1x",
    "Cityscapes/panet_R_50_FPN": "Cityscapes/mask_rcnn_R_50_FPN",
    "Misc/cascade_panet_R_50_FPN_3x": "Misc/cascade_mask_rcnn_R_50_FPN_3x",
    "Misc/keypoint_panet_R_50_FPN_1x": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x",
    "Misc/panoptic_panet_R_50_1x": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x",
    "Misc/panet_R_50_FPN_3x_gn": "Misc/mask_rcnn_R_50_FPN_3x_gn",
    "Misc/panet_R_50_FPN_3x_syncbn": "Misc/mask_rcnn_R_50_FPN_3x_syncbn",
}


@pytest.mark.parametrize("ours, theirs", COUNTERPARTS.items(), ids=COUNTERPARTS)
def test_differs_from_detectron2_by_panet_alone(ours: str, theirs: str):
    keys = changed(load(ours), load(Path(model_zoo.get_config_file(f"{theirs}.yaml"))))
    if ours.startswith("Cityscapes"):
        keys.remove("MODEL.WEIGHTS")  # theirs starts from a Mask R-CNN
    assert keys
    assert {key for key in keys if not PANET_KEYS.fullmatch(key)} == set()


def under(prefix: str, keys: str) -> Set[str]:
    return {f"{prefix}.{key}" for key in keys.split()}


BOX, MASK = "MODEL.ROI_BOX_HEAD", "MODEL.ROI_MASK_HEAD"
SIZES_KEYS = "MIN_SIZE_TRAIN MIN_SIZE_TRAIN_SAMPLING MAX_SIZE_TRAIN MIN_SIZE_TEST MAX_SIZE_TEST"
NORM_KEYS = "BACKBONE.FREEZE_AT RESNETS.NORM FPN.NORM ROI_BOX_HEAD.NORM ROI_MASK_HEAD.NORM"
AFP_ON = {"MODEL.ROI_HEADS.NAME", f"{BOX}.AFP.ENABLED", f"{MASK}.AFP.ENABLED"}
# The default adaptation is the mask head's.
AFP_AFTER = AFP_ON | {f"{BOX}.AFP.ADAPTATION", f"{BOX}.NUM_FC", f"{MASK}.NUM_CONV"}
AFP_BEFORE = AFP_ON | {f"{BOX}.AFP.ADAPTATION", f"{MASK}.AFP.ADAPTATION"}
AFP_FUSION = {f"{BOX}.AFP.FUSION", f"{MASK}.AFP.FUSION"}
# Each rung, the one that it stands on, and all that it changes.
RUNGS = {
    "1_mst": ("0_mask_rcnn_R_50_FPN", under("INPUT", SIZES_KEYS)),
    "2_mbn": ("1_mst", under("MODEL", NORM_KEYS) | {f"{BOX}.NAME"}),
    "3_bpa": ("2_mbn", {"MODEL.BACKBONE.NAME"}),
    "4_afp": ("3_bpa", AFP_AFTER),
    "5_ff": ("4_afp", {f"{MASK}.NAME"}),
    "6_hhd": ("5_ff", {f"{BOX}.NAME", f"{BOX}.NUM_CONV", f"{BOX}.AFP.ADAPTATION"}),
    "afp_before_max": ("2_mbn", AFP_BEFORE),
    "afp_before_sum": ("afp_before_max", AFP_FUSION),
    "afp_after_max": ("2_mbn", AFP_AFTER),
    "afp_after_sum": ("afp_after_max", AFP_FUSION),
}


@pytest.mark.parametrize("rung", RUNGS)
def test_rung_changes_what_it_names(rung: str):
    base, keys = RUNGS[rung]
    assert changed(load(ABLATIONS + rung), load(ABLATIONS + base)) == keys


def test_every_ablation_is_a_rung():
    names = {f.stem for f in (CONFIGS / ABLATIONS).iterdir()}
    assert names == {*RUNGS, "0_mask_rcnn_R_50_FPN"}


def use_everything(cfg: CfgNode) -> None:
    """What reads a config: datasets, mapper, optimizer, model."""
    setup_datasets(cfg)
    check_training_images(cfg)
    NamedImageMapper(cfg, True)
    Trainer.build_optimizer(cfg, torch.nn.Linear(1, 1))
    cfg.MODEL.KEYPOINT_ON = True
    build_model(cfg)


def use(key: str, cfg: CfgNode) -> None:
    # Numbers and the keys of inference, which are read after training, are checked before.
    checked = key.startswith("TEST.") or key.endswith("LR_FACTOR")
    check_values(cfg) if checked else use_everything(cfg)


@pytest.mark.parametrize("key", sorted({*leaves(default_config())} - {*leaves(get_cfg())}))
def test_every_key_is_read(key: str):
    """A value that no key accepts ends in an error that names the key."""
    use(key, tiny_cfg("MODEL.ROI_KEYPOINT_HEAD.AFP.ENABLED", True))
    cfg = tiny_cfg("MODEL.ROI_KEYPOINT_HEAD.AFP.ENABLED", True)
    *nodes, name = key.split(".")
    reduce(getattr, nodes, cfg)[name] = "nonsense"
    with pytest.raises(ConfigError, match=f"{key} is 'nonsense'"):
        use(key, cfg)


# ------------------------------------------------------------------------------------------------ #
# What the models do
# ------------------------------------------------------------------------------------------------ #


def skip_without_compiled_operators(cfg: CfgNode) -> None:
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE) or finds_oriented_boxes(cfg):
        pytest.importorskip(
            "detectron2._C",
            reason="needs a Detectron2 with its compiled operators",
            exc_type=ImportError,
        )


def full_size_model(cfg: CfgNode) -> torch.nn.Module:
    """The model as configured, without memory for its parameters."""
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


@configs()
def test_full_size_model_builds(path: Path):
    cfg = load(path)
    skip_without_compiled_operators(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES or 1  # 0: from the data
    assert full_size_model(cfg).training


RELEASES = {
    f"{COCO}release_panet_R_50_FPN_2x_gn": "2x_mask",
    f"{DETECTION}release_panet_R_50_FPN_1x_4conv1fc_gn": "1x_det",
    f"{DETECTION}release_panet_R_50_FPN_1x_2fc_gn": "1x_det_2fc",
}


@golden.needs_golden
@pytest.mark.parametrize("config, checkpoint", RELEASES.items(), ids=RELEASES)
def test_release_configs_have_the_layers_of_the_release(config: str, checkpoint: str):
    file = golden.FOLDER / f"state_dict_e2e_panet_R-50-FPN_{checkpoint}.json"
    theirs: Counter = Counter()
    for name, shape in json.loads(file.read_text()).items():
        if name.startswith(("Box_Outs.bbox_pred", "Mask_Outs.classify")):
            shape[0] = shape[0] * 80 // 81  # Detectron has the background there too
        if not name.startswith("Conv_Body.conv_body"):  # the ResNet
            theirs[tuple(shape)] += 1
    ours: Counter = Counter()
    for name, parameter in full_size_model(load(config)).named_parameters():
        if "bottom_up" not in name:
            # The four levels' adaptation layers are one of ours.
            levels = parameter.chunk(4) if "adaptation_layers" in name else [parameter]
            ours.update(tuple(level.shape) for level in levels)
    assert ours == theirs


SIZES = ((96, 128), (128, 96))


def shrink(cfg: CfgNode) -> CfgNode:
    """
    The same layers and branches, fewer channels and proposals. Widths are multiples of 32, or of
    64 where fully-connected fusion halves them, because GroupNorm has 32 groups.
    """
    model = cfg.MODEL
    model.DEVICE, model.WEIGHTS = "cpu", ""
    if model.RESNETS.DEPTH > 34:  # Detectron2 fixes the width of R-18 and R-34
        model.RESNETS.STEM_OUT_CHANNELS = model.RESNETS.RES2_OUT_CHANNELS = 32
        model.RESNETS.WIDTH_PER_GROUP = 32 // min(model.RESNETS.NUM_GROUPS, 32)
    model.FPN.OUT_CHANNELS = 32
    model.SEM_SEG_HEAD.CONVS_DIM = 32
    model.ROI_BOX_HEAD.CONV_DIM, model.ROI_BOX_HEAD.FC_DIM = 32, 64
    model.ROI_MASK_HEAD.CONV_DIM = 64
    model.ROI_KEYPOINT_HEAD.CONV_DIMS = [32] * len(model.ROI_KEYPOINT_HEAD.CONV_DIMS)
    model.RPN.PRE_NMS_TOPK_TRAIN = model.RPN.POST_NMS_TOPK_TRAIN = 50
    model.RPN.PRE_NMS_TOPK_TEST = model.RPN.POST_NMS_TOPK_TEST = 20
    model.RETINANET.TOPK_CANDIDATES_TEST = 20
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    # Untrained scores are low, and without detections the mask and keypoint heads would not run.
    model.ROI_HEADS.SCORE_THRESH_TEST = model.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    if model.ROI_HEADS.NUM_CLASSES == 0:  # to be filled in from the data
        model.ROI_HEADS.NUM_CLASSES = 3
    return cfg


def targets(cfg: CfgNode, size: Tuple[int, int]) -> Instances:
    """Two objects, of everything that the config's model learns from."""
    height, width = size
    instances = Instances(size)
    boxes = torch.tensor([[8.0, 10.0, 50.0, 60.0], [30.0, 20.0, width - 4.0, height - 6.0]])
    instances.gt_boxes = Boxes(boxes)
    if finds_oriented_boxes(cfg):
        sides, angles = boxes[:, 2:] - boxes[:, :2], torch.tensor([[20.0], [-75.0]])
        centers = instances.gt_boxes.get_centers()
        instances.gt_boxes = RotatedBoxes(torch.cat([centers, sides, angles], dim=1))
    instances.gt_classes = torch.tensor([0, cfg.MODEL.ROI_HEADS.NUM_CLASSES - 1])
    if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()
        instances.gt_masks = PolygonMasks([[np.array(polygon)] for polygon in corners])
    elif cfg.MODEL.MASK_ON:
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
            mask[y0:y1, x0:x1] = True
        instances.gt_masks = BitMasks(masks)
    if cfg.MODEL.KEYPOINT_ON:
        inside = torch.rand(2, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, 2)
        points = boxes[:, None, :2] + inside * (boxes[:, None, 2:] - boxes[:, None, :2])
        instances.gt_keypoints = Keypoints(torch.cat([points, 2 + 0 * points[..., :1]], dim=2))
    return instances


def batch(cfg: CfgNode) -> List[dict]:
    """Two images of different shape, so that they are padded."""
    images = []
    for size in SIZES:
        image = {
            "image": torch.randint(0, 256, (3, *size)).float(),
            "instances": targets(cfg, size),
        }
        image["height"], image["width"] = size
        if cfg.MODEL.META_ARCHITECTURE == "PanopticFPN":
            image["sem_seg"] = torch.randint(0, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, size)
        images.append(image)
    return images


@configs()
def test_model_infers_and_trains(path: Path):
    torch.manual_seed(0)
    cfg = shrink(load(path))
    skip_without_compiled_operators(cfg)
    model = build_model(cfg)
    for module in model.backbone.bottom_up.modules():
        # Statistics come with the weights. Without them each residual block doubles the variance,
        # and what a deep network puts out is too large for any proposal to stay in the image.
        if isinstance(module, (FrozenBatchNorm2d, SyncBatchNorm)):
            module.weight.data.fill_(0.5)
    images = batch(cfg)
    check_inference(cfg, model, images)
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE):
        return  # Detectron2 has their backward pass for CUDA alone
    check_training_step(cfg, model, images)


def check_inference(cfg: CfgNode, model: torch.nn.Module, images: List[dict]) -> None:
    model.eval()
    with torch.no_grad():
        outputs = model(images)
    for image, output in zip(images, outputs):
        height, width = image["height"], image["width"]
        found = output["instances"]
        assert len(found) > 0
        assert found.pred_boxes.tensor.isfinite().all() and found.scores.isfinite().all()
        if cfg.MODEL.MASK_ON:
            assert found.pred_masks.shape == (len(found), height, width)
        if cfg.MODEL.KEYPOINT_ON:
            assert found.pred_keypoints.shape == (len(found), 17, 3)
        if cfg.MODEL.META_ARCHITECTURE == "PanopticFPN":
            assert output["sem_seg"].shape == (cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, height, width)
            assert output["panoptic_seg"][0].shape == (height, width)


def check_training_step(cfg: CfgNode, model: torch.nn.Module, images: List[dict]) -> None:
    model.train()
    optimizer = build_optimizer(cfg, model)
    with EventStorage():
        losses = model(images)
    assert all(loss.isfinite() for loss in losses.values()), losses
    sum(losses.values()).backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # DistributedDataParallel, as Detectron2 sets it up, stops at a parameter without a gradient;
    # and a gradient that is zero throughout is that of a layer which the losses do not reach.
    assert [n for n, p in trainable.items() if p.grad is None or not p.grad.any()] == []
    assert [n for n, p in trainable.items() if not p.grad.isfinite().all()] == []
    optimizer.step()
    assert [n for n, p in trainable.items() if not p.isfinite().all()] == []
