import logging
import os
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from detectron2.utils.logger import setup_logger
from hypothesis import settings

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter. It must know before it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples each time; `--hypothesis-profile default` draws others.
settings.register_profile("seeded", derandomize=True, deadline=None, database=None)
settings.load_profile("seeded")

# The suite runs in as many processes as there are cores (pytest -n auto).
torch.set_num_threads(1)


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@contextmanager
def restored_loggers():
    """A tool's log goes to what was standard output in its test, which is closed afterwards."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "panet_d2")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    setup_logger.cache_clear()


@pytest.fixture(autouse=True)
def own_logging():
    with restored_loggers():
        yield


@pytest.hookimpl(hookwrapper=True)
def pytest_fixture_setup(fixturedef):
    """Fixtures of a module are set up before own_logging."""
    with restored_loggers() if fixturedef.scope != "function" else nullcontext():
        yield
