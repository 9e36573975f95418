"""mmdetection's models and ours with the same weights; needs mmdetection beside it."""

import importlib.util
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torchvision.ops import RoIAlign, nms

from panet_d2 import PAFPN
from panet_d2.checkpoint.convert import convert
from panet_d2.checkpoint.mmdet import mmdet_rules
from panet_d2.checkpoint.rules import apply_rules
from panet_d2.engine import load_strict, setup_config
from panet_d2.errors import CheckpointError

from ..modeling.golden import CONFIGS
from ..modeling.test_golden import Stages

CHANNELS = {"res2": 8, "res3": 16, "res4": 24, "res5": 32}


class NoOps(types.ModuleType):
    """Stands for mmcv's compiled ops: mmdetection imports all of them, and these models use NMS."""

    @staticmethod
    def nms(boxes, scores, iou_threshold, offset):
        return nms(boxes, scores, iou_threshold)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args: None


def their_pafpn():
    for name in ("mmengine", "mmcv", "mmdet"):
        pytest.importorskip(name, reason="mmdetection is not installed")
    if "mmcv._ext" not in sys.modules and importlib.util.find_spec("mmcv._ext") is None:
        sys.modules["mmcv._ext"] = NoOps("mmcv._ext")
    return importlib.import_module("mmdet.models.necks").PAFPN


@pytest.mark.parametrize("norm", ["", "GN"])
@pytest.mark.parametrize("size", [(64, 96), (32, 32), (96, 160), (224, 64)])
def test_neck(size, norm):
    theirs = their_pafpn()(
        in_channels=list(CHANNELS.values()),
        out_channels=32,
        num_outs=5,
        norm_cfg=dict(type="GN", num_groups=32) if norm else None,
    )
    for parameter in theirs.parameters():
        parameter.data = torch.randn_like(parameter) / parameter[0].numel() ** 0.5
    assert not norm or theirs.pafpn_convs[0].gn.num_groups == 32
    features = {
        name: torch.randn(2, channels, size[0] >> level, size[1] >> level)
        for level, (name, channels) in enumerate(CHANNELS.items(), start=2)
    }
    ours = PAFPN(
        Stages(features),
        list(features),
        32,
        norm=norm,
        top_block=LastLevelMaxPool(),
        activation="",
        bottom_up_input="sum",
    )
    source = {f"neck.{k}": v for k, v in theirs.state_dict().items()}
    state = apply_rules(source, mmdet_rules()).state
    ours.load_state_dict({k[len("backbone.") :]: v for k, v in state.items()})
    with torch.no_grad():
        expected, result = theirs(list(features.values())), ours(features)
    torch.testing.assert_close(list(result.values()), list(expected), rtol=1e-5, atol=1e-5)


def names_and_shapes(mask=False):
    """A state dict of mmdetection's Faster or Mask R-CNN with a ResNet-50 and PAFPN."""
    shapes = {}

    def conv(name, *shape, bias=False):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    def norm(name, channels):
        for kind in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{kind}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    conv("backbone.conv1", 64, 3, 7, 7)
    norm("backbone.bn1", 64)
    before = 64
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        width = 32 << stage
        for block in range(blocks):
            name = f"backbone.layer{stage}.{block}"
            inside = [(width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            for i, shape in enumerate(inside, start=1):
                conv(f"{name}.conv{i}", *shape)
                norm(f"{name}.bn{i}", shape[0])
            if block == 0:
                conv(f"{name}.downsample.0", 4 * width, before, 1, 1)
                norm(f"{name}.downsample.1", 4 * width)
            before = 4 * width
    for i, channels in enumerate((256, 512, 1024, 2048)):
        conv(f"neck.lateral_convs.{i}.conv", 256, channels, 1, 1, bias=True)
        conv(f"neck.fpn_convs.{i}.conv", 256, 256, 3, 3, bias=True)
    for i in range(3):
        conv(f"neck.downsample_convs.{i}.conv", 256, 256, 3, 3, bias=True)
        conv(f"neck.pafpn_convs.{i}.conv", 256, 256, 3, 3, bias=True)
    conv("rpn_head.rpn_conv", 256, 256, 3, 3, bias=True)
    conv("rpn_head.rpn_cls", 3, 256, 1, 1, bias=True)
    conv("rpn_head.rpn_reg", 12, 256, 1, 1, bias=True)
    conv("roi_head.bbox_head.shared_fcs.0", 1024, 12544, bias=True)
    conv("roi_head.bbox_head.shared_fcs.1", 1024, 1024, bias=True)
    conv("roi_head.bbox_head.fc_cls", 81, 1024, bias=True)
    conv("roi_head.bbox_head.fc_reg", 320, 1024, bias=True)
    if mask:
        for i in range(4):
            conv(f"roi_head.mask_head.convs.{i}.conv", 256, 256, 3, 3, bias=True)
        conv("roi_head.mask_head.upsample", 256, 256, 2, 2, bias=True)
        conv("roi_head.mask_head.conv_logits", 80, 256, 1, 1, bias=True)
    return {name: torch.rand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("mask", [False, True])
def test_whole_model(mask, tmp_path):
    source = names_and_shapes(mask)
    torch.save({"meta": {"epoch": 12}, "state_dict": source}, tmp_path / "in.pth")
    cfg = setup_config(
        str(CONFIGS / "COCO-Detection/mmdet_faster_rcnn_R_50_PAFPN_1x.yaml"),
        ["MODEL.DEVICE", "cpu", "MODEL.MASK_ON", str(mask)],
        needed=(),
    )
    result = convert("mmdet", str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), cfg)
    assert {row.source for row in result.rows} == set(source)
    left = [row.source for row in result.rows if row.action == "left out"]
    assert all(name.endswith("num_batches_tracked") for name in left)
    assert {row.action for row in result.rows} == {"carried", "left out"}
    model = build_model(cfg)
    load_strict(model, str(tmp_path / "out.pth"))
    norm = model.backbone.bottom_up.res4[2].conv1.norm
    assert torch.equal(norm.running_var, source["backbone.layer3.2.bn1.running_var"])


def test_plain_fpn_is_refused(tmp_path):
    source = {k: v for k, v in names_and_shapes().items() if "pafpn" not in k}
    torch.save({"state_dict": source}, tmp_path / "in.pth")
    cfg = setup_config(
        str(CONFIGS / "COCO-Detection/mmdet_faster_rcnn_R_50_PAFPN_1x.yaml"),
        ["MODEL.DEVICE", "cpu"],
        needed=(),
    )
    with pytest.raises(CheckpointError, match="in.pth: .*not in the ch.*: .*pafpn_output3"):
        convert("mmdet", str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), cfg)


def their_mask_rcnn(neck, detect):
    """With random weights, of which ``detect(model)`` finds objects."""
    their_pafpn()
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine import Config

    register_all_modules()
    folder = Path(importlib.import_module("mmdet").__file__).parent
    cfg = Config.fromfile(folder / ".mim/configs/_base_/models/mask-rcnn_r50_fpn.py").model
    cfg.backbone.init_cfg, cfg.neck.type = None, neck
    model = MODELS.build(cfg).eval()
    heads = model.roi_head
    for branch in ("bbox", "mask"):  # mmcv's own needs its compiled ops
        layers = heads.get_submodule(f"{branch}_roi_extractor").roi_layers
        for i, layer in enumerate(layers):
            args = (layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned)
            layers[i] = RoIAlign(*args)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter)
        elif name.endswith("bn3.weight"):
            torch.nn.init.constant_(parameter, 0.2)
    # Outputs of a trained model's size. With much larger ones sigmoid and softmax round to 1, and
    # the two projects, which rank scores and logits, order these boxes in another way.
    for layer, std in (
        (model.rpn_head.rpn_cls, 2),
        (model.rpn_head.rpn_reg, 0.3),
        (heads.bbox_head.fc_cls, 3),
        (heads.bbox_head.fc_reg, 1),
        (heads.mask_head.conv_logits, 2),
    ):
        outputs = []
        with layer.register_forward_hook(lambda *args, to=outputs: to.append(args[-1].flatten())):
            detect(model)
        layer.weight.data *= std / torch.cat(outputs).std()
    return model


@pytest.mark.parametrize("neck", ["FPN", "PAFPN"])
def test_detections(neck, tmp_path):
    size, original_size = (203, 277), (300, 409)
    image = torch.rand(1, 3, 9, 13) * 255
    image = F.interpolate(image, size=size, mode="bilinear")[0].to(torch.uint8)

    @torch.no_grad()
    def detect(model):
        from mmdet.structures import DetDataSample

        sample = DetDataSample(
            metainfo={
                "img_shape": size,
                "ori_shape": original_size,
                "scale_factor": (size[1] / original_size[1], size[0] / original_size[0]),
            }
        )
        return model.test_step({"inputs": [image], "data_samples": [sample]})[0].pred_instances

    theirs = their_mask_rcnn(neck, detect)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "in.pth")
    cfg = setup_config(
        str(CONFIGS / "COCO-Detection/mmdet_faster_rcnn_R_50_PAFPN_1x.yaml"),
        ["MODEL.DEVICE", "cpu", "MODEL.MASK_ON", "True"]
        + ["MODEL.BACKBONE.NAME", f"build_resnet_{neck.lower()}_backbone"]
        + ["MODEL.PAFPN.MEMORY_FORMAT", "contiguous"],  # so that convs round alike
        needed=(),
    )
    convert("mmdet", str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), cfg)
    model = build_model(cfg).eval()
    load_strict(model, str(tmp_path / "out.pth"))
    # mmdetection reads BGR, the config RGB.
    height, width = original_size
    with torch.no_grad():
        ours = model([{"image": image.flip(0), "height": height, "width": width}])[0]["instances"]
    expected = detect(theirs)
    assert len(ours) == len(expected) > 50
    assert ours.pred_classes.tolist() == expected.labels.tolist()
    close = partial(torch.testing.assert_close, rtol=0)
    close(ours.scores, expected.scores, atol=1e-4)
    close(ours.pred_boxes.tensor, expected.bboxes, atol=0.01)
    assert (ours.pred_masks != expected.masks).float().mean() < 1e-4 < expected.masks.float().mean()


def test_each_conv_has_its_place():
    names = {
        "neck.fpn_convs.{}.conv": "backbone.fpn_output{}",
        "neck.downsample_convs.{}.conv": "backbone.pafpn_downsample{}",
        "neck.pafpn_convs.{}.conv": "backbone.pafpn_output{}",
        "roi_head.mask_head.convs.{}.conv": "roi_heads.mask_head.mask_fcn{}",
    }
    first = dict(zip(names, (2, 3, 3, 1)))  # the number of theirs with index 0
    pairs = {
        theirs.format(i) + ".weight": ours.format(first[theirs] + i) + ".weight"
        for theirs, ours in names.items()
        for i in range(3)
    }
    source = {name: torch.tensor([float(i)]) for i, name in enumerate(pairs)}
    state = apply_rules(source, mmdet_rules()).state
    assert {ours: state[ours] for ours in pairs.values()} == {
        ours: source[theirs] for theirs, ours in pairs.items()
    }
