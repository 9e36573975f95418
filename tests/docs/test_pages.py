"""The README and the pages of docs/: prose, links, and what they say about code and results."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys

import pytest

from experiments.ablation.report import load_results
from experiments.ablation.report import table as report_table
from panet_d2.check_config import flatten
from panet_d2.config import _panet_config

from ..common import ROOT, load_script
from .common import PAGES, relative, sentences, table, without_code

RESULTS = ROOT / "experiments/results/ablation"
DATA = {"shapes": "shapes", "nuclei": "dsb2018"}
hooks = load_script("docs/hooks.py")
each_page = pytest.mark.parametrize("page", PAGES, ids=relative)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@each_page
def test_sentences_are_short(page):
    long = [s for s in sentences(page.read_text()) if len(re.findall(r"\S*\w\S*", s)) > 35]
    assert not long


def test_a_long_sentence_is_found():
    assert max(len(s.split()) for s in sentences("# A\n\n- one two.\n  Three `a b` four\n")) == 3
    [*_, cell, _] = sentences("| `a b c` [d e](f.md) |\n")
    assert cell == "code d e"


def test_spelling():
    files = [relative(page) for page in PAGES]
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", *files], cwd=ROOT, capture_output=True, text=True
    )
    if "No module named" in done.stderr:
        pytest.skip("needs codespell")
    assert done.returncode == 0, done.stdout + done.stderr


def anchors(markdown: str) -> set:
    titles = re.findall(r"^#+ (.*)$", without_code(markdown), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_resolve_in_the_repository(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked.read_text()), target


@each_page
def test_files_that_are_named_exist(page):
    """Those of this repository, such as `tests/common.py`, and of the package without its name."""
    folders = "configs|datasets|demo|docs|experiments|panet_d2|requirements|tests|tools"
    folders += "|" + "|".join(p.parent.name for p in (ROOT / "panet_d2").glob("*/__init__.py"))
    for name in re.findall(rf"`((?:{folders})/[\w./+*-]+)`", page.read_text()):
        places = (ROOT, ROOT / "panet_d2", ROOT / "configs")
        assert any(list(place.glob(name.rstrip("/"))) for place in places), name


def test_config_reference_has_every_key():
    keys = []
    for _, section in hooks.config_keys((ROOT / "panet_d2/config.py").read_text()):
        for key in section:
            heads = hooks.HEADS if ".AFP." in key.name else hooks.HEADS[:1]
            keys += [key.name.replace(hooks.HEADS[0], head) for head in heads]
    assert sorted(keys) == sorted(key for key, _ in flatten(_panet_config()))


def test_config_reference_keeps_the_text():
    source = """
def _afp_node():
    # Pool from all levels.
    node.ENABLED = False

def _panet_config():
    # ------
    # Pooling (PANet, Sec. 3.2). Needs MODEL.X.
    # ------
    _C.MODEL.ROI_BOX_HEAD.AFP = _afp_node()
    _C.MODEL.ROI_MASK_HEAD.AFP = _afp_node()
    # One of:
    #   "a"  the first,
    #        in two lines.
    #   "b"  the second.
    # Both work.
    _C.MODEL.KIND = "a"
    _C.MODEL.NODE = CN()
    _C.MODEL.NODE.SIZE = 1
"""
    text = hooks.config_reference(source)
    assert "## Pooling\n\nPANet, Sec. 3.2. Needs `MODEL.X`.\n" in text
    assert (
        "### MODEL.ROI_BOX_HEAD.AFP.ENABLED\n\nDefault: `False`\n\nPool from all levels.\n" in text
    )
    assert '- `"a"`: the first, in two lines.\n- `"b"`: the second.\n\nBoth work.\n' in text
    assert "### MODEL.NODE.SIZE\n\nDefault: `1`\n\nSee `MODEL.KIND`.\n" in text
    assert "### MODEL.NODE\n" not in text and text.count("ROI_MASK_HEAD") == 1


def test_figure_is_what_its_script_draws():
    figure = load_script("docs/figures/architecture.py")
    drawn = (ROOT / "docs/figures/architecture.svg").read_text(encoding="utf-8")
    assert figure.draw() == drawn


ERRORS = {"CheckpointError", "ConfigError", "DataError", "ExportError", "TrainingDiverged"}


def messages():
    """The messages of all errors and warnings; "…" stands for what is filled in."""
    files = [*(ROOT / "panet_d2").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    for path in [*files, ROOT / "demo/demo.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            function = ast.unparse(call.func)
            is_error = isinstance(node, ast.Raise) and function in ERRORS
            if is_error or function in ("logger.warning", "warn_once"):
                parts = getattr(call.args[0], "values", [call.args[0]])
                texts = [p.value if isinstance(p, ast.Constant) else "…" for p in parts]
                message = re.sub("%[sdr]", "…", "".join(texts))
                yield pytest.param(message, id=f"{path.stem}-{node.lineno}")


def listed_messages():
    text = (ROOT / "docs/troubleshooting.md").read_text()
    for message in re.findall(r"^\| `([^`]+)`", text, flags=re.MULTILINE):
        yield ".*".join(re.escape(part) for part in re.split(r" ?… ?", message))


@pytest.mark.parametrize("message", messages())
def test_troubleshooting_lists_every_error_and_warning(message):
    if set(message) <= set("….: "):
        return  # the sentence is made elsewhere
    specific = [row for row in listed_messages() if len(re.sub(r"\W|\.\*", "", row)) > 3]
    assert any(re.match(row, message) for row in specific), (
        f"docs/troubleshooting.md needs a row for {message!r}"
    )


def ladder(data):
    """For each row of the report: mask AP, difference above, difference from Mask R-CNN, box AP."""
    folder = RESULTS / DATA[data]
    models = json.loads((folder / "models.json").read_text())
    report = report_table(load_results(str(folder)), models)
    rows = table(f"\n{report}", "### The ladder")
    return [[row[2], row[3], row[4], row[10]] for row in rows]


@pytest.mark.parametrize("data", DATA)
def test_results_are_those_of_the_runs(data):
    text = (ROOT / "docs/results.md").read_text()
    expected = ladder(data)
    assert [row[1:] for row in table(text, f"## {data.title()}")] == expected
    summary = [expected[0][0], expected[-2][0], expected[-1][0], "3"]
    for page, heading in ((text, "## Summary"), ((ROOT / "README.md").read_text(), "## What")):
        rows = [row for row in table(page, heading) if row[0].partition(" (")[0] == data]
        assert [row[1:] for row in rows] == [summary]


def test_times_are_those_of_the_benchmark():
    text = (ROOT / "docs/performance.md").read_text()
    for heading, name in (("## Time of", "cpu_auto"), ("With `MODEL.PAFPN.MEMORY_FORMAT", "cpu")):
        report = (ROOT / f"experiments/results/benchmark/{name}.md").read_text()
        measured = {}
        for head in ("2fc", "4conv1fc"):
            for row in table(report, f"## {head} head"):
                task = row[0].partition(",")[0]
                times = [f"{float(cell.split()[0]) / 1000:.2f} s" for cell in (row[1], row[3])]
                measured[f"{task}, {head}"] = [*times, row[5]]
        rows = [row for row in table(text, heading) if "GPU" not in row[0]]
        assert {row[0]: row[1:] for row in rows} == measured
    report = (ROOT / "experiments/results/benchmark/cpu.md").read_text()
    [boxes] = [r for r in table(report, "## Multi") if r[:2] == ["1000", "max"]]
    forward, backward, _ = table(text, "Time of 1000 boxes")
    assert forward[1:] == [f"{boxes[2]} ms", f"{boxes[3]} ms", boxes[4]]
    assert backward[1:] == [f"{boxes[5]} ms", f"{boxes[6]} ms", boxes[7]]
    sizes = {row[0]: row[1:] for row in table(report, "## The ladder")}
    names = ("0_mask_rcnn_R_50_FPN", "5_ff", "6_hhd")
    assert [row[1:] for row in table(text, "## Arithmetic")] == [sizes[name] for name in names]
