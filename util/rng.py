"""Seeds for libraries that draw from global generators: torch, numpy and `random` (timm uses all three)."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_libraries(seed: int) -> None:
    """Seeds the three generators of this process (torch's on every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int, libraries: bool = False) -> Iterator[None]:
    """Runs its body with torch's CPU generator at `seed`, and restores it; with `libraries`, numpy and `random` too."""
    others = (random.getstate(), np.random.get_state()) if libraries else None
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that one seeds the devices, too, and a loader process has none in use.
        torch.default_generator.manual_seed(seed)
        if libraries:
            random.seed(seed)
            np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            if others is not None:
                random.setstate(others[0])
                np.random.set_state(others[1])
