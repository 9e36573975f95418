"""
What Detectron2's tests hold for its mask head and for masks on their way in and out of it, held for
PANetMaskHead.

Scripting is tested in tests/export/test_scripting.py.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.layers import ShapeSpec
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn

from panet_d2 import PANetMaskHead

SHAPE = ShapeSpec(channels=8, height=7, width=7)
IMAGE_SIZE = (60, 70)
CLASSES = 4
BOXES = torch.tensor([[4.0, 6, 40, 50], [10, 10, 52, 38], [0, 0, 69, 59]])


def mask_head(class_agnostic=False, **kwargs):
    head = PANetMaskHead(
        SHAPE, num_classes=1 if class_agnostic else CLASSES, conv_dims=[16] * 4, **kwargs
    )
    # As built, the predictor's weights are so small that the classes hardly differ.
    nn.init.normal_(head.predictor.weight, std=0.1)
    return head


def predicted(*counts):
    """Instances as the box head leaves them at inference, ``counts`` of them in each image."""
    result = []
    for count in counts:
        instances = Instances(IMAGE_SIZE)
        instances.pred_boxes = Boxes(BOXES[:count])
        instances.pred_classes = torch.arange(count) + 1
        instances.scores = torch.ones(count)
        result.append(instances)
    return result


def labelled(*counts, polygons=False):
    """Instances as the sampling leaves them in training: the right half of each box is object."""
    result = []
    for count in counts:
        instances = Instances(IMAGE_SIZE)
        instances.proposal_boxes = Boxes(BOXES[:count])
        instances.gt_classes = torch.arange(count) + 1
        halves = BOXES[:count].clone()
        halves[:, 0] = (halves[:, 0] + halves[:, 2]).div(2).round()
        if polygons:
            corners = halves[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()
            instances.gt_masks = PolygonMasks([[c] for c in corners])
        else:
            masks = torch.zeros(count, *IMAGE_SIZE, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(masks, halves.int().tolist()):
                mask[y0:y1, x0:x1] = True
            instances.gt_masks = BitMasks(masks)
        result.append(instances)
    return result


def pooled(count):
    return torch.randn(count, SHAPE.channels, SHAPE.height, SHAPE.width)


def loss(head, x, instances):
    with EventStorage() as storage:
        losses = head.train()(x, instances)
    assert set(losses) == {"loss_mask"}
    return losses["loss_mask"], storage


@pytest.mark.parametrize("fc_fusion", [True, False])
@pytest.mark.parametrize("class_agnostic", [True, False])
def test_loss_is_of_the_true_class(class_agnostic, fc_fusion):
    head, x = mask_head(class_agnostic, fc_fusion=fc_fusion), pooled(5)
    value, _ = loss(head, x, labelled(3, 2))
    classes = [1, 2, 3, 1, 2]
    logits = head.layers(x)
    logits = logits[:, 0] if class_agnostic else logits[range(5), classes]
    truth = torch.zeros(5, 14, 14)
    truth[:, :, 7:] = 1
    # Where the middle of a box is no whole pixel, its column belongs to both sides.
    expected = F.binary_cross_entropy_with_logits(logits, truth)
    torch.testing.assert_close(value, expected, rtol=0.02, atol=0)
    value.backward()
    assert all(p.grad is not None for p in head.parameters())


def test_loss_weight():
    head, x = mask_head(), pooled(3)
    once, _ = loss(head, x, labelled(3))
    head.loss_weight = 2.5
    torch.testing.assert_close(loss(head, x, labelled(3))[0], 2.5 * once)


def test_polygons_and_bitmasks_agree():
    head, x = mask_head(), pooled(3)
    of_bitmasks, _ = loss(head, x, labelled(3))
    of_polygons, _ = loss(head, x, labelled(3, polygons=True))
    torch.testing.assert_close(of_polygons, of_bitmasks, rtol=0.02, atol=0)


@pytest.mark.parametrize("class_agnostic", [True, False])
@pytest.mark.parametrize("counts", [(3, 2), (0, 3), (0, 0)])
def test_inference_takes_the_predicted_class(counts, class_agnostic):
    head, x = mask_head(class_agnostic).eval(), pooled(sum(counts))
    instances = predicted(*counts)
    results = head(x, instances)
    classes = torch.cat([i.pred_classes for i in instances])
    with torch.no_grad():
        channel = torch.zeros_like(classes) if class_agnostic else classes
        expected = head.layers(x)[range(sum(counts)), channel][:, None].sigmoid()
    assert [i.pred_masks.shape for i in results] == [(count, 1, 14, 14) for count in counts]
    torch.testing.assert_close(torch.cat([i.pred_masks for i in results]), expected)


@pytest.mark.parametrize("norm", ["", "GN", "BN"])
def test_training_without_instances(norm):
    """No loss, but a gradient for every parameter, for the processes that have some."""
    head = PANetMaskHead(SHAPE, num_classes=CLASSES, conv_dims=[64] * 4, conv_norm=norm)
    value, _ = loss(head, pooled(0), labelled(0, 0))
    assert value == 0
    value.backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("period, step, pictures", [(0, 0, 0), (5, 0, 3), (5, 4, 0), (5, 10, 3)])
def test_vis_period(period, step, pictures):
    head = mask_head(vis_period=period).train()
    with EventStorage(step) as storage:
        head(pooled(3), labelled(3))
    assert len(storage._vis_data) == pictures
    for _, image, at in storage._vis_data:
        assert image.shape == (3, 14, 28) and at == step  # prediction and truth side by side


def test_accuracy_is_logged():
    _, storage = loss(mask_head(), pooled(3), labelled(3))
    assert 0 <= storage.latest()["mask_rcnn/accuracy"][0] <= 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("class_agnostic", [True, False])
def test_trace_keeps_no_count(class_agnostic):
    class Traceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = mask_head(class_agnostic)

        def forward(self, x, first, second):
            instances = [Instances(IMAGE_SIZE, pred_classes=c) for c in (first, second)]
            return tuple(i.pred_masks for i in self.head(x, instances))

    def inputs(first, second):
        classes = [torch.randint(0, CLASSES, (n,)) for n in (first, second)]
        return (pooled(first + second), *classes)

    model = Traceable().eval()
    with torch.no_grad(), patch_builtin_len():
        traced = torch.jit.trace(model, inputs(4, 3), check_trace=False)
        for args in (inputs(2, 6), inputs(0, 1), inputs(0, 0)):
            torch.testing.assert_close(traced(*args), model(*args))


@pytest.mark.parametrize("size", [IMAGE_SIZE, (120, 140), (31, 77)])
def test_masks_fill_their_boxes_in_the_image(size):
    """From the head's grid to the image at the size that is asked for, and into training again."""
    head, instances = mask_head().eval(), predicted(3, 0)
    head.predictor.weight.data.zero_()
    head.fc_fusion.fc.weight.data.zero_()
    with torch.no_grad():  # the left half of every grid is object
        half = torch.full((14, 14), -9.0)
        half[:, :7] = 9.0
        head.fc_fusion.fc.bias.copy_(half.flatten())
        head(pooled(3), instances)
    whole, none = (detector_postprocess(copy.deepcopy(i), *size) for i in instances)
    assert whole.pred_masks.shape == (3, *size) and whole.pred_masks.dtype == torch.bool
    assert none.pred_masks.shape == (0, *size)
    boxes = whole.pred_boxes.tensor
    halves = boxes.clone()
    halves[:, 2] = (boxes[:, 0] + boxes[:, 2]) / 2
    rows, columns = torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5
    for mask, (x0, y0, x1, y1) in zip(whole.pred_masks, halves):
        expected = ((rows > y0) & (rows < y1))[:, None] & ((columns > x0) & (columns < x1))
        overlap = (mask & expected).sum() / (mask | expected).sum()
        assert overlap > 0.95
    back = BitMasks(whole.pred_masks).crop_and_resize(boxes, 14)
    assert (back == (half > 0)).float().mean() > 0.95
