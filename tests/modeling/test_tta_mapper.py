import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data.transforms import HFlipTransform, TransformList, VFlipTransform
from detectron2.modeling import DatasetMapperTTA, GeneralizedRCNNWithTTA, build_model

from panet_d2.errors import ConfigError, DataError
from panet_d2.modeling import MapperTTA, Rotate90Transform

from ..common import tiny_cfg

AUG = ("TEST.AUG.ENABLED", True, "TEST.AUG.MAX_SIZE", 400)
EVERY_VIEW = ("TEST.AUG.FLIP", True, "TEST.AUG.VFLIP", True, "TEST.AUG.ROTATIONS", [90, 180, 270])


def mapper(*opts):
    return MapperTTA(tiny_cfg(*AUG, *opts))


def image(height=20, width=30):
    picture = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return {"image": picture, "height": height, "width": width}


class TestRotation:
    @pytest.mark.parametrize("turns", [0, 1, 2, 3, -1, 5])
    def test_a_box_stays_on_its_pixels(self, turns):
        picture = np.zeros((12, 17, 3), np.uint8)
        picture[2:5, 7:15] = 255
        rotate = Rotate90Transform(12, 17, turns)
        turned = rotate.apply_image(picture)
        x0, y0, x1, y1 = rotate.apply_box(np.array([[7.0, 2, 15, 5]]))[0].astype(int)
        inside = np.zeros(turned.shape[:2], bool)
        inside[y0:y1, x0:x1] = True
        assert np.array_equal(turned[:, :, 0] > 0, inside)
        back = rotate.inverse()
        assert np.array_equal(back.apply_image(turned), picture)
        assert back.apply_box(np.array([[x0, y0, x1, y1]], float)).tolist() == [[7, 2, 15, 5]]

    def test_half_a_turn_is_both_flips(self):
        points = np.random.default_rng(0).random((5, 2)) * 10
        flips = TransformList([HFlipTransform(17), VFlipTransform(12)])
        rotate = Rotate90Transform(12, 17, 2)
        np.testing.assert_allclose(rotate.apply_coords(points), flips.apply_coords(points.copy()))


class TestViews:
    @pytest.mark.parametrize(
        "opts, orientations",
        [
            (("TEST.AUG.FLIP", False), 1),
            ((), 2),
            (("TEST.AUG.VFLIP", True, "TEST.AUG.FLIP", False), 2),
            (("TEST.AUG.VFLIP", True), 4),
            (("TEST.AUG.ROTATIONS", [90]), 4),
            (("TEST.AUG.ROTATIONS", [180], "TEST.AUG.VFLIP", True), 4),
            (EVERY_VIEW, 8),
        ],
    )
    def test_each_once(self, opts, orientations):
        views = mapper("TEST.AUG.MIN_SIZES", [20, 40], *opts)
        made = views(image())
        assert len(made) == len(views) == 2 * orientations
        assert [v["min_size"] for v in made] == [20] * orientations + [40] * orientations
        pictures = {(tuple(v["image"].shape), v["image"].numpy().tobytes()) for v in made}
        assert len(pictures) == len(made)

    def test_flips_are_flips(self):
        given = image()
        views = mapper("TEST.AUG.MIN_SIZES", [20], "TEST.AUG.VFLIP", True)(given)
        pictures = [v["image"] for v in views]
        for dims in ((), (2,), (1,), (1, 2)):
            assert any(torch.equal(given["image"].flip(dims), p) for p in pictures), dims

    @pytest.mark.parametrize("size", [(40, 60), (20, 30)])
    def test_boxes_go_to_the_view_and_back(self, size):
        """From the original image, which may have another size than the one that is given."""
        given = {**image(), "height": size[0], "width": size[1]}
        views = mapper("TEST.AUG.MIN_SIZES", [20, 40], "TEST.AUG.ASPECT_RATIOS", [0.5], *EVERY_VIEW)
        box = np.array([[4.0, 2, 10, 12]])
        for view in views(given):
            there = view["transforms"].apply_box(box)
            assert there[0, 2] <= view["image"].shape[2] and there[0, 3] <= view["image"].shape[1]
            np.testing.assert_allclose(view["transforms"].inverse().apply_box(there), box)

    def test_aspect_ratios(self):
        opts = ("TEST.AUG.FLIP", False, "TEST.AUG.MIN_SIZES", [20])
        shapes = [
            v["image"].shape[1:]
            for v in mapper(*opts, "TEST.AUG.ASPECT_RATIOS", [2, 0.5, 1])(image())
        ]
        assert [tuple(s) for s in shapes] == [(20, 30), (20, 60), (27, 20)]

    def test_as_detectron2s(self):
        cfg = tiny_cfg(*AUG, "TEST.AUG.MIN_SIZES", [20, 50])
        given = {**image(), "height": 40, "width": 60}
        for ours, theirs in zip(MapperTTA(cfg)(given), DatasetMapperTTA(cfg)(given)):
            assert torch.equal(ours["image"], theirs["image"])
            assert repr(ours["transforms"]) == repr(theirs["transforms"])

    @pytest.mark.parametrize("channels", [1, 5])
    def test_other_channels(self, channels):
        given = {"image": torch.rand(channels, 20, 30), "height": 20, "width": 30}
        views = mapper("TEST.AUG.MIN_SIZES", [40], *EVERY_VIEW)(given)
        assert {tuple(v["image"].shape) for v in views} == {(channels, 40, 60), (channels, 60, 40)}

    def test_narrow_image(self):
        with pytest.raises(DataError, match="30x1 pixels .*TEST.AUG.MIN_SIZES"):
            MapperTTA([800], 10, True)(image(1, 30))


@pytest.mark.parametrize(
    "key, value",
    [
        ("TEST.AUG.VFLIP", True),
        ("TEST.AUG.ROTATIONS", [90]),
        ("TEST.AUG.MERGE", "wbf"),
        ("TEST.SOFT_NMS.ENABLED", True),
    ],
)
def test_detectron2s_own_class_does_not_ignore_it(key, value):
    cfg = tiny_cfg(*AUG, key, value)
    with pytest.raises(ConfigError, match=f"{key} is set.*RCNNWithTTA"):
        GeneralizedRCNNWithTTA(cfg, build_model(cfg))


def test_a_config_without_our_keys():
    assert len(DatasetMapperTTA(get_cfg()).min_sizes) == 9


@pytest.mark.parametrize(
    "key, value",
    [
        ("TEST.AUG.ASPECT_RATIOS", [0.5]),
        ("TEST.AUG.BOX_SIZES", [20, 50]),
        ("TEST.AUG.MASKS", "logits"),
    ],
)
def test_detectron2s_own_class_rejects_each_key(key, value):
    with pytest.raises(ConfigError, match=f"{key} is set.*RCNNWithTTA"):
        DatasetMapperTTA(tiny_cfg("TEST.AUG.ENABLED", True, key, value))
