"""Memorization while a model trains: are samples nearer to training images than to held-out ones?

    training share    the share of samples whose nearest image, of N training and n held-out ones, is a training image
    copied share      the share whose nearest training image is less than a third as far as the second nearest one
                      (Yoon et al. 2023, openreview.net/forum?id=shciCbSk9h)
    distance          the root of the mean squared difference of pixels, where black is 0 and white is 1

If which images were held out was decided at random, and the model had learned only what both have in common, each of
the choices of n images would be as probable, given the samples. The training share is then N / (N + n) in the mean,
and its distribution is that of all choices: NUM_CHOICES of them are drawn. So the p-value holds for any model. One
that is blurred, or that prefers some kind of images, is not taken for one that copies, as it can be where distances of
samples are compared with those of held-out images (`memorization`). It needs no limit of what is near, either.

The copied share needs no held-out images, but nothing says how large it is by chance, and it is 0 for a copy of an
image that is there twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.evaluation.memorization import nearest_rows

# A model whose p-value is at most so low memorizes.
SIGNIFICANCE = 0.001
NUM_CHOICES = 9999
# A copy is at less than this part of the distance of the second nearest training image.
COPY_RATIO = 1 / 3


@dataclass(frozen=True, eq=False)
class RealImages:
    """The images that samples are compared with.

    Args:
        training: N of the training images, (N, C, H, W) uint8 on the CPU, N at least 2.
        held_out: The n held-out images, (n, C, H, W) uint8 on the CPU.
        is_mirrored: Whether the model was trained on mirrored images, too. An image is then as near as the nearer of
            itself and its mirror image.
        in_groups: Whether whole groups of images were held out. Choices of single images then say nothing of chance,
            and there is no p-value.
    """

    training: Tensor
    held_out: Tensor
    is_mirrored: bool
    in_groups: bool = False


def nearest_images(queries: Tensor, images: Tensor, is_mirrored: bool) -> tuple[Tensor, Tensor]:
    """Find the two images that are nearest to each query, or the one that there is.

    Args:
        queries: (m, C, H, W) uint8.
        images: (N, C, H, W) uint8.
        is_mirrored: See `RealImages`.

    Returns:
        Distances, (m, 2) float64, rising, and the numbers of the images, (m, 2) int64.
    """
    scale = 255 * queries[0].numel() ** 0.5
    distances, indices = nearest_rows(queries, images, 2)
    if is_mirrored:
        of_mirrored, mirrored = nearest_rows(queries, images.flip(3), 2)
        distances, order = torch.cat([distances, of_mirrored], dim=1).sort(dim=1, stable=True)
        indices = torch.cat([indices, mirrored], dim=1).gather(1, order)
        # The nearest, and the first after it that is not its own mirror image.
        second = (indices != indices[:, :1]).int().argmax(dim=1, keepdim=True)
        columns = torch.cat([torch.zeros_like(second), second], dim=1)
        distances, indices = distances.gather(1, columns), indices.gather(1, columns)
    return distances / scale, indices


def compare_samples(samples: Tensor, real: RealImages) -> Tensor:
    """Compare samples with real images.

    Args:
        samples: (m, C, H, W) uint8 on the CPU.

    Returns:
        (m, 4) float64: the distances of each sample to its nearest and second nearest training image and to its
        nearest held-out one; and the number of the nearest of all, training images first, and of equally near ones a
        held-out one.
    """
    to_training, training = nearest_images(samples, real.training, real.is_mirrored)
    to_held_out, held_out = nearest_images(samples, real.held_out, real.is_mirrored)
    is_training = to_training[:, 0] < to_held_out[:, 0]
    number = torch.where(is_training, training[:, 0], held_out[:, 0] + len(real.training))
    return torch.cat([to_training, to_held_out[:, :1], number[:, None].double()], dim=1)


def training_share(numbers: Tensor, num_training: int, num_held_out: int) -> tuple[float, float]:
    """Return the training share and its p-value.

    Args:
        numbers: The number of the image nearest to each sample, (m,) int64 in [0, N + n), training images first.
        num_training: N.
        num_held_out: n.

    Returns:
        The share, in [0, 1], and the probability of one at least as large, if the n held-out images had been chosen
        after the samples were drawn, at random.
    """
    counts = torch.bincount(numbers, minlength=num_training + num_held_out)
    # Images to which equally many samples are nearest are alike: how many of them are chosen is hypergeometric.
    values, num_images = np.unique(counts.numpy(), return_counts=True)
    choices = np.random.default_rng(0).multivariate_hypergeometric(num_images, num_training, NUM_CHOICES) @ values
    count = int(counts[:num_training].sum())
    return count / len(numbers), (1 + int((choices >= count).sum())) / (1 + NUM_CHOICES)


def summarize(compared: Tensor, real: RealImages) -> dict[str, float]:
    """Return what is recorded of samples.

    Args:
        compared: What `compare_samples` returned for all of them, (m, 4).
    """
    share, p_value = training_share(compared[:, 3].long(), len(real.training), len(real.held_out))
    nearest, second, to_held_out = compared[:, :3].unbind(dim=1)
    tested = {} if real.in_groups else {"training_share_p_value": p_value}
    return {
        "training_share": share,
        "training_share_by_chance": len(real.training) / (len(real.training) + len(real.held_out)),
        **tested,
        "copied_share": float((nearest < COPY_RATIO * second).double().mean()),
        "training_distance": float(nearest.median()),
        "held_out_distance": float(to_held_out.median()),
    }
