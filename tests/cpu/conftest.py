"""Every test draws the same numbers, whichever ran before it, on one thread of torch's own.

With a thread team of torch in each test process, the processes of `make test` would only disturb
each other. Tests of thread counts set those of the kernels themselves.
"""

import pytest
import torch

torch.set_num_threads(1)
torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)
