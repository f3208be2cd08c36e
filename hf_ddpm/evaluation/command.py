"""The command that repeats an evaluation."""

from __future__ import annotations

import shlex
from pathlib import Path

from hf_ddpm.evaluation.images import num_terms
from hf_ddpm.evaluation.job import Job
from hf_ddpm.evaluation.model_data import DEFAULT_TEST_SPLIT
from hf_ddpm.hub.download import is_hub_id


def command_of(job: Job) -> str:
    """Return the command that repeats this evaluation; paths are given by their last component alone.

    The rest of a path says where things lie on this machine, which is of no use to others.
    """
    request = job.request
    data = {} if request.data is None else vars(request.data)
    pairs = dict.fromkeys((each.scheduler, each.num_inference_steps) for each in job.sampler_settings)
    names, numbers = ([*dict.fromkeys(column)] for column in zip(*pairs, strict=True))
    # By default the scheduler and the number of steps depend on one another. Naming all of both would then ask for
    # more settings than there are.
    is_full_grid = len(pairs) == len(numbers) * len(names)
    steps = numbers if is_full_grid else request.num_inference_steps
    schedulers = names if is_full_grid else request.schedulers
    data_options = (
        *("dataset_name", "dataset_config_name", "train_data_dir", "image_column", "label_column"),
        *("condition_column", "channel_axis", "stack_axis", "array_key"),
    )
    options = {
        "metrics": ",".join(request.metrics),
        "reference": request.reference,
        "other_reference": request.other_reference,
        **{name: data.get(name) for name in data_options},
        "split": None if request.split == "train" else request.split,
        "test_split": None if request.test_split == DEFAULT_TEST_SPLIT else request.test_split,
        "num_images": request.num_images,
        "seed": request.seed,
        "num_inference_steps": ",".join(map(str, steps)) or None,
        "scheduler": ",".join(schedulers) or None,
        "guidance_scale": ",".join(f"{scale:g}" for scale in request.guidance_scales) or None,
        "guidance_method": request.guidance_method,
        "autoguidance_scale": request.autoguidance_scale,
        "guidance_model": request.guidance_model,
        "network": None if job.comparison is None else job.comparison.network.name,
        "network_path": request.network_path,
        "timesteps_per_image": num_terms(request, job.full_chain_scheduler) if "nll" in request.metrics else None,
        "dtype": None if request.dtype == "fp32" else request.dtype,
        "out": request.out,
    }
    interval, values = request.guidance_interval, data.get("value_range") or ()
    flags = {
        f"--guidance_interval {' '.join(f'{end:g}' for end in interval or ())}": interval is not None,
        f"--value_range {' '.join(map(str, values))}": bool(values),
        "--center_crop": data.get("center_crop"),
        "--random_crop": data.get("random_crop"),
        "--compile": request.compile,
        "--uniform": request.uniform,
    }
    # The command stands on the card, which may be shared: no folder above the model's is named there.
    is_on_hub = job.repo_id is not None and is_hub_id(job.repo_id)
    words = ["hf-ddpm", "evaluate", str(job.repo_id) if is_on_hub else Path(request.model).resolve().name]
    for name, value in options.items():
        if value is not None:
            is_path = name == "out" or (isinstance(value, str | Path) and Path(value).exists())
            words += [f"--{name}", Path(value).resolve().name if is_path else str(value)]
    return shlex.join(words + [word for flag, is_set in flags.items() if is_set for word in flag.split()])
