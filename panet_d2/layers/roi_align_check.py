"""Check of the Triton kernels against torchvision, before their first use on a device."""

from __future__ import annotations

import logging
import threading
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import torch

from .multilevel_roi_align import multilevel_roi_align_reference

# Types of the feature maps that the kernels read.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_SCALES = (1 / 4, 1 / 8)
_SIZE = (64, 48)  # width and height of the images
_CHANNELS = 12  # more of them take longer to compile
# No sample lies at the distance from the border where it stops counting: rounding would decide.
_BOXES = (
    (0, 5, 6, 41, 30),
    (1, 0.5, 1, 63, 47),
    (0, -20, -12, 30, 22),  # across the border
    (1, 43, 31, 89, 66),
    (0, -3.5, -3.25, 2, 1.5),  # up to a pixel outside, samples take the border's value
    (1, 200, 200, 240, 230),  # outside
)

logger = logging.getLogger("panet_d2")
_lock = threading.Lock()
_failures: Dict[Tuple[str, torch.dtype], Optional[str]] = {}


def triton_failure(device: torch.device, dtype: torch.dtype) -> Optional[str]:
    """
    Say whether the Triton kernels are right. The first call for a device and type pools and
    back-propagates a small pyramid with every fusion, and compares with torchvision in float64.
    Later calls return the same answer. A failure is logged once, as a warning.

    Args:
        device (torch.device): where the feature maps are.
        dtype (torch.dtype): of the feature maps, one of :data:`DTYPES`.

    Returns:
        str or None: what failed; None if the kernels are right.
    """
    key = str(device), dtype
    with _lock:
        if key not in _failures:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return "no check during the capture of a CUDA graph"  # nor an answer for later
            _failures[key] = _check(device, dtype)
            if _failures[key]:
                gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
                logger.warning(
                    "RoIAlign on %s%s is torchvision's, which is right but slower: the kernels of "
                    "%s failed their check for %s: %s. Set PANET_D2_ROI_ALIGN=reference to leave "
                    "out this check.",
                    device,
                    gpu,
                    _triton_version(),
                    str(dtype).replace("torch.", ""),
                    _failures[key],
                )
        return _failures[key]


def _check(device: torch.device, dtype: torch.dtype) -> Optional[str]:
    try:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
            return "Triton needs a GPU of compute capability 7.0 or later"
        # Whatever the caller has chosen, and without the random numbers that it will draw.
        with torch.inference_mode(False), torch.enable_grad():
            with torch.autocast(device.type, enabled=False):
                return next(_differences(device, dtype), None)
    except Exception as e:  # Triton, its compiler, the driver and a broken kernel raise their own
        return f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0]}"


def _differences(device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """Yield what the kernels give differently from torchvision, beyond rounding."""
    # Here, because its import fails without Triton.
    from . import roi_align_triton as kernels

    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")

    # Levels in turn have the larger values, so that rounding never decides which has the maximum.
    channel = torch.arange(_CHANNELS, device="cpu").view(-1, 1, 1)
    features = [
        random(2, _CHANNELS, int(_SIZE[1] * s), int(_SIZE[0] * s)) + 0.5 + 2 * ((channel + i) % 2)
        for i, s in enumerate(_SCALES)
    ]
    features = [f.to(dtype) for f in features]
    all_boxes = torch.tensor(_BOXES, dtype=torch.float32, device="cpu")
    for fusion in kernels.TRITON_FUSIONS:  # the others are computed from None's
        # One sample a bin where that is enough: it compiles in a third of the time.
        args = (list(_SCALES), (3, 2), 1 if fusion else 2, True, fusion)
        for boxes in (all_boxes, all_boxes[:0]):
            shape = (len(boxes), _CHANNELS, 3, 2)
            upstream = random(*(shape if fusion else (len(_SCALES), *shape))).to(dtype)
            ours = _run(
                kernels.roi_align_levels_triton,
                [f.to(device) for f in features],
                boxes.to(device),
                upstream,
                args,
            )
            exact = [f.double() for f in features]
            theirs = _run(multilevel_roi_align_reference, exact, boxes.double(), upstream, args)
            for name, a, b in zip(("values", *["gradients"] * len(features)), ours, theirs):
                error = (a - b).abs()
                # Half precision is rounded once, at the end; float32 is summed in another order.
                if not (error <= torch.finfo(dtype).eps * b.abs() + 1e-4).all():
                    yield (
                        f"{name} with fusion {fusion!r} differ from torchvision's by up to "
                        f"{error.max().item():.2g}"
                    )


def _run(
    op: Callable[..., torch.Tensor],
    features: List[torch.Tensor],
    boxes: torch.Tensor,
    upstream: torch.Tensor,
    args: tuple,
) -> List[torch.Tensor]:
    """Return values and gradients, in float64 on the CPU."""
    leaves = [f.detach().requires_grad_() for f in features]
    out = op(leaves, boxes, *args)
    gradients = torch.autograd.grad(out, leaves, upstream.to(out))
    return [t.detach().cpu().double() for t in (out, *gradients)]


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "Triton"
    return f"Triton {triton.__version__}"
