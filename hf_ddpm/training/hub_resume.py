"""A run that goes on from its checkpoint on the Hub: what it needs comes into its output folder first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi

from hf_ddpm.hub.checkpoints import (
    SUFFIX,
    Place,
    Record,
    create_private,
    download_checkpoint,
    find_record,
    full_name,
    require_write,
)
from hf_ddpm.hub.places import has_buckets
from hf_ddpm.runtime.errors import PushError, UsageError
from hf_ddpm.runtime.files import flush_folder, lock, write_atomically
from hf_ddpm.runtime.format import format_amount
from hf_ddpm.runtime.run_files import checkpoint_names
from hf_ddpm.training.checkpoint import find_checkpoint
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import check_same_run
from hf_ddpm.training.publishing import repository_of, settings_of_record


def resume_from_hub(config: TrainingConfig, print_line: Callable[[str], None]) -> None:
    """Bring the newest checkpoint of a run into its output folder, unless it is there.

    Args:
        config: The settings, whose `resume_from_checkpoint` is `hub`.
        print_line: Shows a line to the user.

    Raises:
        UsageError: There is no checkpoint on the Hub, it is one of another run, or it cannot be had.
        BlockingIOError: A process is at work in the folder.
    """
    repo_id, token, _ = repository_of(config)
    api, output_dir = HfApi(token=token), Path(config.output_dir)
    try:
        model = full_name(api, repo_id)
        require_write(api, model)
        found = find_record(api, model)
        if found is None:
            unseen = "" if has_buckets() else ", or it is a bucket, which takes huggingface_hub 2 and hf-xet"
            raise UsageError(
                f"resume_from_checkpoint hub needs a checkpoint on the Hub, but {model}{SUFFIX} holds none, is not "
                f"there, or the token may not see it{unseen}: give the hub_model_id of the run, or latest to begin one"
            )
        place, record = found
        create_private(place)
        settings = settings_of_record(config, place, record)
        if (output_dir / "config.yaml").is_file():
            check_same_run(config, output_dir / "config.yaml")
        output_dir.mkdir(parents=True, exist_ok=True)
        with lock(output_dir):
            newest = _newest_step(output_dir)
            if newest is not None and newest >= record.step:
                print_line(
                    f"checkpoint-{newest} in {config.output_dir} is no older than {record.checkpoint} of "
                    f"{place.name}: the run resumes from it"
                )
            else:
                size = format_amount(record.num_bytes, "B")
                print_line(f"{record.checkpoint} of {place.name} is downloaded, {size}")
                _take(place, record, settings, output_dir)
    except PushError as error:
        raise UsageError(f"resume_from_checkpoint hub cannot work: {error}") from None


def _newest_step(output_dir: Path) -> int | None:
    """Return the step of the newest whole checkpoint in the folder, or None if there is none."""
    try:
        checkpoint, _ = find_checkpoint(output_dir, "latest")
    except UsageError:  # all of them are damaged
        return None
    return None if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def _take(place: Place, record: Record, settings: dict[str, Any], output_dir: Path) -> None:
    """Download a checkpoint, and move it into the output folder after all that belongs to it."""
    files = download_checkpoint(place, record, output_dir)
    for name in record.files:
        if not name.startswith("checkpoint-") and name != "config.yaml":
            (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (files / name).replace(output_dir / name)
    write_atomically(output_dir / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    target = output_dir / record.checkpoint
    if record.checkpoint in checkpoint_names(output_dir):  # it is damaged, or it would be the newest
        shutil.rmtree(target)
    (files / record.checkpoint).rename(target)
    flush_folder(output_dir)
    shutil.rmtree(output_dir / "partial-download")
