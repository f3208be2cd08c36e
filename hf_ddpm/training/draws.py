"""The random draws of a step, by the seed, the step and the position of an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.labels import Columns, Labels
from hf_ddpm.prediction import hidden_labels
from hf_ddpm.runtime.seeds import CLASS, COLUMN, first_stratum, hashed_uniform, image_draws
from hf_ddpm.training.augmentation import draw_transformations, transform
from hf_ddpm.training.run import Run


def draw(run: Run, step: int, slot: int, positions: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Draw timestep and noise of each image of a forward pass, as functions of the seed, the step and its position.

    Where the strata of t begin differs from step to step. Otherwise the place of an image in its batch, which may also
    decide the file or the class that it is from, would decide its t.

    Args:
        run: The run.
        step: The number of optimizer steps before this one.
        slot: The number of the forward pass among those of all processes in the step.
        positions: Where each image is in the endless stream, (B,) integers.
        shape: The shape of one image, (C, H, W).

    Returns:
        t, (B,) int64, and eps, (B, C, H, W) float32, on the device of the run.
    """
    seed, count = run.config.seed, run.global_batch_size
    uniform, noise = image_draws(seed, positions, shape, run.device)
    first = (slot * run.config.batch_size + first_stratum(seed, step, count)) % count
    return run.objective.timesteps_from_uniform(uniform, first_index=first, global_batch_size=count), noise


def augmented(run: Run, x_0: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
    """Augment the images of a forward pass, if the run augments.

    Args:
        run: The run.
        x_0: (B, C, H, W) float32 in [-1, 1].
        positions: Where each image is in the endless stream, (B,) integers.

    Returns:
        The images, (B, C, H, W), and the parameters of each that the network is told; None: it has no place for them.
    """
    if not run.config.augment_probability:
        return x_0, None
    parameters = draw_transformations(
        run.config.seed, positions, run.config.augment_probability, x_0.shape[2], x_0.shape[3]
    )
    return transform(x_0, parameters), parameters.to(x_0.device, non_blocking=True)


def hide_labels(
    seed: int, positions: Tensor, labels: Tensor | None, known: Labels | None, probability: float
) -> Tensor | None:
    """Replace the labels of some images by the one that stands for every label.

    Of several columns, each column of the other images is hidden by itself as often, so that one label may be asked
    for alone.

    Args:
        seed: The seed of the run; with the position it decides whether a label is hidden.
        positions: Where each image is in the endless stream, (B,) integers.
        labels: The label of each image as the network takes it, (B,) or (B, number of columns); None without labels.
        known: The labels of the run.
        probability: How often a label is hidden, in [0, 1).
    """
    if labels is None or known is None or known.unconditional is None:
        return labels
    index = positions.numpy()
    is_hidden = hashed_uniform(seed, CLASS, index) < probability
    if isinstance(known, Columns):
        of_columns = [hashed_uniform(seed, COLUMN + column, index) < probability for column in range(len(known))]
        is_hidden = np.stack(of_columns, axis=1) | is_hidden[:, None]
    on_device = torch.from_numpy(is_hidden).to(labels.device, non_blocking=True)
    return torch.where(on_device, hidden_labels(known, len(labels), labels.device), labels)
