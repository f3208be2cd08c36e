"""Random numbers as functions of a seed and a position, so that a resumed run has nothing to replay or restore.

stream      what is drawn from it                        function of
IMAGE       t and eps of a training image                (seed, position of the image in the endless stream)
FLIP        whether an image is mirrored                 (seed, position)
CLASS       whether the label of an image is hidden      (seed, position)
COLUMN + c  whether its label in column c is hidden      (seed, position)
TOP, LEFT   where an image is cropped                    (seed, position)
CONDITION   noise of the image that it is made from      (seed, position)
AUGMENT     how an image is augmented                    (seed, position)
STEP + k    dropout of forward pass k of a step          (seed, number of the optimizer step)
STRATUM     where the strata of t begin in a step        (seed, number of the optimizer step)

The draws of IMAGE, CONDITION and AUGMENT come from Philox4x32-10 (Salmon et al. 2011), which maps a counter of 128
bits, under a key of 64 bits, to 128 random bits. The key is the seed, the counter is (position, stream, block of the
image). All images of a batch are drawn at once, on the device that needs them, and an image's draws do not depend on
the batch it is in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.runtime.errors import UsageError

IMAGE, STEP = 1, 2
# Beyond STEP + k for all k.
FLIP, TOP, LEFT, STRATUM, CLASS, CONDITION, AUGMENT = (2**31 + k for k in range(7))
COLUMN = 2**32

MAX_SEED = 2**63 - 1

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
_NUM_ROUNDS = 10
_WORD = 2**32 - 1


def check_seeds(first: int, count: int = 1) -> None:
    """Check that each of so many seeds is one that torch and files of samples can hold.

    Raises:
        UsageError: When one is not in [0, 2**63).
    """
    if not 0 <= first <= MAX_SEED + 1 - count:
        raise UsageError(
            f"seed must be in [0, 2**63), got {first} as the first of {count:,}: begin with a smaller one"
        )


def hashed(seed: int, stream: int, index: np.ndarray) -> np.ndarray:
    """Return a hash of (seed, stream, index).

    Args:
        seed: The seed, at least 0.
        stream: What the numbers are for, at least 0.
        index: Integers of any shape, at least 0.

    Returns:
        Numbers that are uniform in [0, 2^64), uint64 in the shape of `index`.
    """
    x = np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64) + index.astype(np.uint64)
    # The finalizer of SplitMix64 (Steele et al. 2014): neighbors share no bits.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed_uniform(seed: int, stream: int, index: np.ndarray) -> np.ndarray:
    """Return `hashed` as numbers in [0, 1) with 53 bits each, float64 in the shape of `index`."""
    return (hashed(seed, stream, index) >> np.uint64(11)) * 2.0**-53


def image_draws(
    seed: int, positions: Tensor, shape: Sequence[int], device: torch.device | str, stream: int = IMAGE
) -> tuple[Tensor, Tensor]:
    """Draw a uniform number and a standard normal tensor for each image.

    Args:
        seed: The seed, in [0, 2^64).
        positions: Where each image is in the endless stream, (B,) integers, at least 0.
        shape: The shape of one image, (C, H, W).
        device: Where to draw. The numbers are the same on all devices, but for the rounding of log, cos and sin.
        stream: What they are for: IMAGE or CONDITION.

    Returns:
        The uniform numbers, (B,) float32, multiples of 2^-24 in [0, 1), and the normal ones, (B, C, H, W) float32,
        none beyond 6.7.
    """
    num_values = math.prod(shape)
    num_blocks = -(-num_values // 4)
    words = random_words(seed, stream, positions, 1 + num_blocks, device)
    # The first block is for the uniform number. float32 holds 24 bits of it: with more it could round to 1.
    uniform = (words[0][:, 0] >> 8).float() * 2.0**-24

    normal = torch.empty(len(positions), 4, num_blocks, device=device)
    c0, c1, c2, c3 = (word[:, 1:] for word in words)
    normal[:, 0], normal[:, 1] = box_muller(c0, c1)
    normal[:, 2], normal[:, 3] = box_muller(c2, c3)
    return uniform, normal.flatten(1)[:, :num_values].reshape(len(positions), *shape)


def box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Turn two random words into two independent standard normal numbers (Box & Muller 1958).

    ::

        u = (first + 1) / 2^32,  w = second / 2^32
        sqrt(-2 log u) cos(2 pi w),  sqrt(-2 log u) sin(2 pi w)

    Args:
        first: Words in [0, 2^32), int64 of any shape.
        second: Words in [0, 2^32), int64 in the shape of `first`.

    Returns:
        Two tensors of that shape, float32, with no value beyond 6.7.
    """
    # u is above 0, so its logarithm is finite.
    radius = first.float().add_(1).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = second.float().mul_(2 * math.pi * 2.0**-32)
    return angle.cos().mul_(radius), angle.sin_().mul_(radius)


def random_words(
    seed: int, stream: int, positions: Tensor, num_blocks: int, device: torch.device | str
) -> list[Tensor]:
    """Draw blocks of 128 random bits for each position.

    Args:
        seed: The seed, in [0, 2^64).
        stream: What the bits are for, in [0, 2^32).
        positions: (B,) integers in [0, 2^63).
        num_blocks: The number of blocks for each position, at most 2^32.
        device: Where to draw.

    Returns:
        Four words of 32 bits for each block, each (B, num_blocks) int64 in [0, 2^32).
    """
    position = positions.to(device, torch.int64, non_blocking=True)[:, None]
    block = torch.arange(num_blocks, device=device)
    counter = (position & _WORD, position >> 32, torch.full_like(block, stream), block)
    return philox4x32(counter, (seed & _WORD, seed >> 32 & _WORD))


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Return the random words of Philox4x32-10 (Salmon et al. 2011, Sec. 3.3).

    Args:
        counter: Four words in [0, 2^32), int64 tensors whose shapes can be broadcast to one.
        key: Two words in [0, 2^32).

    Returns:
        Four words in [0, 2^32), int64 in that shape.
    """
    c0, c1, c2, c3 = (word.clone(memory_format=torch.contiguous_format) for word in torch.broadcast_tensors(*counter))
    product_0, product_1 = torch.empty_like(c0), torch.empty_like(c2)
    k0, k1 = key
    # The rounds write into memory that is already theirs: to allocate it would take longer than the arithmetic.
    for _ in range(_NUM_ROUNDS):
        # Products of two words have 64 bits. int64 holds them all, the highest as its sign.
        torch.mul(c0, _MULTIPLIERS[0], out=product_0)
        torch.mul(c2, _MULTIPLIERS[1], out=product_1)
        torch.bitwise_right_shift(product_1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        torch.bitwise_right_shift(product_0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        # The next c1 and c3 are the low words of the products; the high words are masked away when they are used.
        c1, product_1 = product_1, c1
        c3, product_0 = product_0, c3
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _WORD, (k1 + _KEY_INCREMENTS[1]) & _WORD
    return [c0, c1.bitwise_and_(_WORD), c2, c3.bitwise_and_(_WORD)]


def seed_step(seed: int, step: int, slot: int) -> None:
    """Seed the global generator, from which dropout draws, for forward pass `slot` of an optimizer step."""
    torch.manual_seed(int(hashed(seed, STEP + slot, np.array([step]))[0]))


def first_stratum(seed: int, step: int, count: int) -> int:
    """Return the stratum of t, in [0, count), that the first image of an optimizer step's batch is drawn from."""
    return int(hashed(seed, STRATUM, np.array([step]))[0] % np.uint64(count))
