"""
What Detectron2's tests hold for its ROI heads, held for PANetROIHeads and PANetCascadeROIHeads.

Not carried over: losses compared with numbers that were written down once. Where adaptive feature
pooling has nothing to do, the losses are the stock heads'; with it they are only the same again.
Scripting is tested in tests/export/test_scripting.py.
"""

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.modeling.roi_heads import StandardROIHeads, build_roi_heads
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from panet_d2 import AdaptiveROIPooler, PANetRROIHeads
from panet_d2.modeling import FastRCNNConvFCNormHead

from ..common import needs_cuda, tiny_cfg
from .common import needs_rotated_ops, rotated

CHANNELS = 32
IMAGE_SIZES = [(40, 50), (60, 64)]
LEVELS = ["p2", "p3", "p4", "p5"]
CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "PANetCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
)
KEYPOINTS = (
    *("MODEL.MASK_ON", False),
    *("MODEL.KEYPOINT_ON", True),
    *("MODEL.ROI_HEADS.NUM_CLASSES", 1),
    *("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 4),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16, 24]),
    *("MODEL.ROI_KEYPOINT_HEAD.AFP.ENABLED", True),
)
ONE_LEVEL = (
    *("MODEL.ROI_HEADS.IN_FEATURES", ["p3"]),
    *("MODEL.RPN.IN_FEATURES", ["p3"]),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[8, 16, 32]]),
)


def shapes():
    return {f"p{i}": ShapeSpec(channels=CHANNELS, stride=2**i) for i in (2, 3, 4, 5, 6)}


def feature_maps(num_images=2):
    return {f"p{i}": torch.rand(num_images, CHANNELS, 64 >> i, 64 >> i) for i in (2, 3, 4, 5, 6)}


def images():
    return ImageList(torch.rand(2, 3, 64, 64), IMAGE_SIZES)


def targets(objects=(2, 2), keypoints=False, num_classes=3):
    """Ground truth of two images, with 0 to 2 objects each."""
    result = []
    for (height, width), count in zip(IMAGE_SIZES, objects):
        boxes = torch.tensor([[1.0, 1, 30, 30], [20, 20, 36, 38]])[:count]
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.tensor([num_classes - 1, 0])[:count]
        if keypoints:
            points = boxes[:, None, :2] + torch.tensor([[2.0, 3], [9, 5], [4, 12], [12, 12]])
            visible = torch.full((count, 4, 1), 2.0)
            instances.gt_keypoints = Keypoints(torch.cat([points, visible], dim=2))
        else:
            instances.gt_masks = BitMasks(torch.rand(count, height, width) > 0.5)
        result.append(instances)
    return result


def losses(cfg: CfgNode, gt: list, seed: int = 121, weights=None):
    """Of the RPN and the ROI heads, all that is random made from ``seed``."""
    torch.manual_seed(seed)
    maps, pictures = feature_maps(), images()
    rpn = build_proposal_generator(cfg, shapes())
    heads = build_roi_heads(cfg, shapes())
    if weights is not None:
        heads.load_state_dict(weights.state_dict())
    torch.manual_seed(seed)
    with EventStorage():
        proposals, rpn_losses = rpn(pictures, maps, gt)
        _, head_losses = heads(pictures, maps, proposals, gt)
    return heads, {**rpn_losses, **head_losses}


@pytest.mark.parametrize("opts", [(), CASCADE, ("MODEL.ROI_BOX_HEAD.AFP.FUSION", "product")])
def test_losses_are_finite_and_come_again(opts):
    gt = targets()
    heads, first = losses(tiny_cfg(*opts), gt)
    of_boxes = {"loss_cls", "loss_box_reg"}
    if opts is CASCADE:
        of_boxes = {f"{name}_stage{k}" for name in of_boxes for k in range(3)}
    assert set(first) == of_boxes | {"loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    assert all(torch.isfinite(v) for v in first.values())
    sum(first.values()).backward()
    assert all(p.grad is not None for p in heads.parameters())
    _, second = losses(tiny_cfg(*opts), gt)
    assert {k: v.item() for k, v in second.items()} == {k: v.item() for k, v in first.items()}
    _, other = losses(tiny_cfg(*opts), gt, seed=122)
    assert all(other[k].item() != v.item() for k, v in first.items())


def test_losses_are_the_stock_heads_where_pooling_adds_nothing():
    """One level and no adaptation: adaptive feature pooling is the stock pooling."""
    opts = (
        *ONE_LEVEL,
        *("MODEL.ROI_BOX_HEAD.AFP.ADAPTATION", "none"),
        *("MODEL.ROI_MASK_HEAD.AFP.ADAPTATION", "none"),
        *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    )
    gt = targets()
    stock_heads, stock = losses(tiny_cfg(*opts, "MODEL.ROI_HEADS.NAME", "StandardROIHeads"), gt)
    assert type(stock_heads) is StandardROIHeads
    ours_heads, ours = losses(tiny_cfg(*opts), gt, weights=stock_heads)
    assert isinstance(ours_heads.box_pooler, AdaptiveROIPooler)
    assert isinstance(ours_heads.mask_pooler, AdaptiveROIPooler)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objects", [(0, 0), (0, 2)])
@pytest.mark.parametrize("opts", [(), CASCADE, KEYPOINTS], ids=["mask", "cascade", "keypoint"])
def test_images_without_objects(opts, objects):
    keypoints = opts is KEYPOINTS
    gt = targets(objects, keypoints, num_classes=1 if keypoints else 3)
    heads, result = losses(tiny_cfg(*opts), gt)
    assert all(torch.isfinite(v) for v in result.values())
    if objects == (0, 0):
        branch = "loss_keypoint" if keypoints else "loss_mask"
        assert result[branch] == 0
    sum(result.values()).backward()
    # Also of what has nothing to learn here: other processes of a distributed training may have.
    assert [n for n, p in heads.named_parameters() if p.grad is None] == []


def proposals(count=(2, 2)):
    result = []
    for size, n in zip(IMAGE_SIZES, count):
        boxes = torch.tensor([[1.0, 1, 30, 30], [20, 20, 36, 38]])[:n]
        logits = torch.tensor([0.5, 0.9])[:n]
        result.append(Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=logits))
    return result


@pytest.mark.parametrize("count", [(2, 2), (0, 2), (0, 0)])
@pytest.mark.parametrize("opts", [(), CASCADE, KEYPOINTS], ids=["mask", "cascade", "keypoint"])
def test_inference(opts, count):
    cfg = tiny_cfg(*opts, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    heads = build_roi_heads(cfg, shapes()).eval()
    with torch.no_grad():
        results, _ = heads(images(), feature_maps(), proposals(count))
    for instances, size, n in zip(results, IMAGE_SIZES, count):
        assert instances.image_size == size
        assert (len(instances) > 0) == (n > 0)
        if opts is KEYPOINTS:
            assert instances.pred_keypoints.shape == (len(instances), 4, 3)
        else:
            assert instances.pred_masks.shape == (len(instances), 1, 28, 28)
        assert all(torch.isfinite(v).all() for v in (instances.scores, instances.pred_boxes.tensor))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("fusion", ["max", "sum"])
# Not of the cascade: Detectron2's refuses boxes that are not finite between its stages.
def test_features_that_are_not_finite_detect_nothing(fusion, value):
    cfg = tiny_cfg("MODEL.ROI_BOX_HEAD.AFP.FUSION", fusion)
    heads = build_roi_heads(cfg, shapes()).eval()
    maps = {name: torch.full_like(f, value) for name, f in feature_maps().items()}
    with torch.no_grad():
        results, _ = heads(images(), maps, proposals())
    assert [len(r) for r in results] == [0, 0]


@pytest.mark.parametrize("norm", ["", "GN"])
def test_box_head_scripts(norm):
    shape = ShapeSpec(channels=8, height=7, width=7)
    head = FastRCNNConvFCNormHead(shape, conv_dims=[32], fc_dims=[64, 32], conv_norm=norm).eval()
    x = torch.randn(4, 8, 7, 7)
    assert torch.equal(torch.jit.script(head)(x), head(x))


@needs_rotated_ops
@pytest.mark.parametrize("adaptation, num_conv", [("fc", 0), ("conv", 1), ("none", 0)])
def test_rotated_boxes(adaptation, num_conv):
    cfg = tiny_cfg(
        *("MODEL.MASK_ON", False),
        *("MODEL.RPN.BBOX_REG_WEIGHTS", (1, 1, 1, 1, 1)),
        *("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignRotated"),
        *("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (10, 10, 5, 5, 1)),
        *("MODEL.ROI_BOX_HEAD.AFP.ADAPTATION", adaptation),
        *("MODEL.ROI_BOX_HEAD.NUM_CONV", num_conv),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    )
    heads = PANetRROIHeads(cfg, shapes())
    assert isinstance(heads.box_pooler, AdaptiveROIPooler)
    pictures, maps, gt, given = images(), feature_maps(), targets(), proposals()
    for instances, proposal in zip(gt, given):
        instances.gt_boxes = rotated(instances.gt_boxes, 30.0)
        instances.remove("gt_masks")
        proposal.proposal_boxes = rotated(proposal.proposal_boxes, 20.0)
    with EventStorage():
        _, result = heads(pictures, maps, given, gt)
    assert set(result) == {"loss_cls", "loss_box_reg"}
    assert all(torch.isfinite(v) for v in result.values())
    sum(result.values()).backward()
    with torch.no_grad():
        detections, _ = heads.eval()(pictures, maps, given)
    assert detections[0].pred_boxes.tensor.shape[1] == 5


AUTOCAST = [("cpu", torch.bfloat16), pytest.param("cuda", torch.float16, marks=needs_cuda)]


@pytest.mark.parametrize("device, dtype", AUTOCAST)
def test_autocast(device, dtype):
    """The network computes in half precision; what comes out of it is in single where it must."""
    cfg = tiny_cfg("MODEL.DEVICE", device, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    model, seen = build_model(cfg).eval(), {}

    def watch(name: str, module: nn.Module) -> None:
        def hook(module, args, output):
            first = output[0] if isinstance(output, tuple) else output
            first = first["p5"] if isinstance(first, dict) else first
            seen[name] = (args[0].dtype if isinstance(args[0], Tensor) else None, first.dtype)

        module.register_forward_hook(hook)

    heads = model.roi_heads
    watch("backbone", model.backbone)
    watch("box_pooler", heads.box_pooler)
    watch("box_predictor", heads.box_predictor)
    watch("mask_pooler", heads.mask_pooler)
    with torch.no_grad(), torch.autocast(device, dtype=dtype):
        inputs = [{"image": torch.rand(3, 64, 96)}]
        instances = model.inference(inputs, do_postprocess=False)[0]
    assert seen == {
        "backbone": (torch.float32, dtype),
        "box_pooler": (None, dtype),
        "box_predictor": (dtype, dtype),
        "mask_pooler": (None, dtype),
    }
    assert len(instances) > 0
    assert instances.pred_boxes.tensor.dtype == torch.float32
    # Autocast takes a softmax in single precision on CUDA alone.
    assert instances.scores.dtype == (torch.float32 if device == "cuda" else dtype)


@needs_cuda
def test_model_moves_from_cuda_to_the_cpu():
    model = build_model(tiny_cfg("MODEL.DEVICE", "cuda")).cpu().eval()
    with torch.no_grad():
        outputs = model([{"image": torch.rand(3, *size)} for size in IMAGE_SIZES])
    assert all(o["instances"].pred_boxes.device.type == "cpu" for o in outputs)
