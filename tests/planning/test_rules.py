"""Each rule on data whose right answer is computed by hand."""

from dataclasses import replace

import numpy as np
import pytest

from panet_d2.planning import Hardware, measure
from panet_d2.planning.rules import (
    plan_anchors,
    plan_classes,
    plan_detections,
    plan_nms,
    plan_scale,
)
from panet_d2.planning.training_rules import plan_masks, plan_sampling, plan_schedule

from ..common import tiny_cfg
from .common import content, squares

ROOMY = Hardware(max_megapixels=100)


def values(choices):
    return {key: choice.value for key, choice in choices.items()}


def sized(size, *opts):
    return tiny_cfg("INPUT.MIN_SIZE_TEST", size, "INPUT.MAX_SIZE_TEST", 2 * size, *opts)


def test_scale_enlarges_small_objects():
    """A tenth below 10 of 200 px: 24 px need 480. Detectron2's proportions of sizes are kept."""
    cfg = sized(200, "INPUT.MIN_SIZE_TRAIN", [160, 200])
    planned = values(plan_scale(measure(squares([10] * 9 + [50], (200, 300))), cfg, ROOMY))
    assert planned["INPUT.MIN_SIZE_TEST"] == 480 and planned["INPUT.MAX_SIZE_TEST"] == 960
    assert planned["INPUT.MIN_SIZE_TRAIN"] == [384, 480]
    assert planned["INPUT.MAX_SIZE_TRAIN"] == 960
    assert planned["TEST.AUG.MIN_SIZES"] == [360, 480, 720]


def test_scale_enlarges_at_most_four_times():
    data = measure(squares([2] * 9 + [50], (200, 200)))
    assert plan_scale(data, sized(200), ROOMY)["INPUT.MIN_SIZE_TEST"].value == 800


def test_scale_is_never_below_the_base():
    data = measure(squares([100] * 9 + [150], (200, 200)))
    assert plan_scale(data, sized(200), ROOMY)["INPUT.MIN_SIZE_TEST"].value >= 200


def test_scale_makes_room_for_long_images():
    data = measure(squares([10] * 9 + [50], (200, 800)))
    assert plan_scale(data, sized(200), ROOMY)["INPUT.MAX_SIZE_TEST"].value == 4 * 480


def test_scale_within_the_budget():
    """0.1 megapixels are 316 x 316, in steps of 32: 288."""
    data = measure(squares([10] * 9 + [50], (200, 200)))
    planned = plan_scale(data, sized(200), Hardware(max_megapixels=0.1))
    choice = planned["INPUT.MIN_SIZE_TEST"]
    assert choice.value == 288 and "0.1 megapixels (--max-megapixels)" in choice.reason
    assert "INPUT.CROP.ENABLED" not in planned  # the image itself is not larger than the budget


def test_a_few_panoramas_shrink_alone():
    """
    Of 20 images of 1000 x 1000, two are 300 x 3000. For a longer edge of 10 times the shorter one,
    0.4 megapixels are 192 x 1920, and the other images would be of 192 x 192.
    """
    cfg = sized(800, "INPUT.MIN_SIZE_TRAIN", [800])
    objects = [(0, 0, 40, 40)] * 9 + [(0, 0, 90, 90)]
    images = [(1000, 1000, objects)] * 18 + [(300, 3000, objects)] * 2
    planned = values(plan_scale(measure(content(images)), cfg, Hardware(max_megapixels=0.4)))
    assert planned["INPUT.MIN_SIZE_TRAIN"] == [416]  # with the base's ratio of 2
    assert planned["INPUT.MAX_SIZE_TRAIN"] == 2 * 416
    # Where all are long, all have room.
    images = [(300, 3000, objects)] * 20
    planned = values(plan_scale(measure(content(images)), cfg, Hardware(max_megapixels=0.4)))
    assert planned["INPUT.MIN_SIZE_TRAIN"] == [192]
    assert planned["INPUT.MAX_SIZE_TRAIN"] == 1920


def test_crops_of_images_above_the_budget():
    """
    Images of 1 megapixel, a budget of 0.25: 480 of the 768 that small objects need. Crops of 0.62
    of each side show them as large as whole images of 768 do at the test.
    """
    rle = measure(content([(1000, 1000, [(0, 0, 31, 31)] * 9 + [(0, 0, 300, 300)])] * 2, 1, "rle"))
    planned = plan_scale(rle, sized(480), Hardware(max_megapixels=0.25))
    assert planned["INPUT.CROP.ENABLED"].value is True
    assert planned["INPUT.MIN_SIZE_TEST"].value == 768
    assert planned["INPUT.CROP.SIZE"].value == [0.62, 0.62]
    assert "sliced inference" in planned["INPUT.MIN_SIZE_TEST"].reason
    for megapixels in (2, 0.5):  # 0.5 allows 704, which is close to 768
        fits = plan_scale(rle, sized(480), Hardware(max_megapixels=megapixels))
        assert "INPUT.CROP.ENABLED" not in fits


def test_no_crops_for_the_base_alone():
    """Large objects need no crops, although the base has a larger size than the budget."""
    rle = measure(content([(1000, 1000, [(0, 0, 99, 99)] * 9 + [(0, 0, 300, 300)])] * 2, 1, "rle"))
    planned = plan_scale(rle, sized(800), Hardware(max_megapixels=0.25))
    assert "INPUT.CROP.ENABLED" not in planned
    assert planned["INPUT.MIN_SIZE_TEST"].value == 480


def test_polygons_are_cropped_with_shapely_only(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    data = measure(squares([31] * 9 + [300], (1000, 1000)))
    planned = plan_scale(data, sized(480), Hardware(max_megapixels=0.25))
    assert planned["INPUT.CROP.ENABLED"].value is False
    assert planned["INPUT.MIN_SIZE_TEST"].value == 480


def test_budget_of_memory():
    """0.9 of 24 GiB without 2 for the model, 2 images, 2 GiB for a megapixel: 4.9."""
    cfg = tiny_cfg("MODEL.RESNETS.DEPTH", 50)
    assert Hardware(1, 24).megapixels(cfg) == pytest.approx(4.9)
    assert Hardware(1, 24, 1.5).megapixels(cfg) == 1.5
    assert Hardware().megapixels(cfg) == 0.4


def test_anchor_sizes_double_from_small_objects():
    """Squares of 20 to 200 px: the smallest are 20, and 320 covers the largest."""
    cfg = sized(400, "MODEL.ANCHOR_GENERATOR.SIZES", [[100], [200], [300], [400], [500]])
    sides = [20] * 4 + [30, 50, 80, 120, 160, 200]
    planned = plan_anchors(measure(squares(sides)), cfg, ROOMY)
    sizes = planned["MODEL.ANCHOR_GENERATOR.SIZES"]
    assert sizes.value == [[20], [40], [80], [160], [320]]
    assert "100.0%" in sizes.reason and "base's" in sizes.reason


def test_anchor_sizes_are_round():
    """A smallest object of 20.4 px has a power of 2 times 20, as a person would write it."""
    cfg = sized(400, "MODEL.ANCHOR_GENERATOR.SIZES", [[100], [200], [300], [400], [500]])
    sides = [20.4] * 4 + [30, 50, 80, 120, 160, 200]
    planned = plan_anchors(measure(squares(sides)), cfg, ROOMY)
    assert planned["MODEL.ANCHOR_GENERATOR.SIZES"].value == [[20], [40], [80], [160], [320]]


def test_anchor_sizes_reach_large_objects():
    """From 40 to 1131 px: 1131 / sqrt 2 = 800 is the largest, 50 = 800 / 16 the smallest."""
    cfg = sized(1200)
    sides = [40] * 10 + [1131] * 10
    planned = plan_anchors(measure(squares(sides, (1200, 1200))), cfg, ROOMY)
    assert planned["MODEL.ANCHOR_GENERATOR.SIZES"].value == [[50], [100], [200], [400], [800]]


def test_anchors_are_not_below_three_strides():
    cfg = sized(400, "MODEL.ANCHOR_GENERATOR.SIZES", [[100], [200], [300], [400], [500]])
    planned = plan_anchors(measure(squares([6] * 5 + [20] * 5)), cfg, ROOMY)
    assert planned["MODEL.ANCHOR_GENERATOR.SIZES"].value[0] == [12]


def test_aspect_ratios_of_long_objects():
    """Heights of 1, 4 and 9 times the width, of which the base's 0.5 to 2 miss two."""
    boxes = [(100, 0, 40, 40)] * 6 + [(200, 0, 20, 80)] * 6 + [(300, 0, 20, 180)] * 6
    planned = plan_anchors(measure(content([(400, 400, boxes)] * 2)), sized(400), ROOMY)
    assert planned["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"].value == [[1, 4, 9]]


def test_two_sizes_on_each_level_for_a_wide_range():
    """From 15 to 1131 px: 800 / 15 is more than five levels, but not ten sizes, can double."""
    sides = np.geomspace(15, 1131, 40)
    planned = plan_anchors(measure(squares(sides, (1200, 1200))), sized(1200), ROOMY)
    sizes = planned["MODEL.ANCHOR_GENERATOR.SIZES"]
    assert np.shape(sizes.value) == (5, 2)
    flat = np.ravel(sizes.value)
    assert flat[0] < 20 and flat[-1] > 700 and (flat[1:] < 2 * flat[:-1]).all()
    assert "fewer anchors" in sizes.reason
    assert "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS" in planned
    assert len(planned["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"].value[0]) == 3


def test_more_aspect_ratios_for_boxes_of_all_shapes():
    """A third, 1 and 3, the quantiles, miss the tenths of the boxes with an eighth and with 8."""
    shapes = [(113, 14), (69, 23), *[(40, 40), (60, 60), (80, 80)] * 2, (23, 69), (14, 113)]
    boxes = [(20 + 25 * i, 20 + 80 * (i % 3), *shape) for i, shape in enumerate(shapes)]
    data = measure(content([(400, 400, boxes)] * 5))
    cfg = sized(400, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0, 2.0]])
    key = "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"
    assert plan_anchors(data, cfg, ROOMY)[key].value == [[0.25, 0.5, 1.0, 2.0, 4.0]]


def test_other_numbers_of_aspect_ratios_are_kept():
    boxes = [(100, 0, 40, 40)] * 6 + [(200, 0, 20, 80)] * 6 + [(300, 0, 20, 180)] * 6
    cfg = sized(400, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]])
    planned = plan_anchors(measure(content([(400, 400, boxes)] * 2)), cfg, ROOMY)
    assert planned["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"].value == [[1.0]]


def test_anchors_that_fit_are_kept():
    cfg = sized(400)
    planned = plan_anchors(measure(squares([16, 17, 32, 33, 64, 65, 128, 120, 60, 30])), cfg, ROOMY)
    assert planned["MODEL.ANCHOR_GENERATOR.SIZES"].value == cfg.MODEL.ANCHOR_GENERATOR.SIZES


def test_anchors_of_other_maps_are_kept():
    cfg = sized(400, "MODEL.RPN.IN_FEATURES", ["res4"])
    planned = plan_anchors(measure(squares([20] * 5 + [200] * 5)), cfg, ROOMY)
    assert "FPN" in planned["MODEL.ANCHOR_GENERATOR.SIZES"].reason
    assert planned["MODEL.ANCHOR_GENERATOR.SIZES"].value == cfg.MODEL.ANCHOR_GENERATOR.SIZES


@pytest.mark.parametrize("most, detections", [(16, 100), (93, 100), (120, 200), (375, 400)])
def test_detections(most, detections):
    data = measure(squares([10] * most, number=1))
    planned = plan_detections(data, tiny_cfg(), ROOMY)
    assert planned["TEST.DETECTIONS_PER_IMAGE"].value == detections


def test_detections_and_proposals_of_the_fullest_image_of_the_evaluation():
    data = replace(measure(squares([10] * 90, number=1)), most_at_test=400)
    planned = values(plan_detections(data, tiny_cfg(), ROOMY))
    assert planned["TEST.DETECTIONS_PER_IMAGE"] == 500
    assert planned["MODEL.RPN.POST_NMS_TOPK_TEST"] == 4000
    assert planned["MODEL.RPN.POST_NMS_TOPK_TRAIN"] == 300
    planned = values(plan_detections(replace(data, most_at_test=2000), tiny_cfg(), ROOMY))
    assert planned["MODEL.RPN.POST_NMS_TOPK_TEST"] == 6000


def test_proposals_and_samples():
    """
    100 objects in each image: 300 and 1000 proposals, twice as many before NMS. A quarter of 512
    samples of ROI heads and half of 256 of the RPN have room for them.
    """
    planned = values(plan_detections(measure(squares([10] * 100)), tiny_cfg(), ROOMY))
    assert planned["MODEL.RPN.POST_NMS_TOPK_TRAIN"] == 300
    assert planned["MODEL.RPN.POST_NMS_TOPK_TEST"] == 1000
    assert planned["MODEL.RPN.PRE_NMS_TOPK_TEST"] == 2000
    assert planned["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"] == 512
    assert "MODEL.RPN.BATCH_SIZE_PER_IMAGE" not in planned


def test_nms_of_crowded_objects():
    """Pairs with IoU 0.64 (0.78 of each side's length): lost at 0.5 and 0.6, not at 0.65."""
    shift = 100 * (1 - 2 * 0.64 / 1.64)
    boxes = [(0, 0, 100, 100), (shift, 0, 100, 100)]
    data = measure(content([(200, 200, boxes)] * 20))
    planned = plan_nms(data, tiny_cfg(), ROOMY)
    assert planned["MODEL.ROI_HEADS.NMS_THRESH_TEST"].value == 0.65
    assert planned["MODEL.RPN.NMS_THRESH"].value == 0.7  # the default
    assert "50.0%" in planned["MODEL.ROI_HEADS.NMS_THRESH_TEST"].reason


def test_nms_of_other_classes_is_apart():
    data = measure(content([(200, 200, [(0, 0, 50, 50, 0), (0, 0, 50, 50, 1)])] * 9, classes=2))
    planned = plan_nms(data, tiny_cfg(), ROOMY)
    assert planned["MODEL.ROI_HEADS.NMS_THRESH_TEST"].value == 0.5
    assert planned["MODEL.RPN.NMS_THRESH"].value == 0.9  # as far as it goes


def test_classes():
    data = measure(content([(50, 50, [(0, 0, 9, 9)])], classes=7))
    assert values(plan_classes(data, tiny_cfg(), ROOMY)) == {"MODEL.ROI_HEADS.NUM_CLASSES": 7}
    retinanet = tiny_cfg("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.MASK_ON", False)
    assert values(plan_classes(data, retinanet, ROOMY)) == {"MODEL.RETINANET.NUM_CLASSES": 7}
    without = measure(content([(50, 50, [(0, 0, 9, 9)])], masks="none"))
    assert values(plan_classes(without, tiny_cfg(), ROOMY))["MODEL.MASK_ON"] is False


@pytest.mark.parametrize("masks, expected", [("polygon", "polygon"), ("rle", "bitmask")])
def test_mask_format(masks, expected):
    data = measure(content([(50, 50, [(0, 0, 9, 9)])], masks=masks))
    assert plan_masks(data, tiny_cfg(), ROOMY)["INPUT.MASK_FORMAT"].value == expected


@pytest.mark.parametrize(
    "side, masks, head, resolution",
    [
        (240, "rle", "MaskRCNNConvUpsampleHead", 28),  # above 8 px for each of 28 cells
        (200, "rle", "MaskRCNNConvUpsampleHead", 14),
        (240, "polygon", "MaskRCNNConvUpsampleHead", 14),  # four corners
        (240, "rle", "PANetMaskHead", 14),  # its fully-connected path would be too large
    ],
)
def test_mask_resolution(side, masks, head, resolution):
    boxes = [(0, 0, side, side)] * 9 + [(0, 0, 30, 30)]
    data = measure(content([(400, 400, boxes)] * 2, masks=masks))
    key = "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION"
    planned = plan_masks(data, sized(400, "MODEL.ROI_MASK_HEAD.NAME", head), ROOMY)
    assert values(planned).get(key, 14) == resolution


@pytest.mark.parametrize("empty, dropped", [(0, True), (1, True), (10, False), (80, True)])
def test_empty_images(empty, dropped):
    """Of 100 images, a few are no more than forgotten, and many would fill the batches."""
    images = [(50, 50, [(0, 0, 9, 9)])] * (100 - empty) + [(50, 50, [])] * empty
    planned = plan_sampling(measure(content(images)), tiny_cfg(), ROOMY)
    assert planned["DATALOADER.FILTER_EMPTY_ANNOTATIONS"].value is dropped


def test_rare_classes():
    """Class 2 is in 5 of 200 images, below 10: 10 / 200."""
    images = [(50, 50, [(0, 0, 9, 9, i % 2), *([(9, 9, 9, 9, 2)] * (i < 5))]) for i in range(200)]
    planned = values(plan_sampling(measure(content(images, classes=3)), tiny_cfg(), ROOMY))
    assert planned["DATALOADER.SAMPLER_TRAIN"] == "RepeatFactorTrainingSampler"
    assert planned["DATALOADER.REPEAT_THRESHOLD"] == 0.05
    alike = measure(content([(50, 50, [(0, 0, 9, 9, i % 2)]) for i in range(200)], classes=2))
    kept = plan_sampling(alike, tiny_cfg(), ROOMY)["DATALOADER.SAMPLER_TRAIN"]
    assert kept.value == "TrainingSampler"


def test_schedule_on_a_gpu():
    """
    600 images, 2 GPUs, the base's 16 images fit: 12 passes of COCO times the root of 118287 / 600,
    which is 168, are cut to 150, so 90000 images, 5625 steps.
    """
    cfg = tiny_cfg("SOLVER.BASE_LR", 0.02, "DATASETS.TEST", ["val"])
    data = measure(content([(50, 50, [(0, 0, 9 + i % 9, 9)]) for i in range(600)]))
    planned = values(plan_schedule(data, cfg, Hardware(2, 80)))
    assert planned["SOLVER.IMS_PER_BATCH"] == 16 and planned["SOLVER.BASE_LR"] == 0.02
    assert planned["SOLVER.MAX_ITER"] == 5600 and planned["SOLVER.STEPS"] == [3700, 5000]
    assert planned["SOLVER.WARMUP_ITERS"] == 560 and planned["SOLVER.AMP.ENABLED"] is True
    assert planned["TEST.EVAL_PERIOD"] == planned["SOLVER.CHECKPOINT_PERIOD"] == 560


def test_schedule_on_a_cpu():
    """4 images a step, the learning rate by the linear rule, 12 passes: 1800 steps."""
    cfg = tiny_cfg("SOLVER.BASE_LR", 0.02)
    data = measure(content([(50, 50, [(0, 0, 9 + i % 9, 9)]) for i in range(600)]))
    planned = values(plan_schedule(data, cfg, Hardware()))
    assert planned["SOLVER.IMS_PER_BATCH"] == 4 and planned["SOLVER.BASE_LR"] == 0.005
    assert planned["SOLVER.MAX_ITER"] == 1800 and planned["SOLVER.AMP.ENABLED"] is False
    assert planned["TEST.EVAL_PERIOD"] == 0  # no validation data


def test_batch_that_does_not_fit():
    """A GPU of 10 GiB has 7 for images, 3.5 megapixels: 3 of 1 megapixel, so 2 and not 16."""
    sizes = ("INPUT.MIN_SIZE_TRAIN", [1000], "INPUT.MAX_SIZE_TRAIN", 1000)
    cfg = tiny_cfg(*sizes, "MODEL.RESNETS.DEPTH", 50)
    assert Hardware(1, 10).batch(cfg) == 2
    assert Hardware(8, 10).batch(cfg) == 16
    assert Hardware(32, 10).batch(cfg) == 32  # at least one on each


def test_budget_of_long_images():
    """Images twice as wide as high: 0.1 megapixels are 223 x 447, in steps of 32: 192."""
    data = measure(squares([10] * 9 + [50], (200, 400)))
    planned = plan_scale(data, sized(200), Hardware(max_megapixels=0.1))
    size, longest = (planned[f"INPUT.{k}_SIZE_TEST"].value for k in ("MIN", "MAX"))
    assert size == 192 and size * longest <= 1e5


def test_crops_enlarge_at_most_twice():
    """The test size is at most twice the size that fits in training."""
    boxes = [(0, 0, 10, 10)] * 9 + [(0, 0, 300, 300)]
    data = measure(content([(1000, 1000, boxes)] * 2, 1, "rle"))
    planned = plan_scale(data, sized(192), Hardware(max_megapixels=0.05))  # 192 fits
    assert planned["INPUT.MIN_SIZE_TEST"].value == 384
    assert planned["INPUT.CROP.SIZE"].value == [0.5, 0.5]


def test_samples_are_for_usual_images():
    """One image of five is crowded: the samples are for the others."""
    images = [(400, 400, [(0, 0, 10, 10)] * n) for n in (300, 10, 10, 10, 10)]
    cfg = tiny_cfg("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 512)
    planned = plan_detections(measure(content(images)), cfg, Hardware())
    assert "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE" not in planned


def test_learning_rate_of_adamw():
    """4 images a step instead of 16: half the rate."""
    data = measure(content([(50, 50, [(0, 0, 9 + i % 9, 9)]) for i in range(20)]))
    cfg = tiny_cfg("SOLVER.BASE_LR", 0.0002, "SOLVER.OPTIMIZER", "ADAMW")
    assert plan_schedule(data, cfg, Hardware())["SOLVER.BASE_LR"].value == 0.0001


def test_images_that_are_left_out_are_no_part_of_a_pass():
    """Images that are not trained on are no part of a pass."""
    images = [(50, 50, [(0, 0, 9 + i % 9, 9)]) for i in range(100)] + [(50, 50, [])] * 300
    data = measure(content(images))
    for filtered, steps in ((True, 300), (False, 1200)):  # 12 passes, 4 images a step
        cfg = tiny_cfg("DATALOADER.FILTER_EMPTY_ANNOTATIONS", filtered)
        assert plan_schedule(data, cfg, Hardware())["SOLVER.MAX_ITER"].value == steps


def test_fewer_images_have_more_passes():
    """12 passes of COCO times the root of 118287 / 5000: 58 passes, 18125 steps of 16."""
    data = measure(content([(50, 50, [(0, 0, 9 + i % 9, 9)]) for i in range(5000)]))
    planned = plan_schedule(data, tiny_cfg(), Hardware(2, 80))
    assert planned["SOLVER.MAX_ITER"].value == 18000


def test_if_most_classes_are_rare_none_is_repeated():
    """Three of four classes are in 5 of 200 images: nearly all of these would be repeated."""
    images = [
        (50, 50, [(0, 0, 9, 9, 0), *[(9, 9, 9, 9, c) for c in (1, 2, 3) if i < 5]])
        for i in range(200)
    ]
    planned = plan_sampling(measure(content(images, classes=4)), tiny_cfg(), Hardware())
    assert planned["DATALOADER.SAMPLER_TRAIN"].value == "TrainingSampler"


def test_memory_of_a_deeper_resnet():
    """Twice the memory: half of the 4.9 megapixels of a ResNet-50."""
    cfg = tiny_cfg("MODEL.RESNETS.DEPTH", 101)
    assert Hardware(1, 24).megapixels(cfg) == pytest.approx(2.45)
