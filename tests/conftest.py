import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter. It must know before it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

# The suite runs in as many processes as there are cores (pytest -n auto).
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
