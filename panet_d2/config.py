"""Config keys that this package adds to Detectron2's, and a check of a key's value."""

from __future__ import annotations

from typing import Any, Sequence

from detectron2.config import CfgNode as CN

from .errors import ConfigError


def _afp_node() -> CN:
    """The adaptive feature pooling (AFP) keys of one ROI head; PANet, Sec. 3.2."""
    node = CN()
    # Pool every proposal from all levels of MODEL.ROI_HEADS.IN_FEATURES and fuse the grids. If
    # False, FPN's rule picks one level by the size of the box.
    node.ENABLED = False
    # Element-wise fusion of the levels: "max" (the paper's choice), "sum", "mean" or "product".
    node.FUSION = "max"
    # The adaptation layer of each level, before the fusion. Each level has its own weights:
    #   "conv"  3x3 conv, norm, ReLU. It replaces the head's first conv, so set NUM_CONV to one
    #           less: four convs become NUM_CONV: 3 (the paper's 4conv1fc head and mask head).
    #   "fc"    linear layer, norm, ReLU. It replaces the head's first fc layer: 2fc becomes
    #           NUM_FC: 1. For the box head only, because an fc layer leaves no grid.
    #   "none"  fuse the pooled grids before the head's first layer.
    # Width and norm are the head's: CONV_DIM or FC_DIM, and NORM. For keypoints the width is
    # CONV_DIMS[0] and there is no norm, as in Detectron2's keypoint head.
    node.ADAPTATION = "conv"
    return node


def install() -> None:
    """
    Add the config keys of PANet to Detectron2's defaults. Every later
    :func:`detectron2.config.get_cfg` of this process has the keys. Call this function in a program
    that makes its own config. A second call changes nothing.

    ``import panet_d2`` does not add the keys. Otherwise a stock model trained in that process would
    have a ``config.yaml`` that plain Detectron2 cannot read.
    """
    # Imported here, because this module imports most of Detectron2.
    from ._detectron2 import default_config

    add_panet_config(default_config)


def add_panet_config(cfg: CN) -> None:
    """
    Add the config keys of PANet to a Detectron2 config, in place. The defaults change nothing.
    Keys that the config already has keep their values.

    Args:
        cfg (CfgNode): from :func:`detectron2.config.get_cfg`.
    """
    _add_missing(cfg, _panet_config())
    for old, new, *message in _RENAMED:
        if not cfg.key_is_renamed(old):
            cfg.register_renamed_key(old, new, *message)


def _add_missing(cfg: CN, defaults: CN) -> None:
    for key, value in defaults.items():
        if key not in cfg:
            cfg[key] = value
        elif isinstance(value, CN):
            _add_missing(cfg[key], value)


_RENAMED = (
    (
        "MODEL.PAFPN.CHANNELS_LAST",
        "MODEL.PAFPN.MEMORY_FORMAT",
        "True is now 'channels_last', False is 'contiguous'; the default is 'auto'.",
    ),
    ("INPUT.MIN_SIZE_TRAIN_PER_BATCH", "INPUT.SAME_SIZE_PER_BATCH"),
)


def _panet_config() -> CN:
    """Return a config with all keys of this package."""
    _C = CN({node: {} for node in ("MODEL", "INPUT", "DATASETS", "SOLVER", "TEST")})
    for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD"):
        _C.MODEL[head] = CN()

    # ---------------------------------------------------------------------------------------- #
    # Bottom-up path augmentation (PANet, Sec. 3.1). Enabled by MODEL.BACKBONE.NAME:
    # build_resnet_pafpn_backbone or build_retinanet_resnet_pafpn_backbone. Width and norm are
    # those of MODEL.FPN.
    # ---------------------------------------------------------------------------------------- #
    _C.MODEL.PAFPN = CN()
    # The activation after each conv of the bottom-up path: "relu" (the paper), or "" for none (the
    # authors' release if MODEL.FPN.NORM is "").
    _C.MODEL.PAFPN.ACTIVATION = "relu"
    # What each step of the bottom-up path reads from the previous level:
    #   "output"  N(i), after its 3x3 conv (the paper and the authors' release).
    #   "sum"     the input of this conv (mmdetection's PAFPN, for its checkpoints).
    _C.MODEL.PAFPN.BOTTOM_UP_INPUT = "output"
    # Give the convs of the bottom-up path a bias even before a norm, as in the authors' release.
    # Without a norm, these convs always have a bias.
    _C.MODEL.PAFPN.BIAS_BEFORE_NORM = False
    # Memory format of the feature maps of backbone and neck. Results are the same with each:
    #   "contiguous"     PyTorch's default format.
    #   "channels_last"  the fastest format for convs and RoIAlign on the CPU. Deformable convs
    #                    cannot read this format.
    #   "auto"           channels_last if MODEL.DEVICE is the CPU and the model has no deformable
    #                    convs, else contiguous.
    _C.MODEL.PAFPN.MEMORY_FORMAT = "auto"

    # ---------------------------------------------------------------------------------------- #
    # Adaptive feature pooling, for each ROI head. Needs MODEL.ROI_HEADS.NAME: PANetROIHeads or
    # PANetCascadeROIHeads.
    # ---------------------------------------------------------------------------------------- #
    _C.MODEL.ROI_BOX_HEAD.AFP = _afp_node()
    _C.MODEL.ROI_MASK_HEAD.AFP = _afp_node()
    _C.MODEL.ROI_KEYPOINT_HEAD.AFP = _afp_node()

    # ---------------------------------------------------------------------------------------- #
    # Fully-connected fusion (PANet, Sec. 3.3). Read by MODEL.ROI_MASK_HEAD.NAME: PANetMaskHead.
    # ---------------------------------------------------------------------------------------- #
    _C.MODEL.ROI_MASK_HEAD.FC_FUSION = CN()
    # Add the class-agnostic logits of the fully-connected path to those of the FCN path. If False,
    # PANetMaskHead is Detectron2's MaskRCNNConvUpsampleHead.
    _C.MODEL.ROI_MASK_HEAD.FC_FUSION.ENABLED = True
    # Add a ReLU after the linear layer, so that the fully-connected path can only increase the
    # logits. The authors' release has this ReLU. The paper does not mention one.
    _C.MODEL.ROI_MASK_HEAD.FC_FUSION.RELU = False
    # Multiply the learning rate of the linear layer by this factor. With AdamW, choose 0.1 for
    # CONV_DIM 128 or more: Adam changes each weight by about the learning rate, and this layer has
    # 98 * CONV_DIM inputs. With fewer inputs the factor gains little, or loses (docs/results.md).
    # Read by panet_d2.engine.Trainer.
    _C.MODEL.ROI_MASK_HEAD.FC_FUSION.LR_FACTOR = 1.0

    # ---------------------------------------------------------------------------------------- #
    # Data
    # ---------------------------------------------------------------------------------------- #
    # Datasets in COCO format to register, for DATASETS.TRAIN and TEST: a list of (name, annotation
    # file, image folder). Relative paths start at the folder in the environment variable
    # DETECTRON2_DATASETS ("datasets" by default). The annotation file determines the class names
    # and the evaluator. The file also determines the number of classes if
    # MODEL.ROI_HEADS.NUM_CLASSES (or MODEL.RETINANET.NUM_CLASSES) is 0.
    _C.DATASETS.REGISTER_COCO = ()
    # The dataset's id and the name of each class, in the model's order: a list of [id, name]. The
    # first dataset of TEST and TRAIN with class names sets this key. A run's config.yaml keeps the
    # key for use without the dataset. If both the key and the dataset have names, the names must
    # be the same.
    _C.DATASETS.CATEGORIES = ()
    # Read every image of REGISTER_COCO's datasets before training starts. The error then names a
    # broken image at once, not hours later.
    _C.DATASETS.CHECK_IMAGES = True
    # When a run starts, check every annotation of the datasets in use, in the main process. A file
    # with 10,000 annotations or more that has passed is not checked again until the file changes.
    # The cache folder (PANET_D2_CACHE) keeps a record of these files. If False, annotations are not
    # checked. Missing images and class counts that do not match are still reported.
    _C.DATASETS.CHECK_ANNOTATIONS = True

    # Draw one of INPUT.MIN_SIZE_TRAIN for all images of a process's batch, instead of one for each
    # image. Images of one shape are then not padded. GroupNorm in the neck sees the padding, and at
    # inference a single image has no padding. Read by panet_d2.engine.Trainer.
    _C.INPUT.SAME_SIZE_PER_BATCH = False

    # ---------------------------------------------------------------------------------------- #
    # Solver
    # ---------------------------------------------------------------------------------------- #
    # "SGD" (Detectron2's and the paper's) or "ADAMW". AdamW gets further in a few hundred steps
    # from scratch. With the 4conv1fc box head, AdamW needs a SOLVER.WARMUP_ITERS of a few hundred.
    # Otherwise most units of the fc layer stay zero (experiments/results/ablation/README.md). See
    # also MODEL.ROI_MASK_HEAD.FC_FUSION.LR_FACTOR. Read by panet_d2.engine.Trainer.
    _C.SOLVER.OPTIMIZER = "SGD"

    # ---------------------------------------------------------------------------------------- #
    # Suppression of duplicates at inference (docs/inference.md). Read by PANetROIHeads and
    # PANetCascadeROIHeads, with AFP or without.
    # ---------------------------------------------------------------------------------------- #
    _C.TEST.SOFT_NMS = CN()
    # Lower the scores of boxes that overlap a better box of their class, instead of deleting these
    # boxes.
    _C.TEST.SOFT_NMS.ENABLED = False
    # The factor by which these scores are multiplied:
    #   "linear"    1 - IoU, for an IoU above MODEL.ROI_HEADS.NMS_THRESH_TEST.
    #   "gaussian"  exp(-IoU^2 / SIGMA), for any IoU.
    _C.TEST.SOFT_NMS.METHOD = "linear"
    _C.TEST.SOFT_NMS.SIGMA = 0.5
    # Delete boxes whose lowered score is not above this value.
    _C.TEST.SOFT_NMS.SCORE_THRESH = 0.001
    _C.TEST.BOX_VOTING = CN()
    # Replace each detection by the mean of the boxes of its class that overlap the detection,
    # weighted by their scores.
    _C.TEST.BOX_VOTING.ENABLED = False
    # The lowest IoU at which a box votes.
    _C.TEST.BOX_VOTING.THRESH = 0.8
    # The new score of a detection:
    #   "id"        the detection's own score.
    #   "avg"       the mean of the scores of the boxes that vote.
    #   "temp_avg"  this mean, after the log-odds of each score are divided by TEMPERATURE.
    _C.TEST.BOX_VOTING.SCORES = "id"
    _C.TEST.BOX_VOTING.TEMPERATURE = 1.0

    # ---------------------------------------------------------------------------------------- #
    # Test-time augmentation (docs/inference.md). Detectron2's own keys are TEST.AUG.ENABLED,
    # MIN_SIZES, MAX_SIZE and FLIP. Read by train_net.py, the demo and panet_d2.engine.Predictor.
    # ---------------------------------------------------------------------------------------- #
    _C.TEST.AUG = CN()
    # Also flip vertically. Each combination of flips, rotations, aspect ratios and sizes is one
    # view of the image. Equal views are used once.
    _C.TEST.AUG.VFLIP = False
    # Rotate counterclockwise by each of these angles: 90, 180, 270.
    _C.TEST.AUG.ROTATIONS = ()
    # Multiply the width by each of these factors, in addition to 1. MIN_SIZES applies to the
    # result.
    _C.TEST.AUG.ASPECT_RATIOS = ()
    # (LOW, HIGH): take boxes smaller than LOW only from the larger half of MIN_SIZES, and boxes
    # larger than HIGH only from the smaller half. The size of a box is the square root of its area
    # in pixels of the image file. If the number of MIN_SIZES is odd,
    # the middle size is in both halves.
    _C.TEST.AUG.BOX_SIZES = ()
    # How the boxes of all views are merged:
    #   "nms"  as for one image, with TEST.SOFT_NMS and TEST.BOX_VOTING if they are enabled.
    #   "wbf"  weighted boxes fusion with the IoU of MODEL.ROI_HEADS.NMS_THRESH_TEST. Needs the
    #          package ensemble-boxes.
    _C.TEST.AUG.MERGE = "nms"
    # Average the masks of the views as "probabilities" or as "logits".
    _C.TEST.AUG.MASKS = "probabilities"
    return _C


def read_choice(cfg: CN, key: str, accepts: Sequence[Any]) -> Any:
    """
    Read a config value and check that it is one of the accepted values.

    Args:
        cfg (CfgNode): the config.
        key (str): the key's full name, e.g. ``MODEL.ROI_BOX_HEAD.AFP.FUSION``.
        accepts: all values that the key may have.

    Returns:
        the value.

    Raises:
        ConfigError: if the value is none of ``accepts``, or the config does not have the key.
    """
    value = cfg
    for part in key.split("."):
        if part not in value:
            raise ConfigError(
                f"the config does not have the key {key}; call panet_d2.add_panet_config(cfg) "
                "after get_cfg(), or panet_d2.install() once before it."
            )
        value = value[part]
    # By type too: 1 is equal to True, and yacs accepts None for a value of any type.
    if not any(type(value) is type(a) and value == a for a in accepts):
        raise ConfigError(
            f"{key} is {value!r}; it must be one of {', '.join(repr(a) for a in accepts)}."
        )
    return value
