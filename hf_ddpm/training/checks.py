"""Settings that cannot work, or that cannot take effect beside the others; said before anything is read or written."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import existing_parent
from hf_ddpm.runtime.run_files import checkpoint_names, run_files
from hf_ddpm.runtime.settings import check_effects, check_values

if TYPE_CHECKING:
    from hf_ddpm.training.config import TrainingConfig


def check_config(config: TrainingConfig) -> None:
    """Raises UsageError for a value that cannot work, or that cannot take effect beside the others.

    Looks at settings and at the output folder, not at the data.
    """
    check_values(config)
    if config.seed >= 2**63:
        raise UsageError(f"seed must be below 2**63, got {config.seed}")
    if config.rescale_betas_zero_snr and config.ddpm_num_steps < 2:
        raise UsageError(f"rescale_betas_zero_snr needs ddpm_num_steps of at least 2, got {config.ddpm_num_steps}")
    halflives = config.ema_halflife_images or []
    if (
        config.ema_halflife_images == []
        or len({f"{h:g}" for h in halflives}) < len(halflives)
        or not all(1 <= h < math.inf for h in halflives)
    ):
        raise UsageError(f"ema_halflife_images must be different numbers of at least 1, got {halflives}")
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

    check_effects(config)
    _check_environment(config)
    check_output_dir(config)


def _check_environment(config: TrainingConfig) -> None:
    """Check what the config needs of this machine: a launcher's rank, a login, a package."""
    launched = int(os.environ.get("LOCAL_RANK", config.local_rank))
    if config.local_rank not in (-1, launched):
        raise UsageError(f"local_rank must be the launcher's LOCAL_RANK, {launched}, got {config.local_rank}")
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


def check_output_dir(config: TrainingConfig) -> None:
    """Raises UsageError if `output_dir` holds another run, or there is nothing to resume from."""
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output_dir must be a folder, got {config.output_dir!r}, which is a file")
    existing = existing_parent(folder)
    if not os.access(existing, os.W_OK) or not existing.is_dir():
        raise UsageError(f"output_dir must be a folder that can be written, got {config.output_dir!r}: see {existing}")
    checkpoints = checkpoint_names(folder)
    wanted = config.resume_from_checkpoint
    if wanted is not None:
        if config.overwrite_output_dir:
            raise UsageError("overwrite_output_dir would delete the checkpoint to resume from: give one of the two")
        if not checkpoints and (folder / "run.json").exists():
            raise UsageError(
                f"resume_from_checkpoint = {wanted!r}, but {config.output_dir!r} holds a finished run without "
                "checkpoints: choose another folder, or --overwrite_output_dir to delete it"
            )
        if not checkpoints and not (folder / "config.yaml").is_file() and run_files(folder):
            raise UsageError(
                f"resume_from_checkpoint = {wanted!r}, but {config.output_dir!r} holds a model of no run that could "
                "go on, and a new one would replace it: choose another folder, or --overwrite_output_dir instead"
            )
        if checkpoints and not (folder / "config.yaml").is_file():
            raise UsageError(f"resume_from_checkpoint = {wanted!r}, but {config.output_dir!r} holds no config.yaml")
        if wanted != "latest" and Path(wanted).name not in checkpoints:
            names = " or ".join(["latest", *checkpoints])
            raise UsageError(f"resume_from_checkpoint must be {names}, got {wanted!r}")
        if wanted != "latest" and Path(wanted).name != checkpoints[-1]:
            raise UsageError(
                f"resuming from {wanted!r} would leave {checkpoints[-1]}, of another course of the run, the latest: "
                "move the newer checkpoints away first"
            )
    elif not config.overwrite_output_dir and not config.dry_run and run_files(folder):
        raise UsageError(
            f"output_dir {config.output_dir!r} already holds a run: choose another, "
            "--resume_from_checkpoint latest to go on with it, or --overwrite_output_dir to delete it"
        )
