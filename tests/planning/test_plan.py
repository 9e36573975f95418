import json

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from panet_d2 import model_zoo
from panet_d2.check_config import check_values, flatten
from panet_d2.engine import Trainer, read_config, setup_config
from panet_d2.planning import Hardware, config_text, make_plan, measure, prediction_table
from panet_d2.planning.plan import RULES

from ..common import tiny_cfg
from .common import content, squares

GPUS = Hardware(8, 24)

# Of 1503 objects of 160 images of COCO 2017: quantiles of the root of the box's area divided by the
# image's shorter edge, and of height by width.
SIDES = {
    **{0: 0.0093, 0.01: 0.015, 0.02: 0.0179, 0.05: 0.0249, 0.1: 0.0328, 0.2: 0.0487, 0.3: 0.0667},
    **{0.4: 0.0911, 0.5: 0.1215, 0.6: 0.1607, 0.7: 0.2174, 0.8: 0.3055, 0.9: 0.4686, 0.95: 0.6548},
    **{0.98: 0.909, 0.99: 1.1183, 1: 1.2257},
}
RATIOS = {0: 0.05, 0.05: 0.34, 1 / 6: 0.61, 1 / 3: 0.86, 0.5: 1.16, 2 / 3: 1.62, 5 / 6: 2.42}
RATIOS.update({0.95: 3.46, 1: 7.48})
MOST_OBJECTS = 93  # in an image of train2017


def coco(images=200):
    """Boxes with COCO's statistics, 7 in an image, in its usual sizes of 640 x 427 to 640 x 480."""
    rng = np.random.default_rng(0)
    records = []
    for index in range(images):
        size = [(427, 640), (480, 640), (640, 480), (640, 427)][index % 4]
        boxes = []
        for _ in range(MOST_OBJECTS if index == 0 else 7):
            side = np.interp(rng.random(), list(SIDES), list(SIDES.values())) * min(size)
            ratio = np.interp(rng.random(), list(RATIOS), list(RATIOS.values())) ** 0.5
            h, w = min(side * ratio, size[0] - 1), min(side / ratio, size[1] - 1)
            x, y = rng.random(2) * [size[1] - w, size[0] - h]
            boxes.append((x, y, w, h))
        records.append((*size, boxes))
    return measure(content(records, classes=80))


@pytest.mark.parametrize(
    "base", ["COCO-InstanceSegmentation/panet_R_50_FPN_1x.yaml", "DSB2018/panet_R_18_FPN_gn.yaml"]
)
def test_coco_gives_about_what_detectron2_has(base):
    """From Detectron2's own values and from those for small images."""
    cfg = make_plan(coco(), model_zoo.get_config(base), GPUS, {}).cfg
    sizes = np.ravel(cfg.MODEL.ANCHOR_GENERATOR.SIZES)
    by = sizes / [32, 64, 128, 256, 512]
    assert (by < 1.3).all() and (by > 1 / 1.3).all(), sizes
    assert cfg.INPUT.MIN_SIZE_TEST == pytest.approx(800, rel=0.2)
    assert max(cfg.INPUT.MIN_SIZE_TRAIN) == pytest.approx(800, rel=0.2)
    assert cfg.INPUT.MAX_SIZE_TEST == pytest.approx(1333, rel=0.2)
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 100
    assert cfg.SOLVER.IMS_PER_BATCH in (8, 16) and cfg.MODEL.RPN.NMS_THRESH == 0.7
    assert cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler"


def test_small_objects_are_reached():
    """In images of 256 px with objects of 6 to 20 px, as in microscopy."""
    sides = [6, 7, 8, 9, 10, 12, 14, 16, 18, 20]
    boxes = [(25 * i, 12 * i, s, s) for i, s in enumerate(sides)]
    base = model_zoo.get_config("COCO-InstanceSegmentation/panet_R_50_FPN_1x.yaml")
    base.INPUT.MIN_SIZE_TEST = 256
    data = measure(content([(256, 256, boxes)] * 5))
    shares = make_plan(data, base, GPUS, {}).prediction(data)
    assert shares["base"]["IoU 0.5"] < 0.1 and shares["plan"]["IoU 0.5"] > 0.95
    assert shares["base"]["side of small objects"] == pytest.approx(6.9)


@pytest.mark.parametrize(
    "data, reason",
    [
        (content([(50, 50, [])] * 3), "no objects"),
        (squares([5, 9] * 9, number=1), "only one image"),
        (squares([5, 9], number=2), "only 4 objects"),
        (squares([9] * 9), "same size"),
    ],
)
def test_where_the_data_cannot_say(data, reason):
    """Sizes, anchors and schedule are the base's, with the reason."""
    base = tiny_cfg("MODEL.ROI_HEADS.NUM_CLASSES", 1, "INPUT.MIN_SIZE_TRAIN", [300])
    plan = make_plan(measure(data), base, GPUS, {})
    assert plan.cfg.INPUT == base.INPUT or plan.cfg.INPUT.MASK_FORMAT == "polygon"
    for key in ("INPUT.MIN_SIZE_TEST", "MODEL.ANCHOR_GENERATOR.SIZES", "SOLVER.MAX_ITER"):
        assert reason in plan.kept[key].reason and key not in plan.changed
    prediction_table(plan, measure(data), "train")


def test_reads_back_equal(tmp_path):
    """The file holds the changed keys alone, has comments, and gives the planned config."""
    base = "panet_d2://DSB2018/panet_R_18_FPN_gn.yaml"
    given = {
        "DATASETS.REGISTER_COCO": ([["a: b", "/tmp/it's #1.json", "/tmp/ö x"]] * 2, "a # reason"),
        "MODEL.WEIGHTS": (
            "detectron2://a.pkl",
            "of somebody, and so long that it wraps " * 3,
        ),
    }
    plan = make_plan(coco(20), read_config(base), GPUS, given)
    text = config_text(plan, base, "A title\nin two lines")
    path = tmp_path / "planned.yaml"
    path.write_text(text, encoding="utf-8")
    again = dict(flatten(read_config(str(path))))
    for key, value in flatten(plan.cfg):
        assert json.dumps(again[key]) == json.dumps(value), key
    keys = {key for key, _ in flatten(yaml.safe_load(text))} - {"_BASE_", "VERSION"}
    assert keys == set(plan.changed)
    assert text.startswith("# A title\n# in two lines\n_BASE_: ") and text.count("#") > len(keys)
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_reasons(rule):
    choices = rule(coco(20), tiny_cfg(), GPUS)
    assert choices and all(choice.reason for choice in choices.values())


sides = st.integers(8, 80)
records = st.lists(
    st.tuples(
        sides,
        sides,
        st.lists(st.tuples(*[st.floats(0, 0.9)] * 2, *[st.floats(0.05, 1)] * 2, st.integers(0, 2))),
    ),
    min_size=1,
    max_size=6,
).filter(lambda images: any(boxes for *_, boxes in images))


@settings(
    max_examples=5,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # each example trains: no shrinking
    suppress_health_check=list(HealthCheck),
)
@given(records, st.sampled_from(["polygon", "rle", "none"]))
def test_any_dataset_gives_a_config_that_trains(tmp_path_factory, images, masks):
    folder = tmp_path_factory.mktemp("any")
    whole = []
    for h, w, boxes in images:
        inside = []
        for x, y, bw, bh, category in boxes:
            x, y = int(x * (w - 2)), int(y * (h - 2))
            inside.append((x, y, max(int(bw * (w - x)), 2), max(int(bh * (h - y)), 2), category))
        whole.append((h, w, inside))
    annotations = content(whole, classes=3, masks=masks)
    for image in annotations["images"]:
        picture = np.zeros((image["height"], image["width"], 3), np.uint8)
        cv2.imwrite(str(folder / image["file_name"]), picture)
    (folder / "any.json").write_text(json.dumps(annotations))
    (folder / "base.yaml").write_text(tiny_cfg("SOLVER.IMS_PER_BATCH", 2).dump())
    given = {
        "DATASETS.REGISTER_COCO": ([["any", str(folder / "any.json"), str(folder)]], "here"),
        "DATASETS.TRAIN": (["any"], "here"),
    }
    hardware = Hardware(max_megapixels=0.01)
    plan = make_plan(measure(annotations), read_config(str(folder / "base.yaml")), hardware, given)
    check_values(plan.cfg)
    path = folder / "planned.yaml"
    path.write_text(config_text(plan, str(folder / "base.yaml"), "any"))
    short = ["SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()", "OUTPUT_DIR", str(folder)]
    cfg = setup_config(str(path), short)
    trainer = Trainer(cfg)
    trainer.resume_or_load()
    trainer.train()
    assert (folder / "model_final.pth").is_file()
