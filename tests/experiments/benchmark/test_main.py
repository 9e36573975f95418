import json
from pathlib import Path

import pytest

from experiments.benchmark import __main__ as tool
from experiments.benchmark.report import MODELS, markdown
from panet_d2 import cli

from ...common import ROOT, tiny_cfg

RESULTS = ROOT / "experiments/results/benchmark"


def test_end_to_end(tmp_path, capsys):
    (tmp_path / "panet.yaml").write_text(tiny_cfg().dump())
    command = [
        *("--config-file", str(tmp_path / "panet.yaml"), "--output", str(tmp_path / "out")),
        *("--size", "64", "96", "--heads", "2fc", "--repeats", "2", "--warmup", "0"),
        *("--boxes", "3", "--no-ladder"),
    ]
    assert cli.run(tool.main, command) == 0
    results = json.loads((tmp_path / "out/cpu.json").read_text())
    measured = results["models"]["2fc"]
    assert len(measured["seconds"]) == 3
    for seconds in measured["seconds"].values():
        assert seconds.keys() == set(MODELS) and min(seconds.values()) > 0
    for name in MODELS:
        # The parts add up to the time of inference.
        total = sum(measured["parts"][name].values())
        assert total == pytest.approx(measured["seconds"]["inference, batch 1"][name], rel=2)
    assert [row["fusion"] for row in results["op"]] == ["max", None, "sum", "mean"]
    assert (tmp_path / "out/cpu.md").read_text() == markdown(results)
    assert (tmp_path / "out/cpu.png").stat().st_size > 10_000
    assert "PANet / stock" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("*.json")))
def test_committed_tables_are_those_of_the_json_file(name):
    results = json.loads((RESULTS / f"{name}.json").read_text())
    assert (RESULTS / f"{name}.md").read_text() == markdown(results)


@pytest.mark.slow
def test_ladder():
    """Each part adds operations, for images of one size."""
    assert [Path(p).name[:2] for p in tool.LADDER] == [f"{i}_" for i in range(7)]
    rows = tool.benchmark_ladder([tool.LADDER[i] for i in (0, 3, 4, 5)], (64, 96))
    # Detectron2's own R-50-FPN
    assert rows[0]["million_parameters"] == pytest.approx(44.4, abs=0.2)
    for key in ("million_parameters", "gflops"):
        values = [row[key] for row in rows]
        assert values == sorted(values) and len(set(values)) == 4, key


def test_ratios():
    seconds = {"Mask R-CNN": 0.1, "naive PANet": 0.2, "PANet": 0.115}
    used = {"Mask R-CNN": 2**20, "naive PANet": 3 * 2**20, "PANet": 2**21}
    results = {
        "machine": {"device": "X"},
        "settings": {},
        "models": {
            "2fc": {
                "seconds": {"inference": seconds},
                "bytes": {"peak": used, "not measured": dict.fromkeys(used)},
                "parts": {name: {"neck": 0.001} for name in seconds},
            }
        },
        "op": [
            {
                "boxes": 10,
                "fusion": None,
                "milliseconds": {
                    **{"forward": 1.0, "forward torchvision": 5.0},
                    **{"backward": 2.0, "backward torchvision": 7.0},
                },
                "bytes": {"forward": 2**20, "forward torchvision": 2**22},
            }
        ],
    }
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown(results).splitlines()
    ]
    assert ["inference", "100.0 ms", "200.0 ms", "115.0 ms", "2.00", "1.15"] in rows
    assert ["peak", "1 MiB", "3 MiB", "2 MiB", "3.00", "2.00"] in rows
    assert ["10", "none", "1.00", "5.00", "5.0", "2.00", "7.00", "3.5", "1", "4"] in rows
    assert not any("not measured" in cell for row in rows for cell in row)


def test_one_clear_error(tmp_path, capsys):
    assert cli.run(tool.main, ["--output", str(tmp_path), "--config-file", "missing.yaml"]) == 1
    assert "missing.yaml" in capsys.readouterr().err
