import json
from math import isnan, nan, sqrt

import pandas as pd
import pytest

from experiments.ablation import report
from experiments.ablation.report import (
    load_results,
    paired_difference,
    plot_curves,
    plot_differences,
    table,
)
from experiments.ablation.rungs import RUNGS, overrides
from experiments.ablation.runner import Run
from panet_d2.errors import DataError


def write_run(folder, rung, seed, ap, opts=()):
    metrics = {f"segm/AP{kind}": ap + i for i, kind in enumerate(("", "50", "75", "s", "m"))}
    content = {
        "rung": rung,
        "seed": seed,
        "settings": Run(rung, seed, "config.yaml", (*overrides(RUNGS[rung]), *opts)).settings,
        "results": {**metrics, "segm/APl": nan, "bbox/AP": ap + 10},
        "curve": {10: ap / 2, 20: ap},
        "seconds_per_step": 0.5,
        "seconds_per_image": 0.25,
    }
    (folder / f"{rung}_seed{seed}.json").write_text(json.dumps(content))


@pytest.fixture
def results(tmp_path):
    for seed, (low, high) in enumerate([(30.0, 31.0), (32.0, 34.0), (34.0, 37.0)]):
        write_run(tmp_path, "baseline", seed, low)
        write_run(tmp_path, "+mst", seed, high)
    write_run(tmp_path, "only_ff", 0, 29.0)
    return load_results(str(tmp_path))


def test_paired_difference():
    # Differences 1, 2, 3: mean 2, deviation 1, error 1 / sqrt(3). Student's t for 2 degrees of
    # freedom is 4.3027 at 97.5 %.
    ours, theirs = pd.Series({1: 11.0, 2: 12.0, 3: 33.0}), pd.Series({3: 30.0, 2: 10.0, 1: 10.0})
    d = paired_difference(ours, theirs)
    reach = pytest.approx(4.3027 / sqrt(3), abs=1e-4)
    assert d.mean == 2.0 and d.high - d.mean == reach and d.mean - d.low == reach


def test_only_common_seeds_count():
    d = paired_difference(pd.Series({1: 5.0, 2: 100.0}), pd.Series({1: 4.0, 3: 0.0}))
    assert d.mean == 1.0 and isnan(d.low) and isnan(d.high)
    assert paired_difference(pd.Series({1: 5.0}), pd.Series({2: 4.0})) is None


def test_table(results):
    models = {"baseline": {"million_parameters": 12.34, "gflops": 5.67}}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table(results, models).splitlines()
    ]
    # 30, 32, 34: mean 32, deviation 2, error 2 / sqrt(3) = 1.15.
    assert rows[4] == [
        *("Mask R-CNN", "3", "32.0 ± 1.2", "", "", "33.0", "34.0", "35.0", "36.0", "-"),
        *("42.0 ± 1.2", "500", "250", "12.3", "5.7"),
    ]
    # Differences 1, 2, 3: mean 2, and 4.303 / sqrt(3) = 2.48 to either side.
    difference = "+2.0 [-0.5, +4.5]"
    assert rows[5][:4] == ["+ multi-scale training", "3", "34.0 ± 1.7", difference]
    assert rows[5][4] == difference  # the row above is Mask R-CNN
    assert rows[5][-2:] == ["-", "-"]
    alone = next(row for row in rows if row[0] == "only fully-connected fusion")
    assert alone[1:4] == ["1", "29.0", "-1.0"]  # from the one seed that both have


def test_no_difference_has_no_sign_of_its_own(tmp_path):
    """0.0, not -0.0 or +0.0, for a difference that rounds to zero."""
    for seed, difference in enumerate((-0.04, -0.02)):
        write_run(tmp_path, "baseline", seed, 30.0)
        write_run(tmp_path, "+mst", seed, 30.0 + difference)
    # Mean -0.03, and 12.71 * 0.01 = 0.13 to either side.
    assert "| 0.0 [-0.2, +0.1] " in table(load_results(str(tmp_path)), {})


def test_plots(results, tmp_path):
    plot_curves(results, str(tmp_path / "curves.png"))
    plot_differences(results, str(tmp_path / "differences.png"))
    assert all((tmp_path / f"{n}.png").stat().st_size > 5000 for n in ("curves", "differences"))


def test_curves_are_means_and_a_second_panel_has_the_last_half(monkeypatch):
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
    curves = {1: {"100": 8.0, "200": 20.0, "300": 30.0}, 2: {"100": 10.0, "200": 22.0, "300": 31.0}}
    runs = {"baseline": {seed: {"curve": curve} for seed, curve in curves.items()}}
    plot_curves(runs, "curves.png")
    plot_curves({}, "empty.png")
    full, last = (axis.lines for axis in figures[0].axes)
    assert full[0].get_xydata().tolist() == [[100, 9], [200, 21], [300, 30.5]]
    assert last[0].get_xydata().tolist() == [[200, 21], [300, 30.5]]
    assert [bool(figure.axes[0].get_legend()) for figure in figures] == [True, False]


def test_full_panet_is_compared_with_mask_rcnn(tmp_path):
    for rung, values in (("baseline", (30.0, 31.0)), ("+ff", (33.0, 33.5)), ("+hhd", (34.0, 36.0))):
        for seed, value in enumerate(values):
            write_run(tmp_path, rung, seed, value)
    last = [line for line in table(load_results(str(tmp_path)), {}).splitlines() if "box" in line]
    above, full = (cell.strip() for cell in last[-1].strip("|").split("|")[3:5])
    # Differences 1 and 2.5 from +ff, 4 and 5 from Mask R-CNN; 12.71 / sqrt(2) times the deviation.
    assert above == "+1.8 [-7.8, +11.3]" and full == "+4.5 [-1.9, +10.9]"


def test_the_memory_format_may_differ(tmp_path):
    """The fastest one depends on the processor. Results are the same up to rounding."""
    write_run(tmp_path, "baseline", 1, 30.0)
    for seed, opts in ((1, ()), (2, ("MODEL.PAFPN.MEMORY_FORMAT", "contiguous"))):
        write_run(tmp_path, "ideas", seed, 31.0, opts=opts)
    assert {name: list(seeds) for name, seeds in load_results(str(tmp_path)).items()} == {
        "baseline": [1],
        "ideas": [1, 2],
    }


def test_runs_that_differ_in_more_than_their_rung_are_not_compared(tmp_path):
    write_run(tmp_path, "baseline", 1, 30.0, ("SOLVER.MAX_ITER", 600))
    write_run(tmp_path, "+hhd", 1, 31.0, ("SOLVER.MAX_ITER", "600"))
    assert len(load_results(str(tmp_path))) == 2
    for opts in (("SOLVER.MAX_ITER", 800), ()):
        write_run(tmp_path, "+hhd", 2, 32.0, opts)
        with pytest.raises(DataError, match="SOLVER.MAX_ITER is (800|None) in .*, 600 in"):
            load_results(str(tmp_path))


def test_seeds_of_a_rung_were_trained_alike(tmp_path):
    """The keys that rungs set agree between the seeds of a rung."""
    write_run(tmp_path, "+norm", 1, 30.0)
    write_run(tmp_path, "+bpa", 1, 30.0, ("MODEL.FPN.NORM", "BN"))
    assert len(load_results(str(tmp_path))) == 2
    write_run(tmp_path, "+norm", 2, 31.0, ("MODEL.FPN.NORM", "BN"))
    with pytest.raises(DataError, match=r"MODEL.FPN.NORM is BN in .*2.json, GN in .*1.json"):
        load_results(str(tmp_path))


def test_plotted_differences(monkeypatch):
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
    runs = {
        rung: {s: {"results": {"segm/AP": ap + s * s}} for s in (1, 2)}
        for rung, ap in (("baseline", 30.0), ("+mst", 32.0))
    }
    runs["+mst"][2]["results"]["segm/AP"] += 1
    report.plot_differences(runs, "differences.png")
    interval, mean, _ = (list(line.get_xdata()) for line in figures[0].axes[0].lines)
    # Differences 2 and 3; Student's t for one degree of freedom is 12.71.
    assert mean == [2.5] and interval == pytest.approx([2.5 - 6.35, 2.5 + 6.35], abs=0.01)
