"""Measure what the parts of a trained model contribute."""

from __future__ import annotations

import contextlib
import io
from functools import partial
from typing import Callable, Dict, Iterable, List, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import GeneralizedRCNN, detector_postprocess
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.structures import Boxes, Instances
from torch import nn

from ..data import NamedImageMapper
from ..errors import ConfigError, DataError
from ..evaluation import detection_limit
from ..modeling import PANetMaskHead, adaptive_poolers
from .matching import ground_truth, object_recall


def _roi_heads(model: nn.Module) -> nn.Module:
    """Return the model's ROI heads, or an empty module if it has none, such as RetinaNet."""
    return getattr(model, "roi_heads", None) or nn.Module()


@torch.no_grad()
def level_shares(
    model: GeneralizedRCNN, inputs: Iterable[List[dict]], proposals: int = 100
) -> Dict[str, torch.Tensor]:
    """
    Count from which level max fusion takes each feature (figure 3 of the paper).

    Args:
        model (GeneralizedRCNN): a PANet whose poolers fuse by "max".
        inputs (iterable[list[dict]]): batches of images, the model's input at inference.
        proposals (int): number of proposals per image, those with the highest objectness.

    Returns:
        dict[str, Tensor]: a table of shape (L, L + 1) for each pooler with max fusion, by its name
        in :func:`adaptive_poolers`. Row i is for the proposals that FPN assigns to level i: the
        share of features from each level, then the number of proposals. Shares add up to 1, or are
        NaN without proposals. Features that are 0 on all levels are not counted.
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
            home = pooler.fpn_levels(boxes)
            value, winner = levels.max(dim=0)
            wins = [((winner == i) & (value > 0)).sum(dim=1) for i in range(len(levels))]
            rows = torch.stack([*wins, torch.ones_like(home)], dim=1)
            counts[name].index_add_(0, home.cpu(), rows.float().cpu())
    for table in counts.values():
        table[:, :-1] /= table[:, :-1].sum(dim=1, keepdim=True)
    return counts


@torch.no_grad()
def mask_paths(
    model: GeneralizedRCNN, image: dict, boxes: torch.Tensor, classes: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    Compute the mask logits of both paths of the mask head for given boxes.

    Args:
        model (GeneralizedRCNN): with a :class:`PANetMaskHead` that has fully-connected fusion.
        image (dict): one image, the model's input at inference.
        boxes (Tensor): shape (M, 4), x0, y0, x1, y1 in pixels of ``image["image"]``.
        classes (Tensor): shape (M,), class index of each box.

    Returns:
        tuple[Tensor, Tensor]: logits of the FCN path and of the fully-connected path, each of shape
        (M, S, S). The model predicts their sum.

    Raises:
        ConfigError: if the mask head has no fully-connected fusion.
    """
    head = getattr(_roi_heads(model), "mask_head", None)
    if not (isinstance(head, PANetMaskHead) and head.fc_fusion_on):
        raise ConfigError(
            "the mask head has no fully-connected fusion: MODEL.ROI_MASK_HEAD.NAME must be "
            "PANetMaskHead, and MODEL.ROI_MASK_HEAD.FC_FUSION.ENABLED must be True."
        )
    model.eval()
    features = model.backbone(model.preprocess_image([image]).tensor)
    maps = [features[f] for f in model.roi_heads.mask_in_features]
    fcn, fc = head.forward_paths(model.roi_heads.mask_pooler(maps, [Boxes(boxes)]))
    class_agnostic = fcn.shape[1] == 1
    return fcn[torch.arange(len(fcn)), 0 if class_agnostic else classes], fc[:, 0]


@torch.no_grad()
def dead_units(model: GeneralizedRCNN, inputs: Iterable[List[dict]]) -> Dict[str, torch.Tensor]:
    """
    Find outputs of the box head that are zero for every proposal. After a ReLU, such a unit has no
    gradient and is not trained.

    Args:
        model (GeneralizedRCNN): with :class:`FastRCNNConvFCHead` box heads, one or a cascade.
        inputs (iterable[list[dict]]): batches of images, the model's input at inference.

    Returns:
        dict[str, Tensor]: a bool tensor for each box head, by its name. The shape is that of the
        head's output for one proposal.

    Raises:
        ConfigError: if the model has no box head of this class.
    """
    modules = _roi_heads(model).named_modules()
    heads = {n: m for n, m in modules if isinstance(m, FastRCNNConvFCHead)}
    if not heads:
        raise ConfigError(
            "the model has no box head of class FastRCNNConvFCHead (MODEL.META_ARCHITECTURE, "
            "MODEL.ROI_BOX_HEAD.NAME)."
        )
    alive: Dict[str, torch.Tensor] = {}

    def see(name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen = (output > 0).any(dim=0)
        alive[name] = alive.get(name, seen) | seen

    model.eval()
    with contextlib.ExitStack() as hooks:
        for name, head in heads.items():
            hooks.enter_context(head.register_forward_hook(partial(see, name)))
        for batch in inputs:
            model(batch)
    return {name: ~seen for name, seen in alive.items()}


def evaluate_true_boxes(
    cfg: CfgNode, model: GeneralizedRCNN, dataset_name: str
) -> Dict[str, float]:
    """
    Compute the mask AP with ground-truth boxes and classes. All scores are 1, so that only the
    masks can be wrong.

    Args:
        cfg (CfgNode): how images are resized and loaded.
        model (GeneralizedRCNN): predicts the masks.
        dataset_name (str): a registered dataset in COCO format, with masks.

    Returns:
        dict[str, float]: AP, AP50, AP75, APs, APm, APl, and the AP of each class, in percent.

    Raises:
        ConfigError: if the model predicts no masks.
        DataError: if the dataset has no objects.
    """
    _check_masks(model)
    keys = ("bbox", "bbox_mode", "category_id")  # without masks, which need not be converted
    objects = {
        record["image_id"]: [
            {key: a[key] for key in keys} for a in record["annotations"] if not a.get("iscrowd", 0)
        ]
        for record in DatasetCatalog.get(dataset_name)
    }
    most = max(map(len, objects.values()), default=0)
    if not most:
        raise DataError(f"dataset {dataset_name!r} has no objects.")

    def ground_truth_boxes(image: dict) -> Instances:
        size = height, width = image["image"].shape[1:]
        target = annotations_to_instances(objects[image["image_id"]], size)
        target.gt_boxes.scale(width / image["width"], height / image["height"])
        found = Instances(size, pred_boxes=target.gt_boxes, pred_classes=target.gt_classes)
        found.scores = torch.ones(len(target))
        return found

    return _evaluate_masks(cfg, model, dataset_name, ground_truth_boxes, most)


def evaluate_boxes_of(
    cfg: CfgNode, model: GeneralizedRCNN, other: GeneralizedRCNN, dataset_name: str
) -> Dict[str, float]:
    """
    Compute the mask AP with the boxes, classes and scores of another model. Exchange the boxes of
    two models to see which has the better boxes and which the better masks.

    Args:
        cfg, model, dataset_name: see :func:`evaluate_true_boxes`. ``TEST.DETECTIONS_PER_IMAGE`` is
            the number of detections that are evaluated.
        other (GeneralizedRCNN): predicts boxes, classes and scores.

    Returns:
        dict[str, float]: see :func:`evaluate_true_boxes`.

    Raises:
        ConfigError: if the model predicts no masks, if the other model has no ROI heads, or if the
            numbers of classes differ.
    """
    _check_masks(model)
    ours, theirs = (getattr(_roi_heads(m), "num_classes", None) for m in (model, other))
    if theirs is None:
        raise ConfigError("the other model has no ROI heads.")
    if ours != theirs:
        raise ConfigError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {ours}, but {theirs} in the other model; both must be "
            "the same."
        )
    other.eval()

    def detected(image: dict) -> Instances:
        return GeneralizedRCNN.inference(other, [image], do_postprocess=False)[0]

    return _evaluate_masks(cfg, model, dataset_name, detected, cfg.TEST.DETECTIONS_PER_IMAGE)


def _check_masks(model: nn.Module) -> None:
    if not getattr(_roi_heads(model), "mask_on", False):
        raise ConfigError("MODEL.MASK_ON is False: the model predicts no masks.")


def _evaluate_masks(
    cfg: CfgNode, model: GeneralizedRCNN, name: str, given: Callable[[dict], Instances], most: int
) -> Dict[str, float]:
    """Compute the mask AP in given boxes, at most ``most`` per image."""

    def predict(batch: List[dict]) -> List[dict]:
        # Not model.inference, because that of a PanopticFPN takes no boxes.
        return GeneralizedRCNN.inference(model, batch, [given(image) for image in batch])

    model.eval()
    loader = build_detection_test_loader(cfg, name, mapper=NamedImageMapper(cfg, False))
    evaluator = COCOEvaluator(
        name, ("segm",), distributed=False, max_dets_per_image=detection_limit(most)
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return dict(inference_on_dataset(predict, loader, evaluator)["segm"])


@torch.no_grad()
def detection_stages(
    cfg: CfgNode, model: GeneralizedRCNN, dataset_name: str
) -> Dict[str, Dict[str, float]]:
    """
    Compute the recall of objects at an IoU of 0.5 after each stage of the model.

    A stage loses objects if its recall is far below that of the stage before. If the last recall is
    high but the AP is low, the causes are false positives and scores.

    Args:
        cfg (CfgNode): how images are resized and loaded.
        model (GeneralizedRCNN): has a proposal generator.
        dataset_name (str): a registered dataset in COCO format.

    Returns:
        dict[str, dict[str, float]]: the result of :func:`object_recall` for "proposals", for
        "boxes" of any class, for "masks" of any class if the model predicts masks, and for
        "classes": the masks, or else the boxes, with the right class.

    Raises:
        ConfigError: if the model makes no proposals.
    """
    if getattr(model, "proposal_generator", None) is None:
        raise ConfigError("the model makes no proposals (MODEL.PROPOSAL_GENERATOR.NAME).")
    loader = build_detection_test_loader(cfg, dataset_name, mapper=NamedImageMapper(cfg, False))
    coco = ground_truth(dataset_name)
    contiguous = MetadataCatalog.get(dataset_name).thing_dataset_id_to_contiguous_id
    category_ids = {ours: theirs for theirs, ours in contiguous.items()}
    proposed: List[dict] = []
    detected: List[dict] = []
    seen: List[Instances] = []  # the proposals of the last image
    model.eval()
    with model.proposal_generator.register_forward_hook(
        lambda module, args, output: seen.extend(output[0])
    ):
        for (image,) in loader:
            instances = model([image])[0]["instances"].to("cpu")
            detected += instances_to_coco_json(instances, image["image_id"])
            found = detector_postprocess(seen.pop().to("cpu"), image["height"], image["width"])
            found.pred_boxes, found.scores = found.proposal_boxes, found.objectness_logits
            found.pred_classes = torch.zeros(len(found), dtype=torch.int64)
            proposed += instances_to_coco_json(found, image["image_id"])
    for result in (*proposed, *detected):
        result["category_id"] = category_ids[result["category_id"]]
    recall = partial(object_recall, coco)
    any_class = partial(recall, use_categories=False)
    stages = {"proposals": any_class(proposed, "bbox"), "boxes": any_class(detected, "bbox")}
    has_masks = getattr(_roi_heads(model), "mask_on", False)
    if has_masks:
        stages["masks"] = any_class(detected, "segm")
    return {**stages, "classes": recall(detected, "segm" if has_masks else "bbox")}
