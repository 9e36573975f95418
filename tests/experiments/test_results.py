import json
import math
import os
import re
import shlex
from functools import partial

import numpy as np
import pytest

from experiments.ablation import __main__ as ablation
from experiments.files import write_json
from panet_d2.engine import setup_config

from ..common import ROOT
from ..docs.common import code_blocks, table

RESULTS = ROOT / "experiments/results"
READMES = sorted(RESULTS.rglob("README.md"))
MODULE = "python -m experiments.ablation "


def ablation_commands(readme):
    """Arguments of the commands of the ablation in a README."""
    lines = "".join(code_blocks(readme, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line[len(MODULE) :]) for line in lines if line.startswith(MODULE)]


WITH_COMMANDS = [
    readme.parent.name
    for readme in sorted((RESULTS / "ablation").glob("*/README.md"))
    if ablation_commands(readme)
]


def test_every_folder_has_a_readme():
    folders = {RESULTS, *(path for path in RESULTS.rglob("*") if path.is_dir())}
    assert folders == {readme.parent for readme in READMES}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(RESULTS)))
def test_links_resolve(readme):
    for target in re.findall(r"\]\(([^)]+)\)", readme.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = readme.parent / path if path else readme
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.M)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, target


def test_json_is_what_other_programs_read():
    def fail(constant):
        raise AssertionError(f"JSON has no {constant}")

    for path in RESULTS.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=fail)


def test_nan_becomes_null(tmp_path):
    write_json(str(tmp_path / "x.json"), {"a": [math.nan, {"b": (1.5, np.float64("nan"))}], 2: "c"})
    found = json.loads((tmp_path / "x.json").read_text())
    assert found == {"a": [None, {"b": [1.5, None]}], "2": "c"}


@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_commands_give_the_committed_runs(name, tmp_path, monkeypatch):
    """For each JSON file, the commands of the README make a run with the same config and seed."""
    without_data = partial(setup_config, needed=())
    monkeypatch.setattr(ablation, "setup_config", without_data)
    monkeypatch.setattr(ablation, "pretrained_resnet", lambda run, *_: f"{run.name}_resnet.pth")
    made = []
    monkeypatch.setattr(ablation, "run_all", lambda runs, *_: made.extend(runs) or ["failed"])
    for command in ablation_commands(RESULTS / "ablation" / name / "README.md"):
        opts = command.index("--opts") if "--opts" in command else len(command)
        ablation.main([*command[:opts], "--results", str(tmp_path), *command[opts:]])

    def config(settings):
        config_file = os.path.join(os.path.dirname(ablation.BASELINES[data]), settings["config"])
        opts = [part for k, v in settings.items() if k != "config" for part in (k, v)]
        return without_data(config_file, opts).dump()

    data = name.split("_")[0]
    configs = {(run.seed, config(run.settings)) for run in made}
    for path in (RESULTS / "ablation" / name).glob("*_seed*.json"):
        run = json.loads(path.read_text())
        if not run["rung"].startswith("pretrain"):
            assert (run["seed"], config(run["settings"])) in configs, path.name


def test_table_of_planned_configs_is_that_of_the_runs():
    runs = json.loads((RESULTS / "planning/nuclei.json").read_text())["runs"]
    stages = ["recall of anchors", "recall of proposals", "recall of masks"]
    expected = []
    for first, second in zip(runs[::2], runs[1::2]):  # the two seeds
        ap = [f"{first[key]:.1f}, {second[key]:.1f}" for key in ("segm/AP", "bbox/AP")]
        of_first = [first.get(key) for key in (*stages, "mask AP with ground-truth boxes")]
        expected.append([*ap, *("" if value is None else f"{value:.1f}" for value in of_first)])
    rows = table((RESULTS / "planning/README.md").read_text(), "## Runs")
    assert [row[2:] for row in rows] == expected
    # The page and the README of the project repeat the rows "by hand" and "planned".
    ap = {
        (run["config"], run["model"]): f"{(run['segm/AP'] + other['segm/AP']) / 2:.1f}"
        for run, other in zip(runs[::2], runs[1::2])
    }
    share = {
        r["config"]: f"{r[stages[1]]:.1f} %"
        for r in runs
        if r["model"] == "panet" and stages[1] in r
    }
    summary = [[share[c], ap[c, "mask_rcnn"], ap[c, "panet"]] for c in ("hand", "planned")]
    for page, heading in (("docs/planning.md", "## Example"), ("README.md", "### A config")):
        assert [row[-3:] for row in table((ROOT / page).read_text(), heading)] == summary, page
