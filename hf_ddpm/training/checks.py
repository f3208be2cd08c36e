"""The checks of a config before anything is read or written.

Each setting says its own range and what it takes effect with (runtime/settings.py). Here stand relations of several
settings, and what a run needs of this machine and of its output folder.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hf_ddpm.data.config import check_data_paths
from hf_ddpm.image_size import require_factor, to_size
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import require_writable_folder
from hf_ddpm.runtime.launch import environment_number, launcher_precision
from hf_ddpm.runtime.run_files import checkpoint_names, run_files
from hf_ddpm.runtime.settings import check_effects, check_values

if TYPE_CHECKING:
    from hf_ddpm.training.config import TrainingConfig

# Settings of training that tuning does without -> why.
_WITHOUT_TUNING = {
    **dict.fromkeys(("loss_weighting", "min_snr_gamma"), "its loss has a weight of its own; leave it out"),
    **dict.fromkeys(
        ("timestep_density", "noise_level_mean", "noise_level_std"),
        "it learns the timesteps of sampling alone; leave it out",
    ),
    "stable_target_images": "its target is that of the model as it was; leave it out",
    "augment_probability": "the model as it was would not be told how images were transformed; leave it out",
}
PRECISIONS = ("no", "fp16", "bf16")
THREADS_PER_CORE = 16  # Far more of them end the process.


def check_config(config: TrainingConfig) -> None:
    """Check settings and the output folder, but not the data.

    Raises:
        UsageError: When a value cannot work, or cannot take effect beside the others.
    """
    check_values(config)
    check_data_paths(config)
    _check_relations(config)
    if config.tuned_steps is not None:
        _check_tuning(config)
    _check_hub_resume(config)
    if config.train_batch_size == "auto":
        _check_automatic_batch(config)
    check_effects(config)
    _check_environment(config)
    check_output_dir(config)


def _check_relations(config: TrainingConfig) -> None:
    if config.ddpm_beta_start > config.ddpm_beta_end:
        raise UsageError(
            "ddpm_beta_start and ddpm_beta_end must rise within (0, 1), "
            f"got {config.ddpm_beta_start} and {config.ddpm_beta_end}"
        )
    if config.rescale_betas_zero_snr and config.ddpm_num_steps < 2:
        raise UsageError(f"rescale_betas_zero_snr needs ddpm_num_steps of at least 2, got {config.ddpm_num_steps}")
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise UsageError(
            "rescale_betas_zero_snr leaves no signal in x_T, and x_0 cannot be recovered from eps there: "
            "use prediction_type v_prediction, sample or previous_sample, got epsilon"
        )
    if config.stable_target_images and config.makes_from_images:
        raise UsageError(
            f"stable_target_images must be 0 for a model that makes images from images, got "
            f"{config.stable_target_images}: its target would be a mean over all images of the same condition, and "
            "each has its own; leave it out"
        )
    if config.augment_probability and config.makes_from_images:
        raise UsageError(
            f"augment_probability must be 0 for a model that makes images from images, got "
            f"{config.augment_probability}: its conditions would have to be transformed alike; leave it out"
        )
    if config.augment_probability and config.stable_target_images:
        raise UsageError(
            f"augment_probability must be 0 with stable_target_images, got {config.augment_probability} with "
            f"{config.stable_target_images}: the stable target is a mean over images that are not transformed; give "
            "stable_target_images 0"
        )
    if config.condition_noise and not config.makes_from_images:
        raise UsageError(
            f"condition_noise = {config.condition_noise} has no effect: give condition_column or super_resolution"
        )
    if config.group_column is not None and config.eval_fraction is None and config.eval_steps is None:
        raise UsageError(
            f"group_column = {config.group_column} has no effect: give eval_fraction, or eval_steps for a split that "
            "is held out"
        )
    if config.super_resolution is not None and config.resolution is not None:
        require_factor(config.super_resolution, to_size(config.resolution))
    if config.random_crop and config.resolution is None and config.init_from is None:
        raise UsageError("resolution must be given with random_crop, as the size of the crops: give --resolution")
    steps = config.ddpm_num_inference_steps
    if steps is not None and steps > config.ddpm_num_steps:
        raise UsageError(f"ddpm_num_inference_steps must be in [1, {config.ddpm_num_steps}], got {steps}")


def _check_tuning(config: TrainingConfig) -> None:
    """Check what a run that tunes a model for few steps asks for."""
    default = type(config)()
    for name, reason in _WITHOUT_TUNING.items():
        value = getattr(config, name)
        if value != getattr(default, name):
            raise UsageError(f"{name} = {value} has no effect on a model that is tuned for few steps: {reason}")
    if config.guidance_interval is not None and not config.is_guided:
        raise UsageError(f"guidance_interval = {config.guidance_interval} has no effect: give guidance_scale above 1")
    folder = Path(config.init_from or "").resolve()
    if config.init_from and folder.exists() and folder.is_relative_to(Path(config.output_dir).resolve()):
        raise UsageError(
            f"output_dir must not hold the model that is tuned, got {config.output_dir!r}: that model teaches the run "
            "to its end, and would be replaced; give another folder"
        )


def _check_hub_resume(config: TrainingConfig) -> None:
    if config.resume_from_checkpoint != "hub":
        return
    if not config.push_to_hub:
        raise UsageError(
            "resume_from_checkpoint hub needs push_to_hub, which says where the checkpoint is: give --push_to_hub and "
            "the --hub_model_id of the run"
        )
    if config.dry_run:
        raise UsageError("resume_from_checkpoint must not be hub with dry_run, which writes nothing: leave one out")


def _check_automatic_batch(config: TrainingConfig) -> None:
    if config.gradient_accumulation_steps != 1:
        raise UsageError(
            "gradient_accumulation_steps must be left out with train_batch_size auto, which chooses both, got "
            f"{config.gradient_accumulation_steps}: give global_batch_size, the images of a step"
        )
    if config.streaming:
        raise UsageError(
            "train_batch_size must be a number with streaming, got auto: the order of a stream depends on it"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UsageError("train_batch_size must be a number with FSDP, got auto: give one, --dry_run measures it")


def _check_environment(config: TrainingConfig) -> None:
    """Check what a run needs of this machine: a launcher's rank, a login, a package."""
    local_rank = environment_number("LOCAL_RANK", max(0, config.local_rank))
    if config.local_rank not in (-1, local_rank):
        raise UsageError(f"local_rank must be the launcher's LOCAL_RANK, {local_rank}, got {config.local_rank}")
    precision = config.mixed_precision
    if precision in (None, "auto"):
        precision = launcher_precision()
    if precision not in PRECISIONS:
        raise UsageError(
            f"mixed_precision must be one of {', '.join(PRECISIONS)}, got {precision!r} of `accelerate config` or of "
            "ACCELERATE_MIXED_PRECISION in the environment: give --mixed_precision, or change it there"
        )
    most_threads = THREADS_PER_CORE * (os.cpu_count() or 1)
    if (config.cpu_threads_per_process or 1) > most_threads:
        raise UsageError(
            f"cpu_threads_per_process must be at most {most_threads} with the cores of this machine, got "
            f"{config.cpu_threads_per_process}"
        )
    if config.push_to_hub:
        from hf_ddpm.hub.token import check_token, stored_token

        if config.hub_token is None and stored_token() is None:
            raise UsageError("push_to_hub needs a login: hf auth login, or HF_TOKEN in the environment")
        check_token(config.hub_token)
    needed = config.logger.split(",") if config.logger else []
    if config.enable_xformers_memory_efficient_attention:
        needed.append("xformers")
    for module in needed:
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"{module} is not installed: pip install {module}")


def check_output_dir(config: TrainingConfig) -> None:
    """Check that the run may write to `output_dir`.

    Raises:
        UsageError: When the folder holds another run, or nothing to resume from.
    """
    folder = Path(config.output_dir)
    require_writable_folder("output_dir", folder)
    if config.resume_from_checkpoint is not None:
        _check_checkpoint(config, config.resume_from_checkpoint, folder)
    elif not config.overwrite_output_dir and not config.dry_run and run_files(folder):
        raise UsageError(
            f"output_dir {config.output_dir!r} already holds a run: choose another, "
            "--resume_from_checkpoint latest to resume it, or --overwrite_output_dir to replace it"
        )


def _check_checkpoint(config: TrainingConfig, checkpoint: str, folder: Path) -> None:
    """Check that a run can be resumed from `checkpoint`, a name or `latest`, in `folder`."""
    if config.overwrite_output_dir:
        raise UsageError("overwrite_output_dir would delete the checkpoint to resume from: give one of the two")
    names = checkpoint_names(folder)
    if not names and (folder / "run.json").exists():
        raise UsageError(
            f"resume_from_checkpoint = {checkpoint!r}, but {config.output_dir!r} holds a run that has ended, "
            "without checkpoints: choose another folder, or --overwrite_output_dir to replace it"
        )
    has_config = (folder / "config.yaml").is_file()
    if not names and not has_config and run_files(folder):
        raise UsageError(
            f"resume_from_checkpoint = {checkpoint!r}, but {config.output_dir!r} holds a model without a run that "
            "could be resumed, and a new one would replace it: choose another folder, or --overwrite_output_dir"
        )
    if names and not has_config:
        raise UsageError(f"resume_from_checkpoint = {checkpoint!r}, but {config.output_dir!r} holds no config.yaml")
    if checkpoint in ("latest", "hub"):
        return
    if Path(checkpoint).name != checkpoint and Path(checkpoint).resolve().parent != folder.resolve():
        raise UsageError(
            f"resume_from_checkpoint must be a checkpoint in output_dir, got {checkpoint!r}, which is not in "
            f"{config.output_dir!r}: give that folder as output_dir"
        )
    if Path(checkpoint).name not in names:
        known = " or ".join(["latest", "hub", *names])
        raise UsageError(f"resume_from_checkpoint must be {known}, got {checkpoint!r}")
    if Path(checkpoint).name != names[-1]:
        raise UsageError(
            f"resuming from {checkpoint!r} would leave {names[-1]}, of a run that went on otherwise, the latest: "
            "move the newer checkpoints away first"
        )


def is_resumed(config: TrainingConfig) -> bool:
    """Return whether there is a checkpoint that the run is to be resumed from."""
    return config.resume_from_checkpoint is not None and bool(checkpoint_names(Path(config.output_dir)))
