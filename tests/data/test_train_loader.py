import random
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.samplers import TrainingSampler

from panet_d2.data import NamedImageMapper, setup_datasets
from panet_d2.data.train_loader import StreamSampler, build_train_loader, seed_all, seeded
from panet_d2.errors import ConfigError

from ..common import tiny_cfg, write_coco


@pytest.fixture
def cfg(tmp_path):
    """Seven images, in batches of two."""
    json_file, root = write_coco(tmp_path / "squares", num_images=7)
    cfg = tiny_cfg(
        *("DATASETS.REGISTER_COCO", [["stream_squares", json_file, root]]),
        *("DATASETS.TRAIN", ["stream_squares"]),
        *("SOLVER.IMS_PER_BATCH", 2),
        *("INPUT.MIN_SIZE_TRAIN", [48, 80]),
        *("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"),
        *("SEED", 5),
    )
    setup_datasets(cfg)
    return cfg


class Noisy(NamedImageMapper):
    """Adds a number from each generator to what augmentation draws."""

    def __call__(self, dataset_dict):
        result = super().__call__(dataset_dict)
        result["noise"] = (random.random(), float(np.random.rand()), float(torch.rand(())))
        return result


@pytest.fixture
def upright(monkeypatch):
    """Every other image is upright, as far as the loader knows."""
    from panet_d2.data import train_loader

    real = train_loader.train_loader_from_config

    def from_config(*args, **kwargs):
        args = real(*args, **kwargs)
        for i, image in enumerate(args["dataset"]):
            if i % 2 == 0:
                image["width"], image["height"] = image["height"], image["width"]
        return args

    monkeypatch.setattr(train_loader, "train_loader_from_config", from_config)


class AnySize(Noisy):
    """Reads the images that the fixture ``upright`` has turned in name only."""

    def __call__(self, dataset_dict):
        shape = dataset_dict["width"], dataset_dict["height"]
        if shape[0] < shape[1]:
            dataset_dict = {**dataset_dict, "width": shape[1], "height": shape[0]}
        result = super().__call__(dataset_dict)
        result["width"], result["height"] = shape
        return result


def batches(cfg, count, start=0):
    """What makes a batch, for so many of them."""
    loader = build_train_loader(cfg, AnySize(cfg, True), start)
    return [
        [(d["image_id"], d["noise"], d["image"].shape, d["image"].sum().item()) for d in batch]
        for batch in islice(iter(loader), count)
    ]


@pytest.mark.parametrize("per_batch", [True, False])
@pytest.mark.parametrize("grouping", [True, False])
def test_any_batch_can_be_the_first(cfg, upright, grouping, per_batch):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    cfg.INPUT.SAME_SIZE_PER_BATCH = per_batch
    whole = batches(cfg, 30)
    assert len({shape for batch in whole for _, _, shape, _ in batch}) > 10  # sizes are drawn
    for start in (1, 2, 3, 7, 8, 15, 29):
        assert batches(cfg, 30 - start, start) == whole[start:]


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("workers, per_batch", [(1, False), (2, True), (2, False), (3, True)])
def test_workers_change_nothing(cfg, upright, grouping, workers, per_batch):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    cfg.INPUT.SAME_SIZE_PER_BATCH = per_batch
    whole = batches(cfg, 12)
    cfg.DATALOADER.NUM_WORKERS = workers
    assert batches(cfg, 12) == whole
    assert batches(cfg, 5, 7) == whole[7:]


@pytest.mark.parametrize("seed, workers", [(5, 0), (5, 2), (-1, 0), (-1, 2)])
@pytest.mark.parametrize("grouping", [True, False])
def test_a_size_for_each_batch(cfg, upright, grouping, seed, workers):
    cfg.merge_from_list(["SEED", seed, "DATALOADER.NUM_WORKERS", workers])
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    shapes = [{shape for _, _, shape, _ in batch} for batch in batches(cfg, 30)]
    assert sum(len(of_batch) > 1 for of_batch in shapes) > 15  # each image has its own
    cfg.INPUT.SAME_SIZE_PER_BATCH = True
    drawn = batches(cfg, 30)
    shapes = [{shape for _, _, shape, _ in batch} for batch in drawn]
    assert all(len(of_batch) == 1 for of_batch in shapes)
    sizes = [min(shape[1:]) for of_batch in shapes for shape in of_batch]
    assert len(set(sizes)) > 10 and min(sizes) >= 48 and max(sizes) <= 80
    # Nothing else is shared.
    assert len({noise for batch in drawn for _, noise, _, _ in batch}) == 60


def test_sizes_of_a_list_are_drawn_alike(cfg):
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice"])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", [48, 64, 80]])
    cfg.INPUT.SAME_SIZE_PER_BATCH = True
    sizes = [min(batch[0][2][1:]) for batch in batches(cfg, 300)]
    counts = [sizes.count(size) for size in (48, 64, 80)]
    assert sum(counts) == 300 and min(counts) > 70  # of 100; four standard deviations are 33


def test_a_size_of_the_batch_needs_a_batch(cfg):
    cfg.INPUT.SAME_SIZE_PER_BATCH = True
    image = DatasetCatalog.get("stream_squares")[0]
    with pytest.raises(ConfigError, match="INPUT.SAME_SIZE_PER_BATCH.*Trainer"):
        NamedImageMapper(cfg, True)(image)
    assert NamedImageMapper(cfg, False)(image)["image"].shape[0] == 3


def test_a_size_of_the_batch_or_not(cfg):
    with pytest.raises(ConfigError, match="INPUT.SAME_SIZE_PER_BATCH is None.*True, False"):
        cfg.INPUT.SAME_SIZE_PER_BATCH = None
        build_train_loader(cfg, NamedImageMapper(cfg, False))


def test_images_of_a_batch_are_of_one_kind(cfg, upright):
    loader = build_train_loader(cfg, AnySize(cfg, True))
    kinds = [{d["width"] > d["height"] for d in batch} for batch in islice(iter(loader), 20)]
    assert all(len(kind) == 1 for kind in kinds) and {True} in kinds and {False} in kinds


def test_the_seed_decides(cfg):
    first = batches(cfg, 6)
    np.random.rand(7)  # whatever else has drawn numbers before
    assert batches(cfg, 6) == first
    cfg.SEED = 6
    assert batches(cfg, 6) != first


def test_every_image_comes_once_an_epoch(cfg):
    ids = [image[0] for batch in batches(cfg, 7) for image in batch]
    assert sorted(ids) == sorted(list(range(1, 8)) * 2)
    assert sorted(ids[:7]) == list(range(1, 8))


def test_an_image_is_augmented_anew_each_time(cfg):
    seen = [image for batch in batches(cfg, 21) for image in batch]
    noise = {n for _, n, _, _ in seen}
    assert len(noise) == len(seen)


def test_without_a_seed_it_is_detectron2s_own(cfg):
    cfg.SEED = -1
    assert batches(cfg, 4) != batches(cfg, 4)


def test_loading_leaves_the_generators_alone(cfg):
    seed_all(1, 2)
    expected = random.random(), np.random.rand(), torch.rand(3).tolist()
    seed_all(1, 2)
    batch = build_train_loader(cfg, Noisy(cfg, True))
    for token in (0, 1, 0), (4, 2, 2):
        assert batch.dataset.dataset.dataset[token]["noise"]
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected


def test_seeded_is_seed_all_and_restores():
    with seeded(3, 4):
        inside = random.random(), np.random.rand(), torch.rand(3).tolist()
    after = torch.rand(3).tolist()
    seed_all(3, 4)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == inside != after
    with seeded(3, 5):
        assert random.random() != inside[0]


def test_a_batch_must_split_evenly(cfg, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 4)
    with pytest.raises(ConfigError, match="SOLVER.IMS_PER_BATCH is 2.*multiple.*4"):
        build_train_loader(cfg, NamedImageMapper(cfg, True))


def test_images_without_sizes_cannot_be_grouped(cfg, monkeypatch):
    from panet_d2.data import train_loader

    real = train_loader.train_loader_from_config

    def without_sizes(*args, **kwargs):
        made = real(*args, **kwargs)
        for image in made["dataset"]:
            del image["width"], image["height"]
        return made

    monkeypatch.setattr(train_loader, "train_loader_from_config", without_sizes)
    with pytest.raises(ConfigError, match="DATALOADER.ASPECT_RATIO_GROUPING.*SEED 5.*width"):
        build_train_loader(cfg, NamedImageMapper(cfg, True))
    cfg.merge_from_list(["SEED", -1, "INPUT.SAME_SIZE_PER_BATCH", True])
    with pytest.raises(ConfigError, match="ASPECT_RATIO_GROUPING.*PER_BATCH True.*width"):
        build_train_loader(cfg, NamedImageMapper(cfg, True))
    cfg.merge_from_list(["SEED", 5, "INPUT.SAME_SIZE_PER_BATCH", False])
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    next(iter(build_train_loader(cfg, NamedImageMapper(cfg, True))))


@pytest.mark.parametrize("start", range(12))
def test_what_is_left_over_comes_in_the_streams_order(start):
    """Images of both groups, and those that no skipped batch was complete for."""
    groups = [0, 1, 1, 0, 0, 1, 0]
    sampler = TrainingSampler(len(groups), seed=0)
    rest = [p for p, _, _ in islice(iter(StreamSampler(sampler, 3, start, groups)), 40)]
    assert rest == sorted(rest)
    whole = list(islice(iter(StreamSampler(sampler, 3, 0, groups)), rest[-1] + 1))
    batches = [batch for position, _, batch in whole if position not in rest]
    assert len(batches) == 3 * start and all(batches.count(b) == 3 for b in batches)


def test_each_process_augments_its_own_way(cfg, monkeypatch):
    """By its rank: two processes that read one image at one position would train the same."""
    first = batches(cfg, 2)
    monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: 1)
    second = batches(cfg, 2)
    noise = [{noise for batch in drawn for _, noise, _, _ in batch} for drawn in (first, second)]
    assert not noise[0] & noise[1]


def test_skipping_a_million_images_takes_seconds():
    sampler = StreamSampler(TrainingSampler(1000, seed=0), 16, 70_000, [i % 2 for i in range(1000)])
    assert next(iter(sampler))[0] > 1_000_000
