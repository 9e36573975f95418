import itertools

import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Keypoints
from detectron2.utils.events import EventStorage

from panet_d2 import AdaptiveROIPooler, PANetCascadeROIHeads, PANetROIHeads
from panet_d2.errors import ConfigError

from ..common import batch, tiny_cfg

CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "PANetCascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 50),
)


def losses_of(model, inputs):
    with EventStorage():
        losses = model.train()(inputs)
    assert losses and all(torch.isfinite(v) for v in losses.values()), losses
    return losses


def train_and_infer(cfg, inputs):
    model = build_model(cfg)
    sum(losses_of(model, inputs).values()).backward()
    with torch.no_grad():
        outputs = model.eval()(inputs)
    assert len(outputs) == len(inputs)
    return model, outputs


@pytest.mark.parametrize(
    "backbone, box, mask, fc_fusion", list(itertools.product([False, True], repeat=4))
)
def test_every_combination_of_switches(backbone, box, mask, fc_fusion):
    cfg = tiny_cfg(
        "MODEL.BACKBONE.NAME",
        "build_resnet_pafpn_backbone" if backbone else "build_resnet_fpn_backbone",
        *("MODEL.ROI_BOX_HEAD.AFP.ENABLED", box),
        *("MODEL.ROI_MASK_HEAD.AFP.ENABLED", mask),
        *("MODEL.ROI_MASK_HEAD.FC_FUSION.ENABLED", fc_fusion),
    )
    model, _ = train_and_infer(cfg, batch())
    assert hasattr(model.backbone, "pafpn_output3") == backbone
    assert isinstance(model.roi_heads.box_pooler, AdaptiveROIPooler) == box
    assert isinstance(model.roi_heads.mask_pooler, AdaptiveROIPooler) == mask
    assert model.roi_heads.mask_head.fc_fusion_on == fc_fusion
    assert any("fc_fusion" in name for name, _ in model.named_parameters()) == fc_fusion
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


@pytest.mark.parametrize("adaptation, num_conv", [("fc", 0), ("conv", 1), ("none", 0)])
def test_adaptations_of_the_box_head(adaptation, num_conv):
    cfg = tiny_cfg(
        *("MODEL.ROI_BOX_HEAD.AFP.ADAPTATION", adaptation),
        *("MODEL.ROI_BOX_HEAD.NUM_CONV", num_conv),
    )
    model, _ = train_and_infer(cfg, batch())
    # The head is made for what comes out of the pooler.
    shape = model.roi_heads.box_pooler.output_shape
    first = next(m for m in model.roi_heads.box_head if hasattr(m, "weight"))
    expected = {"fc": 48, "conv": 40, "none": 32 * 49}[adaptation]
    assert first.weight.shape[1] == expected
    assert (shape.channels, shape.height) == {"fc": (48, 1), "conv": (40, 7), "none": (32, 7)}[
        adaptation
    ]


def test_all_off_is_the_stock_model():
    opts = (
        *("MODEL.ROI_BOX_HEAD.AFP.ENABLED", False),
        *("MODEL.ROI_MASK_HEAD.AFP.ENABLED", False),
        *("MODEL.ROI_MASK_HEAD.FC_FUSION.ENABLED", False),
    )
    ours = build_model(tiny_cfg(*opts)).eval()
    stock = build_model(
        tiny_cfg(
            *opts,
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
            *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
        )
    ).eval()
    assert type(stock.roi_heads) is StandardROIHeads
    stock.load_state_dict(ours.state_dict())
    inputs = batch()
    with torch.no_grad():
        for a, b in zip(ours(inputs), stock(inputs)):
            a, b = a["instances"], b["instances"]
            torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=0)
            torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=0, atol=0)
            assert torch.equal(a.pred_masks, b.pred_masks)


@pytest.mark.parametrize("empty", [(0,), (0, 1)])
@pytest.mark.parametrize("cascade", [False, True])
def test_images_without_objects(cascade, empty):
    cfg = tiny_cfg(*(CASCADE if cascade else ()))
    train_and_infer(cfg, batch(empty=empty))


def test_cascade():
    model, _ = train_and_infer(tiny_cfg(*CASCADE), batch())
    heads = model.roi_heads
    assert isinstance(heads, PANetCascadeROIHeads) and len(heads.box_head) == 3
    assert isinstance(heads.box_pooler, AdaptiveROIPooler)
    assert [h.fc1.in_features for h in heads.box_head] == [48] * 3
    assert all(p.grad is not None for p in heads.parameters())


@pytest.mark.parametrize("afp", [False, True])
def test_keypoints(afp):
    cfg = tiny_cfg(
        *("MODEL.KEYPOINT_ON", True),
        *("MODEL.MASK_ON", False),
        *("MODEL.ROI_HEADS.NUM_CLASSES", 1),
        *("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 4),
        *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16, 24]),
        *("MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO", 2),
        *("MODEL.ROI_KEYPOINT_HEAD.AFP.ENABLED", afp),
        *("MODEL.ROI_KEYPOINT_HEAD.AFP.FUSION", "sum"),
    )
    inputs = batch(num_classes=1)
    for image in inputs:
        boxes = image["instances"].gt_boxes.tensor
        points = torch.full((len(boxes), 4, 3), 2.0)
        points[:, :, :2] = boxes[:, None, :2] + torch.tensor([[2, 3], [9, 5], [4, 20], [20, 20]])
        image["instances"].gt_keypoints = Keypoints(points)
        image["instances"].remove("gt_masks")
    model, outputs = train_and_infer(cfg, inputs)
    pooler = model.roi_heads.keypoint_pooler
    assert isinstance(pooler, AdaptiveROIPooler) == afp
    assert not hasattr(model.roi_heads, "mask_pooler")
    if afp:
        assert pooler.fusion == "sum" and pooler.output_shape.channels == 16
    assert outputs[0]["instances"].pred_keypoints.shape[1:] == (4, 3)


def test_branch_that_is_off_gets_no_pooler():
    model = build_model(tiny_cfg("MODEL.MASK_ON", False))
    assert not hasattr(model.roi_heads, "mask_pooler")


def test_built_without_a_config():
    """As a LazyConfig does: every part constructed directly."""
    built = build_model(tiny_cfg())
    parts = built.roi_heads
    heads = PANetROIHeads(
        num_classes=3,
        batch_size_per_image=16,
        positive_fraction=0.25,
        proposal_matcher=parts.proposal_matcher,
        box_in_features=["p2", "p3", "p4", "p5"],
        box_pooler=AdaptiveROIPooler(
            7,
            [1 / 4, 1 / 8, 1 / 16, 1 / 32],
            2,
            "ROIAlignV2",
            in_channels=32,
            adaptation="fc",
            adaptation_dim=48,
        ),
        box_head=parts.box_head,
        box_predictor=parts.box_predictor,
    )
    built.roi_heads = heads
    losses_of(built, batch())


def test_bad_value_is_reported_when_the_model_is_built():
    with pytest.raises(ConfigError, match="MODEL.ROI_MASK_HEAD.AFP.FUSION"):
        build_model(tiny_cfg("MODEL.ROI_MASK_HEAD.AFP.FUSION", "maximum"))


def test_stock_predictor(tmp_path):
    """DefaultPredictor, as another project's script uses it."""
    cfg = tiny_cfg("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    image = batch(1)[0]["image"].permute(1, 2, 0).byte().numpy()
    instances = DefaultPredictor(cfg)(image)["instances"]
    assert instances.pred_masks.shape[1:] == image.shape[:2]
    assert len(instances) > 0


def test_training_learns():
    """A few steps on one batch bring every loss down."""
    cfg = tiny_cfg("MODEL.ROI_MASK_HEAD.NORM", "")
    model, inputs = build_model(cfg), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    history = []
    for _ in range(30):
        losses = losses_of(model, inputs)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        history.append({k: v.item() for k, v in losses.items()})
    for name in ("loss_cls", "loss_mask", "loss_rpn_cls"):
        assert history[-1][name] < 0.8 * history[0][name], (name, history[0], history[-1])
