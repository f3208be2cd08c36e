"""The prediction of a network, as a step of sampling makes it: with labels, and guided.

prediction     what the network puts out at x_t and t, and at the label of each image
conditions     what it takes beside x_t and t, which is the same in all steps of a call
guided         led away from the prediction of a weaker model: another network, the same one without a label, or both
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from torch import Tensor

from hf_ddpm.classes import Classes, numbered_classes
from hf_ddpm.guidance import Guidance, add_autoguidance, combine, in_interval
from hf_ddpm.label_embedding import require_same_embedding
from hf_ddpm.labels import Labels, NetworkLabel, describe_labels, takes_floats
from hf_ddpm.network import timestep_for
from hf_ddpm.network_config import num_classes_of
from hf_ddpm.scheduler import DDPMScheduler, as_our_scheduler, complete_config

Label = int | float | str | Mapping[str, Any] | NetworkLabel
ClassLabels = Label | Sequence[Label] | Tensor | None


@dataclass(frozen=True)
class Conditions:
    """The inputs of each evaluation of the network beside x_t and t. They are the same in all steps of a call.

    Args:
        network_dtype: The type of the network's weights, which it takes x_t in.
        class_labels: The label of each image, see `network_labels`; None for a model without labels.
        guidance: How the prediction is guided; None: it is not.
        weaker: The weaker network that guidance leads away from; None: none.
        no_labels: What stands for no label, as `class_labels`, where guidance leads away from the network itself
            without a label; None: it does not.
        output_scheduler: Our scheduler of the model, for guidance that acts on x_0_hat; None for other guidance.
        images: The channels that the network takes after those of x_t, (B, C', H, W); None: it takes x_t alone.
    """

    network_dtype: torch.dtype
    class_labels: Tensor | None = None
    guidance: Guidance | None = None
    weaker: Any = None
    no_labels: Tensor | None = None
    output_scheduler: DDPMScheduler | None = None
    images: Tensor | None = None


def evaluate(
    network: Any,
    dtype: torch.dtype,
    network_input: Tensor,
    t: Tensor,
    labels: Tensor | None,
    images: Tensor | None = None,
) -> Tensor:
    """Return what a network of some type puts out, in the type of its input; it takes `images` after the input."""
    keywords = {} if labels is None else {"class_labels": labels}
    if images is not None:
        network_input = torch.cat([network_input, images.to(network_input)], dim=1)
    output = network(network_input.to(dtype), timestep_for(network, t, network_input), **keywords).sample
    return output.to(network_input.dtype)


def predict_guided(
    network: Any, network_input: Tensor, t: Tensor, conditions: Conditions, running: Tensor | None, acts: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the output with a guided prediction; a learned variance is that of the model that is guided.

    Args:
        network: The network that is guided.
        network_input: x_t in the scale that the network takes, (B, C, H, W).
        t: The timestep, ().
        conditions: What the network takes beside these, with guidance.
        running: What the guidance `apg` returned in the step before.
        acts: Whether guidance acts at t. Else autoguidance beside it does, alone.

    Returns:
        The output, and what the next step takes as `running`.
    """
    guidance, labels, images = conditions.guidance, conditions.class_labels, conditions.images
    assert guidance is not None
    if conditions.no_labels is not None and acts:
        assert labels is not None
        # Both in one batch, which takes less time than two.
        twice, both = torch.cat([network_input] * 2), torch.cat([labels, conditions.no_labels])
        both_images = None if images is None else torch.cat([images] * 2)
        output, without = evaluate(network, conditions.network_dtype, twice, t, both, both_images).chunk(2)
    else:
        output, without = evaluate(network, conditions.network_dtype, network_input, t, labels, images), None
    weaker = None
    if conditions.weaker is not None:
        weaker = evaluate(conditions.weaker, conditions.weaker.dtype, network_input, t, labels, images)
    channels = network_input.shape[1]
    prediction, variance = output[:, :channels], output[:, channels:]
    guided = prediction
    if acts:
        led_away_from = weaker if without is None else without
        assert led_away_from is not None
        guided, running = _combine(conditions, prediction, led_away_from[:, :channels], network_input, t, running)
    if weaker is not None and guidance.autoguidance_scale != 1:
        guided = add_autoguidance(guided, prediction, weaker[:, :channels], guidance.autoguidance_scale)
    return torch.cat([guided, variance], dim=1), running


def _combine(
    conditions: Conditions, prediction: Tensor, weaker: Tensor, x_t: Tensor, t: Tensor, running: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the guided prediction as the network would put it out, whatever quantity its guidance acts on."""
    assert conditions.guidance is not None
    if conditions.output_scheduler is None:
        return combine(conditions.guidance, prediction, weaker)
    # x_0_hat is the output times a factor plus a multiple of x_t.
    one = torch.ones_like(prediction[:, :1, :1, :1])
    factor = conditions.output_scheduler.predict_original(one, torch.zeros_like(one), t.long())
    x_0_hat = conditions.output_scheduler.predict_original(prediction, x_t, t.long())
    weaker_x_0_hat = x_0_hat + factor * (weaker - prediction)
    guided_x_0_hat, running = combine(conditions.guidance, x_0_hat, weaker_x_0_hat, running)
    running = None if running is None else running.detach()
    return prediction + (guided_x_0_hat - x_0_hat) / factor, running


def is_guided_at(scheduler: Any, t: Tensor, guidance: Guidance) -> bool:
    """Return whether guidance acts at a timestep."""
    return guidance.interval is None or in_interval(sigma_at(scheduler, t), *guidance.interval)


def sigma_at(scheduler: Any, t: Tensor) -> float:
    """Return sigma_t, the ratio of noise to signal, of a scheduler of diffusers.

    Args:
        scheduler: The scheduler. Without `alphas_cumprod` it is one of flow matching, where t / T is the share of the
            noise and 1 - t / T that of the image.
        t: The timestep, (); the nearest whole one counts.
    """
    if hasattr(scheduler, "alphas_cumprod"):
        alpha_bar = float(scheduler.alphas_cumprod[int(t.round())])
        return math.sqrt((1 - alpha_bar) / alpha_bar) if alpha_bar > 0 else math.inf
    noise = float(t) / scheduler.config.num_train_timesteps
    return noise / (1 - noise) if noise < 1 else math.inf


def predict_original(scheduler: Any, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return x_0_hat, clipped as the scheduler clips it, for a scheduler whose step does not return it."""
    x_0_hat = scheduler_of_outputs(scheduler.config).predict_original(model_output, x_t, t.long())
    # A config may hold settings of another scheduler, which this one does not know: clip_sample, thresholding.
    if scheduler.config.get("thresholding") and hasattr(scheduler, "_threshold_sample"):
        return scheduler._threshold_sample(x_0_hat)
    if isinstance(scheduler, LCMScheduler) and scheduler.config["clip_sample"]:
        limit = scheduler.config["clip_sample_range"]
        return x_0_hat.clamp(-limit, limit)
    return x_0_hat


def scheduler_of_outputs(config: Any) -> Any:
    """Return our scheduler of a model, to turn outputs of its network into x_0_hat, whatever scheduler samples it."""
    return as_our_scheduler(
        {**complete_config(config), "variance_type": "fixed_small", "timestep_spacing": "trailing"}
    )


def check_guide(guide: Any, unet: Any) -> None:
    """Check that a network can guide another one.

    Raises:
        ValueError: When it takes other images or other classes.
    """
    if isinstance(guide, DiffusionPipeline) or not hasattr(guide, "config"):
        hint = "give its unet" if isinstance(guide, DiffusionPipeline) else "give one of diffusers"
        raise ValueError(f"guide must be a network, got {type(guide).__name__}: {hint}")
    for name in ("in_channels", "sample_size", "num_class_embeds", "class_embed_type", "num_embeds_ada_norm"):
        ours, theirs = (config.get(name) for config in (unet.config, guide.config))
        sizes = ([side] * 2 if isinstance(side, int) else side and [*side] for side in (ours, theirs))
        if ours != theirs and not (name == "sample_size" and len({str(side) for side in sizes}) == 1):
            raise ValueError(
                f"guide must have the model's {name}, {ours}, got {theirs}: take a model of the same data"
            )
    require_same_embedding(guide, unet)


def network_labels(
    labels: Labels | None, kind: str | None, class_labels: ClassLabels, batch_size: int, device: torch.device
) -> Tensor | None:
    """Return the label of each image as the network takes it; None for a network without labels.

    Args:
        labels: The labels of the network, if they are known.
        kind: How the network embeds what is no class, its `class_embed_type`.
        class_labels: The label of all images, or of each.
        batch_size: B.
        device: The device of the network.

    Returns:
        (B,) int64 for classes, (B,) float32 for numbers, (B, number of columns) float32 for several columns.

    Raises:
        ValueError: When they are not what the network takes.
    """
    if labels is None and kind is None:
        if class_labels is not None:
            raise ValueError("class_labels must be None: the model was trained without classes")
        return None
    if class_labels is None:
        if labels is None or labels.unconditional is None:
            count = "labels" if labels is None else describe_labels(labels)
            raise ValueError(f"class_labels must be given: the model is conditioned on {count}")
        return hidden_labels(labels, batch_size, device)
    if labels is not None:
        is_one, numbers = _numbers_of(labels, class_labels)
        tensor = torch.tensor(numbers, dtype=torch.float32 if takes_floats(labels) else torch.int64, device=device)
        tensor = tensor.expand(batch_size, *tensor.shape) if is_one else tensor
    else:
        try:
            tensor = torch.as_tensor(class_labels, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"class_labels must be numbers, one or as many as images, got {class_labels!r}"
            ) from error
        tensor = tensor.expand(batch_size) if tensor.ndim == 0 else tensor
    if tensor.shape[0] != batch_size:
        raise ValueError(f"class_labels must hold batch_size = {batch_size} labels, got {tensor.shape[0]}")
    return tensor


def hidden_labels(labels: Labels, batch_size: int, device: torch.device) -> Tensor:
    """Return what stands for every label, for each of B images, as the network takes it."""
    dtype = torch.float32 if takes_floats(labels) else torch.int64
    hidden = torch.tensor(labels.unconditional, dtype=dtype, device=device)
    return hidden.expand(batch_size, *hidden.shape)


def labels_to_tensor(labels: Labels | None, each: Sequence[Any] | None, device: torch.device) -> Tensor | None:
    """Return a label for each image as the network takes them; None for a model without labels.

    Args:
        labels: The labels of the model.
        each: What `number_of` of the labels takes, one for each image.
        device: The device of the network.
    """
    if labels is None or each is None:
        return None
    return network_labels(labels, None, each, len(each), device)


def _numbers_of(labels: Labels, class_labels: Any) -> tuple[bool, Any]:
    """Return whether there is one label for all images, and its number or the list of their numbers.

    Raises:
        ValueError: When one is no label of the model, or `class_labels` is neither a label nor a list of labels.
    """
    if isinstance(class_labels, Tensor | np.ndarray):
        class_labels = class_labels.tolist()
    if not isinstance(class_labels, Sequence) or isinstance(class_labels, str):
        return True, labels.number_of(class_labels)
    return False, [labels.number_of(label) for label in class_labels]


def unnamed_classes(config: Any) -> Classes | None:
    """Return the classes that a network's config tells of; one that embeds something else has none."""
    num_classes = num_classes_of(config) if config.get("class_embed_type") is None else None
    return None if num_classes is None else numbered_classes(num_classes)
