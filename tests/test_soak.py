"""Many images through one predictor from several threads: the same results, and no more memory."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from panet_d2.engine import Predictor

from .common import tiny_cfg

THREADS = 4
# Multiples of 8 between 32 and 96: with the padding to 32 nine shapes reach the network.
SIDES = range(32, 97, 8)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> Predictor:
    cfg = tiny_cfg(
        *("MODEL.FPN.OUT_CHANNELS", 16),
        *("MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
        *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 7),
        *("MODEL.RPN.POST_NMS_TOPK_TEST", 20),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
        *("INPUT.MIN_SIZE_TEST", 0),  # images as they are
        *("TEST.DETECTIONS_PER_IMAGE", 5),
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("soak") / "model.pth"
    torch.save({"model": build_model(cfg).state_dict()}, path)
    cfg.MODEL.WEIGHTS = str(path)
    return Predictor(cfg)


def random_images(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [(int(rng.choice(SIDES)), int(rng.choice(SIDES))) for _ in range(count)]
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def fingerprint(predictor: Predictor, image: np.ndarray) -> str:
    """Every bit of what is predicted for an image."""
    instances = predictor(image)["instances"]
    assert len(instances) > 0
    digest = hashlib.sha256(repr((len(instances), instances.image_size)).encode())
    for name in ("pred_boxes", "scores", "pred_classes", "pred_masks"):
        value = instances.get(name)
        digest.update(getattr(value, "tensor", value).numpy().tobytes())
    return digest.hexdigest()


def resident_megabytes() -> float:
    """This process's memory, after what is free has been given back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def predict_at_once(
    pool: ThreadPoolExecutor, predictor: Predictor, images: list, expected: list, inferences: int
) -> None:
    """Predict random ones of the images from all threads, and compare bit by bit."""
    order = random.Random(0).choices(range(len(images)), k=inferences)
    results = list(pool.map(lambda i: fingerprint(predictor, images[i]), order))
    assert [n for n, i in enumerate(order) if results[n] != expected[i]] == []


def predict_one_by_one(predictor: Predictor, images: list) -> list[str]:
    expected = [fingerprint(predictor, image) for image in images]
    assert len(set(expected)) == len(images)  # else a mix-up of images would not be seen
    return expected


@pytest.mark.parametrize("inferences", [40])
def test_threads_predict_what_one_does(predictor, inferences):
    images = random_images(20)
    expected = predict_one_by_one(predictor, images)
    with ThreadPoolExecutor(THREADS) as pool:
        predict_at_once(pool, predictor, images, expected, inferences)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and glibc")
@pytest.mark.parametrize("inferences", [2000])
def test_memory_is_flat(predictor, inferences):
    images = random_images(100)
    expected = predict_one_by_one(predictor, images)
    with ThreadPoolExecutor(THREADS) as pool:
        # Fills what is kept on purpose: each thread's heap and the kernels for each shape.
        predict_at_once(pool, predictor, images, expected, 200)
        before = resident_megabytes()
        predict_at_once(pool, predictor, images, expected, inferences)
        after = resident_megabytes()
    print(f"resident: {before:.1f} MiB before, {after:.1f} MiB after {inferences} inferences")
    # 4 KiB an inference. The smallest thing of one that could be kept is larger: the image alone
    # has 12 to 108 KiB as the network reads it.
    assert after - before < inferences * 4 / 1024
