"""The kernels' check at their first use. Without a GPU, kernels run in Triton's interpreter."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from importlib import import_module

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from panet_d2 import info
from panet_d2.errors import ConfigError
from panet_d2.layers import multilevel_roi_align
from panet_d2.layers import roi_align_check as check

from ..common import batch, child_env, needs_cuda, tiny_cfg

pytest.importorskip("triton", "3.3")
kernels = import_module("panet_d2.layers.roi_align_triton")
module = import_module("panet_d2.layers.multilevel_roi_align")

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
pytestmark = [needs_cuda] if DEVICE.type == "cuda" else []


@pytest.fixture(autouse=True)
def first_use(monkeypatch):
    """Nothing is checked yet, and the kernels are for tensors of the CPU too."""
    monkeypatch.setattr(check, "_failures", {})
    monkeypatch.setattr(check, "_checked", set())
    monkeypatch.setattr(module, "_for_triton", lambda device: True)
    monkeypatch.delenv("PANET_D2_ROI_ALIGN", raising=False)


@pytest.fixture
def calls(monkeypatch):
    """The number of boxes of each call of the kernels."""
    seen = []
    real = kernels.roi_align_levels_triton

    def counted(features, boxes, *args):
        seen.append(len(boxes))
        return real(features, boxes, *args)

    monkeypatch.setattr(kernels, "roi_align_levels_triton", counted)
    return seen


# Of a type: every fusion with small kernels, and the kernels that will be run.
CHECKS = len(kernels.TRITON_FUSIONS) + 1


class Broken:
    """A kernel whose launch fails, or which is run and then spoils one of its arguments."""

    def __init__(self, kernel, spoil):
        self.kernel, self.spoil = kernel, spoil

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.kernel[grid](*args, **kwargs)
            self.spoil(args)

        return launch


def no_launch(args):
    raise RuntimeError("CUDA error: no kernel image is available\nfor execution on the device")


BROKEN = {
    "values": ("_forward_kernel", lambda args: args[5].mul_(1.01), "values with fusion None"),
    "gradients": (
        "_backward_kernel",
        lambda args: [gradient.mul_(0.99) for gradient in args[0]],
        "gradients with fusion None",
    ),
    "launch": ("_forward_kernel", no_launch, "RuntimeError: CUDA error: no kernel image"),
    "launch of the backward": ("_backward_kernel", no_launch, "RuntimeError: CUDA error"),
}


def spoil(monkeypatch, kind):
    name, how, message = BROKEN[kind]
    monkeypatch.setattr(kernels, name, Broken(getattr(kernels, name), how))
    return message


def pooled(dtype=torch.float32, fuse="max"):
    features = [torch.ones(1, 4, 8, 8, device=DEVICE, dtype=dtype, requires_grad=True)] * 2
    boxes = torch.tensor([[0.0, 1, 1, 9, 9]], device=DEVICE)
    return multilevel_roi_align(features, boxes, [1.0, 0.5], (2, 2), 2, True, fuse)


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_right_kernels_run(calls, caplog):
    """After one check for each type."""
    for types, dtype in enumerate(check.DTYPES, 1):
        pooled(dtype)
        assert calls.count(0) == types * CHECKS
        checked = len(calls)
        pooled(dtype)
        assert calls[checked:] == [1]
    assert not warnings(caplog)


@pytest.mark.parametrize("kind", list(BROKEN))
def test_broken_kernels_are_not_used(kind, calls, caplog, monkeypatch):
    dtype = torch.float32 if "launch" in kind else torch.float16
    message = spoil(monkeypatch, kind)
    first = pooled(dtype)
    calls.clear()
    assert torch.equal(pooled(dtype), first) and first.dtype == dtype
    assert not calls
    (warning,) = warnings(caplog)
    assert message in warning and str(DEVICE.type) in warning and "\n" not in warning
    assert f"Triton {import_module('triton').__version__}" in warning
    assert str(dtype).replace("torch.", "") in warning and "PANET_D2_ROI_ALIGN" in warning


def test_rounding_of_long_sums_is_no_fault(monkeypatch):
    """
    The gradient of a pixel of the coarsest map is a sum of up to 784 terms with a grid of 14 x 14.
    On a GPU these are added in any order, in float32.
    """
    real = kernels._backward_kernel
    largest = []

    def round_otherwise(args):
        largest.extend(float(gradient.max()) for gradient in args[0])
        for gradient in args[0]:
            gradient.mul_(1 + 2e-6)

    monkeypatch.setattr(kernels, "_backward_kernel", Broken(real, round_otherwise))
    use = check.Use(4, 8, (14, 14), 2, True, None)
    assert check.triton_failure(DEVICE, torch.float32, use, True) is None
    assert max(largest) > 60  # 2e-6 of this are more than the absolute tolerance


@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel"])
def test_kernels_that_are_broken_for_large_tiles_alone(kernel, caplog, monkeypatch):
    """Others are compiled for every number of channels."""
    real = getattr(kernels, kernel)

    class Wrong(Broken):
        def __getitem__(self, grid):
            def launch(*args, CHANNELS, **kwargs):
                if CHANNELS >= 64:
                    raise RuntimeError("out of resource: shared memory")
                real[grid](*args, CHANNELS=CHANNELS, **kwargs)

            return launch

    monkeypatch.setattr(kernels, kernel, Wrong(real, None))
    for channels, used in ((4, True), (64, False), (4, False)):
        features = [torch.ones(1, channels, 8, 8, device=DEVICE, requires_grad=True)] * 2
        boxes = torch.tensor([[0.0, 1, 1, 9, 9]], device=DEVICE)
        out = multilevel_roi_align(features, boxes, [1.0, 0.5], (2, 2), 2, True, "max")
        out.sum().backward()
        assert (check.triton_failure(DEVICE, torch.float32) is None) == used
    (warning,) = warnings(caplog)
    assert "shared memory" in warning


def test_inference_does_not_wait_for_the_backward(monkeypatch):
    seen = []
    real = kernels._backward_kernel

    class Counted(Broken):
        def __getitem__(self, grid):
            seen.append(grid)
            return real[grid]

    monkeypatch.setattr(kernels, "_backward_kernel", Counted(real, None))
    check.triton_failure(DEVICE, torch.float32)
    seen.clear()
    with torch.no_grad():
        pooled()
    assert not seen
    pooled()
    assert seen


@pytest.mark.parametrize("fusion", ["max", "sum", "mean"])
def test_every_fusion_is_checked(fusion, monkeypatch):
    number = kernels.TRITON_FUSIONS[fusion]
    real = kernels._forward_kernel

    class Wrong(Broken):
        def __getitem__(self, grid):
            def launch(*args, FUSE, **kwargs):
                real[grid](*args, FUSE=FUSE, **kwargs)
                if number == FUSE:
                    args[5].add_(0.01)

            return launch

    monkeypatch.setattr(kernels, "_forward_kernel", Wrong(real, None))
    assert f"values with fusion {fusion!r}" in check.triton_failure(DEVICE, torch.float32)


def losses(model, inputs):
    torch.manual_seed(0)
    model.zero_grad()
    with EventStorage():
        result = model.train()(inputs)
    sum(result.values()).backward()
    gradient = model.backbone.fpn_output2.weight.grad.clone()
    return {name: loss.item() for name, loss in result.items()}, gradient


TIMED = """
import time, torch, triton
from panet_d2.layers.roi_align_check import DTYPES, triton_failure
zero = torch.zeros(1, device="cuda")
for dtype in DTYPES:
    start = time.perf_counter()
    failure = triton_failure(zero.device, dtype)
    assert failure is None, failure
    assert time.perf_counter() - start < 10
"""


@needs_cuda
def test_takes_seconds(tmp_path):
    """Where nothing has been compiled before, and other tests run beside this one."""
    environment = child_env(TRITON_CACHE_DIR=str(tmp_path))
    subprocess.run([sys.executable, "-W", "ignore", "-c", TIMED], env=environment, check=True)


@pytest.mark.parametrize("kind", list(BROKEN))
def test_training_has_the_losses_of_the_reference(kind, caplog, monkeypatch):
    model, inputs = build_model(tiny_cfg("MODEL.DEVICE", str(DEVICE))), batch()
    monkeypatch.setenv("PANET_D2_ROI_ALIGN", "reference")
    expected, gradient = losses(model, inputs)
    monkeypatch.delenv("PANET_D2_ROI_ALIGN")
    spoil(monkeypatch, kind)
    for _ in range(2):
        found, ours = losses(model, inputs)
        if DEVICE.type == "cpu":
            assert found == expected and torch.equal(ours, gradient)
        else:  # which sums in no fixed order
            assert found == pytest.approx(expected, rel=1e-4)
    assert len(warnings(caplog)) == 1


def test_no_triton(caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "panet_d2.layers.roi_align_triton", None)
    monkeypatch.delattr("panet_d2.layers.roi_align_triton")
    pooled()
    (warning,) = warnings(caplog)
    assert "ModuleNotFoundError" in warning


def test_interruption_is_no_failure(monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(kernels, "_forward_kernel", Broken(kernels._forward_kernel, interrupt))
        with pytest.raises(KeyboardInterrupt):
            pooled()
    assert check.triton_failure(DEVICE, torch.float32) is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_the_caller_has_chosen_stays(context, caplog):
    features = [torch.ones(1, 4, 8, 8, device=DEVICE)]
    boxes = torch.tensor([[0.0, 1, 1, 9, 9]], device=DEVICE)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with context(), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            state = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            multilevel_roi_align(features, boxes, [1.0], (2, 2), 2, True)
            assert state == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            assert torch.is_autocast_enabled(DEVICE.type)
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(torch.get_rng_state(), before)
    assert check._failures == {(str(features[0].device), torch.float32): None}
    assert not warnings(caplog)


def test_threads_share_one_check(calls):
    threads = [threading.Thread(target=pooled) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls.count(0) == CHECKS


class Pool(torch.nn.Module):
    def forward(self, feature, boxes):
        return multilevel_roi_align([feature], boxes, [1.0], (2, 2), 2, True)


def test_nothing_is_checked_while_a_model_is_traced(calls):
    args = (torch.ones(1, 4, 8, 8, device=DEVICE), torch.ones(1, 5, device=DEVICE))
    args[1][:, 0] = 0
    torch.jit.trace(Pool(), args, check_trace=False)
    if hasattr(torch.compiler, "is_compiling"):
        torch._dynamo.reset()
        torch.compile(Pool(), backend="eager", fullgraph=True)(*args)
        torch.export.export(Pool(), args)
    assert not calls and not check._failures


def test_nothing_is_checked_during_the_capture_of_a_cuda_graph(calls, monkeypatch):
    device = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "CUDA graph" in check.triton_failure(device, torch.float32)
    assert not calls and not check._failures  # a later call checks


def test_old_gpus(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of 2016")
    assert check.triton_failure(torch.device("cuda:0"), torch.float32)
    (warning,) = warnings(caplog)
    assert "cuda:0 (GPU of 2016)" in warning and "7.0" in warning


@pytest.mark.parametrize("kind", ["launch", "values"])
def test_triton_lets_errors_through(kind, calls, caplog, monkeypatch):
    monkeypatch.setenv("PANET_D2_ROI_ALIGN", "triton")
    spoil(monkeypatch, kind)
    if kind == "launch":
        with pytest.raises(RuntimeError, match="no kernel image"):
            pooled()
    else:
        pooled()
    assert calls == [1] and not warnings(caplog)


@pytest.mark.parametrize("value", ["Triton", "yes", " "])
def test_other_values_are_rejected(value, monkeypatch):
    monkeypatch.setenv("PANET_D2_ROI_ALIGN", value)
    sentence = f"PANET_D2_ROI_ALIGN is {value!r}; it must be one of auto, triton, reference"
    with pytest.raises(ConfigError, match=sentence):
        pooled()
    with pytest.raises(ConfigError, match=sentence):  # before the first step
        build_model(tiny_cfg())


@pytest.mark.skipif(DEVICE.type == "cuda", reason="tensors of the CPU stand in for a GPU's")
def test_info_has_the_answer_for_each_type(caplog, monkeypatch):
    real = kernels._forward_kernel

    class NotInHalf(Broken):
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                if args[0][0].dtype == torch.float16:
                    raise RuntimeError("out of registers")
                real[grid](*args, **kwargs)

            return launch

    monkeypatch.setattr(kernels, "_forward_kernel", NotInHalf(real, None))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    on_cpu = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to", lambda t, where, *a: t if where == "cuda:0" else on_cpu(t, where, *a)
    )
    found = info.collect_info()["RoIAlign on cuda:0"]
    assert found == (
        "float32: triton, float16: reference (RuntimeError: out of registers), bfloat16: triton"
    )
    assert len(warnings(caplog)) == 1


def test_out_of_memory_is_no_fault_of_the_kernels():
    def uses():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        check._check(torch.device("cpu"), torch.float32, uses, (), True)
