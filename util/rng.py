"""Seeds for libraries that draw from global generators: torch, numpy and `random` (timm uses all
three)."""

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import permutations

import numpy as np
import torch

# Separate random streams, so that adding one never shifts another.
ORDER, CROP, MASK, REPLACEMENT, SUBSET, BATCH, HEAD, MONITOR, PACK, LORA, PATCHES = range(11)
WORD = 2**32 - 1  # the largest number of 32 bits
Words = int | np.ndarray  # 32 bits of one number, or of each of several


def derive_seed(*coordinates: int) -> int:
    """A 63-bit seed from coordinates in [0, 2^64) (run seed, stream, ...), another one for each
    different tuple."""
    # SeedSequence takes trailing zeros and split words for the same entropy: fixed words and the
    # length tell them apart
    words = np.array([len(coordinates), *coordinates], dtype=np.uint64).view(np.uint32)
    high, low = np.random.SeedSequence(words).generate_state(2).tolist()
    return (high << 32 | low) >> 1


def derive_seeds(tuples: Sequence[tuple[int, ...]]) -> list[int]:
    """The seeds of several tuples of one length: what `derive_seed` returns for each, in a small
    part of the time where there are many.

    These are the steps of numpy's SeedSequence, whose results numpy keeps as they are.
    Source: M. E. O'Neill, "Developing a seed_seq alternative" (2015).
    """
    if len(tuples) == 1:
        return [derive_seed(*tuples[0])]
    columns = np.array(tuples, dtype=np.uint64).T
    # what all tuples share stays an int, with which the same steps cost next to nothing
    values = [column if (column != column[0]).any() else int(column[0]) for column in columns]
    words = [half for value in (len(values), *values) for half in (value & WORD, value >> 32)]
    constant = 0x43B0D7E5

    def hashed(value: Words, multiplier: int = 0x931E8875) -> Words:
        nonlocal constant
        value, constant = value ^ constant, constant * multiplier & WORD
        value = value * constant & WORD
        return value ^ value >> 16

    def mixed(left: Words, right: Words) -> Words:
        value = left * 0xCA01F9DD - right * 0x4973F715 & WORD
        return value ^ value >> 16

    pool = [hashed(word) for word in words[:4]]
    for source, target in permutations(range(4), 2):
        pool[target] = mixed(pool[target], hashed(pool[source]))
    for word in words[4:]:
        pool = [mixed(part, hashed(word)) for part in pool]
    constant = 0x8B51F9DD
    high, low = (hashed(part, 0x58F38DED) for part in pool[:2])
    seeds = np.asarray((high << 32 | low) >> 1, dtype=np.uint64)
    return np.broadcast_to(seeds, len(tuples)).tolist()


def generator(*coordinates: int) -> torch.Generator:
    """A torch generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*coordinates))


def generators(tuples: Sequence[tuple[int, ...]]) -> Iterator[torch.Generator]:
    """As `generator` for each of the tuples, but always the same object: it must have been read
    before the next is taken."""
    stream = torch.Generator()
    return map(stream.manual_seed, derive_seeds(tuples))


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
