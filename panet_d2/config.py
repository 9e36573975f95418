"""Every config key that this package adds to Detectron2's, and how their values are checked."""

from __future__ import annotations

from typing import Any, Sequence

from detectron2.config import CfgNode as CN

from .errors import ConfigError

__all__ = ["add_panet_config", "read_choice"]


def _afp_node() -> CN:
    """The adaptive feature pooling (AFP) switches of one ROI head; PANet, Sec. 3.2."""
    node = CN()
    # Pool every proposal from all of MODEL.ROI_HEADS.IN_FEATURES and fuse the grids, instead of
    # from the one level that FPN's rule picks by the size of the box.
    node.ENABLED = False
    # Element-wise fusion of the levels: "max" (the paper's choice), "sum", "mean" or "product".
    node.FUSION = "max"
    # The layer that each level has of its own, with independent weights, before the fusion:
    #   "conv"  3x3 conv, norm, ReLU; it stands for the head's first conv, so that a head of four
    #           convs becomes NUM_CONV: 3 (the paper's 4conv1fc head, and its mask head);
    #   "fc"    linear layer, norm, ReLU; it stands for the head's first fc, so that 2fc becomes
    #           NUM_FC: 1. For the box head only, since nothing of the grid is left after it;
    #   "none"  fuse the pooled grids as they are, before the head's first layer.
    # Width and norm are those of the head (CONV_DIM or FC_DIM, and NORM; for keypoints
    # CONV_DIMS[0] and no norm, as in Detectron2's keypoint head).
    node.ADAPTATION = "conv"
    return node


def add_panet_config(cfg: CN) -> None:
    """
    Add the config keys of PANet to a Detectron2 config, all of them switched off.

    Args:
        cfg (CfgNode): the config to extend in place, as made by
            :func:`detectron2.config.get_cfg`.
    """
    _C = cfg

    # ---------------------------------------------------------------------------------------- #
    # Bottom-up path augmentation (PANet, Sec. 3.1). Switched on by MODEL.BACKBONE.NAME:
    # build_resnet_pafpn_backbone or build_retinanet_resnet_pafpn_backbone. Width and norm are
    # those of MODEL.FPN.
    # ---------------------------------------------------------------------------------------- #
    _C.MODEL.PAFPN = CN()
    # What follows each conv of the bottom-up path: "relu" (the paper) or "" for nothing (what the
    # authors' release does when MODEL.FPN.NORM is "").
    _C.MODEL.PAFPN.ACTIVATION = "relu"
    # What each step of the path reads: "output", the level below after its 3x3 conv, which is N(i)
    # (the paper and the authors' release); or "sum", the level below before that conv, so that
    # the chain of stride-2 convs skips the 3x3 convs (mmdetection's PAFPN; for its checkpoints).
    _C.MODEL.PAFPN.BOTTOM_UP_INPUT = "output"
    # Give those convs a bias even where a norm follows, as the authors' release does. Without a
    # norm they always have one.
    _C.MODEL.PAFPN.BIAS_BEFORE_NORM = False
    # Keep the feature maps of the network below and of the neck with their channels last in memory,
    # as the RoIAlign of all levels, CUDA's convs in half precision and the CPU's read them fastest.
    # Not with deformable convs, whose kernels cannot.
    _C.MODEL.PAFPN.CHANNELS_LAST = False

    # ---------------------------------------------------------------------------------------- #
    # Adaptive feature pooling, for each ROI head by itself. Needs MODEL.ROI_HEADS.NAME:
    # PANetROIHeads or PANetCascadeROIHeads.
    # ---------------------------------------------------------------------------------------- #
    _C.MODEL.ROI_BOX_HEAD.AFP = _afp_node()
    _C.MODEL.ROI_MASK_HEAD.AFP = _afp_node()
    _C.MODEL.ROI_KEYPOINT_HEAD.AFP = _afp_node()

    # ---------------------------------------------------------------------------------------- #
    # Fully-connected fusion (PANet, Sec. 3.3). Read by MODEL.ROI_MASK_HEAD.NAME: PANetMaskHead.
    # ---------------------------------------------------------------------------------------- #
    _C.MODEL.ROI_MASK_HEAD.FC_FUSION = CN()
    # Add the class-agnostic logits of a fully-connected path to the FCN path's. When off,
    # PANetMaskHead is Detectron2's MaskRCNNConvUpsampleHead.
    _C.MODEL.ROI_MASK_HEAD.FC_FUSION.ENABLED = True
    # Put a ReLU behind the linear layer, so that it can only add to the logits. The authors'
    # release has it; the paper's text does not mention it.
    _C.MODEL.ROI_MASK_HEAD.FC_FUSION.RELU = False

    # ---------------------------------------------------------------------------------------- #
    # Data
    # ---------------------------------------------------------------------------------------- #
    # Data sets in COCO format to make known, so that DATASETS.TRAIN and TEST can name them: a
    # list of (name, annotation file, image folder). Relative paths start at the environment
    # variable DETECTRON2_DATASETS ("datasets" where it is not set). Class names and evaluator
    # follow from the file, and so does the number of classes of the heads where
    # MODEL.ROI_HEADS.NUM_CLASSES (or MODEL.RETINANET.NUM_CLASSES) is 0.
    _C.DATASETS.REGISTER_COCO = ()
    # Read every image of those that are trained and evaluated on once before training starts, so
    # that a broken one is named then and not hours later.
    _C.DATASETS.CHECK_IMAGES = True

    # Draw one of INPUT.MIN_SIZE_TRAIN for all images of a batch that one process gets, not one
    # for each, so that they need no padding (but for what they differ in shape). GroupNorm's
    # statistics in the neck are of the padded map, and at inference one image has no padding.
    # Read by panet_d2.engine.Trainer.
    _C.INPUT.SAME_SIZE_PER_BATCH = False
    _C.register_renamed_key("INPUT.MIN_SIZE_TRAIN_PER_BATCH", "INPUT.SAME_SIZE_PER_BATCH")

    # ---------------------------------------------------------------------------------------- #
    # Solver
    # ---------------------------------------------------------------------------------------- #
    # "SGD" (Detectron2's and the paper's) or "ADAMW", which gets much further in the few hundred
    # steps that a model trained from scratch on a CPU has. Behind the box head of four convs its
    # steps are large for the fc layer: with a SOLVER.WARMUP_ITERS of some hundred most units live
    # (experiments/results/ablation/README.md). Read by panet_d2.engine.Trainer.
    _C.SOLVER.OPTIMIZER = "SGD"


def read_choice(cfg: CN, key: str, accepts: Sequence[Any]) -> Any:
    """
    Read one config value that must be one of a few.

    Args:
        cfg (CfgNode): the whole config.
        key (str): the key's full name, e.g. ``MODEL.ROI_BOX_HEAD.AFP.FUSION``.
        accepts: every value that the key may have, in the key's type.

    Returns:
        the value.

    Raises:
        ConfigError: if the value is none of ``accepts``.
    """
    value = cfg
    for part in key.split("."):
        value = getattr(value, part)
    # By type too: 1 is equal to True, and yacs lets None stand in for a value of any type.
    if not any(type(value) is type(a) and value == a for a in accepts):
        raise ConfigError(
            f"{key} is {value!r}; it must be one of {', '.join(repr(a) for a in accepts)}."
        )
    return value
