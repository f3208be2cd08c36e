"""The trackers of a run, such as TensorBoard and Trackio: their start and their end.

A run that resumes goes on with the run of its trackers: one curve, without a gap, with no step twice. Steps after the
checkpoint are taken again and give the same values, so what a tracker holds of them is not logged again. What it lacks
of the steps before, as on an empty machine, is logged from the run's own files.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from PIL import Image

from hf_ddpm.runtime.errors import UsageError, in_one_line
from hf_ddpm.runtime.files import read_mapping, read_metrics, write_atomically
from hf_ddpm.runtime.run_files import previews
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.previews import TRACKED, track_sheet
from hf_ddpm.training.run import Run, Tracked, track_values, try_to_track


def start_trackers(run: Run, progress: Progress) -> Run:
    """Start the trackers, and return the run with them.

    Raises:
        UsageError: A tracker cannot start: it has no login, no network or no folder.
    """
    config, accelerator, name = run.config, run.accelerator, run.output_dir.resolve().name
    events = run.output_dir / config.logging_dir / config.tracker_project
    is_resumed = config.resume_from_checkpoint is not None  # also where the start before left no checkpoint
    has_events = is_resumed and any(events.glob("events.out.tfevents.*"))
    in_events = _tracked_by_tensorboard(events, progress.step) if has_events and run.is_main else Tracked()
    # TensorBoard then shows nothing of later steps that the folder holds.
    starts: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": progress.step + 1} if has_events else {}}
    if {"wandb", "trackio"} & {*(config.logger or "").split(",")}:
        known = run.processes.on_main(lambda: _id_of_run(run.output_dir))
        starts["wandb"] = {"id": known, "name": name, "resume": "allow"}
        # Trackio finds runs by their names alone, and other folders may have the name of this one.
        starts["trackio"] = {"name": f"{name}-{known}", "resume": "allow"}

    def start() -> None:
        accelerator.init_trackers(config.tracker_project, None, starts)
        for tracker in accelerator.trackers:
            if not (tracker.name == "tensorboard" and has_events):  # which shows settings as a run of their own
                tracker.store_init_configuration(_tracked_settings(config))

    try:
        run.processes.gather(start)
    except Exception as error:  # trackers have no common type of error
        if progress.step == 0 and run.is_main:
            (run.output_dir / "config.yaml").unlink()  # so that the same command may begin again
        reason = in_one_line(error, with_type=True)
        raise UsageError(f"logger must be able to start, got {config.logger!r}: {reason}") from error
    if not run.is_main:
        return run
    run = replace(run, trackers=tuple(accelerator.trackers))
    if is_resumed:
        finders = {"tensorboard": lambda _: in_events, "trackio": _tracked_by_trackio, "wandb": _tracked_by_wandb}
        for tracker in run.trackers:
            try_to_track(
                run, lambda tracker=tracker: run.tracked.update({tracker.name: finders[tracker.name](tracker)})
            )
        _track_earlier_steps(run)
    return run


def finish_trackers(run: Run) -> None:
    """Finish the trackers of a run that did not end by `end_processes`, so that a next one gets its own."""
    trackers, run.accelerator.trackers = run.accelerator.trackers, []
    for tracker in trackers:
        try_to_track(run, tracker.finish)


def _id_of_run(output_dir: Path) -> str:
    """Return the id by which W&B and Trackio find the run again, on any machine."""
    path = output_dir / "tracker.json"
    known = read_mapping(path, "delete it, and the tracker begins another run").get("id")
    if known is None:
        known = uuid4().hex[:8]
        write_atomically(path, json.dumps({"id": known}) + "\n")
    return str(known)


def _track_earlier_steps(run: Run) -> None:
    """Give the trackers what they lack of the steps before this start."""
    earlier: list[tuple[int, Any]] = []
    for name in ("metrics.jsonl", "eval.jsonl"):
        for line in read_metrics(run.output_dir / name):
            values = {key: value for key, value in line.items() if key != "step"}
            if name == "eval.jsonl":
                values = {key: values[key] for key in TRACKED if key in values}
            earlier.append((line["step"], values))
    earlier += previews(run.output_dir)
    for step, values in sorted(earlier, key=lambda each: each[0]):
        if isinstance(values, Path):
            with Image.open(values) as sheet:
                track_sheet(run, sheet, step)
        else:
            track_values(run, values, step)
        for tracked in run.tracked.values():
            tracked.values.update((step, key) for key in (["samples"] if isinstance(values, Path) else values))


def _tracked_by_tensorboard(folder: Path, last_step: int) -> Tracked:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    values = [(name, event.step) for name in tags["scalars"] for event in events.Scalars(name)]
    values += [(name, event.step) for name in tags["images"] for event in events.Images(name)]
    return Tracked({(step, name) for name, step in values if step <= last_step})


def _tracked_by_trackio(tracker: Any) -> Tracked:
    if tracker.tracker.url is not None:  # a Space or server, of which the last step is known
        return Tracked(before=tracker.tracker._next_step)
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

    rows = SQLiteStorage.get_logs(tracker.run_name, tracker.tracker.name, run_id=tracker.tracker.id)
    return Tracked({(row["step"], name) for row in rows for name in row})


def _tracked_by_wandb(tracker: Any) -> Tracked:
    return Tracked(before=tracker.tracker.step)  # W&B drops what comes for an earlier step


def _tracked_settings(config: TrainingConfig) -> dict[str, Any]:
    settings = {**asdict(config), "learning_rate": config.peak_learning_rate}
    del settings["hub_token"]
    return {k: v if isinstance(v, int | float | str) else "" if v is None else str(v) for k, v in settings.items()}
