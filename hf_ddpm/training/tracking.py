"""The trackers of a run, such as TensorBoard and Trackio: their start and their end."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from hf_ddpm.runtime.errors import UsageError, in_one_line
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.run import Run, try_to_track


def start_trackers(run: Run, progress: Progress) -> Run:
    """Start the trackers, and return the run with them.

    Raises:
        UsageError: A tracker cannot start: it has no login, no network or no folder.
    """
    config, accelerator = run.config, run.accelerator
    run_name = {name: {"name": run.output_dir.resolve().name} for name in ("wandb", "trackio")}
    try:
        run.processes.gather(
            lambda: accelerator.init_trackers(config.tracker_project, _tracked_settings(config), run_name)
        )
    except Exception as error:  # trackers have no common type of error
        if progress.step == 0 and run.is_main:
            (run.output_dir / "config.yaml").unlink()  # so that the same command may begin again
        reason = in_one_line(error, with_type=True)
        raise UsageError(f"logger must be able to start, got {config.logger!r}: {reason}") from error
    return replace(run, trackers=tuple(accelerator.trackers) if run.is_main else ())


def finish_trackers(run: Run) -> None:
    """Finish the trackers of a run that did not end by `end_processes`, so that a next one gets its own."""
    trackers, run.accelerator.trackers = run.accelerator.trackers, []
    for tracker in trackers:
        try_to_track(run, tracker.finish)


def _tracked_settings(config: TrainingConfig) -> dict[str, Any]:
    settings = {**asdict(config), "learning_rate": config.peak_learning_rate}
    del settings["hub_token"]
    return {k: v if isinstance(v, int | float | str) else "" if v is None else str(v) for k, v in settings.items()}
