"""The demo, from its command line to the files that it writes, on a small random model."""

import json
import os
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from panet_d2 import add_panet_config, cli

from ..common import load_script

DATASET = "demo_test_data"
CATEGORY_IDS = [7, 9]
HEIGHT, WIDTH = 48, 64


demo = load_script("demo/demo.py")


def _picture(seed):
    noise = np.random.RandomState(seed).randint(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def _write_images(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        Image.fromarray(_picture(seed)).save(folder / name)
    return folder


def _config(folder):
    """A PANet that is as small as its parts allow."""
    cfg = get_cfg()
    add_panet_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.BACKBONE.NAME = "build_resnet_pafpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 30
    cfg.MODEL.ROI_HEADS.NAME = "PANetROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(CATEGORY_IDS)
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_MASK_HEAD.NAME = "PANetMaskHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 4
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.INPUT.MAX_SIZE_TEST = 96
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    cfg.DATASETS.TRAIN = ()
    cfg.DATASETS.TEST = ()
    return cfg


def _save_model(cfg, path):
    """Random weights, with which the first class is found with a score of about 0.99."""
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias.copy_(torch.tensor([5.0, 0.0, 0.0]))
    torch.save({"model": model.state_dict()}, path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The part of the command line that names the model: its data set has classes 7 and 9."""
    folder = tmp_path_factory.mktemp("model")
    _write_images(folder / "images", "known.png")
    annotations = {
        "images": [{"id": 1, "file_name": "known.png", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": i, "name": f"class-{i}"} for i in CATEGORY_IDS],
        "annotations": [],
    }
    (folder / "annotations.json").write_text(json.dumps(annotations))
    cfg = _config(folder)
    _save_model(cfg, folder / "model.pth")
    cfg.MODEL.WEIGHTS = str(folder / "model.pth")
    cfg.DATASETS.REGISTER_COCO = [
        [DATASET, str(folder / "annotations.json"), str(folder / "images")]
    ]
    cfg.DATASETS.TEST = [DATASET]
    (folder / "config.yaml").write_text(cfg.dump())
    yield ["--config-file", str(folder / "config.yaml")]
    if DATASET in DatasetCatalog:
        DatasetCatalog.remove(DATASET)
        MetadataCatalog.remove(DATASET)


@pytest.fixture
def images(tmp_path):
    return _write_images(tmp_path / "images", "b.png", "a.jpg", "c.bmp")


def _assert_is_drawing(path, original):
    drawing = np.asarray(Image.open(path).convert("RGB"))
    assert drawing.shape == original.shape
    assert np.abs(drawing.astype(int) - original).mean() > 1, "nothing is drawn"


def _assert_error(capfd, *parts):
    """That stderr is one line with these parts."""
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(lines) == 1, lines
    for part in ("error: ", *parts):
        assert str(part) in lines[0]


@pytest.mark.parametrize("name", ["out.png", "new/folder/out.jpg"])
def test_one_image_to_a_file(model, images, tmp_path, name):
    argv = [*model, "--input", str(images / "a.jpg"), "--output", str(tmp_path / name)]
    assert cli.run(demo.main, argv) == 0
    _assert_is_drawing(tmp_path / name, _picture(1))


def test_folder_to_folder(model, images, tmp_path):
    (images / "notes.txt").write_text("not an image")
    _write_images(images / "subfolder", "not_searched.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.jpg").write_text("from an earlier run")
    argv = [*model, "--input", str(images), "--output", str(tmp_path / "out")]
    assert cli.run(demo.main, argv) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["a.jpg", "b.png", "c.bmp"]
    _assert_is_drawing(tmp_path / "out" / "a.jpg", _picture(1))
    _assert_is_drawing(tmp_path / "out" / "b.png", _picture(0))


def test_inputs_are_sorted_and_unique(tmp_path):
    folder = _write_images(tmp_path / "in[1]", "10.png", "02.PNG", "1.jpg")
    given = [str(folder / "10.png"), str(folder), str(folder) + "/./1.jpg"]
    found, empty = demo.find_images(given)
    assert [os.path.basename(path) for path in found] == ["10.png", "02.PNG", "1.jpg"]
    assert empty == []


def test_glob_and_json(model, images, tmp_path, monkeypatch):
    monkeypatch.chdir(images)
    out = tmp_path / "new" / "results.json"
    assert cli.run(demo.main, [*model, "--input", "*.[jp][pn]g", "--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert list(dict.fromkeys(r["image_id"] for r in results)) == ["a.jpg", "b.png"]
    assert sorted(os.listdir(images)) == ["a.jpg", "b.png", "c.bmp"]  # no pictures, nothing left
    assert os.listdir(out.parent) == [out.name]
    for r in results:
        assert r["file_name"] == r["image_id"]
        assert r["category_id"] == CATEGORY_IDS[0]
        assert 0.5 < r["score"] <= 1
        x, y, w, h = r["bbox"]
        assert 0 <= x <= x + w <= WIDTH and 0 <= y <= y + h <= HEIGHT
        assert isinstance(r["segmentation"]["counts"], str)
        assert mask_util.decode(r["segmentation"]).shape == (HEIGHT, WIDTH)

    known = COCO()
    known.dataset = {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in ("a.jpg", "b.png")],
        "categories": [{"id": i, "name": str(i)} for i in CATEGORY_IDS],
        "annotations": [],
    }
    known.createIndex()
    assert len(known.loadRes(str(out)).getAnnIds(imgIds=["a.jpg"])) == 5


def test_threshold_of_one_finds_nothing(model, images, tmp_path):
    argv = [*model, "--input", str(images), "--json", str(tmp_path / "r.json")]
    assert cli.run(demo.main, [*argv, "--confidence-threshold", "1.0"]) == 0
    assert json.loads((tmp_path / "r.json").read_text()) == []


@pytest.mark.parametrize(
    "opts",
    [
        ["TEST.SOFT_NMS.ENABLED", "True", "TEST.SOFT_NMS.METHOD", "gaussian"],
        ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.ROTATIONS", "[90]"],
    ],
)
def test_options_of_inference(model, images, tmp_path, opts):
    """What Soft-NMS lowers below the threshold is left out, too."""
    found = {}
    for name, extra in (("plain", []), ("changed", opts)):
        argv = [*model, "--input", str(images), "--json", str(tmp_path / name)]
        argv += ["--confidence-threshold", "0.5", "--opts", *extra]
        assert cli.run(demo.main, argv) == 0
        found[name] = json.loads((tmp_path / name).read_text())
    assert 0 < len(found["changed"]) and found["changed"] != found["plain"]
    assert all(result["score"] >= 0.5 for result in found["changed"])


def test_threshold_is_a_probability(model, images, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.run(demo.main, [*model, "--input", str(images), "--confidence-threshold", "50"])
    assert "--confidence-threshold must be from 0 to 1" in capsys.readouterr().err


def test_unreadable_images_are_skipped(model, images, tmp_path, capfd):
    (images / "broken.png").write_text("not a PNG")
    whole = (images / "b.png").read_bytes()
    (images / "truncated.png").write_bytes(whole[: len(whole) // 2])
    argv = [*model, "--input", str(images), str(tmp_path / "none" / "*.png")]
    argv += ["--output", str(tmp_path / "out"), "--json", str(tmp_path / "r.json")]
    assert cli.run(demo.main, argv) == 1
    err = capfd.readouterr().err
    assert f"cannot read image {images / 'broken.png'}: " in err
    assert f"cannot read image {images / 'truncated.png'}: " in err
    assert f"no image found in {tmp_path / 'none' / '*.png'}" in err
    assert err.rstrip().endswith("3 of 6 inputs could not be used")
    assert sorted(os.listdir(tmp_path / "out")) == ["a.jpg", "b.png", "c.bmp"]
    assert len({r["image_id"] for r in json.loads((tmp_path / "r.json").read_text())}) == 3


def test_unusable_images_are_skipped(model, images, tmp_path, capfd, caplog):
    """What the decoder takes, but the model cannot: resized to nothing, or of 16 bits."""
    Image.fromarray(np.zeros((2, 4000, 3), np.uint8)).save(images / "narrow.png")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(images / "deep.png")
    pages = [Image.fromarray(_picture(seed)) for seed in range(3)]
    pages[0].save(images / "pages.tif", save_all=True, append_images=pages[1:])
    argv = [*model, "--input", str(images), "--output", str(tmp_path / "out")]
    assert cli.run(demo.main, [*argv, "--json", str(tmp_path / "r.json")]) == 1
    err = capfd.readouterr().err
    assert f"cannot use image {images / 'narrow.png'}: the image of 4000x2 pixels is too" in err
    assert f"cannot use image {images / 'deep.png'}: it has more than 8 bits per channel" in err
    assert f"{images / 'pages.tif'} has 3 pages; only the first is used" in caplog.text
    assert err.rstrip().endswith("2 of 6 inputs could not be used")
    names = ["a.jpg", "b.png", "c.bmp", "pages.tif"]
    assert sorted(os.listdir(tmp_path / "out")) == names
    results = json.loads((tmp_path / "r.json").read_text())
    assert sorted({os.path.basename(r["image_id"]) for r in results}) == names


@pytest.fixture
def gray_model(model, tmp_path):
    cfg = _config(tmp_path)
    opts = ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [110.0], "MODEL.PIXEL_STD", [60.0]]
    cfg.merge_from_list(opts)
    _save_model(cfg, tmp_path / "gray.pth")
    return [*map(str, opts), "MODEL.WEIGHTS", str(tmp_path / "gray.pth")]


def test_one_channel(model, gray_model, images, tmp_path):
    Image.fromarray(_picture(1)[:, :, 0]).save(images / "gray.png")
    argv = [*model, "--input", str(images), "--output", str(tmp_path / "out")]
    assert cli.run(demo.main, [*argv, "--opts", *gray_model]) == 0
    assert len(os.listdir(tmp_path / "out")) == 4
    _assert_is_drawing(tmp_path / "out" / "b.png", _picture(0))


def test_one_channel_video(model, gray_model, video, tmp_path):
    argv = [*model, "--video-input", str(video), "--output", str(tmp_path / "out.avi")]
    assert cli.run(demo.main, [*argv, "--opts", *gray_model]) == 0
    assert len(_read_video(tmp_path / "out.avi")[0]) == 3


def test_other_channels(model, images, tmp_path, capfd):
    argv = [*model, "--input", str(images), "--output", str(tmp_path / "out"), "--opts"]
    opts = ["MODEL.PIXEL_MEAN", "[1.0, 1.0, 1.0, 1.0]", "MODEL.PIXEL_STD", "[1.0, 1.0, 1.0, 1.0]"]
    assert cli.run(demo.main, [*argv, *opts]) == 1
    _assert_error(capfd, "MODEL.PIXEL_MEAN has 4 values", "panet_d2.engine.Predictor")


def _without_data(model, tmp_path, categories):
    """The command line of a run whose dataset is not at hand."""
    cfg = get_cfg()
    add_panet_config(cfg)
    cfg.merge_from_file(model[1])
    cfg.DATASETS.REGISTER_COCO, cfg.DATASETS.TEST = (), ("gone_demo_data",)
    cfg.DATASETS.CATEGORIES = categories
    (tmp_path / "config.yaml").write_text(cfg.dump())
    return ["--config-file", str(tmp_path / "config.yaml")]


@pytest.mark.parametrize("where", ["train", "config", "checkpoint", "nowhere"])
def test_json_has_the_ids_that_are_known(model, images, tmp_path, capfd, where):
    categories = [[i, f"class-{i}"] for i in CATEGORY_IDS]
    argv = _without_data(model, tmp_path, categories if where == "config" else ())
    opts = []
    if where == "train":
        argv = model
        opts = ["DATASETS.TEST", "()", "DATASETS.TRAIN", f"('{DATASET}',)"]
    elif where == "checkpoint":
        content = torch.load(Path(model[1]).with_name("model.pth"))
        torch.save({**content, "categories": categories}, tmp_path / "run.pth")
        opts = ["MODEL.WEIGHTS", str(tmp_path / "run.pth")]
    argv = [*argv, "--input", str(images / "a.jpg"), "--json", str(tmp_path / "r.json")]
    assert cli.run(demo.main, [*argv, "--opts", *opts]) == 0
    ids = {r["category_id"] for r in json.loads((tmp_path / "r.json").read_text())}
    assert ids == ({0} if where == "nowhere" else {CATEGORY_IDS[0]})
    said = capfd.readouterr().err.count("category ids count from 0")
    assert said == (where == "nowhere")


CHINESE = "\u7ec6\u80de"


def _draw_chinese(model, images, tmp_path, monkeypatch, fonts):
    monkeypatch.setattr(demo.font_manager, "findSystemFonts", lambda: fonts)
    monkeypatch.setitem(demo.rcParams, "font.sans-serif", ["DejaVu Sans"])
    argv = _without_data(model, tmp_path, [[7, CHINESE], [9, "spot"]])
    argv += ["--input", str(images / "a.jpg"), "--output", str(tmp_path / "out.png")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert cli.run(demo.main, argv) == 0
    assert not [w for w in caught if "Glyph" in str(w.message)]
    return np.asarray(Image.open(tmp_path / "out.png")).astype(int)


def test_names_that_no_font_can_draw(model, images, tmp_path, monkeypatch, capfd):
    _draw_chinese(model, images, tmp_path, monkeypatch, fonts=[])
    err = capfd.readouterr().err
    assert err.count(f"no installed font can draw {CHINESE}, so pictures have the numbers") == 1
    assert "spot" not in err


def test_names_that_another_font_can_draw(model, images, tmp_path, monkeypatch, capfd):
    without = _draw_chinese(model, images, tmp_path, monkeypatch, fonts=[])
    capfd.readouterr()
    builder = FontBuilder(1000, isTTF=True)
    letters = {ord(c): f"u{ord(c)}" for c in f"{CHINESE}spot0123456789% "}
    pen = TTGlyphPen(None)
    for i, point in enumerate([(0, 0), (0, 700), (900, 700), (900, 0)]):
        (pen.lineTo if i else pen.moveTo)(point)
    pen.closePath()
    names = [".notdef", *letters.values()]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(letters)
    builder.setupGlyf({name: pen.glyph() for name in names})
    builder.setupHorizontalMetrics({name: (1000, 0) for name in names})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Demo Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "squares.ttf")
    (tmp_path / "broken.ttf").write_text("no font")
    fonts = [str(tmp_path / "broken.ttf"), str(tmp_path / "squares.ttf")]
    drawn = _draw_chinese(model, images, tmp_path, monkeypatch, fonts)
    assert "font" not in capfd.readouterr().err
    assert (drawn != without).any()


def test_one_unreadable_image(model, tmp_path, capfd):
    (tmp_path / "broken.png").write_text("not a PNG")
    argv = [*model, "--input", str(tmp_path / "broken.png"), "--json", str(tmp_path / "r.json")]
    assert cli.run(demo.main, argv) == 1
    err = capfd.readouterr().err
    assert err.count("broken.png: ") == 1 and "inputs" not in err
    assert os.listdir(tmp_path) == ["broken.png"]  # [] would say that nothing is in the image


def test_no_input_found(model, tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    argv = [*model, "--output", str(tmp_path / "out"), "--input"]
    assert (
        cli.run(demo.main, [*argv, str(tmp_path / "empty"), str(tmp_path / "x*.png"), "y.png"]) == 1
    )
    _assert_error(capfd, f"no image found in {tmp_path / 'empty'}, {tmp_path / 'x*.png'}, y.png")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("link", [False, True])
def test_inputs_are_not_overwritten(model, images, tmp_path, capfd, link):
    output = images
    if link:
        output = tmp_path / "link"
        output.symlink_to(images, target_is_directory=True)
    before = (images / "a.jpg").read_bytes()
    assert cli.run(demo.main, [*model, "--input", str(images), "--output", str(output)]) == 1
    _assert_error(capfd, output / "a.jpg", "will not be overwritten")
    assert (images / "a.jpg").read_bytes() == before


def test_json_of_lvis_counts_from_one(model):
    """Its categories have no other numbers, and Detectron2's evaluator adds one to them too."""
    MetadataCatalog.get("like_lvis").set(evaluator_type="lvis", thing_classes=["a", "b"])
    args = demo.parse([*model, "--input", "x.png", "--opts", "DATASETS.TEST", "('like_lvis',)"])
    found = Instances((HEIGHT, WIDTH))
    found.pred_boxes = Boxes(torch.tensor([[10.0, 10, 40, 30]]))
    found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([1])
    (result,) = demo.Model(args).results({"instances": found}, 4, "x.png")
    assert result["category_id"] == 2


def test_json_does_not_overwrite_the_config(model, images, capfd):
    before = Path(model[1]).read_bytes()
    assert cli.run(demo.main, [*model, "--input", str(images), "--json", model[1]]) == 1
    _assert_error(capfd, model[1], "will not be overwritten")
    assert Path(model[1]).read_bytes() == before


def test_json_does_not_overwrite_the_weights(model, images, tmp_path, capfd):
    weights = tmp_path / "weights.json"
    weights.write_bytes((Path(model[1]).parent / "model.pth").read_bytes())
    argv = [*model, "--input", str(images), "--json", str(weights), "--opts"]
    assert cli.run(demo.main, [*argv, "MODEL.WEIGHTS", str(weights)]) == 1
    _assert_error(capfd, weights, "will not be overwritten")


def test_weights_of_a_run_are_its_last(model, images, tmp_path, capfd):
    """Not those that its training started from, unless these are asked for."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(Path(model[1]).read_text())
    started = Path(model[1]).parent / "model.pth"
    cfg = _config(run)
    torch.manual_seed(9)
    torch.save({"model": build_model(cfg).state_dict()}, run / "model_final.pth")
    argv = ["--config-file", str(run / "config.yaml"), "--input", str(images)]
    argv += ["--json", str(tmp_path / "r.json"), "--confidence-threshold", "0.01"]

    def results(*opts):
        assert cli.run(demo.main, [*argv, *opts]) == 0
        return json.loads((tmp_path / "r.json").read_text())

    found = results()
    assert f"weights: {run / 'model_final.pth'}" in capfd.readouterr().err
    assert found == results("--opts", "MODEL.WEIGHTS", str(run / "model_final.pth"))
    assert found != results("--opts", "MODEL.WEIGHTS", str(started))


def test_outputs_that_cannot_be(model, images, tmp_path, capfd):
    argv = [*model, "--input", str(images), "--output"]
    assert cli.run(demo.main, [*argv, str(tmp_path / "out.png")]) == 1
    _assert_error(capfd, "out.png is one file, but there are 3 images")
    assert cli.run(demo.main, [*argv, str(tmp_path / "out.xyz")]) == 1
    _assert_error(capfd, "out.xyz must be a folder or end in .png, ")
    other = _write_images(tmp_path / "other", "a.jpg")
    argv = [*model, "--input", str(images), str(other), "--output", str(tmp_path / "out")]
    assert cli.run(demo.main, argv) == 1
    _assert_error(capfd, "several images would be saved as", tmp_path / "out" / "a.jpg")
    (tmp_path / "file").write_text("")
    argv = [*model, "--input", str(images), "--output", str(tmp_path / "file")]
    assert cli.run(demo.main, argv) == 1
    _assert_error(capfd, tmp_path / "file")


def test_json_is_whole_or_absent(model, images, tmp_path, monkeypatch):
    """A bug that ends the program while it writes leaves the file before."""
    (tmp_path / "r.json").write_text("[]")
    argv = [*model, "--input", str(images), "--json", str(tmp_path / "r.json")]
    monkeypatch.setattr(demo.Model, "results", lambda *args: [{"a": 1}, {"b": object()}])
    with pytest.raises(TypeError):
        demo.main(argv)
    assert (tmp_path / "r.json").read_text() == "[]"
    assert not list(tmp_path.glob("r.json.*"))


def test_weights_of_another_model(model, images, tmp_path, capfd):
    cfg = _config(tmp_path)
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    _save_model(cfg, tmp_path / "other.pth")
    argv = [*model, "--input", str(images), "--output", str(tmp_path / "out")]
    assert cli.run(demo.main, [*argv, "--opts", "MODEL.WEIGHTS", str(tmp_path / "other.pth")]) == 1
    _assert_error(capfd, "does not match the model")


def test_config_errors(model, images, tmp_path, capfd):
    argv = ["--input", str(images), "--output", str(tmp_path / "out")]
    assert cli.run(demo.main, ["--config-file", str(tmp_path / "no.yaml"), *argv]) == 1
    _assert_error(capfd, "no.yaml")
    assert cli.run(demo.main, [*model, *argv, "--opts", "MODEL.NOPE", "1"]) == 1
    _assert_error(capfd, "NOPE")
    assert (
        cli.run(demo.main, [*model, *argv, "--opts", "MODEL.WEIGHTS", str(tmp_path / "no.pth")])
        == 1
    )
    _assert_error(capfd, "no.pth")


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 12.0, (WIDTH, HEIGHT))
    if not writer.isOpened():
        pytest.skip("this build of OpenCV cannot write MJPG videos")
    for seed in range(3):
        writer.write(_picture(seed)[:, :, ::-1])
    writer.release()
    return path


def _read_video(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while True:
        there_is_one, frame = capture.read()
        if not there_is_one:
            return frames, capture.get(cv2.CAP_PROP_FPS)
        frames.append(frame)


def test_video(model, video, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [*model, "--video-input", video.name, "--output", "out.avi", "--json", "r.json"]
    assert cli.run(demo.main, argv) == 0
    before, _ = _read_video(video)
    after, fps = _read_video(tmp_path / "out.avi")
    assert fps == 12
    assert [frame.shape for frame in after] == [(HEIGHT, WIDTH, 3)] * 3
    assert all(cv2.absdiff(a, b).mean() > 1 for a, b in zip(after, before))
    results = json.loads((tmp_path / "r.json").read_text())
    assert sorted({r["image_id"] for r in results}) == [0, 1, 2]
    assert {r["file_name"] for r in results} == {video.name}


def test_video_to_mp4_and_folder(model, video, tmp_path, capfd):
    argv = [*model, "--video-input", str(video), "--output"]
    if cli.run(demo.main, [*argv, str(tmp_path / "out.mp4")]) == 1:
        assert "OpenCV cannot write the video" in capfd.readouterr().err
        pytest.skip("this build of OpenCV cannot write MP4 videos")
    assert len(_read_video(tmp_path / "out.mp4")[0]) == 3
    assert cli.run(demo.main, [*argv, str(tmp_path / "out")]) == 0
    assert os.listdir(tmp_path / "out") == ["clip.avi"]


def test_video_that_ends_early(model, video, tmp_path, monkeypatch, capfd):
    argv = [*model, "--video-input", str(video), "--json", str(tmp_path / "r.json")]
    assert cli.run(demo.main, argv) == 0
    assert "ends after" not in capfd.readouterr().err
    real = cv2.VideoCapture.get

    class Longer:
        def __init__(self, path):
            self.capture = real_capture(path)

        def get(self, key):
            value = real(self.capture, key)
            return 2 * value if key == cv2.CAP_PROP_FRAME_COUNT else value

        def __getattr__(self, name):
            return getattr(self.capture, name)

    real_capture = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Longer)
    assert cli.run(demo.main, argv) == 0
    assert f"{video} ends after 3 of about 6 frames" in capfd.readouterr().err


def test_videos_that_cannot_be(model, video, tmp_path, capfd, monkeypatch):
    assert cli.run(demo.main, [*model, "--video-input", str(video), "--output", str(tmp_path)]) == 1
    _assert_error(capfd, video, "will not be overwritten")
    argv = [*model, "--output", str(tmp_path / "out.mp4"), "--video-input"]
    assert cli.run(demo.main, [*argv, str(tmp_path / "no.avi")]) == 1
    assert f"error: cannot open {tmp_path / 'no.avi'} as a video" in capfd.readouterr().err
    monkeypatch.setitem(demo.VIDEOS, ".mp4", ("none",))
    assert cli.run(demo.main, [*argv, str(video)]) == 1
    assert "out.mp4 (codecs tried: none)" in capfd.readouterr().err


def test_webcam_ends_with_interrupt(model, video, tmp_path, monkeypatch):
    frames = _read_video(video)[0]

    class Webcam:
        """Endless, until the user presses Ctrl-C."""

        def __init__(self, number):
            assert number == 0

        def isOpened(self):
            return True

        def get(self, _):
            return -1.0

        def read(self):
            if not frames:
                raise KeyboardInterrupt
            return True, frames.pop(0)

    monkeypatch.setattr(cv2, "VideoCapture", Webcam)
    argv = [*model, "--webcam", "--output", str(tmp_path / "out.avi")]
    assert cli.run(demo.main, [*argv, "--json", str(tmp_path / "r.json")]) == 0
    monkeypatch.undo()
    assert len(_read_video(tmp_path / "out.avi")[0]) == 3
    results = json.loads((tmp_path / "r.json").read_text())
    assert sorted({(r["image_id"], r["file_name"]) for r in results}) == [
        (0, "webcam-0"),
        (1, "webcam-0"),
        (2, "webcam-0"),
    ]


@pytest.mark.parametrize("keys, shown", [([255, ord("n"), ord("q")], 2), ([27], 1), ([1, 2, 3], 3)])
def test_window(model, images, monkeypatch, keys, shown):
    pictures = []
    monkeypatch.setattr(demo, "check_display", lambda: None)
    monkeypatch.setattr(cv2, "imshow", lambda _, picture: pictures.append(picture))
    monkeypatch.setattr(cv2, "waitKey", lambda _: keys.pop(0))
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: 1.0)
    assert cli.run(demo.main, [*model, "--input", str(images)]) == 0
    assert [picture.shape for picture in pictures] == [(HEIGHT, WIDTH, 3)] * shown


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="DISPLAY matters on Linux only")
def test_no_display(model, images, capfd, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    assert cli.run(demo.main, [*model, "--input", str(images)]) == 1
    _assert_error(capfd, "--output")


def _panoptic_and_keypoints():
    """Outputs as of Panoptic FPN and Keypoint R-CNN for one image, without running them."""
    masks = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    masks[0, 10:30, 10:40] = True
    instances = Instances(
        (HEIGHT, WIDTH),
        pred_boxes=Boxes(torch.tensor([[10.0, 10.0, 40.0, 30.0]])),
        scores=torch.tensor([0.9]),
        pred_classes=torch.tensor([1]),
    )
    segments = torch.ones(HEIGHT, WIDTH, dtype=torch.int32)
    segments[masks[0]] = 2
    info = [
        {"id": 1, "isthing": False, "category_id": 3, "area": 100},
        {"id": 2, "isthing": True, "category_id": 1, "score": 0.9, "instance_id": 0},
    ]
    keypoints = torch.tensor([[[12.0, 12.0, 0.9], [35.5, 28.5, 0.8]]])
    return instances, (segments, info), keypoints


@pytest.mark.parametrize("is_video", [False, True])
@pytest.mark.parametrize("kind", ["panoptic", "keypoints"])
def test_other_outputs(model, tmp_path, monkeypatch, is_video, kind):
    instances, panoptic, keypoints = _panoptic_and_keypoints()
    if kind == "keypoints":
        instances.pred_keypoints = keypoints.clone()

    class FakePredictor:
        metadata = Metadata()

        def __init__(self, cfg):
            assert cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH == 0.25
            self.cfg = cfg

        def __call__(self, image):
            outputs = {"instances": instances}
            return {**outputs, "panoptic_seg": panoptic} if kind == "panoptic" else outputs

    monkeypatch.setattr(demo, "Predictor", FakePredictor)
    source = ["--webcam"] if is_video else ["--input", "x.png"]
    opts = ["DATASETS.TEST", "()", "MODEL.META_ARCHITECTURE", "PanopticFPN"]
    args = demo.parse([*model, *source, "--confidence-threshold", "0.25", "--opts", *opts])
    wrapped = demo.Model(args)
    image = np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)
    drawing = wrapped.draw(image, wrapped.predictor(image))
    assert drawing.shape == image.shape and drawing.dtype == np.uint8
    changed = (drawing != image).any(axis=2)
    assert changed.mean() > (0.9 if kind == "panoptic" else 0.01)

    (result,) = wrapped.results(wrapped.predictor(image), 4, "x.png")
    assert result["category_id"] == 1  # without a known data set, the model's own number
    assert result["bbox"] == [10, 10, 30, 20]
    assert "segmentation" not in result
    assert ("keypoints" in result) == (kind == "keypoints")
    if kind == "keypoints":  # COCO counts pixels, Detectron2 measures from their corners
        assert result["keypoints"] == pytest.approx([11.5, 11.5, 0.9, 35.0, 28.0, 0.8])


def test_pictures_that_cannot_be_written(model, images, tmp_path, monkeypatch, capfd):
    """The others are, and the results of all."""
    save = Image.Image.save

    def fail_for_b(self, path, **kwargs):
        if str(path).endswith("b.png"):
            raise ValueError("too large for this format")
        save(self, path, **kwargs)

    monkeypatch.setattr(Image.Image, "save", fail_for_b)
    argv = [*model, "--input", str(images), "--output", str(tmp_path / "out")]
    assert cli.run(demo.main, [*argv, "--json", str(tmp_path / "r.json")]) == 1
    one = [*model, "--input", str(images / "b.png"), "--output", str(tmp_path / "out")]
    assert cli.run(demo.main, [*one, "--json", str(tmp_path / "one.json")]) == 1
    assert json.loads((tmp_path / "one.json").read_text())
    err = capfd.readouterr().err
    assert f"cannot write {tmp_path / 'out' / 'b.png'}: too large" in err
    assert sorted(os.listdir(tmp_path / "out")) == ["a.jpg", "c.bmp"]
    assert len({r["image_id"] for r in json.loads((tmp_path / "r.json").read_text())}) == 3


def test_folders_that_cannot_be_written_to(model, images, capfd):
    """Before the first prediction."""
    argv = [*model, "--input", str(images / "a.jpg"), "--json", "/proc/results.json"]
    assert cli.run(demo.main, argv) == 1
    assert "no file can be written in /proc" in capfd.readouterr().err
