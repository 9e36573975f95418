"""What a program gives to the predictor, and what it gets."""

import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image

from panet_d2.data import NamedImageMapper
from panet_d2.engine import Predictor, load_run, setup_config
from panet_d2.errors import CheckpointError, DataError
from panet_d2.modeling import RCNNWithTTA

from ..common import batch, tiny_cfg


def weights(cfg, folder, **beside):
    """The same config with random weights."""
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    torch.manual_seed(0)
    cfg.MODEL.WEIGHTS = str(folder / "model.pth")
    torch.save({"model": build_model(cfg).state_dict(), **beside}, cfg.MODEL.WEIGHTS)
    return cfg


def picture(channels=3):
    return np.random.default_rng(0).integers(0, 256, (40, 60, channels), dtype=np.uint8)


def same(a, b):
    a, b = a["instances"], b["instances"]
    return len(a) > 0 and torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


def test_load_run(tmp_path, capsys):
    """The last weights of the run, where its folder is now."""
    cfg = weights(tiny_cfg("OUTPUT_DIR", "another/folder"), tmp_path)
    folder = tmp_path / "moved"
    folder.mkdir()
    config_file = str(folder / "config.yaml")
    start = torch.load(cfg.MODEL.WEIGHTS)["model"]

    def save(name, value):
        state = {k: torch.full_like(v, value) for k, v in start.items()}
        torch.save({"model": state}, folder / name)

    def loaded(*opts, path=config_file):
        model = load_run(cfg, opts, path)
        assert not model.training
        printed = capsys.readouterr().out.strip().removeprefix("weights: ")
        return model.backbone.fpn_output2.weight.flatten()[0].item(), Path(printed).name

    first = start["backbone.fpn_output2.weight"].flatten()[0].item()
    assert loaded() == (first, "model.pth")  # as after --eval-only
    save("model_0000004.pth", 4)
    (folder / "last_checkpoint").write_text("model_0000004.pth")
    assert loaded() == (4, "model_0000004.pth")  # a run that has not ended
    save("model_final.pth", 5)
    assert loaded() == (4, "model_0000004.pth")  # continued after its end
    (folder / "last_checkpoint").write_text("model_final.pth")
    assert loaded() == (5, "model_final.pth")
    (folder / "last_checkpoint").unlink()
    assert loaded() == (5, "model_final.pth")
    assert loaded("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS) == (first, "model.pth")
    assert loaded(path="configs/own.yaml") == (first, "model.pth")
    cfg.OUTPUT_DIR = str(folder)
    assert loaded(path="configs/own.yaml") == (5, "model_final.pth")
    assert loaded("OUTPUT_DIR", str(folder), path="other/config.yaml") == (5, "model_final.pth")


def test_run_with_other_classes(tmp_path, caplog):
    categories = [[1, "cat"], [2, "dog"], [3, "cow"]]
    cfg = weights(tiny_cfg("DATASETS.CATEGORIES", categories), tmp_path, categories=categories)
    load_run(cfg)
    assert "was trained for the classes" not in caplog.text
    cfg.DATASETS.CATEGORIES = [[1, "dog"], [2, "cat"], [3, "cow"]]
    load_run(cfg)
    message = "was trained for the classes cat, dog, cow, but config and data name them dog, cat"
    assert message in caplog.text


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return Predictor(weights(tiny_cfg(), tmp_path_factory.mktemp("predictor")))


def test_predicts(config_file, tmp_path):
    cfg = weights(setup_config(config_file), tmp_path)
    cfg.freeze()
    image = batch(1)[0]["image"].permute(1, 2, 0).byte().numpy()
    predictor = Predictor(cfg)
    assert predictor(image)["instances"].pred_masks.shape[1:] == image.shape[:2]
    assert predictor.cfg.MODEL.WEIGHTS == cfg.MODEL.WEIGHTS
    expected = torch.load(cfg.MODEL.WEIGHTS)["model"]
    for name, value in predictor.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_stock_config(tmp_path):
    """Without the keys of this package."""
    cfg = weights(tiny_cfg(), tmp_path)
    del cfg.DATASETS["CATEGORIES"]
    assert "instances" in Predictor(cfg)(picture())


def test_refuses_weights_of_another_model(config_file, tmp_path):
    cfg = setup_config(config_file)
    stock = tiny_cfg("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": build_model(stock).state_dict()}, cfg.MODEL.WEIGHTS)
    with pytest.raises(CheckpointError, match="not in the ch.*: backbone.pafpn_"):
        Predictor(cfg)


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_as_detectron2(tmp_path, image_format):
    cfg = weights(tiny_cfg("INPUT.FORMAT", image_format), tmp_path)
    ours, theirs = Predictor(cfg), DefaultPredictor(cfg)
    for image in (picture(), picture().astype(np.float32), picture().astype(np.float64)):
        assert same(ours(image), theirs(image))


def test_views_of_arrays(predictor):
    image = picture()
    rgb = np.ascontiguousarray(image[:, :, ::-1])
    expected = predictor(image)
    assert same(predictor(rgb[:, :, ::-1]), expected)
    assert same(predictor(np.asfortranarray(image)), expected)
    wide = np.zeros((80, 60, 3), np.uint8)
    wide[::2] = image
    assert same(predictor(wide[::2]), expected)


WANTED = "it must be a uint8 BGR array of shape (H, W, 3)."


@pytest.mark.parametrize(
    "image, message",
    [
        (cv2.imread("nowhere.png"), "the image is None, which cv2.imread returns for a file"),
        ("image.png", "the image is the str 'image.png'"),
        (Path("image.png"), "Path 'image.png'"),
        (picture(1)[:, :, 0], "the image is an array of uint8 and shape (40, 60);"),
        (picture(1), "shape (40, 60, 1)"),
        (picture(4), "shape (40, 60, 4)"),
        (picture()[None], "shape (1, 40, 60, 3)"),
        (picture()[:0], "shape (0, 60, 3)"),
        (picture().astype(np.uint16), "an array of uint16 and shape (40, 60, 3);"),
        (picture().astype(np.int64), "int64"),
        (picture() > 9, "bool"),
        (picture().astype(np.float16), "float16"),
        (picture().astype(np.float32) / 255, "float32 and shape (40, 60, 3) with values from 0 to"),
        (picture() / 255, "with values from 0 to 1, not 0 to 255"),
        (picture().astype(np.float32) - 128, "with values from -128 to 127, not 0 to 255"),
        (picture() * np.nan, "with values from nan to nan"),
        (
            torch.from_numpy(picture()),
            "of type Tensor (torch.uint8, shape (40, 60, 3));",
        ),
        (Image.fromarray(picture()), "the image is of type Image;"),
        (picture().tolist(), "the image is of type list;"),
        ([picture()], "the image is of type list;"),
    ],
)
def test_other_inputs(predictor, image, message):
    with pytest.raises(DataError) as e:
        predictor(image)
    assert isinstance(e.value, ValueError)
    assert message in str(e.value) and str(e.value).endswith(WANTED)


def test_black_float_image(predictor):
    predictor(np.zeros((40, 60, 3), np.float32))


def test_model_of_images_from_0_to_1(tmp_path):
    """With a user's own mapper, which the config's mean and deviation give away."""
    cfg = tiny_cfg("MODEL.PIXEL_MEAN", [0.5, 0.5, 0.5], "MODEL.PIXEL_STD", [0.2, 0.2, 0.2])
    assert "instances" in Predictor(weights(cfg, tmp_path))(picture().astype(np.float32) / 255)


@pytest.mark.parametrize("shape", [(4, 12000, 3), (12000, 4, 3)])
def test_narrow_image(predictor, shape):
    with pytest.raises(DataError, match="too narrow: INPUT.MIN_SIZE_TEST 64.*resize it to"):
        predictor(np.zeros((shape[0], shape[1], 3), np.uint8))


def test_one_channel(tmp_path):
    opts = ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [110.0], "MODEL.PIXEL_STD", [60.0]]
    predictor = Predictor(weights(tiny_cfg(*opts), tmp_path))
    gray = picture(1)
    expected = predictor(gray)
    assert same(predictor(gray[:, :, 0]), expected)
    assert same(predictor(np.repeat(gray, 3, axis=2)), expected)
    assert same(predictor(np.repeat(gray, 3, axis=2).astype(np.float32)), expected)
    with pytest.raises(DataError, match=r"shape \(40, 60, 4\); .*\(H, W\) or \(H, W, 1\)"):
        predictor(picture(4))


@pytest.mark.parametrize("channels", [2, 4, 6])
def test_other_channels(tmp_path, channels):
    """Of a user's own mapper: as they are, in units of their own."""
    opts = ["MODEL.PIXEL_MEAN", [9.0] * channels, "MODEL.PIXEL_STD", [50.0] * channels]
    predictor = Predictor(weights(tiny_cfg(*opts, "INPUT.FORMAT", "RGB"), tmp_path))
    image = picture(channels)
    seen = []
    predictor.model.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]["image"]))
    for dtype in (np.uint8, np.uint16, np.float32):
        predictor(image.astype(dtype))
        assert seen[-1].shape[0] == channels
    predictor(np.broadcast_to(np.arange(channels, dtype=np.float32), image.shape))
    assert seen[-1].mean(dim=(1, 2)).tolist() == list(range(channels))  # in the given order
    with pytest.raises(DataError, match=f"\\(H, W, {channels}\\) in the model's own channels"):
        predictor(picture())


CATEGORIES = [[7, "a"], [9, "b"], [1, "c"]]


def test_names_of_the_config(tmp_path):
    """Other programs look for names in the catalog, by the first dataset."""
    cfg = weights(tiny_cfg("DATASETS.CATEGORIES", CATEGORIES), tmp_path)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ["gone_train"], ["gone_test"]
    predictor = Predictor(cfg)
    for metadata in (predictor.metadata, *map(MetadataCatalog.get, ["gone_train", "gone_test"])):
        assert metadata.thing_classes == ["a", "b", "c"]
        assert metadata.thing_dataset_id_to_contiguous_id == {7: 0, 9: 1, 1: 2}
    # A run with other classes may have given its dataset the same name.
    cfg.DATASETS.CATEGORIES = [[1, "x"], [2, "y"], [3, "z"]]
    assert Predictor(cfg).metadata.thing_classes == ["x", "y", "z"]
    assert MetadataCatalog.get("gone_test").thing_classes == ["x", "y", "z"]


def test_names_of_the_checkpoint(tmp_path):
    predictor = Predictor(weights(tiny_cfg(), tmp_path, categories=CATEGORIES))
    assert predictor.metadata.thing_classes == ["a", "b", "c"]
    assert [list(c) for c in predictor.cfg.DATASETS.CATEGORIES] == CATEGORIES


def test_checkpoint_of_other_classes(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("panet_d2"), "propagate", True)
    cfg = tiny_cfg("DATASETS.CATEGORIES", [[1, "b"], [2, "a"], [3, "c"]])
    with caplog.at_level(logging.WARNING, "panet_d2"):
        predictor = Predictor(weights(cfg, tmp_path, categories=CATEGORIES))
    assert "was trained for the classes a, b, c, but config and data name them b, a, c" in (
        caplog.text
    )
    assert predictor.metadata.thing_classes == ["b", "a", "c"]


@pytest.mark.parametrize("categories", [None, "text", [[1]], [[1.5, "a"]], {"a": 1}])
def test_strange_categories_in_a_checkpoint(tmp_path, categories):
    predictor = Predictor(weights(tiny_cfg(), tmp_path, categories=categories))
    assert not predictor.cfg.DATASETS.CATEGORIES


AUG = ("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", [48, 64], "TEST.AUG.MAX_SIZE", 200)


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_test_time_augmentation(tmp_path, image_format):
    """As an evaluation of the image file."""
    cfg = weights(tiny_cfg(*AUG, "TEST.AUG.VFLIP", True, "INPUT.FORMAT", image_format), tmp_path)
    predictor, image = Predictor(cfg), picture()
    cv2.imwrite(str(tmp_path / "image.png"), image)
    loaded = {"file_name": str(tmp_path / "image.png"), "height": 40, "width": 60}
    cfg.INPUT.MIN_SIZE_TEST = 0
    with torch.no_grad():
        expected = RCNNWithTTA(cfg, predictor.model)([NamedImageMapper(cfg, False)(loaded)])[0]
    outputs = predictor(image)
    assert same(predictor(image.astype(np.float64)), predictor(image.astype(np.float32)))
    assert same(outputs, expected) and outputs["instances"].pred_masks.shape[1:] == (40, 60)
    assert not same(
        outputs, {"instances": predictor.model([{**loaded, **_input(image)}])[0]["instances"]}
    )


def _input(image):
    return {"image": torch.from_numpy(image.transpose(2, 0, 1).copy())}


def test_test_time_augmentation_of_one_channel_and_narrow_images(tmp_path):
    gray = ("INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [100.0], "MODEL.PIXEL_STD", [50.0])
    predictor = Predictor(weights(tiny_cfg(*AUG, *gray), tmp_path))
    assert len(predictor(picture(1))["instances"])
    with pytest.raises(DataError, match="too narrow: TEST.AUG.MIN_SIZES"):
        predictor(np.zeros((1, 900), np.uint8))


def test_gray_of_a_bgr_image():
    """Pillow's weights: red counts 0.299, blue 0.114. Images are BGR."""
    predictor = Predictor.__new__(Predictor)  # in the repository: that of test_one_channel
    predictor.takes_gray, predictor.channels = True, 1
    predictor.cfg = tiny_cfg("INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [110.0])
    red = np.zeros((4, 6, 3), np.uint8)
    red[:, :, 2] = 255
    assert (predictor._check(red) == 76).all()
