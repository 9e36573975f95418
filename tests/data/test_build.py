import pytest

from panet_d2.data import build_training_sample_loader, setup_datasets
from panet_d2.errors import ConfigError

from ..common import tiny_cfg, write_coco


@pytest.fixture
def cfg(tmp_path):
    json_file, root = write_coco(tmp_path / "squares", num_images=6)
    cfg = tiny_cfg(
        *("DATASETS.REGISTER_COCO", [["sampled_squares", json_file, root]]),
        *("DATASETS.TRAIN", ["sampled_squares"]),
    )
    setup_datasets(cfg, ("TRAIN",))
    return cfg


@pytest.mark.parametrize("count, expected", [(1, [1]), (3, [1, 3, 5]), (100, [1, 2, 3, 4, 5, 6])])
def test_images_are_spread_over_the_data(cfg, count, expected):
    batches = list(build_training_sample_loader(cfg, count))
    assert [[x["image_id"] for x in batch] for batch in batches] == [[i] for i in expected]
    assert batches[0][0]["image"].shape == (3, 64, 96)
    assert "instances" not in batches[0][0]  # as for inference


def test_no_training_data():
    with pytest.raises(ConfigError, match="DATASETS.TRAIN"):
        build_training_sample_loader(tiny_cfg(), 1)
