import numpy as np
import pytest
import torch

# The suite runs in as many processes as there are cores (pytest -n auto).
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
