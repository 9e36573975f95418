import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from detectron2.modeling import build_model

from experiments.ablation import __main__ as tool
from experiments.ablation.report import load_results, table
from experiments.ablation.rungs import RUNGS, overrides
from experiments.benchmark.models import images
from panet_d2 import cli
from panet_d2.engine import setup_config

from ...common import ROOT
from .test_report import write_run

RESULTS = ROOT / "experiments/results/ablation"
DOCUMENT = RESULTS / "README.md"


def test_report_fills_its_place_in_the_document(tmp_path):
    results, document = tmp_path / "dsb2018", tmp_path / "document.md"
    results.mkdir()
    write_run(results, "baseline", 1, 30.0)
    document.write_text("before\n<!-- table dsb2018 -->\nold\n<!-- end -->\nafter\n")
    command = ["--report", "--results", str(results), "--document", str(document)]
    assert cli.run(tool.main, command) == 0
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
    assert "| Mask R-CNN |" in text and "old" not in text
    assert (results / "curves.png").is_file()
    document.write_text("no place")
    assert cli.run(tool.main, command) == 1
    # With --results the committed document stays as it is.
    before = DOCUMENT.read_text()
    assert cli.run(tool.main, command[:3]) == 0 and DOCUMENT.read_text() == before


def test_runs_are_the_rungs_seed_by_seed(tmp_path, monkeypatch):
    seen = {}

    def run_all(runs, work, results, train_net, jobs):
        seen["runs"], seen["jobs"] = runs, jobs
        return ["one failed"]

    monkeypatch.setattr(tool, "run_all", run_all)
    command = ["--data", "shapes", "--rungs", "baseline", "+ff", "--seeds", "3", "5"]
    command += ["--results", str(tmp_path / "r"), "--steps", "80", "--jobs", "2"]
    assert cli.run(tool.main, [*command, "--opts", "TEST.DETECTIONS_PER_IMAGE", "50"]) == 1
    names = ["baseline_seed3", "+ff_seed3", "baseline_seed5", "+ff_seed5"]
    assert [run.name for run in seen["runs"]] == names and seen["jobs"] == 2
    for run in seen["runs"]:  # only the rung's own overrides differ
        assert run.opts[-10:] == (
            *("SOLVER.MAX_ITER", "80", "SOLVER.STEPS", "[60, 74]"),
            *("TEST.DETECTIONS_PER_IMAGE", "50", "TEST.EVAL_PERIOD", "13"),
            *("SOLVER.CHECKPOINT_PERIOD", "20"),
        )


def test_own_evaluations_and_checkpoints(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(tool, "run_all", lambda made, *_: runs.extend(made) or ["failed"])
    command = ["--data", "shapes", "--rungs", "baseline", "--seeds", "1", "--results"]
    command += [str(tmp_path), "--steps", "80", "--opts", "TEST.EVAL_PERIOD", "0"]
    assert cli.run(tool.main, command) == 1
    assert runs[0].opts[-4:] == ("TEST.EVAL_PERIOD", "0", "SOLVER.CHECKPOINT_PERIOD", "20")


@pytest.mark.parametrize("data", ["granular", "facade"])
def test_some_configs_name_their_resnet(data, tmp_path, monkeypatch, capsys):
    command = ["--data", data, "--results", str(tmp_path), "--rungs", "heavy_ideas", "bpa_afp"]
    with pytest.raises(SystemExit):
        tool.main([*command, "--pretrain", "40"])
    assert "--pretrain is for shapes and dsb2018" in capsys.readouterr().err
    runs = []
    monkeypatch.setattr(tool, "setup_config", partial(setup_config, needed=()))  # without the data
    monkeypatch.setattr(tool, "run_all", lambda made, *_: runs.extend(made) or ["failed"])
    assert cli.run(tool.main, [*command, "--seeds", "1"]) == 1
    heavy, light = (setup_config(run.config_file, run.opts, needed=()) for run in runs)
    assert heavy.MODEL.ROI_BOX_HEAD.CONV_DIM == heavy.MODEL.FPN.OUT_CHANNELS == 128
    assert heavy.MODEL.ROI_MASK_HEAD.NAME == "PANetMaskHead"
    assert light.MODEL.ROI_MASK_HEAD.NAME == "MaskRCNNConvUpsampleHead"
    assert light.MODEL.ROI_MASK_HEAD.AFP.ENABLED and light.MODEL.RESNETS.NORM == "FrozenBN"


@pytest.mark.parametrize("norm", ["BN", "GN"])
@pytest.mark.parametrize("data", list(tool.FINE_TUNING_ON))
def test_all_start_from_one_resnet(data, norm, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(tool, "setup_config", partial(setup_config, needed=()))  # without the data

    def pretrained(run, work, results, train_net):
        seen["donor"] = run
        return "resnet.pth"

    monkeypatch.setattr(tool, "pretrained_resnet", pretrained)
    monkeypatch.setattr(tool, "run_all", lambda runs, *args: seen.update(runs=runs) or ["failed"])
    command = ["--data", data, "--rungs", "baseline", "+ff", "--results", str(tmp_path / "r")]
    command += ["--steps", "80", "--pretrain", "40", "--norm", norm]
    command += ["--opts", "INPUT.MAX_SIZE_TEST", "300"]
    assert cli.run(tool.main, command) == 1
    donor = seen["donor"]
    assert donor.name == "pretrain40_seed0" and "MODEL.BACKBONE.NAME" not in donor.opts
    steps = ("SOLVER.MAX_ITER", "40", "SOLVER.STEPS", "[30, 37]")
    assert donor.opts[-6:] == ("INPUT.MAX_SIZE_TEST", "300", *steps)
    place = donor.opts.index("MODEL.RESNETS.NORM")
    assert donor.opts[place + 1] == "BN"
    assert "MODEL.BACKBONE.FREEZE_AT" not in donor.opts  # it starts from random weights
    for run in seen["runs"]:
        cfg = setup_config(run.config_file, run.opts, needed=())
        assert cfg.MODEL.BACKBONE.FREEZE_AT == 2
        assert cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE == 64
        assert cfg.MODEL.RESNETS.NORM == ("BN" if run.rung == "+ff" else "FrozenBN")
        assert cfg.MODEL.FPN.NORM == (norm if run.rung == "+ff" else "")
        place = run.opts.index("MODEL.WEIGHTS")
        assert run.opts[place + 1] == "resnet.pth" and run.opts[-len(steps) :] != steps


@pytest.mark.parametrize(
    "data, pretrain, steps", [("shapes", "1600", "3200"), ("dsb2018", "1200", "1200")]
)
def test_committed_runs_are_those_of_the_documented_commands(
    data, pretrain, steps, tmp_path, monkeypatch
):
    runs = []
    monkeypatch.setattr(tool, "setup_config", partial(setup_config, needed=()))  # without the data
    monkeypatch.setattr(tool, "pretrained_resnet", lambda run, *_: f"/x/{run.name}_resnet.pth")
    monkeypatch.setattr(tool, "run_all", lambda made, *_: runs.extend(made) or ["failed"])
    command = ["--data", data, "--pretrain", pretrain, "--steps", steps]
    document = DOCUMENT.read_text()
    assert " ".join(["python -m experiments.ablation", *command]) in document
    assert cli.run(tool.main, [*command, "--results", str(tmp_path), "--groups", *tool.GROUPS]) == 1
    made = {(run.rung, str(run.seed)): run.settings for run in runs}
    committed = load_results(str(RESULTS / data))
    assert "baseline" in committed
    for rung, seeds in committed.items():
        for seed, result in seeds.items():
            assert result["settings"] == made[rung, str(seed)], (rung, seed)


def test_models_are_described():
    opts = {n: [*map(str, tool.overrides(tool.RUNGS[n]))] for n in ("baseline", "+ff")}
    models = tool.describe_models(tool.BASELINES["shapes"], opts)
    assert models["+ff"]["gflops"] > models["baseline"]["gflops"] > 1
    assert models["+ff"]["million_parameters"] > models["baseline"]["million_parameters"] > 10


TABLES = re.findall("<!-- table (.*) -->", DOCUMENT.read_text())


@pytest.mark.parametrize("name", TABLES)
def test_document_holds_the_table_of_the_runs(name, tmp_path):
    results, document = RESULTS / name, DOCUMENT
    models = json.loads((results / "models.json").read_text())
    assert table(load_results(str(results)), models) in document.read_text()
    copy = shutil.copy(document, tmp_path)
    shutil.copytree(results, tmp_path / name)
    command = ["--report", "--results", str(tmp_path / name)]
    assert cli.run(tool.main, [*command, "--document", str(copy)]) == 0
    assert Path(copy).read_text() == document.read_text()


def test_models_are_timed_side_by_side(tmp_path, monkeypatch):
    results, document = tmp_path / "dsb2018", tmp_path / "document.md"
    results.mkdir()
    frozen = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.WEIGHTS", "elsewhere.pth")
    for rung in ("baseline", "+mst"):
        write_run(results, rung, 1, 30.0, frozen)
    sizes = {"million_parameters": 1.0, "gflops": 2.0}
    (results / "models.json").write_text(json.dumps({"baseline": sizes, "+mst": sizes}))
    built = []
    monkeypatch.setattr(tool, "build_model", lambda cfg: built.append(cfg) or build_model(cfg))
    monkeypatch.setattr(tool, "images", lambda n, *_, classes: images(n, 64, 64, classes=classes))
    document.write_text("<!-- table dsb2018 -->\n<!-- end -->\n")
    command = ["--time", "1", "--rungs", "baseline", "--results", str(results)]
    assert cli.run(tool.main, [*command, "--document", str(document)]) == 0
    assert [cfg.MODEL.RESNETS.NORM for cfg in built] == ["FrozenBN"]  # as it was trained
    models = json.loads((results / "models.json").read_text())
    assert models["+mst"] == sizes and models["baseline"].items() > sizes.items()
    timed = models["baseline"]["seconds_per_step"], models["baseline"]["seconds_per_image"]
    assert min(timed) > 0  # on a busy machine either can be longer
    rows = [line.split("|") for line in document.read_text().splitlines() if "| 30.0" in line]
    baseline, mst = ([cell.strip() for cell in row] for row in rows)
    assert {f"{1e3 * seconds:.0f}" for seconds in timed} <= set(baseline)
    assert {"500", "250"} <= set(mst)  # times of its own run
    (results / "models.json").write_text(json.dumps({"baseline": sizes}))
    command = ["--time", "1", "--results", str(results), "--document", str(document)]
    assert cli.run(tool.main, command) == 0 and len(built) == 3  # all rungs that have runs
    models = json.loads((results / "models.json").read_text())
    assert "seconds_per_step" in models["+mst"] and models["baseline"].items() > sizes.items()
    assert models["+mst"]["gflops"] > 5  # was missing


def test_models_are_timed_with_equal_counts(monkeypatch):
    """No model is faster because it detects less with random weights."""
    counts = []

    def count(roi_heads, ins, outs):
        if not roi_heads.training:
            counts.append(len(outs[0][0]))

    def build(cfg):
        model = build_model(cfg)
        model.roi_heads.register_forward_hook(count)
        return model

    monkeypatch.setattr(tool, "build_model", build)
    monkeypatch.setattr(tool, "images", lambda n, h, w, **kwargs: images(n, 64, 64, **kwargs))
    rungs = {name: list(map(str, overrides(RUNGS[name]))) for name in ("baseline", "only_norm")}
    assert tool.time_models(tool.BASELINES["shapes"], rungs, 1).keys() == rungs.keys()
    assert set(counts[-6:]) == {100}  # two to warm up and one timed, of each


def test_models_without_runs_are_not_timed(tmp_path, capsys):
    write_run(tmp_path, "baseline", 1, 30.0)
    command = ["--time", "1", "--rungs", "+bpa", "--results", str(tmp_path)]
    assert cli.run(tool.main, command) == 1
    assert "has no runs of +bpa" in capsys.readouterr().err
