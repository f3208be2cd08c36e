"""Randomness as a function of where a run is: nothing is drawn in turn, so nothing is to be replayed or restored.

image      hash(seed, IMAGE, position in the stream)       t and eps of an image
           hash(seed, FLIP | TOP | LEFT, position)         how a streamed image is mirrored and cropped
step       hash(seed, STEP + slot, optimizer step)         dropout of a forward pass
"""

from __future__ import annotations

import numpy as np
import torch

IMAGE, STEP = 1, 2
# Beyond STEP and all slots.
FLIP, TOP, LEFT = 2**31, 2**31 + 1, 2**31 + 2


def hashed(seed: int, stream: int, index: np.ndarray) -> np.ndarray:
    """A hash of (seed, stream, index), uniform in [0, 2^64): uint64 in the shape of `index`.

    Args:
        stream: at least 0; what the numbers are for.
        index: integers, at least 0.
    """
    x = np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64) + index.astype(np.uint64)
    # The finalizer of SplitMix64 (Steele et al. 2014): neighbors share no bits.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed_uniform(seed: int, stream: int, index: np.ndarray) -> np.ndarray:
    """`hashed` as numbers in [0, 1), of 53 bits each: float64 in the shape of `index`."""
    return (hashed(seed, stream, index) >> np.uint64(11)) * 2.0**-53


def image_generators(seed: int, positions: np.ndarray, device: torch.device) -> list[torch.Generator]:
    """One generator for each image of the stream: its t and eps do not depend on the batch it is in."""
    return [torch.Generator(device).manual_seed(int(s)) for s in hashed(seed, IMAGE, positions)]


def seed_step(seed: int, step: int, slot: int) -> None:
    """Seeds the global generator, from which dropout draws, for forward pass `slot` of an optimizer step."""
    torch.manual_seed(int(hashed(seed, STEP + slot, np.array([step]))[0]))
