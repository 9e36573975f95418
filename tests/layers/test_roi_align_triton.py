"""
Against torchvision, which is the definition. Without a GPU the kernels run in Triton's
interpreter, and are compiled for one all the same.
"""

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from panet_d2.layers import multilevel_roi_align
from panet_d2.layers.multilevel_roi_align import multilevel_roi_align_reference

from ..common import child_env, needs_cuda

pytest.importorskip("triton", "3.3")
kernels = import_module("panet_d2.layers.roi_align_triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [needs_cuda] if DEVICE == "cuda" else []
SCALES = [1 / 4, 1 / 8, 1 / 16]
BOXES = [
    [0, 10, 12, 60, 44],
    [1, 0, 0, 128, 96],
    [0, -20, -20, 30, 30],  # partly outside
    [1, 300, 300, 340, 330],  # outside
    [0, 50, 50, 50, 50],  # no area
    [1, 40, 40, 20, 20],  # turned inside out
    [0, 126, 94, 128, 96],
    [1, -4, -4, 0, 0],  # samples up to a pixel outside take the border's value
]


def pyramid(channels=5, dtype=torch.float32, scales=SCALES):
    return [
        torch.randn(2, channels, int(96 * s), int(128 * s), device=DEVICE)
        .to(dtype)
        .requires_grad_()
        for s in scales
    ]


def boxes(rows=BOXES):
    return torch.tensor(rows, dtype=torch.float32, device=DEVICE)


def both(features, rois, *args):
    """Values and gradients by the kernels, and by torchvision in float64."""
    ours = kernels.roi_align_levels_triton(features, rois, *args)
    exact = [f.detach().double().requires_grad_() for f in features]
    theirs = multilevel_roi_align_reference(exact, rois.double(), *args)
    upstream = torch.randn(theirs.shape, device=ours.device).to(ours.dtype)
    return (
        ours,
        theirs,
        torch.autograd.grad(ours, features, upstream),
        torch.autograd.grad(theirs, exact, upstream.double()),
    )


@pytest.mark.parametrize("fuse", [None, "max", "sum", "mean"])
@pytest.mark.parametrize("aligned", [True, False])
def test_values_and_gradients(fuse, aligned):
    ours, theirs, gradients, expected = both(pyramid(), boxes(), SCALES, (7, 5), 2, aligned, fuse)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("ratio", [1, 3, 4])
@pytest.mark.parametrize("channels, output_size", [(1, (1, 1)), (16, (2, 3)), (300, (1, 2))])
def test_sizes(ratio, channels, output_size):
    ours, theirs, gradients, expected = both(
        pyramid(channels), boxes(BOXES[:3]), SCALES, output_size, ratio, True, "max"
    )
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_numbers_of_levels(levels):
    scales = [0.5 ** (i + 1) for i in range(levels)]
    ours, theirs, gradients, expected = both(
        pyramid(3, scales=scales), boxes(BOXES[:3]), scales, (2, 2), 2, True, "max"
    )
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fuse", [None, "max"])
def test_low_precision_is_rounded_once(dtype, fuse):
    features = pyramid(4, dtype)
    ours, theirs, gradients, expected = both(features, boxes(), SCALES, (3, 3), 2, True, fuse)
    assert ours.dtype == dtype and all(g.dtype == dtype for g in gradients)
    # Half a unit in the last place of the result; the interpreter cuts bfloat16 off instead.
    units = 1.0 if DEVICE == "cpu" and dtype == torch.bfloat16 else 0.5
    for a, b in zip((ours, *gradients), (theirs, *expected)):
        error = (a.double() - b).abs()
        # and float32's error below that
        assert (error <= units * torch.finfo(dtype).eps * b.abs() + 1e-4).all(), error.max()


def test_equal_levels_share_the_gradient():
    """As a chain of torch.maximum does it, of which each hands on halves."""
    features = [torch.ones(1, 1, 8, 8, device=DEVICE, requires_grad=True) for _ in range(3)]
    rois, args = boxes([[0, 1, 1, 6, 6]]), ([1.0, 1.0, 1.0], (2, 2), 1, True, "max")
    ours = kernels.roi_align_levels_triton(features, rois, *args)
    theirs = multilevel_roi_align_reference(features, rois, *args)
    for a, b in zip(*(torch.autograd.grad(y.sum(), features) for y in (ours, theirs))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_no_harm(value):
    features, rois = pyramid(3), boxes([[0, value, 3, 20, 30], [0, 4, 4, 20, 20]])
    args = (SCALES, (3, 3), 2, True, None)
    result = kernels.roi_align_levels_triton(features, rois, *args)
    expected = multilevel_roi_align_reference(features, rois[1:], *args)
    torch.testing.assert_close(result[:, 1:], expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        features[1].fill_(float("nan"))
    fused = kernels.roi_align_levels_triton(features, rois[1:], *args[:-1], "max")
    assert fused.isnan().all()  # as torch.maximum, and not hidden


def test_no_boxes():
    features = pyramid()
    for fuse, shape in [(None, (3, 0, 5, 7, 7)), ("max", (0, 5, 7, 7))]:
        result = kernels.roi_align_levels_triton(
            features, boxes([]).reshape(0, 5), SCALES, (7, 7), 2, True, fuse
        )
        assert result.shape == shape
        assert all(not g.any() for g in torch.autograd.grad(result.sum(), features))


def test_channels_are_last_in_memory():
    args = (boxes(BOXES[:2]), SCALES, (3, 5), 2, True)
    features = [f.detach().to(memory_format=torch.channels_last) for f in pyramid()]
    levels = kernels.roi_align_levels_triton(features, *args)
    assert levels.permute(1, 3, 4, 0, 2).is_contiguous()  # (M, h, w, L, C)
    fused = kernels.roi_align_levels_triton(features, *args, "max")
    assert fused.is_contiguous(memory_format=torch.channels_last)
    plain = [f.contiguous() for f in features]
    assert torch.equal(fused, kernels.roi_align_levels_triton(plain, *args, "max"))


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from panet_d2.layers import roi_align_triton as m

def ptx(kernel, dtype, fuse):
    levels, maps = 4, "*fp32" if "backward" in kernel.__name__ else dtype
    types = dict(features=(maps,) * levels, gradients=(maps,) * levels, heights=("fp32",) * levels,
                 widths=("fp32",) * levels, scales=("fp32",) * levels, boxes="*fp32", out=dtype,
                 upstream=dtype, winners="*u8", channel_step="i32", channels="i32", bins_h="i32",
                 bins_w="i32")
    constants = dict(LEVELS=levels, RATIO=2, ALIGNED=True, FUSE=fuse, KEEP_WINNERS=True, BINS=4,
                     CHANNELS=256)
    names = kernel.arg_names
    aligned = [["tt.divisibility", 16]]  # as Triton sees tensors, and multiples of 16
    attributes = {}
    for i, name in enumerate(names):
        if name in ("features", "gradients"):
            attributes.update({(i, level): aligned for level in range(levels)})
        elif name in ("boxes", "out", "upstream", "winners", "channels"):
            attributes[i,] = aligned
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(k),): v for k, v in constants.items() if k in names},
        attrs=attributes,
    )
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": 4}).asm["ptx"]

for case in sys.argv[1:]:
    name, dtype, fuse = case.split()
    assert f".entry {name}" in ptx(getattr(m, name), dtype, int(fuse)), case
    print(case)
"""
COMPILED = [
    "_forward_kernel *fp16 0",
    "_forward_kernel *bf16 1",
    "_forward_kernel *fp32 2",
    "_backward_kernel *fp16 0",
    "_backward_kernel *fp32 1",
]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_compiles():
    """For sm_90, which takes no GPU; the interpreter lets pass what the compiler does not."""
    environment = child_env()
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, *COMPILED],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == COMPILED


@needs_cuda
def test_other_sizes_of_images_are_not_compiled_again(tmp_path, monkeypatch):
    """Each of Triton's compilations writes into its cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = []
    for height, width in [(200, 304), (208, 336), (16, 1), (7, 13)]:
        maps = [torch.randn(1, 24, height, width, device=DEVICE, requires_grad=True)] * 2
        args = (boxes([[0, 1, 1, 9, 9]]), [0.5, 0.25], (3, 3), 2, True, "max")
        kernels.roi_align_levels_triton(maps, *args).sum().backward()
        compiled.append(sorted(os.listdir(tmp_path)))
    assert compiled[0] and compiled == [compiled[0]] * 4


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (16, 16)])
def test_sizes_of_maps(size):
    features = [torch.randn(1, 3, *size, device=DEVICE) for _ in range(2)]
    args = (boxes([[0, 1, 0, 9, 5]]), [1.0, 0.5], (2, 2), 2, True, "max")
    result = kernels.roi_align_levels_triton(features, *args)
    torch.testing.assert_close(result, multilevel_roi_align_reference(features, *args))


def test_what_is_not_covered():
    features = pyramid()
    assert kernels.covers(features, 2)
    assert not kernels.covers(features, 0)
    assert not kernels.covers(features, 5)
    assert not kernels.covers([f.double() for f in features], 2)
    assert not kernels.covers([features[0].half(), *features[1:]], 2)
    assert not kernels.covers(features * 3, 2)


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device():
    maps = [f.detach().to("cuda:1").requires_grad_() for f in pyramid()]
    ours, theirs, our_gradients, exact = both(maps, boxes().to("cuda:1"), SCALES, (2, 2), 2, True)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(our_gradients, exact):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fuse", [None, "max", "sum", "mean", "product"])
def test_full_size(fuse, dtype):
    """Through the public function, on maps of an 800 x 1333 image."""
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    features = [
        torch.randn(2, 256, round(800 * s), round(1344 * s), device=DEVICE).to(dtype)
        for s in scales
    ]
    features = [f.to(memory_format=torch.channels_last).requires_grad_() for f in features]
    corner = torch.rand(1000, 2, device=DEVICE) * torch.tensor([1333, 800], device=DEVICE) - 50
    size = 2 ** (torch.rand(1000, 2, device=DEVICE) * 10)
    image = torch.randint(0, 2, (1000, 1), device=DEVICE).float()
    rois = torch.cat([image, corner, corner + size], dim=1)
    args = (scales, (7, 7), 2, True, fuse)
    ours = multilevel_roi_align(features, rois, *args)
    exact = [f.detach().double().requires_grad_() for f in features]
    theirs = multilevel_roi_align_reference(exact, rois.double(), *args)
    upstream = torch.randn_like(theirs).to(dtype)
    eps = torch.finfo(dtype).eps
    # In float32 a sample's place is known to a part in 10^7 of 1333 / 4 pixels, 3e-5.
    # A product rounds after each level's grid and after each factor.
    rtol = max(1e-5, (4 if fuse == "product" else 2) * eps)
    torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=5e-4)
    for a, b in zip(
        torch.autograd.grad(ours, features, upstream),
        torch.autograd.grad(theirs, exact, upstream.double()),
    ):
        # Where two levels are all but equal, rounding decides which of them wins.
        error = (a.double() - b).norm() / b.norm()
        assert error < max(1e-3, 4 * eps), error


@needs_cuda
def test_is_chosen_on_cuda(monkeypatch):
    args = (pyramid(), boxes(), SCALES, (7, 7), 2, True, "max")
    multilevel_roi_align(*args)  # checks the kernels, which calls them too
    calls = []
    chosen = kernels.roi_align_levels_triton
    count = lambda *args: calls.append(args) or chosen(*args)  # noqa: E731
    monkeypatch.setattr(kernels, "roi_align_levels_triton", count)
    ours = multilevel_roi_align(*args)
    assert len(calls) == 1
    monkeypatch.setenv("PANET_D2_ROI_ALIGN", "reference")
    torch.testing.assert_close(multilevel_roi_align(*args), ours, rtol=1e-4, atol=1e-4)
    monkeypatch.delenv("PANET_D2_ROI_ALIGN")
    torch.use_deterministic_algorithms(True)
    try:
        multilevel_roi_align(*args)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(calls) == 1
