import pytest

from ..common import tiny_cfg, write_coco


@pytest.fixture
def config_file(tmp_path):
    """The tiny model as a YAML file, with a dataset."""
    json_file, root = write_coco(tmp_path / "data")
    cfg = tiny_cfg(
        *("DATASETS.REGISTER_COCO", [["engine_squares", json_file, root]]),
        *("DATASETS.TRAIN", ["engine_squares"]),
        *("DATASETS.TEST", ["engine_squares"]),
        *("OUTPUT_DIR", str(tmp_path / "output")),
        *("SOLVER.IMS_PER_BATCH", 2),
        *("SOLVER.MAX_ITER", 2),
    )
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    return str(path)
