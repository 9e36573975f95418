"""What the parts of a trained PANet contribute."""

from __future__ import annotations

import contextlib
import io
from functools import partial
from typing import Callable, Dict, Iterable, List, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.structures import Boxes, BoxMode, Instances
from torch import nn

from ..data import NamedImageMapper
from ..errors import ConfigError, DataError
from ..evaluation import detection_limit
from ..modeling import PANetMaskHead, adaptive_poolers
from .matching import ground_truth, object_recall

__all__ = [
    "dead_units",
    "detection_stages",
    "evaluate_boxes_of",
    "evaluate_true_boxes",
    "level_shares",
    "mask_paths",
]


def _roi_heads(model: nn.Module) -> nn.Module:
    """The model's ROI heads; a module with nothing in it where there are none, as in RetinaNet."""
    return getattr(model, "roi_heads", None) or nn.Module()


@torch.no_grad()
def level_shares(
    model: GeneralizedRCNN, inputs: Iterable[List[dict]], proposals: int = 100
) -> Dict[str, torch.Tensor]:
    """
    Which level gives the features that the maximum over levels keeps; the paper's figure 3.

    Args:
        model (GeneralizedRCNN): a PANet whose poolers fuse by "max".
        inputs (iterable[list[dict]]): batches of images, as the model takes them for inference.
        proposals (int): how many of an image count, those of the highest objectness.

    Returns:
        dict[str, Tensor]: for each pooler of :func:`adaptive_poolers`, of shape (L, L + 1): for
        proposals that FPN's rule would send to level i, in row i, the share of features that come
        from each level, which sum up to 1 (or are nan where there are no such proposals); and in
        the last column how many proposals these were. Features that are 0 on all levels come from
        none and do not count.
    """
    poolers = {n: p for n, p in adaptive_poolers(_roi_heads(model)).items() if p.fusion == "max"}
    if not poolers:
        return {}
    counts = {n: torch.zeros(len(p.scales), len(p.scales) + 1) for n, p in poolers.items()}
    model.eval()
    for batch in inputs:
        images = model.preprocess_image(batch)
        features = model.backbone(images.tensor)
        found, _ = model.proposal_generator(images, features)
        boxes = [p.proposal_boxes[:proposals] for p in found]
        maps = [features[f] for f in model.roi_heads.in_features]
        for name, pooler in poolers.items():
            levels = pooler.adapt(pooler.pool_levels(maps, boxes)).flatten(2)  # (L, M, ...)
            home = pooler.fpn_levels(boxes).cpu()
            value, winner = levels.max(dim=0)
            for level in range(len(levels)):
                wins = ((winner == level) & (value > 0)).sum(dim=1).float().cpu()
                counts[name][:, level].index_add_(0, home, wins)
            counts[name][:, -1] += torch.bincount(home, minlength=len(levels))
    for table in counts.values():
        table[:, :-1] /= table[:, :-1].sum(dim=1, keepdim=True)
    return counts


@torch.no_grad()
def mask_paths(
    model: GeneralizedRCNN, image: dict, boxes: torch.Tensor, classes: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    The mask logits of both paths of the mask head for given boxes.

    Args:
        model (GeneralizedRCNN): with a :class:`PANetMaskHead` that has fully-connected fusion.
        image (dict): one image, as the model takes it for inference.
        boxes (Tensor): shape (M, 4), x0, y0, x1, y1 in pixels of ``image["image"]``.
        classes (Tensor): shape (M,), index of each box's class.

    Returns:
        tuple[Tensor, Tensor]: the FCN path's logits and the fully-connected path's, each of shape
        (M, S, S). Their sum is what the model predicts.

    Raises:
        ConfigError: if the model has no fully-connected path.
    """
    head = getattr(_roi_heads(model), "mask_head", None)
    if not (isinstance(head, PANetMaskHead) and head.fc_fusion_on):
        raise ConfigError(
            "the mask head has no fully-connected path: MODEL.ROI_MASK_HEAD.NAME must be "
            "PANetMaskHead and FC_FUSION.ENABLED True."
        )
    model.eval()
    features = model.backbone(model.preprocess_image([image]).tensor)
    maps = [features[f] for f in model.roi_heads.mask_in_features]
    fcn, fc = head.forward_paths(model.roi_heads.mask_pooler(maps, [Boxes(boxes)]))
    if fcn.shape[1] > 1:
        fcn = fcn[torch.arange(len(fcn)), classes]
    else:  # class-agnostic
        fcn = fcn[:, 0]
    return fcn, fc[:, 0]


@torch.no_grad()
def dead_units(model: GeneralizedRCNN, inputs: Iterable[List[dict]]) -> Dict[str, torch.Tensor]:
    """
    Which outputs of the box head are zero for every proposal. Behind a ReLU such a unit has no
    gradient, so that it is not trained either.

    Args:
        model (GeneralizedRCNN): with one or several box heads of Detectron2's kind.
        inputs (iterable[list[dict]]): batches of images, as the model takes them for inference.

    Returns:
        dict[str, Tensor]: by the name of each box head, bool, of the shape of its output for one
        proposal.

    Raises:
        ConfigError: if the model has no box head that ends with a ReLU.
    """
    modules = _roi_heads(model).named_modules()
    heads = {n: m for n, m in modules if isinstance(m, FastRCNNConvFCHead)}
    if not heads:
        raise ConfigError(
            "the model has no box head of the FastRCNNConvFCHead kind (MODEL.ROI_BOX_HEAD.NAME)."
        )
    alive: Dict[str, torch.Tensor] = {}

    def see(name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen = (output > 0).any(dim=0)
        alive[name] = alive.get(name, seen) | seen

    hooks = [head.register_forward_hook(partial(see, name)) for name, head in heads.items()]
    model.eval()
    try:
        for batch in inputs:
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: ~seen for name, seen in alive.items()}


def evaluate_true_boxes(
    cfg: CfgNode, model: GeneralizedRCNN, dataset_name: str
) -> Dict[str, float]:
    """
    Mask AP where all boxes and classes are those of the truth and all scores are 1: what is wrong
    are masks alone.

    Args:
        cfg (CfgNode): how images are resized.
        model (GeneralizedRCNN): predicts masks.
        dataset_name (str): a registered data set with masks, evaluated as COCO is.

    Returns:
        dict[str, float]: AP, AP50, AP75, APs, APm, APl, and the AP of each class, in percent.

    Raises:
        ConfigError: if the model predicts no masks.
        DataError: if the dataset has no objects.
    """
    _check_masks(model)
    objects = {
        record["image_id"]: [a for a in record["annotations"] if not a.get("iscrowd", 0)]
        for record in get_detection_dataset_dicts([dataset_name], filter_empty=False)
    }
    most = max(map(len, objects.values()), default=0)
    if not most:
        raise DataError(f"dataset {dataset_name!r} has no objects.")

    def true_boxes(image: dict) -> Instances:
        annotations = objects[image["image_id"]]
        height, width = image["image"].shape[1:]
        corners = [
            BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations
        ]
        boxes = Boxes(torch.tensor(corners, dtype=torch.float32).reshape(-1, 4))
        boxes.scale(width / image["width"], height / image["height"])
        return Instances(
            (height, width),
            pred_boxes=boxes,
            pred_classes=torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64),
            scores=torch.ones(len(annotations)),
        )

    return _evaluate_masks(cfg, model, dataset_name, true_boxes, most)


def evaluate_boxes_of(
    cfg: CfgNode, model: GeneralizedRCNN, other: GeneralizedRCNN, dataset_name: str
) -> Dict[str, float]:
    """
    Mask AP with the boxes, classes and scores that another model detects. Two models each in the
    boxes of the other say which of them has the better boxes, and which the better masks.

    Args:
        cfg (CfgNode): how images are resized, for both, and how many detections count.
        model (GeneralizedRCNN): predicts the masks.
        other (GeneralizedRCNN): detects.
        dataset_name (str): a registered data set with masks, evaluated as COCO is.

    Returns:
        dict[str, float]: as of :func:`evaluate_true_boxes`.

    Raises:
        ConfigError: if the model predicts no masks, or the other model has other classes or no
            ROI heads.
    """
    _check_masks(model)
    ours, theirs = (getattr(_roi_heads(m), "num_classes", None) for m in (model, other))
    if theirs is None:
        raise ConfigError("the other model has no ROI heads.")
    if ours != theirs:
        raise ConfigError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {ours}, and {theirs} in the other model; they must be "
            "the same."
        )
    other.eval()

    def detected(image: dict) -> Instances:
        (found,) = GeneralizedRCNN.inference(other, [image], do_postprocess=False)
        return Instances(
            found.image_size,
            pred_boxes=found.pred_boxes,
            pred_classes=found.pred_classes,
            scores=found.scores,
        )

    return _evaluate_masks(cfg, model, dataset_name, detected, cfg.TEST.DETECTIONS_PER_IMAGE)


def _check_masks(model: nn.Module) -> None:
    if not getattr(_roi_heads(model), "mask_on", False):
        raise ConfigError("MODEL.MASK_ON is False: the model predicts no masks.")


@torch.no_grad()
def _evaluate_masks(
    cfg: CfgNode,
    model: GeneralizedRCNN,
    dataset_name: str,
    given: Callable[[dict], Instances],
    most: int,
) -> Dict[str, float]:
    """Mask AP in boxes that are given for each image, ``most`` at most, in pixels of the input."""
    mapper = NamedImageMapper(cfg, False)
    evaluator = COCOEvaluator(
        dataset_name,
        ("segm",),
        distributed=False,
        max_dets_per_image=detection_limit(most),
    )
    evaluator.reset()
    model.eval()
    for record in get_detection_dataset_dicts([dataset_name], filter_empty=False):
        image = mapper(record)
        # A panoptic model's own method takes no boxes.
        evaluator.process([image], GeneralizedRCNN.inference(model, [image], [given(image)]))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools says what it does
        return dict(evaluator.evaluate()["segm"])


@torch.no_grad()
def detection_stages(
    cfg: CfgNode, model: GeneralizedRCNN, dataset_name: str, iou_threshold: float = 0.5
) -> Dict[str, Dict[str, float]]:
    """
    How far objects come through the model. A row that is far below the one above it is of the
    part that loses them; what is lost in AP although the last row is high is lost by false
    positives and by scores.

    Args:
        cfg (CfgNode): how images are resized.
        model (GeneralizedRCNN): has a proposal generator.
        dataset_name (str): a registered data set in COCO format.
        iou_threshold (float): overlap from which an object counts as found.

    Returns:
        dict[str, dict[str, float]]: see :func:`object_recall`; of what the "proposals" overlap, of
        what detected "boxes" of any class do, if the model predicts masks of what these
        "masks" do, and with "classes" of what the last of these do with the right class.

    Raises:
        ConfigError: if the model makes no proposals.
    """
    if getattr(model, "proposal_generator", None) is None:
        raise ConfigError(
            "the model makes no proposals of its own (MODEL.PROPOSAL_GENERATOR.NAME)."
        )
    mapper = NamedImageMapper(cfg, False)
    coco = ground_truth(dataset_name)
    contiguous = MetadataCatalog.get(dataset_name).thing_dataset_id_to_contiguous_id
    category_ids = {ours: theirs for theirs, ours in contiguous.items()}
    proposed: List[dict] = []
    detected: List[dict] = []
    seen: List[Instances] = []
    hook = model.proposal_generator.register_forward_hook(
        lambda module, args, output: seen.extend(output[0])
    )
    model.eval()
    try:
        for record in get_detection_dataset_dicts([dataset_name], filter_empty=False):
            instances = model([mapper(record)])[0]["instances"].to("cpu")
            detected += instances_to_coco_json(instances, record["image_id"])
            proposals = seen.pop().to("cpu")
            height, width = proposals.image_size
            proposals.pred_boxes = proposals.proposal_boxes
            proposals.pred_boxes.scale(record["width"] / width, record["height"] / height)
            proposals.scores = proposals.objectness_logits
            proposals.pred_classes = torch.zeros(len(proposals), dtype=torch.int64)
            proposed += instances_to_coco_json(proposals, record["image_id"])
    finally:
        hook.remove()
    for result in (*proposed, *detected):
        result["category_id"] = category_ids[result["category_id"]]
    recall = partial(object_recall, coco, iou_threshold=iou_threshold)
    stages = {
        "proposals": recall(proposed, "bbox", use_categories=False),
        "boxes": recall(detected, "bbox", use_categories=False),
    }
    last = "bbox"
    if getattr(_roi_heads(model), "mask_on", False):
        last = "segm"
        stages["masks"] = recall(detected, last, use_categories=False)
    stages["classes"] = recall(detected, last)
    return stages
