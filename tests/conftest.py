"""What holds for every test: known torchvision operators, one thread, a fixed global seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from support import define_torchvision_operators

define_torchvision_operators()
torch.set_num_threads(1)  # tests run in parallel processes, and sums must not depend on the number of cores

# Without a deadline, because other processes share the machine; with the same examples in every run, so that a change
# is judged and not the dice.
settings.register_profile("here", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("here")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20190609)
