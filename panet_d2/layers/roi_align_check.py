"""Check of the Triton kernels against torchvision, before their first use on a device."""

from __future__ import annotations

import logging
import threading
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch

from .multilevel_roi_align import multilevel_roi_align_reference

# Types of the feature maps that the kernels read.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_SIZE = (64, 48)  # width and height of the images
# No sample lies exactly where samples stop counting, because rounding would decide there.
_BOXES = (
    (0, 5, 6, 41, 30),
    (1, 0.5, 1, 63, 47),
    (0, -20, -12, 30, 22),  # across the border
    (1, 43, 31, 89, 66),
    (0, -3.5, -3.25, 2, 1.5),  # samples up to one pixel outside take the border's value
    (1, 200, 200, 240, 230),  # outside
)
_INSIDE = ((0, 5.3, 6.7, 41.1, 30.9), (1, 0.6, 1.7, 62.9, 47.1))  # inside for all grids and scales


class Use(NamedTuple):
    """What a kernel is compiled for, in addition to the device and the type."""

    levels: int
    channels: int
    output_size: Tuple[int, int]
    sampling_ratio: int
    aligned: bool
    fuse: Optional[str]


logger = logging.getLogger("panet_d2")
_lock = threading.Lock()
_failures: Dict[Tuple[str, torch.dtype], Optional[str]] = {}
_checked: Set[Tuple[str, torch.dtype, Use, bool]] = set()
# Relative tolerance of float32. A gradient on a coarse map is a sum of hundreds of terms, which the
# kernels add in any order. Its rounding reaches 1e-6 of the sum.
_RTOL = 1e-5


def triton_failure(
    device: torch.device, dtype: torch.dtype, use: Optional[Use] = None, backward: bool = False
) -> Optional[str]:
    """
    Check the Triton kernels against torchvision.

    The first call for a device and type pools and back-propagates a small pyramid with every
    fusion. The results must match torchvision's in float64. The first call for a use does the same
    with the kernels of that use, which must be compiled anyway. Later calls return the same answer.
    A failure is logged once, as a warning, and is the answer for all uses.

    Args:
        device (torch.device): where the feature maps are.
        dtype (torch.dtype): of the feature maps, one of :data:`DTYPES`.
        use (Use or None): what the kernels will run for.
        backward (bool): whether the use needs gradients.

    Returns:
        str or None: what failed; None if the kernels are right.
    """
    key = str(device), dtype
    with _lock:
        known = key in _failures and (
            use is None or _failures[key] is not None or (*key, use, backward) in _checked
        )
        if not known:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                # Not stored: a later call checks.
                return "no check during the capture of a CUDA graph"
            failure = _failures.get(key, "")
            if failure == "":
                failure = _check(device, dtype, _small_uses, _BOXES, True)
            if failure is None and use is not None:
                failure = _check(device, dtype, lambda: [use], _INSIDE, backward)
                _checked.add((*key, use, backward))
            _failures[key] = failure
            if failure:
                gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
                logger.warning(
                    "RoIAlign on %s%s is torchvision's, which is correct but slower: the kernels "
                    "of %s failed their check for %s: %s. Set PANET_D2_ROI_ALIGN=reference to skip "
                    "this check.",
                    device,
                    gpu,
                    _triton_version(),
                    str(dtype).replace("torch.", ""),
                    failure,
                )
        return _failures[key]


def _small_uses() -> List[Use]:
    """Return a small use for every fusion of the kernels: few channels and samples compile fast."""
    from .roi_align_triton import TRITON_FUSIONS  # here, because the import fails without Triton

    # One sample per bin compiles in a third of the time.
    return [Use(2, 12, (3, 2), 1 if fuse else 2, True, fuse) for fuse in TRITON_FUSIONS]


def _check(
    device: torch.device,
    dtype: torch.dtype,
    uses: Callable[[], Sequence[Use]],
    boxes: Sequence[Tuple[float, ...]],
    backward: bool,
) -> Optional[str]:
    try:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
            return "Triton needs a GPU of compute capability 7.0 or later"
        # Independent of the modes that the caller has set.
        with torch.inference_mode(False), torch.enable_grad():
            with torch.autocast(device.type, enabled=False):
                found = (_difference(device, dtype, use, boxes, backward) for use in uses())
                return next(filter(None, found), None)
    except torch.cuda.OutOfMemoryError:
        raise  # not a fault of the kernels
    except Exception as e:  # Triton, its compiler, the driver and broken kernels: each its own type
        return f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0]}"


def _difference(
    device: torch.device,
    dtype: torch.dtype,
    use: Use,
    boxes: Sequence[Tuple[float, ...]],
    backward: bool,
) -> Optional[str]:
    """Return how the kernels' results differ from torchvision's beyond rounding, or None."""
    from .roi_align_triton import roi_align_levels_triton

    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")

    scales = [2.0 ** -(2 + i) for i in range(use.levels)]
    # Another level in each channel has the larger values, so that rounding never decides a maximum.
    channel = torch.arange(use.channels, device="cpu").view(-1, 1, 1)
    features = [
        (
            random(2, use.channels, *(max(1, int(side * scale)) for side in reversed(_SIZE)))
            + 0.5
            + 2 * ((channel + i) % use.levels)
        ).to(dtype)
        for i, scale in enumerate(scales)
    ]
    all_boxes = torch.tensor(boxes, dtype=torch.float32, device="cpu")
    args = (scales, use.output_size, use.sampling_ratio, use.aligned, use.fuse)
    for some in (all_boxes, all_boxes[:0]):
        shape = (len(some), use.channels, *use.output_size)
        upstream = random(*(shape if use.fuse else (use.levels, *shape))).to(dtype)
        ours = _run(
            roi_align_levels_triton,
            [f.to(device) for f in features],
            some.to(device),
            upstream if backward else None,
            args,
        )
        exact = [f.double() for f in features]
        theirs = _run(multilevel_roi_align_reference, exact, some.double(), upstream, args)
        for name, a, b in zip(("values", *["gradients"] * use.levels), ours, theirs):
            error = (a - b).abs()
            # float16 and bfloat16 are rounded once, at the end.
            if not (error <= max(torch.finfo(dtype).eps, _RTOL) * b.abs() + 1e-4).all():
                return (
                    f"{name} with fusion {use.fuse!r} differ from torchvision's by up to "
                    f"{error.max().item():.2g}"
                )
    return None


def _run(
    op: Callable[..., torch.Tensor],
    features: List[torch.Tensor],
    boxes: torch.Tensor,
    upstream: Optional[torch.Tensor],
    args: tuple,
) -> List[torch.Tensor]:
    """Return values and, with an upstream gradient, gradients, all in float64 on the CPU."""
    leaves = [f.detach().requires_grad_(upstream is not None) for f in features]
    outputs = [op(leaves, boxes, *args)]
    if upstream is not None:
        outputs += torch.autograd.grad(outputs[0], leaves, upstream.to(outputs[0]))
    return [t.detach().cpu().double() for t in outputs]


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "Triton"
    return f"Triton {triton.__version__}"
