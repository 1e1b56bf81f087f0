"""Independent streams of random numbers, all derived from a run's one seed.

Every consumer of randomness (the split, the initial weights, the order of batches, each method) has a stream of its
own. What one of them draws never shifts what another one sees, so two methods at one seed train on the same split,
from the same weights, in the same order, and their difference can be taken seed by seed.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch

__all__ = ["generator", "stream_seed"]


def stream_seed(seed: int, stream: str) -> int:
    """A 63-bit seed for one named stream of a run.

    Args:
        seed: The run's seed, at least 0.
        stream: The stream's name, such as ``"data/test"``.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(stream.encode()),))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, stream: str) -> torch.Generator:
    """A CPU generator seeded for one named stream of a run."""
    return torch.Generator().manual_seed(stream_seed(seed, stream))
