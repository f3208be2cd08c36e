"""Settings that cannot work, or that cannot take effect beside the others; said before anything is read or written."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import fields
from typing import TYPE_CHECKING, Literal, get_args, get_origin, get_type_hints

from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.run_files import check_output_dir

if TYPE_CHECKING:
    from hf_ddpm.training.config import TrainingConfig


_AT_LEAST_ONE = (
    *("resolution", "ddpm_num_steps", "train_batch_size", "gradient_accumulation_steps", "num_epochs"),
    *("max_train_steps", "max_bad_steps", "checkpointing_steps", "checkpoints_total_limit", "eval_batch_size"),
    *("save_images_epochs", "save_model_epochs", "ddpm_num_inference_steps", "logging_steps"),
    *("cpu_threads_per_process", "shuffle_buffer_images", "eval_steps"),
)
_AT_LEAST_ZERO = (
    *("dataloader_num_workers", "lr_warmup_steps", "adam_weight_decay", "seed", "ema_snapshots"),
    "stable_target_images",
)
_ABOVE_ZERO = (
    *(
        "learning_rate",
        "adam_epsilon",
        "max_grad_norm",
        "min_snr_gamma",
        "noise_level_std",
        "ema_inv_gamma",
        "ema_power",
    ),
    *("ema_rampup_ratio", "max_train_hours"),
)


def check_config(config: TrainingConfig) -> None:
    """Raises UsageError for a value that cannot work, or that cannot take effect beside the others.

    Looks at settings and at the output folder, not at the data.
    """
    for name, hint in get_type_hints(type(config)).items():
        choices = [c for part in (hint, *get_args(hint)) if get_origin(part) is Literal for c in get_args(part)]
        value = getattr(config, name)
        if value is None and type(None) not in get_args(hint):
            raise UsageError(f"{name} must have a value, got None: leave the setting out for its default")
        if choices and value is not None and value not in choices:
            raise UsageError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")

    for name in _AT_LEAST_ONE:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    for name in _ABOVE_ZERO:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{name} must be above 0, got {value}")
    for name in _AT_LEAST_ZERO:
        if getattr(config, name) < 0:
            raise UsageError(f"{name} must not be negative, got {getattr(config, name)}")
    if config.seed >= 2**63:
        raise UsageError(f"seed must be below 2**63, got {config.seed}")
    if config.rescale_betas_zero_snr and config.ddpm_num_steps < 2:
        raise UsageError(f"rescale_betas_zero_snr needs ddpm_num_steps of at least 2, got {config.ddpm_num_steps}")
    for name in ("dropout", "adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            raise UsageError(f"{name} must be in [0, 1), got {getattr(config, name)}")
    halflives = config.ema_halflife_images or []
    if (
        config.ema_halflife_images == []
        or len({f"{h:g}" for h in halflives}) < len(halflives)
        or not all(1 <= h < math.inf for h in halflives)
    ):
        raise UsageError(f"ema_halflife_images must be different numbers of at least 1, got {halflives}")
    if config.eval_num_images < 4:
        raise UsageError(f"eval_num_images must be at least 4, got {config.eval_num_images}")
    if not 0 < config.ema_max_decay < 1:
        raise UsageError(f"ema_max_decay must be in (0, 1), got {config.ema_max_decay}")
    if not 0 < config.ddpm_beta_start <= config.ddpm_beta_end < 1:
        raise UsageError(
            f"ddpm_beta_start and ddpm_beta_end must rise within (0, 1), "
            f"got {config.ddpm_beta_start} and {config.ddpm_beta_end}"
        )
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise UsageError(
            "rescale_betas_zero_snr leaves no signal in x_T, and x_0 cannot be recovered from eps there: "
            "use prediction_type v_prediction, sample or previous_sample, got epsilon"
        )
    steps = config.ddpm_num_inference_steps
    if steps is not None and steps > config.ddpm_num_steps:
        raise UsageError(f"ddpm_num_inference_steps must be in [1, {config.ddpm_num_steps}], got {steps}")

    _check_effects(config)
    _check_environment(config)
    check_output_dir(config)


def _check_effects(config: TrainingConfig) -> None:
    """A setting that was changed from its default and cannot take effect is an error."""
    default = {f.name: f.default for f in fields(config)}

    def require(condition: bool, remedy: str, *names: str) -> None:
        for name in names:
            if not condition and getattr(config, name) != default[name]:
                shown = "..." if name == "hub_token" else getattr(config, name)
                raise UsageError(f"{name} = {shown} has no effect: {remedy}")

    by_ends = config.ddpm_beta_schedule != "squaredcos_cap_v2"
    require(by_ends, "the schedule squaredcos_cap_v2 is not given by its ends", "ddpm_beta_start", "ddpm_beta_end")
    require(config.loss_weighting == "min_snr", "give loss_weighting min_snr", "min_snr_gamma")
    warms_up = config.lr_scheduler != "constant" or config.lr_warmup_steps == 0
    require(warms_up, "the schedule constant has no warm-up; give constant_with_warmup", "lr_warmup_steps")
    of_lognormal = ("noise_level_mean", "noise_level_std")
    require(config.timestep_density == "lognormal", "give timestep_density lognormal", *of_lognormal)
    averaging = ("ema_halflife_images", "ema_inv_gamma", "ema_power", "ema_max_decay", "ema_rampup_ratio")
    require(config.use_ema, "give use_ema", *averaging, "ema_snapshots")
    require(config.ema_rampup_ratio is None, "ema_rampup_ratio is given", "ema_inv_gamma", "ema_power")
    require(config.streaming, "give streaming", "shuffle_buffer_images")
    require(not config.streaming, "a stream is read once; leave streaming out, or give 0", "stable_target_images")
    measured = ("eval_split", "eval_num_images", "eval_network", "eval_network_path")
    require(config.eval_steps is not None, "give eval_steps", *measured)
    require(config.ema_halflife_images is None, "ema_halflife_images is given", "ema_max_decay")
    require(config.model_config_name_or_path is None, "the model config says its own", "dropout")
    require(config.init_from is None, "init_from has a network", "dropout", "model_config_name_or_path")
    require(config.push_to_hub, "give push_to_hub", "hub_model_id", "hub_token", "hub_revision", "hub_averages")
    require(config.logger == "tensorboard", "give logger tensorboard", "logging_dir")
    require(config.dataset_name is not None, "give dataset_name", "dataset_config_name")
    launched = int(os.environ.get("LOCAL_RANK", config.local_rank))
    require(launched == config.local_rank, f"the launcher's LOCAL_RANK is {launched}", "local_rank")


def _check_environment(config: TrainingConfig) -> None:
    if config.push_to_hub and config.hub_token is None:
        from huggingface_hub import get_token

        if get_token() is None:
            raise UsageError("push_to_hub needs a login: hf auth login, or HF_TOKEN in the environment")
    needed = [config.logger] if config.logger else []
    if config.enable_xformers_memory_efficient_attention:
        needed.append("xformers")
    for module in needed:
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"{module} is not installed: pip install {module}")
