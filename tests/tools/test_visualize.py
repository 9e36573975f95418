import json
import shutil
from pathlib import Path

import cv2
import pytest
import torch
from detectron2.modeling import build_model

from panet_d2 import cli
from panet_d2.engine import read_config

from ..common import load_script, tiny_cfg, write_coco

visualize = load_script("tools/visualize.py")


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
    return cli.run(
        visualize.main, ["predictions", "--config-file", config, "--output", output, *args]
    )


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
    assert predictions(run, "--results", "lost.json") == 1
    assert "lost.json" in capsys.readouterr().err


@pytest.fixture
def trained(run):
    """The same folder with a model in it, and what training it has written."""
    cfg = tiny_cfg()
    torch.save({"model": build_model(cfg).state_dict()}, run / "model_final.pth")
    lines = [{"iteration": i, "total_loss": 3.0 - i, "loss_cls": 1.0} for i in range(3)]
    lines[-1]["segm/AP"] = 50.0
    (run / "metrics.json").write_text("\n".join(json.dumps(line) for line in lines))
    return run


def test_levels(trained, capsys):
    config, output = str(trained / "config.yaml"), trained / "figures"
    assert (
        cli.run(visualize.main, ["levels", "--config-file", config, "--output", str(output)]) == 0
    )
    assert cv2.imread(str(output / "levels.png")) is not None
    printed = capsys.readouterr().out
    assert "box_pooler" in printed and "mask_pooler" in printed
    found = json.loads((output / "levels.json").read_text())
    assert set(found) == {"box_pooler", "mask_pooler"}
    levels = ["N2", "N3", "N4", "N5"]
    for rows in found.values():
        assert list(rows) == levels
        assert sum(row["proposals"] for row in rows.values()) > 0
        for row in rows.values():
            shares = [row[level] for level in levels]
            if row["proposals"]:
                assert sum(shares) == pytest.approx(1)
                assert all(f"{100 * share:.1f} %" in printed for share in shares)
            else:
                assert shares == [None] * 4


def test_given_weights_go_before_those_of_the_run(trained, capsys):
    config, output = str(trained / "config.yaml"), str(trained / "figures")
    command = ["levels", "--config-file", config, "--output", output]
    assert cli.run(visualize.main, [*command, "MODEL.WEIGHTS", "lost.pth"]) == 1
    assert "lost.pth" in capsys.readouterr().err


def test_masks(trained, capsys):
    config, output = str(trained / "config.yaml"), trained / "figures"
    command = ["masks", "--config-file", config, "--output", str(output), "--number", "3"]
    assert cli.run(visualize.main, command) == 0
    picture = cv2.imread(str(output / "masks.png"))
    assert picture.shape == (24 + 3 * 164, 4 * 164, 3)  # a bar, three rows of four panels
    assert "3 objects" in capsys.readouterr().out


def test_masks_of_objects_that_reach_beyond_the_image(trained, capsys):
    config, output = str(trained / "config.yaml"), trained / "figures"
    cfg = read_config(config)
    (_, json_file, root) = cfg.DATASETS.REGISTER_COCO[0]
    content = json.loads(Path(json_file).read_text())
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [-3, -3, x + w + 3, y + h + 3]
    beyond = Path(json_file).with_name("beyond.json")
    beyond.write_text(json.dumps(content))
    opts = ["DATASETS.REGISTER_COCO", str([["beyond", str(beyond), root]])]
    command = ["masks", "--config-file", config, "--output", str(output), "--number", "3"]
    assert cli.run(visualize.main, [*command, *opts, "DATASETS.TEST", "('beyond',)"]) == 0
    assert cv2.imread(str(output / "masks.png")) is not None
    content["annotations"][0]["bbox"] = [500, 500, 20, 20]  # outside: nothing to draw
    beyond.write_text(json.dumps(content))
    command[-1] = "100"
    assert cli.run(visualize.main, [*command, *opts, "DATASETS.TEST", "('beyond',)"]) == 0
    assert f"{len(content['annotations']) - 1} objects" in capsys.readouterr().out
    content["annotations"] = []
    beyond.with_name("none.json").write_text(json.dumps(content))
    opts = ["DATASETS.REGISTER_COCO", str([["none", str(beyond.with_name("none.json")), root]])]
    assert cli.run(visualize.main, [*command, *opts, "DATASETS.TEST", "('none',)"]) == 1
    assert "dataset none has no objects" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predictions", "levels", "masks"])
def test_no_dataset(trained, command, capsys):
    config, output = str(trained / "config.yaml"), str(trained / "figures")
    opts = ["DATASETS.TEST", "()"]
    assert (
        cli.run(visualize.main, [command, "--config-file", config, "--output", output, *opts]) == 1
    )
    assert "DATASETS.TEST is empty" in capsys.readouterr().err


def test_curves_of_runs_with_the_same_name(trained, tmp_path, monkeypatch):
    for group in "ab":
        (tmp_path / group / "run").mkdir(parents=True)
        shutil.copy(trained / "metrics.json", tmp_path / group / "run")
    drawn = {}
    monkeypatch.setattr(visualize, "plot_training", lambda runs, path: drawn.update(runs))
    runs = [str(tmp_path / group / "run") for group in "ab"]
    assert cli.run(visualize.main, ["curves", *runs, "--output", str(tmp_path / "figures")]) == 0
    assert list(drawn) == runs


def test_results_of_the_dataset_among_several(run, capsys):
    """The evaluation of two datasets; the results looked at are those of the first, or chosen."""
    cfg = read_config(str(run / "config.yaml"))
    _, json_file, root = cfg.DATASETS.REGISTER_COCO[0]
    cfg.DATASETS.REGISTER_COCO = [[n, json_file, root] for n in ("one", "other")]
    cfg.DATASETS.TEST = ["one", "other"]
    (run / "config.yaml").write_text(cfg.dump())
    (run / "inference/other").mkdir()
    name = "coco_instances_results.json"
    (run / "inference" / name).rename(run / "inference/other" / name)
    assert predictions(run, "DATASETS.TEST", "('other',)") == 0
    assert "mask AP 72.3" in capsys.readouterr().out
    assert predictions(run) == 1
    assert f"inference/one/{name} does not exist" in capsys.readouterr().err
    (run / "inference/other").rename(run / "inference/one")
    assert predictions(run) == 0
    assert "mask AP 72.3" in capsys.readouterr().out


def test_results_of_another_dataset(run, capsys):
    """Whose images have the same ids."""
    cfg = read_config(str(run / "config.yaml"))
    _, json_file, root = cfg.DATASETS.REGISTER_COCO[0]
    other = ("DATASETS.REGISTER_COCO", str([["other", json_file, root]]))
    other += ("DATASETS.TEST", "('other',)")
    assert predictions(run, *other) == 1
    assert "was evaluated on pictured_squares, not on other;" in capsys.readouterr().err
    results = str(run / "inference/coco_instances_results.json")
    assert predictions(run, "--results", results, *other) == 0


def test_boxes_alone_have_no_mask_ap(run, capsys):
    """pycocotools makes a mask of each box."""
    file = run / "inference/coco_instances_results.json"
    results = json.loads(file.read_text())
    for result in results:
        del result["segmentation"]
    file.write_text(json.dumps(results))
    assert predictions(run) == 0
    out = capsys.readouterr().out
    assert "box AP 72.3" in out and "mask AP" not in out


NO_RESULTS = {
    "other JSON": '{"images": []}',
    "annotations": '[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]',
    "cut": '[{"image_id": 1, "cat',
    "lines": '{"total_loss": 1.0}\n{"total_loss": 0.9}',
    "numbers": "[1, 2]",
    "not text": "\udcff",
}


@pytest.mark.parametrize("kind", NO_RESULTS)
def test_files_that_are_no_results(run, kind, capsys):
    file = run / "other.json"
    file.write_bytes(NO_RESULTS[kind].encode(errors="surrogateescape"))
    assert predictions(run, "--results", str(file)) == 1
    assert f"error: {file} is not a file of COCO results" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--number", "--images"])
def test_numbers_from_one_on(trained, option, capsys):
    with pytest.raises(SystemExit) as e:
        command = ["masks", "--config-file", str(trained / "config.yaml"), "--output", "x"]
        cli.run(visualize.main, [*command, option, "0"])
    assert e.value.code == 2 and f"{option}: 0 is not at least 1" in capsys.readouterr().err


def test_curves(trained, tmp_path):
    output = tmp_path / "figures"
    assert cli.run(visualize.main, ["curves", str(trained), "--output", str(output)]) == 0
    for name in ("training", "precision_recall"):
        assert cv2.imread(str(output / f"{name}.png")) is not None


def test_curves_on_another_machine(trained, tmp_path, capsys):
    """Without the GPU of the run, and without its data."""
    config = trained / "config.yaml"
    text = config.read_text().replace("DEVICE: cpu", "DEVICE: cuda")
    output = tmp_path / "figures"
    for test_set in ("not_here", "coco_2017_val"):  # given in the config, or built in
        config.write_text(text.replace("pictured_squares", test_set).replace("squares", "lost"))
        assert cli.run(visualize.main, ["curves", str(trained), "--output", str(output)]) == 0
        assert cv2.imread(str(output / "training.png")) is not None
        assert f"no precision of {trained}: " in capsys.readouterr().out
    (trained / "metrics.json").write_text("")
    assert cli.run(visualize.main, ["curves", str(trained), "--output", str(output)]) == 1
    assert "no losses yet" in capsys.readouterr().err


def test_oriented_boxes_are_not_drawn(run, capsys):
    _, json_file, root = read_config(str(run / "config.yaml")).DATASETS.REGISTER_COCO[0]
    content = json.loads(Path(json_file).read_text())
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x + w / 2, y + h / 2, w, h, 30.0]
        del annotation["segmentation"]
    turned = Path(json_file).with_name("turned.json")
    turned.write_text(json.dumps(content))
    opts = [
        *("DATASETS.REGISTER_COCO", str([["turned", str(turned), root]])),
        *("DATASETS.TEST", "('turned',)", "MODEL.MASK_ON", "False"),
        *("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN"),
    ]
    assert predictions(run, *opts) == 1
    assert "visualize.py draws upright boxes only" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, message",
    [
        (["curves", "nowhere"], "nowhere is not the output folder"),
        (["levels", "--config-file", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_one_clear_error(command, message, tmp_path, capsys):
    assert cli.run(visualize.main, [*command, "--output", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    def broken(*args):
        raise ValueError("a bug")

    monkeypatch.setattr(visualize, "match_predictions", broken)
    with pytest.raises(ValueError, match="a bug"):
        predictions(run)
