import time

import pytest

from experiments.benchmark.timing import PartTimes, interleaved, peak_memory

from ...common import needs_cuda


def test_candidates_take_turns():
    calls = []
    times = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b") or time.sleep(0.02)},
        "cpu",
        repeats=3,
        warmup=1,
    )
    assert calls == ["a", "b"] * 4
    assert [len(t) for t in times.values()] == [3, 3]
    assert min(times["b"]) >= 0.02 > max(times["a"])


def test_time_of_an_inner_part_is_not_the_outer_ones(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 3.5, 4.0, 10.0])
    times = PartTimes("cpu")
    monkeypatch.setattr(times, "_now", lambda: next(clock))
    with times.part("outer"):  # 0
        with times.part("inner"):  # 1
            pass  # 3
        with times.part("inner"):  # 3.5
            pass  # 4
    # 10
    assert dict(times.seconds) == {"outer": 1.0 + 0.5 + 6.0, "inner": 2.0 + 0.5}


def test_wrapping_is_undone():
    class Model:
        @staticmethod
        def helper(x):
            return 2 * x

        def forward(self, x):
            return Model.helper(x) + 1

    times, model = PartTimes("cpu"), Model()
    undo = [times.wrap(model, "forward", "a"), times.wrap(Model, "helper", "b")]
    assert model.forward(3) == 7
    assert times.seconds.keys() == {"a", "b"}
    for restore in reversed(undo):
        restore()
    assert "forward" not in vars(model) and isinstance(vars(Model)["helper"], staticmethod)
    assert model.forward(3) == 7 and model.helper(2) == 4


def test_an_exception_closes_the_part():
    times = PartTimes("cpu")
    with pytest.raises(KeyError), times.part("a"):
        raise KeyError
    with times.part("b"):
        pass
    assert times.seconds.keys() == {"a", "b"} and not times._open


def test_no_peak_on_the_cpu():
    assert peak_memory(lambda: None, "cpu") is None


@needs_cuda
def test_peak_on_cuda():
    import torch

    used = peak_memory(lambda: torch.empty(2**20, device="cuda").sum().item(), "cuda")
    assert 4 * 2**20 <= used < 5 * 2**20
