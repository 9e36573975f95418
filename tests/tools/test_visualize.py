import importlib.util
import json
from pathlib import Path

import cv2
import pytest

from ..common import tiny_cfg, write_coco

TOOL = Path(__file__).resolve().parents[2] / "tools/visualize.py"
spec = importlib.util.spec_from_file_location("visualize", TOOL)
visualize = importlib.util.module_from_spec(spec)
spec.loader.exec_module(visualize)


@pytest.fixture
def run(tmp_path):
    """The output folder of an evaluation that found everything in three of four images."""
    json_file, root = write_coco(tmp_path / "squares")
    cfg = tiny_cfg(
        *("DATASETS.REGISTER_COCO", [["pictured_squares", json_file, root]]),
        *("DATASETS.TEST", ["pictured_squares"]),
        *("OUTPUT_DIR", str(tmp_path / "run")),
    )
    (tmp_path / "run/inference").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text(cfg.dump())
    keys = ("image_id", "category_id", "bbox", "segmentation")
    annotations = json.loads(Path(json_file).read_text())["annotations"]
    results = [{**{k: a[k] for k in keys}, "score": 0.9} for a in annotations if a["image_id"] != 3]
    (tmp_path / "run/inference/coco_instances_results.json").write_text(json.dumps(results))
    return tmp_path / "run"


def predictions(run, *args):
    output = str(run / "pictures")
    config = str(run / "config.yaml")
    return visualize.main(["predictions", "--config-file", config, "--output", output, *args])


def test_worst_first_and_average_precision(run, capsys):
    assert predictions(run) == 0
    names = sorted(p.name for p in (run / "pictures").iterdir())
    assert len(names) == 4 and names[0] == "000_003.png"
    assert cv2.imread(str(run / "pictures" / names[0])).shape[1] > 2 * 96
    out = capsys.readouterr().out
    # Found are 1 of 2, 2 of 3 and 3 of 3 of the three classes, without a false positive; COCO
    # averages the precision at 101 recalls: (51 / 101 + 67 / 101 + 1) / 3.
    assert "mask AP 72.3  AP50 72.3" in out and " box AP 72.3" in out


def test_number_of_pictures(run):
    assert predictions(run, "--number", "2") == 0
    assert len(list((run / "pictures").iterdir())) == 2


def test_no_results(run, capsys):
    assert predictions(run, "--results", "lost.json") == 2
    assert "lost.json" in capsys.readouterr().err
