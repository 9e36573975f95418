"""Trained models as files that run without this package: TorchScript and ONNX."""

from __future__ import annotations

import importlib.util
import os
import warnings
from contextlib import contextmanager, suppress
from typing import Any, Callable, Dict, Iterator, List, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.env import TORCH_VERSION
from torch import nn
from torch.onnx import symbolic_helper

from ..config import read_choice
from ..errors import ConfigError, ExportError
from .verify import Agreement, blank_images

__all__ = ["FORMATS", "check_exportable", "export_model"]

FORMATS = ("torchscript", "onnx")

# What exported models put out, in this order, where the model has it.
_OUTPUTS = ("pred_boxes", "pred_classes", "scores", "pred_masks", "pred_keypoints")

# The first whose RoIAlign can shift boxes by half a pixel, as ROIAlignV2 does.
_OPSET = 16

# An exported model that was loaded.
Run = Callable[[torch.Tensor], Sequence[torch.Tensor]]


def check_exportable(cfg: CfgNode, formats: Sequence[str] = FORMATS) -> None:
    """
    Refuse what is known not to work.

    Args:
        cfg (CfgNode): the config of the model.
        formats (sequence[str]): of :data:`FORMATS`.

    Raises:
        ConfigError: if the model cannot be exported; the message names the key.
        ExportError: if a package is missing.
    """
    # PanopticFPN puts segments together in Python, one after the other.
    read_choice(cfg, "MODEL.META_ARCHITECTURE", ("GeneralizedRCNN", "RetinaNet"))
    # Detectron2's deformable convs are no operator that a trace could hold.
    stages = cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE
    if any(stages):
        raise ConfigError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {list(stages)}; deformable convolutions cannot "
            "be exported, so it must be False for every stage."
        )
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        read_choice(cfg, "MODEL.ANCHOR_GENERATOR.NAME", ("DefaultAnchorGenerator",))
    else:
        # Rotated boxes have operators of their own, for which ONNX has none; and proposals that
        # were computed before would be further inputs.
        read_choice(cfg, "MODEL.PROPOSAL_GENERATOR.NAME", ("RPN",))
        branches = {"BOX": True, "MASK": cfg.MODEL.MASK_ON, "KEYPOINT": cfg.MODEL.KEYPOINT_ON}
        for branch in (b for b, on in branches.items() if on):
            types = ("ROIAlignV2", "ROIAlign", "ROIPool")
            read_choice(cfg, f"MODEL.ROI_{branch}_HEAD.POOLER_TYPE", types)
    if "onnx" not in formats:
        return
    if cfg.MODEL.KEYPOINT_ON:
        # Detectron2 looks for each keypoint's maximum in a loop that the exporter cannot translate.
        raise ConfigError(
            "MODEL.KEYPOINT_ON is True; keypoints cannot be exported to ONNX, only to TorchScript."
        )
    missing = [p for p in ("onnx", "onnxruntime") if importlib.util.find_spec(p) is None]
    if missing:
        raise ExportError(f"export to ONNX needs more packages: pip install {' '.join(missing)}")


def export_model(
    model: nn.Module, images: Sequence[torch.Tensor], path: str, format: str
) -> Agreement:
    """
    Write a model to a file, and check that what the file holds finds the same in some images as
    the model does. The file is there only if it does; an older one of that name is removed first.

    What is exported takes one image, a float32 tensor of shape (3, H, W) of any H and W, from 0 to
    255 in the config's ``INPUT.FORMAT``; normalization and padding are part of it. It returns, in
    this order and for any number N of detections, which may be 0:

    - ``pred_boxes``, (N, 4): x0, y0, x1, y1 in pixels of that image;
    - ``pred_classes``, (N,), int64, and ``scores``, (N,);
    - ``pred_masks``, (N, 1, S, S), the probability of the mask within its box, if the model
      predicts masks;
    - ``pred_keypoints``, (N, K, 3), if the model predicts keypoints.

    Args:
        model (nn.Module): a GeneralizedRCNN or RetinaNet on the CPU, see :func:`check_exportable`.
            Put into evaluation mode.
        images (sequence[Tensor]): of shape (3, H, W), preferably of several sizes. The model must
            find something in one of them. See :func:`sample_images`.
        path (str): the file to write.
        format (str): one of :data:`FORMATS`. ONNX is run in onnxruntime.

    Returns:
        Agreement: how far both agree on these images, and on a blank one in which the model finds
        nothing, if there is such a one.

    Raises:
        ValueError: for another ``format``.
        ExportError: if it cannot be exported, cannot be run, or finds something else.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}.")
    write, load = {
        "torchscript": (_write_torchscript, _load_torchscript),
        "onnx": (_write_onnx, _load_onnx),
    }[format]
    with suppress(FileNotFoundError):
        os.remove(path)
    model.eval()
    expected = [_detect(model, image) for image in images]
    example = next((i for i, found in enumerate(expected) if len(found["scores"])), None)
    if example is None:
        raise ExportError(
            f"the model finds nothing in any of the {len(images)} images, so its export could not "
            "be checked; take other images, or a lower score threshold"
        )
    images = [*images]
    # Of these one is enough, and there may be none: some models see something in every image.
    mean: Any = model.pixel_mean
    for image in blank_images(mean):
        nothing = _detect(model, image)
        if not len(nothing["scores"]):
            images.append(image)
            expected.append(nothing)
            break

    unfinished = path + ".part"
    try:
        with _as_export_error(f"the model cannot be exported to {format}"):
            write(_adapter(model, images[example]), list(expected[example]), unfinished)
        agreement = Agreement()
        with _as_export_error(f"what was exported to {format} does not run"):
            run = load(unfinished)
            for image, detections in zip(images, expected):
                agreement.add(detections, dict(zip(detections, run(image))))
        if agreement.complaint():
            raise ExportError(
                f"the model and its export to {format} differ: {agreement.complaint()}"
            )
        os.replace(unfinished, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(unfinished)
    return agreement


def _detections(model: nn.Module, inputs: List[dict]) -> Dict[str, Any]:
    """The model's detections in one image, by their names and in the order of _OUTPUTS."""
    if isinstance(model, GeneralizedRCNN):
        # Without pasting the masks into the image, which would make them as large as that.
        instances = model.inference(inputs, do_postprocess=False)[0]
    else:
        instances = model(inputs)[0]["instances"]
    return {name: instances.get(name) for name in _OUTPUTS if instances.has(name)}


@torch.no_grad()
def _detect(model: nn.Module, image: torch.Tensor) -> Dict[str, torch.Tensor]:
    """The same, as tensors."""
    detections = _detections(model, [{"image": image}])
    return {name: getattr(value, "tensor", value) for name, value in detections.items()}


def _adapter(model: nn.Module, image: torch.Tensor) -> TracingAdapter:
    """The same, as a module that takes the image's tensor and returns a tuple of tensors."""
    return TracingAdapter(
        model, [{"image": image}], lambda model, inputs: [*_detections(model, inputs).values()]
    ).eval()


def _write_torchscript(adapter: TracingAdapter, names: List[str], path: str) -> None:
    # The check that tracing has of its own is less than what follows.
    torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False).save(path)


def _load_torchscript(path: str) -> Run:
    return torch.no_grad()(torch.jit.load(path))


def _write_onnx(adapter: TracingAdapter, names: List[str], path: str) -> None:
    # The newer exporter, torch.export's, refuses Detectron2's models: what they compute depends on
    # which values are finite.
    exporter: Dict[str, Any] = {"dynamo": False} if TORCH_VERSION >= (2, 5) else {}
    with _group_norm_of_nothing():
        torch.onnx.export(
            adapter,
            adapter.flattened_inputs,
            path,
            input_names=["image"],
            output_names=names,
            dynamic_axes={
                "image": {1: "height", 2: "width"},
                **{name: {0: "detections"} for name in names},
            },
            opset_version=_OPSET,
            **exporter,
        )


def _load_onnx(path: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised as well
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: [torch.from_numpy(o) for o in session.run(None, {"image": image.numpy()})]


@contextmanager
def _group_norm_of_nothing() -> Iterator[None]:
    """
    Have GroupNorm exported to ONNX so that it takes no detections as well. The exporter leaves one
    side of the shape of its groups to be computed, which is not determined where M is 0.
    """

    @symbolic_helper.parse_args("v", "i", "v", "v", "f", "i")
    def group_norm(
        g: Any, x: Any, groups: int, weight: Any, bias: Any, eps: float, cudnn_enabled: int
    ) -> Any:
        def constant(values: list) -> Any:
            return g.op("Constant", value_t=torch.tensor(values))

        channels = weight.type().sizes()[0]
        shape = g.op("Shape", x)
        height_width = g.op("Slice", shape, constant([2]), constant([4]))
        split = g.op("Concat", constant([0, groups, channels // groups]), height_width, axis_i=0)
        split = g.op("Reshape", x, split)  # to which 0 stands for the size that x has there
        ones, zeros = constant([1.0] * groups), constant([0.0] * groups)
        x = g.op("InstanceNormalization", split, ones, zeros, epsilon_f=eps)
        x = g.op("Reshape", x, shape)
        weight, bias = (g.op("Unsqueeze", p, constant([1, 2])) for p in (weight, bias))
        return g.op("Add", g.op("Mul", x, weight), bias)

    torch.onnx.register_custom_op_symbolic("aten::group_norm", group_norm, _OPSET)
    try:
        yield
    finally:
        torch.onnx.unregister_custom_op_symbolic("aten::group_norm", _OPSET)


@contextmanager
def _as_export_error(what: str) -> Iterator[None]:
    """Whatever goes wrong, in one line."""
    try:
        with warnings.catch_warnings():
            # Tracing warns wherever a value decides about what is computed. Whether such a place
            # matters is what is checked afterwards.
            warnings.simplefilter("ignore")
            yield
    except Exception as e:  # torch's and onnxruntime's own, and many others
        lines = str(e).strip().splitlines()
        raise ExportError(f"{what}: {lines[0] if lines else type(e).__name__}") from e
