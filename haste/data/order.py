"""Randomness as a function of position: a draw depends on where it is used, never on earlier draws.

Every stream is a numpy Philox generator, keyed by the seed and the purpose, whose 256-bit counter starts at the
position. So a run that is stopped and restarted, split over more processes or cut into other batches draws the
same numbers. The raw output of a bit generator is frozen by numpy's compatibility policy; orders and uniforms are made
from it alone. Normals go through numpy's ziggurat, which may change with a numpy release (the version is recorded).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

_WORD = 2**64


def generator(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """The stream of random numbers of one purpose at one position.

    Streams of different (seed, purpose, position) never overlap within 2**64 draws: the purpose (with the number of
    coordinates) and the seed are the Philox key, and the coordinates are the three upper words of its counter.

    Args:
        seed: 0 <= seed < 2**64.
        purpose: what the numbers are for; purposes are independent of one another.
        position: up to three integers in [0, 2**64), for instance step and index of the sample.

    Raises:
        ValueError: a seed or coordinate out of range, or more than three coordinates.
    """
    if len(position) > 3:
        raise ValueError(f"random position {position} has {len(position)} coordinates, expected at most 3")
    for name, value in [("seed", seed), *(("position", p) for p in position)]:
        if not 0 <= value < _WORD:
            raise ValueError(f"random {name} is {value}, expected an integer in [0, 2**64)")
    # Word 0 counts the draws; missing coordinates are 0, and the length in the key distinguishes them from a given 0.
    counter = np.array([0, *position, *[0] * (3 - len(position))], dtype=np.uint64)
    key = np.array([seed, _purpose_word(purpose, len(position))], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _streams(seed: int, purpose: str, step: int, positions: Sequence[int]) -> Iterator[np.random.Generator]:
    """`generator` of a step at each position, by moving one: to make one takes longer than most draws."""
    stream = generator(seed, purpose, step, 0)
    state = stream.bit_generator.state
    for position in positions:
        state["state"]["counter"][2] = position
        stream.bit_generator.state = state
        yield stream


@functools.lru_cache(maxsize=256)
def _purpose_word(purpose: str, coordinates: int) -> int:
    digest = hashlib.blake2b(f"{coordinates}:{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@functools.lru_cache(maxsize=4)  # a batch touches one epoch or two neighbours; training and a probe may alternate
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which an epoch visits n samples: (n,) int64, read-only because it is cached and shared."""
    # Sorting random keys needs only raw numbers; with 64 bits a tie is rare, and "stable" resolves it the same way.
    keys = generator(seed, "order", epoch).bit_generator.random_raw(n)
    order = np.argsort(np.asarray(keys, dtype=np.uint64), kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def batch_indices(seed: int, step: int, batch: int, n: int) -> np.ndarray:
    """The samples of a step, (batch,) int64: epoch after epoch of permutations, cut into batches without a remainder.

    A batch may begin in one epoch and end in the next, and n may be smaller than the batch.

    Args:
        seed: seed of the order.
        step: steps taken before this one, from 0.
        batch: samples per step, over all ranks; a rank takes its slice of the result.
        n: samples in the data set.

    Raises:
        ValueError: n or batch is below 1.
    """
    if n < 1 or batch < 1:
        raise ValueError(f"cannot draw batches of {batch} from {n} samples, expected at least 1 of each")
    visits = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    chosen = np.empty(batch, dtype=np.int64)
    for epoch in range(int(visits[0]) // n, int(visits[-1]) // n + 1):
        here = visits // n == epoch
        chosen[here] = permutation(seed, epoch, n)[visits[here] % n]
    return chosen


def choice(seed: int, purpose: str, step: int, count: int, n: int) -> np.ndarray:
    """`count` of the indices 0 .. n - 1 without repetition, in random order: (min(count, n),) int64."""
    keys = generator(seed, purpose, step).bit_generator.random_raw(n)
    return np.argsort(np.asarray(keys, dtype=np.uint64), kind="stable")[:count].astype(np.int64)


def used(count: int, holdout: int, subset: int) -> np.ndarray:
    """`subset` of the images to train on, which depend only on the numbers of images, and all held-out ones, the last
    `holdout` of `count`: (subset + holdout,) int64, ascending."""
    trained = count - holdout
    kept = np.arange(trained) if subset == trained else np.sort(choice(0, "subset", 0, subset, trained))
    return np.concatenate([kept, np.arange(trained, count)])


def flips(seed: int, step: int, positions: Sequence[int]) -> np.ndarray:
    """Which samples of a step are mirrored, (len(positions),) bool: those whose uniform number is in [0.5, 1)."""
    return uniforms(seed, "flip", step, positions) >= 0.5


def normals(seed: int, purpose: str, step: int, positions: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Standard normal (len(positions), *shape) float32; row r depends only on seed, purpose, step and positions[r]."""
    drawn = np.empty((len(positions), *shape), dtype=np.float32)
    for row, stream in enumerate(_streams(seed, purpose, step, positions)):
        drawn[row] = stream.standard_normal(tuple(shape), dtype=np.float32)
    return drawn


def uniforms(seed: int, purpose: str, step: int, positions: Sequence[int], shape: Sequence[int] = ()) -> np.ndarray:
    """Uniform in [0, 1), (len(positions), *shape) float64; row r depends only on seed, purpose, step, positions[r]."""
    size = int(np.prod(shape, dtype=np.int64))
    raw = np.empty((len(positions), size), dtype=np.uint64)
    for row, stream in enumerate(_streams(seed, purpose, step, positions)):
        raw[row] = stream.bit_generator.random_raw(size)
    # The upper 53 bits fill a float64 mantissa, so 1 is never reached.
    return ((raw >> np.uint64(11)) * 2.0**-53).reshape(len(positions), *shape)
