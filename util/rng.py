"""Seeds for libraries that draw from global generators: torch, numpy and `random` (timm uses all
three)."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

# Separate random streams, so that adding one never shifts another.
ORDER, CROP, MASK, REPLACEMENT, SUBSET, BATCH, HEAD, MONITOR, PACK = range(9)


def derive_seed(*coordinates: int) -> int:
    """A 63-bit seed from coordinates in [0, 2^64) (run seed, stream, ...), another one for each
    different tuple."""
    # SeedSequence takes trailing zeros and split words for the same entropy: fixed words and the
    # length tell them apart
    words = np.array([len(coordinates), *coordinates], dtype=np.uint64).view(np.uint32)
    high, low = np.random.SeedSequence(words).generate_state(2).tolist()
    return (high << 32 | low) >> 1


def generator(*coordinates: int) -> torch.Generator:
    """A torch generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*coordinates))


def seed_libraries(seed: int) -> None:
    """Seeds the three generators of this process (torch's on every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int, libraries: bool = False) -> Iterator[None]:
    """Runs its body with torch's CPU generator at `seed`, and restores it; with `libraries`, numpy
    and `random` too."""
    with torch.random.fork_rng(devices=[]), ExitStack() as stack:
        # Not torch.manual_seed: that one seeds the devices, too, and a loader process has none in
        # use.
        torch.default_generator.manual_seed(seed)
        if libraries:
            stack.callback(random.setstate, random.getstate())
            stack.callback(np.random.set_state, np.random.get_state())
            random.seed(seed)
            np.random.seed(seed % 2**32)
        yield
