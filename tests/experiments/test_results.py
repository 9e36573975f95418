import json
import os
import re
import shlex
from collections import defaultdict
from functools import partial

import pandas as pd
import pytest

from experiments.ablation import __main__ as ablation
from experiments.ablation.report import paired_difference
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


def prose(page):
    """The text of a page without its line breaks."""
    return " ".join((ROOT / page).read_text().split())


STAGES = ["recall of anchors", "recall of proposals", "recall of masks"]


def planned_runs():
    """Runs of experiments/results/planning, by config and model, then by seed."""
    found = defaultdict(dict)
    for run in json.loads((RESULTS / "planning/nuclei.json").read_text())["runs"]:
        found[run["config"], run["model"]][run["seed"]] = run
    return found


def test_table_of_planned_configs_is_that_of_the_runs():
    expected = []
    for seeds in planned_runs().values():
        ap = [
            ", ".join(f"{run[key]:.1f}" for run in seeds.values()) for key in ("segm/AP", "bbox/AP")
        ]
        of_first = [seeds[1].get(key) for key in (*STAGES, "mask AP with ground-truth boxes")]
        expected.append([*ap, *("" if value is None else f"{value:.1f}" for value in of_first)])
    rows = table((RESULTS / "planning/README.md").read_text(), "## Runs")
    assert [row[2:] for row in rows] == expected


def test_table_of_the_planned_shapes_is_that_of_the_runs():
    runs = json.loads((RESULTS / "planning/shapes.json").read_text())["runs"]
    rows = table((RESULTS / "planning/README.md").read_text(), "## The embedded dataset")
    for (title, *row), start in zip(rows, ("random", "ImageNet")):
        by_hand, planned = (run for run in runs if run["start"] == start)
        values = [run[key] for run in (by_hand, planned) for key in ("segm/AP", "bbox/AP")]
        assert start in title and row == [f"{value:.1f}" for value in values]


def test_planned_configs_in_the_docs():
    runs = planned_runs()
    values = {
        (key, *name): pd.Series({seed: run[key] for seed, run in seeds.items()})
        for name, seeds in runs.items()
        for key in ("segm/AP", "bbox/AP")
    }
    share = {c: f"{runs[c, 'panet'][1][STAGES[1]]:.1f} %" for c in ("hand", "planned")}
    expected = []
    for config in ("hand", "planned"):
        means = [f"{values['segm/AP', config, m].mean():.1f}" for m in ("mask_rcnn", "panet")]
        expected.append([share[config], *means])
    for page, heading in (("docs/planning.md", "## Example"), ("README.md", "### A config")):
        assert [row[-3:] for row in table((ROOT / page).read_text(), heading)] == expected, page
    expected = [[], []]
    for key in ("segm/AP", "bbox/AP"):
        base, ours = (values[key, "planned", m] for m in ("mask_rcnn", "panet"))
        d = paired_difference(ours, base)
        expected[0] += [f"{base.mean():.1f} ± {base.sem():.1f}", ""]
        difference = f"{d.mean:+.1f} [{d.low:+.1f}, {d.high:+.1f}]"
        expected[1] += [f"{ours.mean():.1f} ± {ours.sem():.1f}", difference]
    rows = table((ROOT / "docs/results.md").read_text(), "## Nuclei with a planned config")
    assert [row[1:] for row in rows] == expected
    summary = [expected[0][0], expected[1][0], "", str(len(base))]
    for page, heading in (("docs/results.md", "## Summary"), ("README.md", "## What")):
        rows = table((ROOT / page).read_text(), heading)
        assert [row[1:] for row in rows if row[0].startswith("nuclei, planned")] == [summary], page


# Models by the name of their rung.
FOLDS = {"baseline": "Mask R-CNN", "ideas": "PANet-2fc"}
OF_STONES = {
    "baseline": "Mask R-CNN",
    "only_bpa": "BPA",
    "bpa_afp": "BPA and AFP",
    "ideas": "PANet-2fc",
}


def test_table_of_the_folds_is_that_of_the_runs():
    expected = []
    for path in sorted((RESULTS / "granular").glob("fold*.json")):
        run = json.loads(path.read_text())
        name = [path.stem[len("fold")], OF_STONES[run["rung"]], str(run["seed"])]
        keys = [f"{task}/AP{iou}" for task in ("segm", "bbox") for iou in ("", "75")]
        expected.append([*name, *(f"{run['results'][key]:.1f}" for key in keys)])
    assert table((RESULTS / "granular/README.md").read_text(), "## Runs") == expected


def trainings(*names):
    """
    Results of Mask R-CNN and PANet-2fc in each training, and their files. A training without a
    Mask R-CNN of its own is compared with that of the training before.
    """
    results, files, current = [], set(), {}
    for name in names:
        for rung in FOLDS:
            path = RESULTS / f"granular/{name}_{rung}_seed1.json"
            if path.exists():
                files.add(path)
                current[rung] = json.loads(path.read_text())["results"]
        results.append(tuple(current[rung] for rung in FOLDS))
    return results, files


TRIED = (
    "tried_sgd",
    "tried_adamw",
    "tried_slow_fc",
    "tried_slow_linear",
    "fold1",
    "tried_long",
)


def test_what_was_tried():
    results, files = trainings(*TRIED)
    expected = []
    for base, ours in results:
        cells = [f"{ap[key]:.1f}" for ap in (base, ours) for key in ("bbox/AP", "segm/AP")]
        expected.append([*cells, f"{ours['segm/AP'] - base['segm/AP']:+.1f}"])
    assert files >= set((RESULTS / "granular").glob("tried_*_seed1.json"))
    rows = table((RESULTS / "granular/README.md").read_text(), "## What was tried")
    assert [row[1:] for row in rows] == expected


def test_learning_rate_of_fully_connected_fusion():
    page = (ROOT / "docs/results.md").read_text()
    results, _ = trainings("tried_adamw", "tried_slow_fc", "tried_long")
    expected = []
    for base, ours in results:
        base_ap, ap = base["segm/AP"], ours["segm/AP"]
        expected.append([f"{base_ap:.1f}", f"{ap:.1f}", f"{ap - base_ap:+.1f}"])
    rows = table(page, "### The learning rate of fully-connected")
    assert [row[1:] for row in rows] == expected
    (_, before), (_, after), _ = results
    mask, box = (f"{after[key] - before[key]:.1f}" for key in ("segm/AP", "bbox/AP"))
    assert page.count(f"gains {mask} mask AP and {box} box AP") == 2


def test_learning_rate_factor_on_other_data():
    runs = json.loads((RESULTS / "granular/lr_factor.json").read_text())["runs"]
    found = defaultdict(dict)
    for run in runs:
        ap = [f"{run[key]:.1f}" for key in ("segm/AP", "bbox/AP")]
        found[run["data"], str(run["inputs"]), str(run["seed"])][run["factor"]] = ap
    rows = table((RESULTS / "granular/README.md").read_text(), "### The factor on")
    assert rows == [[*name, *ap[1.0], *ap[0.1]] for name, ap in found.items()]
    changes = pd.DataFrame(runs).set_index(["data", "factor"]).groupby(level=[0, 1]).mean()
    changes = changes.xs(0.1, level=1) - changes.xs(1.0, level=1)
    page = prose("docs/results.md")
    for data, verb in (("nuclei", "gains"), ("demo", "loses")):
        mask, box = (abs(changes[key][data]) for key in ("segm/AP", "bbox/AP"))
        assert f"{verb} {mask:.1f} mask AP and {box:.1f} box AP" in page, (mask, box)


@pytest.mark.parametrize("data", ["granular", "facade"])
def test_diagnosis(data):
    expected = []
    for path in sorted((RESULTS / data).glob("diagnosis_*.json")):
        found = json.loads(path.read_text())
        *fold, rung, _ = path.stem.split("_")[1:]
        values = [found["recall"][s]["all"] for s in ("anchors", "proposals", "boxes", "masks")]
        values += [ap["AP"] for ap in found["mask AP with"].values()]
        name = [*(f[len("fold") :] for f in fold), FOLDS[rung]]
        expected.append([*name, *(f"{value:.1f}" for value in values)])
    assert table((RESULTS / data / "README.md").read_text(), "## Diagnosis") == expected


def test_ground_truth_boxes_with_sgd():
    text = (RESULTS / "granular/README.md").read_text().replace("\n", " ")
    for rung, name in FOLDS.items():
        path = RESULTS / f"granular/sgd_diagnosis_fold1_{rung}_seed1.json"
        ap = json.loads(path.read_text())["mask AP with"]["ground-truth boxes and classes"]["AP"]
        assert re.search(rf"{name}( had)? {ap:.1f}", text)


# Files of a comparison by the seeds in them. The detections of seeds 1 and 2 were not kept.
COMPARISONS = {
    "granular": {"1, 2": "comparison", "3": "seed3_comparison"},
    "facade": {"1": "comparison"},
}


@pytest.mark.parametrize(("data", "heading"), [("granular", "Stones"), ("facade", "Fronts")])
def test_comparisons_in_the_docs(data, heading):
    of_sizes = ("AP smaller", "AP similar", "AP larger")
    for page, columns in (
        ("docs/results.md", ("AP75",)),
        (f"experiments/results/{data}/README.md", ("AP50", "AP75", "AP90")),
    ):
        expected = []
        for seeds, name in COMPARISONS[data].items():
            found = json.loads((RESULTS / f"{data}/{name}.json").read_text())
            for rung, ap in found["models"].items():
                assert seeds == ", ".join(ap["seeds"])
                d = found["differences"].get(rung)
                difference = "{mean:+.1f} [{low:+.1f}, {high:+.1f}]".format(**d) if d else ""
                model = [OF_STONES[rung], *([seeds] if len(COMPARISONS[data]) > 1 else [])]
                values = [f"{ap[c]:.1f}" for c in ("AP all", *columns)]
                # With seeds 1 and 2, false positives had the size of their box.
                sizes = [f"{ap[c]:.1f}" if seeds != "1, 2" else "" for c in of_sizes]
                expected.append([*model, values[0], difference, *values[1:], *sizes])
        assert table((ROOT / page).read_text(), f"## {heading}") == expected, page


@pytest.mark.parametrize(
    ("data", "row"), [("granular", "stones, four folds"), ("facade", "fronts, four classes")]
)
def test_comparisons_in_the_summary(data, row):
    found = [
        json.loads((RESULTS / f"{data}/{name}.json").read_text())["models"]
        for name in COMPARISONS[data].values()
    ]
    ap = [[v for models in found for v in models[r]["seeds"].values()] for r in FOLDS]
    expected = [row, *(f"{sum(values) / len(values):.1f}" for values in ap), "", str(len(ap[0]))]
    for page, heading in (("docs/results.md", "## Summary"), ("README.md", "## What")):
        rows = table((ROOT / page).read_text(), heading)
        assert [cells for cells in rows if cells[0] == row] == [expected], page


def fronts():
    """Runs of the fronts by rung, all of seed 1."""
    return {rung: json.loads((RESULTS / f"facade/{rung}_seed1.json").read_text()) for rung in FOLDS}


def test_sentences_about_the_fronts():
    found = json.loads((RESULTS / "facade/comparison.json").read_text())
    (difference,) = found["differences"].values()
    base, ours = (run["results"]["segm/AP"] for run in fronts().values())
    curve = [f"{ap:.1f}" for ap in fronts()["baseline"]["curve"].values()]
    for text in map(prose, ("docs/results.md", "experiments/results/facade/README.md")):
        assert f"PANet-2fc has {-difference['mean']:.1f} less mask AP" in text
        assert "has {} mask AP after 1000 steps and {} after 2000".format(*curve) in text
    assert f"Over all ten classes PANet-2fc has {ours - base:.1f} more." in text
    assert f"the {found['runs']} runs of photos" in text
    recall = json.loads((RESULTS / "facade/diagnosis_baseline_seed1.json").read_text())["recall"]
    reached, proposed = (recall[stage] for stage in ("anchors", "proposals"))
    assert f"The anchors reach {reached['all']:.0f} % of the objects" in text
    assert f"Mask R-CNN proposes {proposed['all']:.0f} % of them" in text
    assert f"and {proposed['small']:.0f} % of those below 32 x 32 pixels" in text
    exact = []
    for rung in FOLDS:
        found = json.loads((RESULTS / f"facade/diagnosis_{rung}_seed1.json").read_text())
        exact.append(found["mask AP with"]["ground-truth boxes and classes"]["AP"])
    assert f"With ground-truth boxes PANet-2fc has {exact[1] - exact[0]:.1f} more mask AP" in text
    page = prose("docs/results.md")
    assert f"RPN proposes {proposed['all']:.0f} % of the objects" in page


def test_classes_of_the_fronts():
    runs = fronts()
    rows = table((RESULTS / "facade/README.md").read_text(), "## Classes")
    for name, _, *cells in rows:
        key = "AP" if name == "all ten" else f"AP-{name}"
        values = [run["results"][f"{t}/{key}"] for t in ("segm", "bbox") for run in runs.values()]
        assert cells == [f"{value:.1f}" for value in values], name
    of_classes = [key for key in runs["ideas"]["results"] if key.startswith("segm/AP-")]
    assert len(rows) == len(of_classes) + 1


def span(values, decimals=1):
    """Smallest and largest value, as the docs write a range."""
    return f"{min(values):.{decimals}f} to {max(values):.{decimals}f}"


def gains_of_the_stones():
    """AP that PANet-2fc has more than Mask R-CNN in each fold with each seed, by kind of AP."""
    runs = {}
    for path in (RESULTS / "granular").glob("fold*_seed*.json"):
        run = json.loads(path.read_text())
        runs[path.stem.split("_")[0], run["seed"], run["rung"]] = run["results"]
    return {
        key: [
            ap[key] - runs[(*pair, "baseline")][key]
            for (*pair, r), ap in runs.items()
            if r == "ideas"
        ]
        for key in ("segm/AP", "bbox/AP")
    }


def test_sentences_about_the_stones():
    """The ranges and differences outside the tables."""
    folder = RESULTS / "granular"
    gains = gains_of_the_stones()
    names = ("comparison", "afp", "fusion")
    seed3, afp, fusion = (json.loads((folder / f"seed3_{name}.json").read_text()) for name in names)
    models = seed3["models"]
    sizes = {
        s: models["ideas"][f"AP {s}"] - models["baseline"][f"AP {s}"]
        for s in ("smaller", "similar", "larger")
    }
    tried = json.loads((folder / "tried_adamw_comparison.json").read_text())["differences"]["ideas"]
    page = prose("docs/results.md")
    assert f"each seed ({len(gains['segm/AP'])} pairs), by {span(gains['segm/AP'])}, and" in page
    assert f"and more box AP, by {span(gains['bbox/AP'])}." in page
    assert f"median side of their image gain {sizes['smaller']:.1f}" in page
    assert f"more than twice the median side gain {sizes['larger']:.1f}" in page
    assert f"those between gain {sizes['similar']:.1f} (seed 3)" in page
    bpa = "{mean:.1f} [{low:.1f}, {high:+.1f}]".format(**seed3["differences"]["only_bpa"])
    more, most = (
        "{mean:.1f} [{low:.1f}, {high:.1f}]".format(**difference)
        for difference in (afp["differences"]["bpa_afp"], fusion["differences"]["ideas"])
    )
    alone = f"With seed 3, BPA alone changes mask AP by {bpa}, AFP then adds {more}"
    assert f"{alone}, and FF {most}." in page
    readme = prose("experiments/results/granular/README.md")
    assert f"{alone} (`seed3_afp.json`), and FF {most} (`seed3_fusion.json`)." in readme
    assert "gains {mean:.1f} [{low:+.1f}, {high:+.1f}] over".format(**tried) in prose(
        "experiments/results/granular/README.md"
    )


def test_sentences_about_the_levels_of_the_stones():
    tables = json.loads((RESULTS / "granular/levels.json").read_text())
    proposals = [row["proposals"] for row in tables["box_pooler"].values()]
    finest = {
        pooler: [100 * row["N2"] for row in table.values() if row["proposals"]]
        for pooler, table in tables.items()
    }
    for page in ("docs/results.md", "experiments/results/granular/README.md"):
        text = prose(page)
        assert f"assigns {100 * proposals[0] / sum(proposals):.0f} % of the proposals to N2" in text
        assert f"AFP takes {span(finest['box_pooler'], 0)} % of the box features" in text
        assert f"and {span(finest['mask_pooler'], 0)} % of the mask features from N2" in text


def test_sentences_about_the_diagnosis_of_the_stones():
    """What masks and boxes add, each with the other's held equal; where small stones are lost."""
    exact, masks, boxes, recalls = [], [], [], defaultdict(list)
    for fold in ("fold1", "fold2"):
        own, in_exact, in_other = {}, {}, {}
        for rung in FOLDS:
            run = json.loads((RESULTS / f"granular/{fold}_{rung}_seed1.json").read_text())
            path = RESULTS / f"granular/diagnosis_{fold}_{rung}_seed1.json"
            found = json.loads(path.read_text())
            own[rung] = run["results"]["segm/AP"]
            in_exact[rung], in_other[rung] = (ap["AP"] for ap in found["mask AP with"].values())
            recalls["all"].append(found["recall"]["proposals"]["all"])
            for stage in ("proposals", "boxes"):
                recalls[stage].append(found["recall"][stage]["small"])
        exact.append(f"{in_exact['ideas'] - in_exact['baseline']:.1f}")
        masks += [own["ideas"] - in_other["baseline"], in_other["ideas"] - own["baseline"]]
        boxes += [own["ideas"] - in_other["ideas"], in_other["baseline"] - own["baseline"]]
    page = prose("docs/results.md")
    assert f"with equal boxes they have {span(masks)} more mask AP" in page
    assert f"with ground-truth boxes {' and '.join(exact)} (folds 1 and 2, seed 1)" in page
    readme = prose("experiments/results/granular/README.md")
    assert f"With ground-truth boxes PANet-2fc has {' and '.join(exact)} more mask AP" in readme
    assert f"masks have {span(masks)} more mask AP than" in readme
    assert f"PANet-2fc's boxes add {span(boxes)}." in readme
    assert f"Proposals cover {span(recalls['all'], 0)} % of the stones" in readme
    share = {stage: span(recalls[stage], 0) for stage in ("proposals", "boxes")}
    assert f"{share['proposals']} % have a proposal, but only {share['boxes']} % a box" in readme


@pytest.mark.parametrize("data", ["nuclei", "stones"])
def test_inference_options_in_the_docs(data):
    models = json.loads((RESULTS / f"inference/{data}.json").read_text())["models"]
    base, ours = models["Mask R-CNN"], models["PANet-2fc"]
    expected = [
        [name, f"{base[name]['forward passes']}"]
        + [f"{rows[name][f'{task} AP']:.1f}" for rows in (base, ours) for task in ("box", "mask")]
        for name in ours
    ]
    rows = table((ROOT / "docs/inference.md").read_text(), f"### {data.title()}")
    assert rows == expected


def test_sentences_about_inference_options():
    gains = defaultdict(list)  # of Mask R-CNN, then of PANet-2fc, by data, kind of AP and option
    for data in ("nuclei", "stones"):
        models = json.loads((RESULTS / f"inference/{data}.json").read_text())["models"]
        for rows in models.values():
            for option, row in rows.items():
                for kind in ("box AP", "mask AP"):
                    gains[data, kind, option].append(row[kind] - rows["one scale"][kind])

    def soft_nms(data, kind):
        return span(
            [*gains[data, kind, "Soft-NMS, linear"], *gains[data, kind, "Soft-NMS, gaussian"]]
        )

    of_all = gains["nuclei", "mask AP", "all"]
    three = {
        data: "{1:.1f} and {0:.1f} on the {2}".format(*gains[data, "mask AP", "three scales"], data)
        for data in ("nuclei", "stones")
    }
    voting = [g for data in three for g in gains[data, "mask AP", "box voting"]]
    page = prose("docs/inference.md")
    for sentence in (
        "gain {1:.1f} mask AP for PANet-2fc and {0:.1f} for Mask R-CNN on the".format(*of_all),
        f"{three['nuclei']}, {three['stones']}",
        f"It gains {soft_nms('nuclei', 'mask AP')} on the nuclei.",
        f"On the stones it gains {soft_nms('stones', 'box AP')} box AP",
        f"Box voting changes mask AP by {max(map(abs, voting)):.1f} at most.",
    ):
        assert sentence in page, sentence
