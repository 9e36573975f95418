import json

import pytest

from experiments import warm_start as tool
from panet_d2 import cli

from ..checkpoint.test_mask_rcnn import DONOR
from ..common import tiny_cfg, write_coco


def test_curve(tmp_path):
    lines = [{"iteration": 29, "segm/AP": 1.5}, {"iteration": 59, "total_loss": 2.0}]
    lines.append({"iteration": 60, "segm/AP": 2.5, "bbox/AP": 3.5})  # after the last step
    path = tmp_path / "metrics.json"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert tool.curve(str(path)) == {30: 1.5, 60: 2.5}


def test_table():
    results = {"donor": {"training": 40.0, "validation": 35.0}}
    for i, run in enumerate(tool.RUNS):
        curve = {30: 10.0 + i, "60": 20.0 + i}  # JSON has text keys
        results[run] = {"training": i, "validation": i + 0.25, "curve": curve}
    lines = tool.table(results).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][1:] == ["training images, step 0", "step 0", "step 30", "step 60"]
    assert cells[2] == ["Mask R-CNN, the donor", "40.0", "35.0", "", ""]
    assert cells[4] == ["PANet, warm start", "1.0", "1.2", "11.0", "21.0"]


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys):
    """On a dataset of squares. A second call trains nothing."""
    json_file, root = write_coco(tmp_path / "squares")
    data = (
        *("DATASETS.REGISTER_COCO", [["compared_squares", json_file, root]]),
        *("DATASETS.TRAIN", ["compared_squares"]),
        *("DATASETS.TEST", ["compared_squares"]),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "SEED", 1),
    )
    (tmp_path / "panet.yaml").write_text(tiny_cfg(*data).dump())
    no_afp = [f"MODEL.ROI_{head}_HEAD.AFP.ENABLED" for head in ("BOX", "MASK")]
    donor = tiny_cfg(*data, *DONOR, no_afp[0], False, no_afp[1], False)
    (tmp_path / "donor.yaml").write_text(donor.dump())
    command = [
        *("--config-file", str(tmp_path / "panet.yaml")),
        *("--donor-config", str(tmp_path / "donor.yaml")),
        *("--output", str(tmp_path / "out"), "--steps", "2", "--every", "1"),
        *("--calibrate", "2", "--train-images", "2"),
    ]
    assert cli.run(tool.main, command) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results.keys() == {"arguments", "donor", *tool.RUNS}
    assert all(list(results[run]["curve"]) == ["1", "2"] for run in tool.RUNS)
    assert "| PANet, warm start, calibrated |" in capsys.readouterr().out
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("model_final.pth")}
    assert len(written) == 4
    assert cli.run(tool.main, command) == 0
    assert written == {p: p.stat().st_mtime_ns for p in written}
    capsys.readouterr()
    assert cli.run(tool.main, [*command, "--steps", "3"]) == 1
    error = capsys.readouterr().err
    assert "steps was 2 there and is 3 now" in error and "another --output" in error
    assert written == {p: p.stat().st_mtime_ns for p in written}


def test_one_clear_error(tmp_path, capsys):
    missing = str(tmp_path / "missing.yaml")
    command = ["--config-file", missing, "--donor-config", missing, "--donor", missing]
    assert cli.run(tool.main, [*command, "--output", str(tmp_path / "out")]) == 1
    assert "missing.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--steps", "--every"])
def test_numbers_are_numbers(argument):
    with pytest.raises(SystemExit):
        cli.run(tool.main, [argument, "x"])
