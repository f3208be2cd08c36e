"""The settings of a run beside those of Ho et al. 2020 for CIFAR-10: a table of the model card.

Theirs are from Sec. 4 and App. B of the paper; the variance, the warm-up and the clipping of gradients are from the
code that was published with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_ddpm.runtime.format import format_value


def settings_rows(recorded: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return rows of a setting's name, its value in this run and its value in Ho et al. 2020, in the same words.

    A row for which a setting was not recorded is left out.

    Args:
        recorded: Settings by name; None stands for one that was not recorded.
    """
    settings = {name: value for name, value in recorded.items() if value is not None}
    rows = [
        ("Chain length T", "{num_train_timesteps:,}", "1,000"),
        ("Noise schedule", _noise_schedule(settings), "linear, beta from 0.0001 to 0.02"),
        ("The network predicts", "{prediction_type}", "epsilon"),
        ("Variance of p", "{variance_type}", "fixed_large"),
        ("Weight of the squared error", _loss_weight(settings), "1"),
        *([] if settings.get("tuned_steps") else [("Target averaged over", _target(settings), "the image")]),
        ("Guidance that is a part of it", _guidance(settings), "none"),
        ("Distribution of t", _timestep_density(settings), "uniform, independent"),
        ("Optimizer", _optimizer(settings), "Adam, betas 0.9 and 0.999"),
        ("Learning rate", _learning_rate(settings), "0.0002, constant_with_warmup, 5,000 warm-up steps"),
        ("Images per step", "{global_batch_size:,}", "128"),
        ("Gradients clipped to the norm", "{max_grad_norm:g}", "1"),
        ("Averaged weights (EMA)", _average(settings), "0.9999 per step"),
        ("Dropout", "{dropout:g}", "0.1"),
        ("Images mirrored at random", _yes_or_no(settings, "random_flip"), "yes"),
        ("Images augmented, told to the network", _augmentation(settings), "no"),
        ("Optimizer steps", "{steps:,}", "800,000"),
    ]
    filled = [(name, _fill(template, settings), theirs) for name, template, theirs in rows]
    return [(name, ours, theirs) for name, ours, theirs in filled if ours is not None]


def _fill(template: str, settings: Mapping[str, Any]) -> str | None:
    """Return a template of `str.format` with settings filled in, or None if it names one that was not recorded."""
    try:
        return format_value(template.format(**settings))
    except KeyError:
        return None


def _noise_schedule(settings: Mapping[str, Any]) -> str:
    if settings.get("beta_schedule") == "squaredcos_cap_v2":
        schedule = "cosine"
    else:
        schedule = "{beta_schedule}, beta from {beta_start:g} to {beta_end:g}"
    return schedule + (", rescaled to zero terminal SNR" if settings.get("rescale_betas_zero_snr") else "")


def _loss_weight(settings: Mapping[str, Any]) -> str:
    if settings.get("has_own_objective"):
        return "that of an objective of its own"
    if settings.get("tuned_steps"):
        return "that of consistency tuning"
    match settings.get("loss_weighting"):
        case "constant":
            return "1"
        case "min_snr":
            return "min(SNR, {min_snr_gamma:g}) on x_0"
    return "{loss_weighting}"


def _target(settings: Mapping[str, Any]) -> str:
    if settings.get("stable_target_images") == 0:
        return "the image"
    return "the image and {stable_target_images:,} others"


def _guidance(settings: Mapping[str, Any]) -> str:
    if not settings.get("guidance_interval"):
        return "scale {guidance_scale:g}"
    return "scale {guidance_scale:g}, for sigma from {guidance_interval[0]:g} to {guidance_interval[1]:g}"


def _timestep_density(settings: Mapping[str, Any]) -> str:
    if settings.get("tuned_steps"):
        return "the timesteps of sampling in few steps alone"
    match settings.get("timestep_density"):
        case "uniform":
            return "uniform, independent"
        case "lognormal":
            return (
                "nine tenths: log(sigma_t) normal with mean {noise_level_mean:g} and std {noise_level_std:g}; "
                "one tenth: uniform; stratified"
            )
    return "{timestep_density}"


def _optimizer(settings: Mapping[str, Any]) -> str:
    adam = "AdamW, weight decay {adam_weight_decay:g}" if settings.get("adam_weight_decay") else "Adam"
    adam += ", betas {adam_beta1:g} and {adam_beta2:g}"
    is_muon = settings.get("optimizer") == "muon"
    return f"Muon for the matrices of blocks; for the rest {adam}" if is_muon else adam


def _learning_rate(settings: Mapping[str, Any]) -> str:
    is_constant = settings.get("lr_scheduler") == "constant"
    return "{learning_rate:g}, {lr_scheduler}" + ("" if is_constant else ", {lr_warmup_steps:,} warm-up steps")


def _average(settings: Mapping[str, Any]) -> str:
    if settings.get("use_ema") is False:
        return "none"
    if "use_ema" not in settings:
        return "{use_ema}"
    if "ema_std" in settings:
        return "a power of the images seen, std {ema_std:g} of them"
    if "ema_halflife_images" in settings:
        average = "half-life {ema_halflife_images[0]:,.0f} images"
    else:
        average = "{ema_max_decay:g} per step"
    if "ema_rampup_ratio" in settings:
        return average + ", at most {ema_rampup_ratio:g} of the images seen"
    k = "k" if settings.get("ema_inv_gamma") == 1 else "k / {ema_inv_gamma:g}"
    return f"{average}, at most 1 - (1 + {k})^-{{ema_power:g}} at step k"


def _augmentation(settings: Mapping[str, Any]) -> str:
    return "no" if settings.get("augment_probability") == 0 else "each transformation with {augment_probability:g}"


def _yes_or_no(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return f"{{{name}}}"
    return "yes" if settings[name] else "no"
