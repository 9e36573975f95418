"""Every config key that this package adds to Detectron2's, and how values are checked."""

from __future__ import annotations

from typing import Any, Sequence

from detectron2.config import CfgNode as CN

from .errors import ConfigError


def _afp_node() -> CN:
    """The adaptive feature pooling (AFP) keys of one ROI head; PANet, Sec. 3.2."""
    node = CN()
    # Pool every proposal from all levels of MODEL.ROI_HEADS.IN_FEATURES and fuse the grids. Without
    # it, FPN's rule picks one level by the size of the box.
    node.ENABLED = False
    # Element-wise fusion of the levels: "max" (the paper's choice), "sum", "mean" or "product".
    node.FUSION = "max"
    # The adaptation layer of each level before the fusion, with independent weights:
    #   "conv"  3x3 conv, norm, ReLU. It replaces the head's first conv, so set NUM_CONV to one
    #           less: four convs become NUM_CONV: 3 (the paper's 4conv1fc head and mask head).
    #   "fc"    linear layer, norm, ReLU. It replaces the head's first fc layer: 2fc becomes
    #           NUM_FC: 1. For the box head only, because no grid is left after it.
    #   "none"  fuse the pooled grids before the head's first layer.
    # Width and norm are the head's (CONV_DIM or FC_DIM, and NORM; for keypoints CONV_DIMS[0] and no
    # norm, as in Detectron2's keypoint head).
    node.ADAPTATION = "conv"
    return node


def install() -> None:
    """
    Add the config keys of PANet to Detectron2's defaults, so that every later
    :func:`detectron2.config.get_cfg` of this process has them. For programs that make the config
    themselves. A second call changes nothing.

    Not done by ``import panet_d2``, because plain Detectron2 could not read the ``config.yaml`` of
    a stock model that was trained in such a process.
    """
    # Here, because it imports most of Detectron2.
    from ._detectron2 import default_config

    add_panet_config(default_config)


def add_panet_config(cfg: CN) -> None:
    """
    Add the config keys of PANet to a Detectron2 config, in place. With their defaults nothing
    changes. Keys that are there already keep their values.

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
    """All keys of this package."""
    _C = CN({node: {} for node in ("MODEL", "INPUT", "DATASETS", "SOLVER", "TEST")})
    for head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD"):
        _C.MODEL[head] = CN()

    # ---------------------------------------------------------------------------------------- #
    # Bottom-up path augmentation (PANet, Sec. 3.1). Enabled by MODEL.BACKBONE.NAME:
    # build_resnet_pafpn_backbone or build_retinanet_resnet_pafpn_backbone. Width and norm are
    # those of MODEL.FPN.
    # ---------------------------------------------------------------------------------------- #
    _C.MODEL.PAFPN = CN()
    # After each conv of the bottom-up path: "relu" (the paper), or "" for nothing (the authors'
    # release if MODEL.FPN.NORM is "").
    _C.MODEL.PAFPN.ACTIVATION = "relu"
    # What each step of the path reads from the level before it: "output" for N(i), after its 3x3
    # conv (the paper and the authors' release), or "sum" for the input of that conv (mmdetection's
    # PAFPN, for its checkpoints).
    _C.MODEL.PAFPN.BOTTOM_UP_INPUT = "output"
    # Give these convs a bias even before a norm, as in the authors' release. Without a norm they
    # always have one.
    _C.MODEL.PAFPN.BIAS_BEFORE_NORM = False
    # Memory format of the feature maps of backbone and neck: "contiguous", "channels_last", which
    # deformable convs cannot read, or "auto": channels_last if MODEL.DEVICE is the CPU, whose convs
    # and RoIAlign read it fastest, and there are no deformable convs. Results are the same.
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
    # Add the class-agnostic logits of the fully-connected path to the FCN path's. If False,
    # PANetMaskHead is Detectron2's MaskRCNNConvUpsampleHead.
    _C.MODEL.ROI_MASK_HEAD.FC_FUSION.ENABLED = True
    # Add a ReLU after the linear layer, so that it can only increase the logits. The authors'
    # release has it; the paper does not mention it.
    _C.MODEL.ROI_MASK_HEAD.FC_FUSION.RELU = False

    # ---------------------------------------------------------------------------------------- #
    # Data
    # ---------------------------------------------------------------------------------------- #
    # Datasets in COCO format to register, for DATASETS.TRAIN and TEST: a list of (name, annotation
    # file, image folder). Relative paths start at the environment variable DETECTRON2_DATASETS
    # ("datasets" if it is not set). The file determines class names and evaluator, and the number
    # of classes if MODEL.ROI_HEADS.NUM_CLASSES (or MODEL.RETINANET.NUM_CLASSES) is 0.
    _C.DATASETS.REGISTER_COCO = ()
    # The dataset's id and the name of each class, in the model's order: a list of [id, name]. Set
    # from the first dataset of TEST and TRAIN that has names, and kept in a run's config.yaml for
    # where the dataset is not at hand. If both are there, the names must be the same.
    _C.DATASETS.CATEGORIES = ()
    # Read every image of REGISTER_COCO's datasets before training starts, so that a broken one is
    # named then and not hours later.
    _C.DATASETS.CHECK_IMAGES = True
    # Check every annotation of the datasets in use when a run starts, in its main process. A file
    # with 10,000 annotations or more that has passed is not checked again until the file changes:
    # the cache folder (PANET_D2_CACHE) keeps a record. False leaves the check out. Missing images
    # and class counts that do not match are still reported.
    _C.DATASETS.CHECK_ANNOTATIONS = True

    # Draw one of INPUT.MIN_SIZE_TRAIN for all images of a process's batch instead of one for each,
    # so that images of one shape are not padded. GroupNorm in the neck sees the padding, and at
    # inference one image has none. Read by panet_d2.engine.Trainer.
    _C.INPUT.SAME_SIZE_PER_BATCH = False

    # ---------------------------------------------------------------------------------------- #
    # Solver
    # ---------------------------------------------------------------------------------------- #
    # "SGD" (Detectron2's and the paper's) or "ADAMW", which gets further in a few hundred steps
    # from scratch. With the 4conv1fc box head it needs a SOLVER.WARMUP_ITERS of some hundred, or
    # most units of the fc layer stay zero (experiments/results/ablation/README.md). Read by
    # panet_d2.engine.Trainer.
    _C.SOLVER.OPTIMIZER = "SGD"

    # ---------------------------------------------------------------------------------------- #
    # Suppression of duplicates at inference (docs/inference.md). Read by PANetROIHeads and
    # PANetCascadeROIHeads, with AFP or without.
    # ---------------------------------------------------------------------------------------- #
    _C.TEST.SOFT_NMS = CN()
    # Instead of deleting the boxes that overlap a better box of their class, lower their scores.
    _C.TEST.SOFT_NMS.ENABLED = False
    # The factor of these scores: "linear", 1 - IoU above MODEL.ROI_HEADS.NMS_THRESH_TEST; or
    # "gaussian", exp(-IoU^2 / SIGMA) for any IoU.
    _C.TEST.SOFT_NMS.METHOD = "linear"
    _C.TEST.SOFT_NMS.SIGMA = 0.5
    # Delete boxes whose lowered score is not above this.
    _C.TEST.SOFT_NMS.SCORE_THRESH = 0.001
    _C.TEST.BOX_VOTING = CN()
    # Replace each detection by the mean of the boxes of its class that overlap it, weighted by
    # their scores.
    _C.TEST.BOX_VOTING.ENABLED = False
    # Boxes vote from this IoU on.
    _C.TEST.BOX_VOTING.THRESH = 0.8
    # The new score: "id", as it was; "avg", the mean of the scores of the boxes that vote; or
    # "temp_avg", this mean after the log-odds of each score were divided by TEMPERATURE.
    _C.TEST.BOX_VOTING.SCORES = "id"
    _C.TEST.BOX_VOTING.TEMPERATURE = 1.0

    # ---------------------------------------------------------------------------------------- #
    # Test-time augmentation, beside Detectron2's TEST.AUG.ENABLED, MIN_SIZES, MAX_SIZE and FLIP
    # (docs/inference.md). Read by train_net.py, the demo and panet_d2.engine.Predictor.
    # ---------------------------------------------------------------------------------------- #
    _C.TEST.AUG = CN()
    # Flip vertically, too. Every combination of flips, rotations, aspect ratios and sizes is a view
    # of the image, each once.
    _C.TEST.AUG.VFLIP = False
    # Rotate counterclockwise by each of these angles: 90, 180, 270.
    _C.TEST.AUG.ROTATIONS = ()
    # Multiply the width by each of these, beside 1. MIN_SIZES is for the result.
    _C.TEST.AUG.ASPECT_RATIOS = ()
    # (LOW, HIGH): take boxes smaller than LOW only from the larger half of MIN_SIZES, and boxes
    # larger than HIGH only from the smaller half. The size of a box is the square root of its area
    # in pixels of the image file. An odd number of MIN_SIZES has its middle in both halves.
    _C.TEST.AUG.BOX_SIZES = ()
    # How boxes of all views are merged: "nms" as for one image, with TEST.SOFT_NMS and
    # TEST.BOX_VOTING if they are enabled; or "wbf", weighted boxes fusion with the IoU of
    # MODEL.ROI_HEADS.NMS_THRESH_TEST, which needs the package ensemble-boxes.
    _C.TEST.AUG.MERGE = "nms"
    # What masks are averaged as: "probabilities" or "logits".
    _C.TEST.AUG.MASKS = "probabilities"
    return _C


def read_choice(cfg: CN, key: str, accepts: Sequence[Any]) -> Any:
    """
    Read a config value that must be one of a few.

    Args:
        cfg (CfgNode): the whole config.
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
