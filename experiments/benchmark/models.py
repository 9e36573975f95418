"""Models of the benchmark: Mask R-CNN, PANet, and PANet as a plain loop over levels."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Dict, Iterator, List, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.poolers import convert_boxes_to_pooler_format
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.analysis import FlopCountAnalysis
from detectron2.utils.env import seed_all_rng
from fvcore.nn.jit_handles import bmm_flop_jit
from torch import nn

from panet_d2.modeling import AdaptiveROIPooler

from .timing import PartTimes

__all__ = [
    "FIXED_COUNTS",
    "HEADS",
    "NaivePooler",
    "build_models",
    "count_flops",
    "images",
    "imitate_trained",
    "model_size",
    "part_times",
    "set_score_threshold",
]

# For each kind of box head: overrides that make the config of a PANet that of a Mask R-CNN with the
# same heads, and overrides that give the PANet that box head.
_MASK_RCNN = (
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 4),
)
HEADS: Dict[str, Tuple[tuple, tuple]] = {
    "2fc": (
        (*_MASK_RCNN, "MODEL.ROI_BOX_HEAD.NUM_CONV", 0, "MODEL.ROI_BOX_HEAD.NUM_FC", 2),
        (
            *("MODEL.ROI_BOX_HEAD.AFP.ADAPTATION", "fc"),
            *("MODEL.ROI_BOX_HEAD.NUM_CONV", 0, "MODEL.ROI_BOX_HEAD.NUM_FC", 1),
        ),
    ),
    "4conv1fc": (
        (*_MASK_RCNN, "MODEL.ROI_BOX_HEAD.NUM_CONV", 4, "MODEL.ROI_BOX_HEAD.NUM_FC", 1),
        (
            *("MODEL.ROI_BOX_HEAD.AFP.ADAPTATION", "conv"),
            *("MODEL.ROI_BOX_HEAD.NUM_CONV", 3, "MODEL.ROI_BOX_HEAD.NUM_FC", 1),
        ),
    ),
}

# With random weights, the number of proposals and detections after non-maximum suppression is
# arbitrary and differs between models. These thresholds keep as many as the config allows, as a
# trained model has. The limit for each level keeps proposals of all sizes.
FIXED_COUNTS = (
    *("MODEL.RPN.NMS_THRESH", 1.0, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 200, "MODEL.RPN.PRE_NMS_TOPK_TEST", 200),
)

# Pairs of box and class that reach the non-maximum suppression of a trained model.
_CANDIDATES = 300


class NaivePooler(nn.Module):
    """
    Adaptive feature pooling as a plain loop: torchvision's RoIAlign, a layer and a ReLU for each
    level, then the fusion of the stacked levels. The weights are those of another pooler.
    """

    def __init__(self, pooler: AdaptiveROIPooler):
        """
        Args:
            pooler (AdaptiveROIPooler): with fusion "max" and layers "conv" or "fc".

        Raises:
            ValueError: for another fusion, or no layers.
        """
        super().__init__()
        if pooler.fusion != "max" or pooler.adaptation == "none":
            raise ValueError(
                f"fusion {pooler.fusion!r} after {pooler.adaptation!r} is not supported."
            )
        self.adaptation = pooler.adaptation
        self.level_poolers = pooler.level_poolers
        weights = pooler.adaptation_layers.weight.detach().chunk(len(pooler.scales))
        biases = pooler.adaptation_layers.bias.detach().chunk(len(pooler.scales))
        self.layers = nn.ModuleList()
        for weight, bias in zip(weights, biases):
            out_channels, in_channels = weight.shape[:2]
            if self.adaptation == "fc":
                layer: nn.Module = nn.Linear(in_channels, out_channels)
            else:
                layer = nn.Conv2d(in_channels, out_channels, 3, padding=1)
            layer.load_state_dict({"weight": weight, "bias": bias})
            self.layers.append(layer)

    def forward(self, x: List[torch.Tensor], box_lists: List[Boxes]) -> torch.Tensor:
        """As :meth:`AdaptiveROIPooler.forward`."""
        boxes = convert_boxes_to_pooler_format(box_lists)
        levels = [
            self.adapt(pooler(feature, boxes), layer)
            for feature, pooler, layer in zip(x, self.level_poolers, self.layers)
        ]
        fused = self.fuse(levels)
        return fused[:, :, None, None] if self.adaptation == "fc" else fused

    def adapt(self, grid: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """One level's part of :meth:`AdaptiveROIPooler.adapt`."""
        return layer(grid.flatten(start_dim=1) if self.adaptation == "fc" else grid)

    def fuse(self, levels: List[torch.Tensor]) -> torch.Tensor:
        """As :meth:`AdaptiveROIPooler.fuse`."""
        return torch.stack([level.relu() for level in levels]).amax(dim=0)


def build_models(cfg: CfgNode, head: str) -> Dict[str, nn.Module]:
    """
    Args:
        cfg (CfgNode): the config of a PANet without norms in its heads.
        head (str): a key of :data:`HEADS`.

    Returns:
        dict[str, nn.Module]: "Mask R-CNN", "naive PANet" and "PANet", with random weights. Both
        PANets have the same weights.
    """
    baseline, panet = HEADS[head]
    models = {}
    for name, opts in (("Mask R-CNN", baseline), ("naive PANet", panet), ("PANet", panet)):
        changed = cfg.clone()
        changed.defrost()
        changed.merge_from_list([*opts, *FIXED_COUNTS, "MODEL.WEIGHTS", ""])
        if name == "Mask R-CNN":
            for head_node in (changed.MODEL.ROI_BOX_HEAD, changed.MODEL.ROI_MASK_HEAD):
                head_node.AFP.ENABLED = False
        seed_all_rng(0)
        models[name] = imitate_trained(build_model(changed))
    heads = models["naive PANet"].roi_heads
    for pooler in ("box_pooler", "mask_pooler"):
        naive = NaivePooler(getattr(heads, pooler)).to(cfg.MODEL.DEVICE)
        setattr(heads, pooler, naive)
    return models


def images(count: int, height: int, width: int, objects: int = 10, classes: int = 1) -> List[dict]:
    """
    Args:
        count, height, width (int): number and size of the random images.
        objects (int): number of random rectangles in each image.
        classes (int): number of their classes.

    Returns:
        list[dict]: inputs for training or inference.
    """
    rng = np.random.default_rng(0)
    inputs = []
    for _ in range(count):
        corner = rng.uniform(0, 0.6, (objects, 2)) * (width, height)
        size = rng.uniform(0.05, 0.4, (objects, 2)) * (width, height)
        boxes = np.concatenate([corner, corner + size], axis=1)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.from_numpy(boxes).float())
        instances.gt_classes = torch.from_numpy(rng.integers(0, classes, objects))
        instances.gt_masks = PolygonMasks(
            [[np.array([x0, y0, x1, y0, x1, y1, x0, y1])] for x0, y0, x1, y1 in boxes]
        )
        image = torch.from_numpy(rng.integers(0, 256, (3, height, width))).float()
        inputs.append({"image": image, "height": height, "width": width, "instances": instances})
    return inputs


@torch.no_grad()
def imitate_trained(model: nn.Module) -> nn.Module:
    """
    Give a model with random weights the cost of a trained one. Its residual branches become zero,
    because the features would grow without bounds otherwise. Its box deltas become zero, so
    proposals are anchors and detections are proposals.

    Args:
        model (nn.Module): changed in place.

    Returns:
        nn.Module: the same model.
    """
    for block in model.backbone.bottom_up.modules():
        if hasattr(block, "shortcut"):  # a residual block of any kind
            last = block.conv3 if hasattr(block, "conv3") else block.conv2
            last.norm.weight.zero_()
    model.proposal_generator.rpn_head.anchor_deltas.weight.zero_()
    model.roi_heads.box_predictor.bbox_pred.weight.zero_()
    return model


@torch.no_grad()
def set_score_threshold(model: nn.Module, inputs: List[dict]) -> None:
    """
    Set a model's score threshold so that as many boxes pass as with a trained model. With random
    weights no score reaches the usual threshold, and there would be no masks to predict.
    """
    seen = []
    hook = model.roi_heads.box_predictor.register_forward_hook(lambda *args: seen.append(args[2]))
    model.eval()(inputs[:1])
    hook.remove()
    probabilities = seen[0][0].float().softmax(dim=1)[:, :-1].flatten()
    count = min(_CANDIDATES + 1, len(probabilities))
    threshold = probabilities.topk(count).values[-1].item()
    model.roi_heads.box_predictor.test_score_thresh = threshold


def count_flops(model: nn.Module, inputs: List[dict]) -> float:
    """
    Args:
        model (nn.Module): any model of Detectron2, for inference.
        inputs (list[dict]): one image.

    Returns:
        float: multiply-adds of convs and matrix products, as fvcore counts them.
    """
    analysis = FlopCountAnalysis(model, [{"image": inputs[0]["image"]}])
    # fvcore counts bmm but not baddbmm, the product with a bias.
    analysis.set_op_handle("aten::baddbmm", lambda ins, outs: bmm_flop_jit(ins[1:3], outs))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.total()


def model_size(cfg: CfgNode, height: int, width: int) -> Dict[str, float]:
    """
    Args:
        cfg (CfgNode): config of a Mask R-CNN or a PANet.
        height, width (int): size of an image.

    Returns:
        dict[str, float]: "million_parameters", and "gflops" of inference with the numbers of
        proposals and detections of a trained model.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([*FIXED_COUNTS, "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"])
    model, inputs = imitate_trained(build_model(cfg)).eval(), images(1, height, width)
    set_score_threshold(model, inputs)
    return {
        "gflops": count_flops(model, inputs) / 1e9,
        "million_parameters": sum(p.numel() for p in model.parameters()) / 1e6,
    }


@contextmanager
def part_times(model: nn.Module, device: str) -> Iterator[PartTimes]:
    """
    Args:
        model (nn.Module): one of :func:`build_models`.
        device (str): where it runs.

    Yields:
        PartTimes: times of the model's calls within the context, by part.
    """
    times = PartTimes(device)
    heads = model.roi_heads
    undo = [
        times.wrap(model, "forward", "other"),
        times.wrap(type(model), "_postprocess", "post-processing"),  # called on the class
        times.wrap(model.backbone, "forward", "neck"),
        times.wrap(model.backbone.bottom_up, "forward", "backbone"),
        times.wrap(model.proposal_generator, "forward", "RPN"),
        times.wrap(heads.box_predictor, "inference", "post-processing"),
        times.wrap(heads.box_head, "forward", "heads"),
        times.wrap(heads.box_predictor, "forward", "heads"),
        times.wrap(heads.mask_head, "forward", "heads"),
    ]
    for pooler in (heads.box_pooler, heads.mask_pooler):
        undo.append(times.wrap(pooler, "forward", "pooling"))
        if isinstance(pooler, (AdaptiveROIPooler, NaivePooler)):
            undo += [times.wrap(pooler, name, "adaptation") for name in ("adapt", "fuse")]
    try:
        yield times
    finally:
        for restore in reversed(undo):
            restore()
