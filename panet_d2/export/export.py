"""Export of trained models to TorchScript and ONNX files that run without this package."""

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

from ..checkpoint import atomic_open
from ..checkpoint.safe_load import first_line
from ..config import read_choice
from ..errors import ConfigError, ExportError
from ..layers.multilevel_roi_align import ONNX_OPSET
from ..modeling.anchor_generator import ANCHOR_GENERATORS
from .verify import Agreement, blank_images

FORMATS = ("torchscript", "onnx")

# Outputs of exported models in this order, if the model has them.
_OUTPUTS = ("pred_boxes", "pred_classes", "scores", "pred_masks", "pred_keypoints")

Run = Callable[[torch.Tensor], Sequence[torch.Tensor]]  # a loaded file


def check_exportable(cfg: CfgNode, formats: Sequence[str] = FORMATS) -> None:
    """
    Check that the model of a config can be exported.

    Args:
        cfg (CfgNode): the config.
        formats (sequence[str]): one or more of :data:`FORMATS`.

    Raises:
        ConfigError: if the model cannot be exported; the message names the key.
        ExportError: if a package is missing.
    """
    # An exported file is one forward pass with NMS.
    for key in ("AUG", "SOFT_NMS", "BOX_VOTING"):
        if cfg.TEST.get(key, {}).get("ENABLED"):
            raise ConfigError(
                f"TEST.{key}.ENABLED is True, which cannot be exported; set it to False."
            )
    # PanopticFPN combines segments in a Python loop.
    read_choice(cfg, "MODEL.META_ARCHITECTURE", ("GeneralizedRCNN", "RetinaNet"))
    # Detectron2's deformable convs are not operators that a trace can contain.
    stages = cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE
    if any(stages):
        raise ConfigError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {list(stages)}; it must be False for every "
            "stage, because deformable convs cannot be exported."
        )
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        read_choice(cfg, "MODEL.ANCHOR_GENERATOR.NAME", tuple(ANCHOR_GENERATORS))
    else:
        # ONNX has no operators for rotated boxes. Precomputed proposals would need a second input.
        read_choice(cfg, "MODEL.PROPOSAL_GENERATOR.NAME", ("RPN",))
        branches = {"BOX": True, "MASK": cfg.MODEL.MASK_ON, "KEYPOINT": cfg.MODEL.KEYPOINT_ON}
        for branch in (b for b, on in branches.items() if on):
            types = ("ROIAlignV2", "ROIAlign", "ROIPool")
            read_choice(cfg, f"MODEL.ROI_{branch}_HEAD.POOLER_TYPE", types)
    if "onnx" not in formats:
        return
    if cfg.MODEL.KEYPOINT_ON:
        # Detectron2 finds each keypoint's maximum in a loop that the exporter cannot translate.
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
    Write a model to a file, and check that the file finds the same objects in some images. An
    older file of this name is removed first. If the check fails, no file is left.

    The file takes one image, a float32 tensor of shape (C, H, W) for any H and W, from 0 to 255 in
    the config's ``INPUT.FORMAT``. The file normalizes and pads the image. For N detections (N may
    be 0), the file returns in this order:

    - ``pred_boxes``, (N, 4): x0, y0, x1, y1 in pixels of the input image;
    - ``pred_classes``, (N,), int64, and ``scores``, (N,);
    - ``pred_masks``, (N, 1, S, S), if the model has masks: probabilities within the box;
    - ``pred_keypoints``, (N, K, 3), if the model has keypoints.

    Args:
        model (nn.Module): a GeneralizedRCNN or RetinaNet on the CPU, see :func:`check_exportable`.
            The model is switched to evaluation mode.
        images (sequence[Tensor]): of shape (C, H, W), preferably of several sizes, see
            :func:`sample_images`. The model must find something in one of them.
        path (str): the file to write.
        format (str): one of :data:`FORMATS`. ONNX is run in onnxruntime.

    Returns:
        Agreement: for these images and, if possible, a blank image in which the model finds
        nothing.

    Raises:
        ValueError: for another ``format``.
        ExportError: if the model cannot be exported, or the file fails or finds other objects.
        OSError: if the file cannot be written.
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
    expected = [(image, _detect(model, image)) for image in images]
    useful = [pair for pair in expected if len(pair[1]["scores"])]
    if not useful:
        raise ExportError(
            f"the model finds nothing in any of the {len(images)} images, so the export cannot be "
            "checked; use other images or a lower score threshold"
        )
    example, outputs = useful[0]
    mean = model.get_buffer("pixel_mean")
    blank = [(image, _detect(model, image)) for image in blank_images(mean)]
    # One blank image is enough. Some models find something in every image.
    expected += [pair for pair in blank if not len(pair[1]["scores"])][:1]
    agreement = Agreement()
    with atomic_open(path, "wb") as f:  # f.name becomes path when the block ends
        with _as_export_error(f"the model cannot be exported to {format}"):
            adapter = TracingAdapter(model, example, lambda m, image: [*_detect(m, image).values()])
            write(adapter.eval(), list(outputs), f.name)
        with _as_export_error(f"the export to {format} does not run"):
            run = load(f.name)
            for image, detections in expected:
                agreement.add(detections, dict(zip(detections, run(image))))
        complaint = agreement.complaint()
        if complaint:
            raise ExportError(f"the model and its export to {format} differ: {complaint}")
    return agreement


@torch.no_grad()
def _detect(model: nn.Module, image: torch.Tensor) -> Dict[str, torch.Tensor]:
    """Return the model's detections in one image, by name, in the order of _OUTPUTS."""
    inputs = [{"image": image}]
    if isinstance(model, GeneralizedRCNN):
        # Without postprocessing, which pastes the masks into the image.
        instances = model.inference(inputs, do_postprocess=False)[0]
    else:
        instances = model(inputs)[0]["instances"]
    outputs = {name: instances.get(name) for name in _OUTPUTS if instances.has(name)}
    return {name: getattr(value, "tensor", value) for name, value in outputs.items()}


def _write_torchscript(adapter: TracingAdapter, names: List[str], path: str) -> None:
    # No check_trace, because export_model checks more.
    torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False).save(path)


def _load_torchscript(path: str) -> Run:
    return torch.no_grad()(torch.jit.load(path))


def _write_onnx(adapter: TracingAdapter, names: List[str], path: str) -> None:
    # The newer exporter of torch.export rejects Detectron2's models, because their computation
    # depends on which values are finite.
    exporter: Dict[str, Any] = {"dynamo": False} if TORCH_VERSION >= (2, 5) else {}
    axes: Dict[str, Dict[int, str]] = {name: {0: "detections"} for name in names}
    with _group_norm_of_nothing():
        torch.onnx.export(
            adapter,
            adapter.flattened_inputs,
            path,
            input_names=["image"],
            output_names=names,
            dynamic_axes={"image": {1: "height", 2: "width"}, **axes},
            opset_version=ONNX_OPSET,
            **exporter,
        )


def _load_onnx(path: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised as well
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: [torch.from_numpy(o) for o in session.run(None, {"image": image.numpy()})]


@contextmanager
def _group_norm_of_nothing() -> Iterator[None]:
    """Export GroupNorm to ONNX so that it accepts a batch of 0, unlike PyTorch's own export."""

    @symbolic_helper.parse_args("v", "i", "v", "v", "f", "i")
    def group_norm(
        g: Any, x: Any, groups: int, weight: Any, bias: Any, eps: float, cudnn_enabled: int
    ) -> Any:
        def constant(values: list) -> Any:
            return g.op("Constant", value_t=torch.tensor(values))

        channels = weight.type().sizes()[0]
        shape = g.op("Shape", x)
        # PyTorch's -1 for a size to infer is not possible for a batch of 0. A size of 0 means the
        # size of x.
        height_width = g.op("Slice", shape, constant([2]), constant([4]))
        split = g.op("Concat", constant([0, groups, channels // groups]), height_width, axis_i=0)
        split = g.op("Reshape", x, split)
        ones, zeros = constant([1.0] * groups), constant([0.0] * groups)
        x = g.op("InstanceNormalization", split, ones, zeros, epsilon_f=eps)
        x = g.op("Reshape", x, shape)
        weight, bias = (g.op("Unsqueeze", p, constant([1, 2])) for p in (weight, bias))
        return g.op("Add", g.op("Mul", x, weight), bias)

    torch.onnx.register_custom_op_symbolic("aten::group_norm", group_norm, ONNX_OPSET)
    try:
        yield
    finally:
        torch.onnx.unregister_custom_op_symbolic("aten::group_norm", ONNX_OPSET)


@contextmanager
def _as_export_error(what: str) -> Iterator[None]:
    """Turn any error into an ExportError of one line."""
    try:
        with warnings.catch_warnings():
            # Tracing warns wherever a value decides what is computed. export_model checks
            # the results.
            warnings.simplefilter("ignore")
            yield
    except Exception as e:  # torch and onnxruntime raise their own
        raise ExportError(f"{what}: {first_line(e)}") from e
