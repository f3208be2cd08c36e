"""The model of a run before its first step: labels, network, scheduler and objective."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_ddpm.classes import Classes
from hf_ddpm.condition import Condition
from hf_ddpm.consistency import ConsistencyObjective, visited_timesteps
from hf_ddpm.data.given import GivenImages
from hf_ddpm.data.labels import labels_of
from hf_ddpm.labels import Labels, Values, describe_labels, on_scales, read_labels, scales_of, structure_of
from hf_ddpm.network import make_unet
from hf_ddpm.network_config import num_classes_of
from hf_ddpm.objective import Objective
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.training import sharding
from hf_ddpm.training.config import CLASS_DROPOUT, TrainingConfig
from hf_ddpm.training.finetuning import is_conditional_network, load_weights, network_of
from hf_ddpm.training.parts import check_given_network
from hf_ddpm.training.start import Images, Start
from hf_ddpm.training.trial import network_source
from hf_ddpm.training.tuning import open_teacher


def make_scheduler(config: TrainingConfig) -> DDPMScheduler:
    """Make the scheduler of training, which sampling never touches; it is saved with the model.

    Stock samples it well in fewer steps than T: `trailing` starts at T-1 for any number of them, but stock adds noise
    in its last step, which is seen unless the variance is `fixed_small`; `leading` has no such step.
    """
    leading = config.variance_type != "fixed_small" and not config.rescale_betas_zero_snr
    return DDPMScheduler(
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        beta_start=config.ddpm_beta_start,
        beta_end=config.ddpm_beta_end,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        timestep_spacing="leading" if leading else "trailing",
    )


def labels_of_run(config: TrainingConfig, images: Images, given: Any) -> Labels | None:
    """Return the labels of the images, with one for `class_dropout` where the network has a place for it."""
    if not isinstance(images, GivenImages) and images.label_columns is not None:
        if given is not None:
            raise UsageError(
                f"label_column must be one column of classes for a network that is passed, got {config.label_column}: "
                "leave out network=, or take another column"
            )
        assert images.labels is not None
        return labels_of(images.label_columns, images.labels, config.class_dropout > 0)
    if images.num_classes is None:
        if config.class_dropout not in (0, CLASS_DROPOUT):
            raise UsageError(f"class_dropout = {config.class_dropout} has no effect: the images have no classes")
        return None
    classes = Classes(tuple(images.class_names or map(str, range(images.num_classes))))
    has_place = given is None or num_classes_of(given.config) == len(classes) + 1
    if given is not None and not has_place and config.class_dropout not in (0, CLASS_DROPOUT):
        raise UsageError(
            f"class_dropout = {config.class_dropout} needs a network of {len(classes) + 1} classes, one more than the "
            f"images have, got {num_classes_of(given.config)}"
        )
    return replace(classes, has_unconditional=config.class_dropout > 0 and has_place)


def make_network(
    config: TrainingConfig,
    images: Images,
    labels: Labels | None,
    condition: Condition | None,
    checkpoint: Path | None,
    given: Any,
) -> Any:
    """Make the network of the run: that of the checkpoint or of `init_from`, one from a config, or a new one.

    One that was passed to `train` is taken as it is.
    """
    condition_channels = 0 if condition is None else condition.channels
    if given is not None:
        check_given_network(given, config, images, condition_channels)
        if config.gradient_checkpointing:
            given.enable_gradient_checkpointing()
        return given
    network, widens = None, False
    if checkpoint is not None and config.model_config_name_or_path is None:
        # Where this version makes another network for the data, or the model lies elsewhere, the run keeps its own.
        network = checkpoint / "unet"
    elif config.init_from is not None:
        network = network_of(config.init_from)
        widens = condition is not None and not is_conditional_network(network)
    unet = make_unet(
        images.channels,
        images.size,
        labels.num_embeddings if isinstance(labels, Classes) else None,
        model_config=config.model_config_name_or_path if network is None else str(network),
        variance_type=config.variance_type,
        dropout=None if config.model_config_name_or_path or config.init_from else config.dropout,
        seed=config.seed,
        source=network_source(config) if checkpoint is None else f"the network of {checkpoint.name}",
        condition_channels=condition_channels,
        widens=widens,
        labels=None if isinstance(labels, Classes) else labels,
    )
    if network is not None and checkpoint is None:
        load_weights(unet, network, network_source(config))
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    return unet


def on_scales_of_start(config: TrainingConfig, labels: Labels | None, start: Start) -> Labels | None:
    """Return the labels on the scales of what the run begins with: a number means to its network what it meant."""
    if start.checkpoint is not None:
        return on_scales(labels, start.progress.label_scales)
    if config.init_from is None:
        return labels
    of_model = read_labels(network_of(config.init_from).parent)
    _check_same_labels(config, labels, of_model)
    return labels if of_model is None else on_scales(labels, scales_of(of_model))


def _check_same_labels(config: TrainingConfig, labels: Labels | None, of_model: Labels | None) -> None:
    """Check that the labels of the images are those of the model of `init_from`: its classes, in its order."""
    if of_model is None or labels is None:
        return
    if isinstance(labels, Classes) and isinstance(of_model, Classes):
        if of_model.names != labels.names:
            raise UsageError(
                f"the images must have the classes of {config.init_from!r}, {', '.join(of_model.names)}, in this "
                f"order, got {', '.join(labels.names)}: give other images, or begin with a model without classes"
            )
        return
    if structure_of(labels) != structure_of(of_model):
        raise UsageError(
            f"the images must have the labels of {config.init_from!r}, {describe_labels(of_model)}, got "
            f"{describe_labels(labels)}: give other images, or begin with a model without labels"
        )
    if of_model.has_unconditional != labels.has_unconditional:
        raise UsageError(
            f"class_dropout must be {'above 0' if of_model.has_unconditional else '0'}, as that of the model "
            f"{config.init_from!r}, got {config.class_dropout}"
        )


def make_objective(
    config: TrainingConfig, scheduler: DDPMScheduler, images: Images, labels: Labels | None, device: torch.device
) -> Objective:
    """Make the loss of the run; a learned variance is trained on the integers that x_0 is made of."""
    unconditional = None if labels is None or isinstance(labels, Values) else labels.unconditional
    kind: Any = Objective
    if config.tuned_steps is not None:
        teacher = open_teacher(config, scheduler, labels, device)
        visited = visited_timesteps(scheduler, config.tuned_steps)
        kind = partial(ConsistencyObjective, teacher=teacher, visited=visited)
    return kind(
        scheduler=scheduler,
        weighting=config.loss_weighting,
        min_snr_gamma=config.min_snr_gamma,
        density=config.timestep_density,
        noise_level_mean=config.noise_level_mean,
        noise_level_std=config.noise_level_std,
        autocast_dtype=sharding.AUTOCAST[config.mixed_precision or "no"],
        max_value=images.max_value if images.value_range is None else images.value_range.num_steps or images.max_value,
        unconditional_class=unconditional,
    )
