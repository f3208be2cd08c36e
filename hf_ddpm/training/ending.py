"""The checkpoints of a run, and its end before the last step, which writes one more."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from hf_ddpm.runtime.errors import RunError
from hf_ddpm.runtime.signals import StoppedOnPurpose, StopRequest
from hf_ddpm.training.checkpoint import Progress, save_checkpoint
from hf_ddpm.training.loader import Loader, explain_loader_failure, merge_block_starts
from hf_ddpm.training.loop_state import LoopState
from hf_ddpm.training.parts import Event, call_callbacks
from hf_ddpm.training.previews import preview_path
from hf_ddpm.training.publishing import STOPPED_PUSH_TIMEOUT_SECONDS, finish_checkpoint_push, start_checkpoint_push
from hf_ddpm.training.report import leave_model
from hf_ddpm.training.run import FINISHES, FREE_SPACE, Run, print_once, send_alert
from hf_ddpm.training.skipped_steps import count_skipped_steps


def announce(run: Run, progress: Progress, state: LoopState, events: Sequence[Event]) -> None:
    """Call the callbacks with what was done after a step.

    Raises:
        RunError: One of them failed; a checkpoint was written.
    """
    try:
        call_callbacks(run.callbacks, run.processes, run, events)
    except RunError as error:
        progress = count_skipped_steps(run, progress, state)
        _, how_to_resume = save_at_end(run, progress, state)
        run.processes.on_main(lambda: finish_checkpoint_push(run, STOPPED_PUSH_TIMEOUT_SECONDS))
        raise RunError(f"{error}. The run ends after step {progress.step}; {how_to_resume}") from error


def announce_end(run: Run, progress: Progress) -> RunError | None:
    """Call the callbacks with the last preview and the end; return the error of one, which the model outlives."""
    paths = {"preview": preview_path(run, progress.step), "end": run.output_dir}
    events = [Event(name, progress.step, progress.images, {"path": path}) for name, path in paths.items()]
    try:
        call_callbacks(run.callbacks, run.processes, run, [event for event in events if event.values["path"].exists()])
    except RunError as error:
        return RunError(f"{error}. The run is finished, and its model whole in {str(run.output_dir)!r}")
    return None


def checkpoint(run: Run, progress: Progress, state: LoopState, is_last: bool) -> None:
    """Write a checkpoint that the schedule asks for. If the disk is full, the run continues without it.

    Raises:
        RunError: It was the last one.
    """
    problem = write_state(run, progress, state)
    if problem is None:
        state.saved_step = progress.step
    elif is_last:
        raise RunError(f"the last checkpoint could not be written: {problem}. {FREE_SPACE}; {FINISHES}")
    else:
        text = f"checkpoint-{progress.step} could not be written, the run continues: {problem}. {FREE_SPACE}"
        print_once(run.processes, text)
        send_alert(run, "a checkpoint could not be written", text)


def write_state(run: Run, progress: Progress, state: LoopState) -> str | None:
    """Write a checkpoint; return on all processes why that failed, or None. All processes call it.

    The lines of metrics are written first, so that a resumed run lacks none that its checkpoint counts as logged.
    """
    problem = run.processes.on_main(lambda: state.metrics.write() or state.evaluations.write())
    if problem is not None:
        return problem
    scaler = run.accelerator.scaler
    progress = replace(progress, losses=state.meter.state(), scaler=None if scaler is None else scaler.state_dict())
    if progress.stream is not None:
        progress = merge_block_starts(run.processes, progress, state.first, state.block_starts)
    problem = save_checkpoint(run.state, progress, run.output_dir, run.config.checkpoints_total_limit, run.is_main)
    if problem is None:
        start_checkpoint_push(run, progress.step)
    return run.processes.on_main(lambda: problem)


def end_early(
    run: Run,
    progress: Progress,
    state: LoopState,
    stop: StopRequest,
    loader: Loader,
    failure: Exception | None,
) -> NoReturn:
    """End a run before its last step, with a checkpoint if there are new steps; all processes call it.

    A run that was asked to end also leaves its model, card and pictures.

    Raises:
        StoppedOnPurpose: The run was asked to end.
        RunError: No images came, or the checkpoint could not be written.
    """
    state.bar.close()
    progress = count_skipped_steps(run, progress, state)
    problem, how_to_resume = save_at_end(run, progress, state)
    explanations = run.processes.gather(
        lambda: None if failure is None else explain_loader_failure(failure, loader.workers)
    )
    failures = [text for text in explanations if text]
    if failures:
        send_alert(run, "images are lost", failures[0])
        run.processes.on_main(lambda: finish_checkpoint_push(run, STOPPED_PUSH_TIMEOUT_SECONDS))
        raise RunError(f"{failures[0]}. The run ends after step {progress.step}; {how_to_resume}") from failure
    reason = next(text for text in run.processes.gather(lambda: stop.reason(1)) if text)
    if problem is not None:
        raise RunError(f"{reason}, but {how_to_resume}")
    if progress.step > state.saved_step:
        path = run.output_dir / f"checkpoint-{progress.step}"
        try:
            event = Event("checkpoint", progress.step, progress.images, {"path": path})
            call_callbacks(run.callbacks, run.processes, run, [event])
        except RunError as error:
            raise RunError(f"{error}. The run ends after step {progress.step}; {how_to_resume}") from error
    has_model = False
    if progress.step > 0:
        print_once(
            run.processes,
            f"{reason}: checkpoint-{progress.step} is written, then model, card and pictures; a second signal ends "
            "the run at once",
        )
        has_model = leave_model(run, progress)
    folder = shlex.quote(str(run.output_dir))
    image = "" if run.condition is None else " --image FILE_OR_FOLDER"
    model = f". Its model samples: hf-ddpm sample {folder}{image} --out samples" if has_model else ""
    run.accelerator.wait_for_everyone()
    run.processes.on_main(lambda: finish_checkpoint_push(run, STOPPED_PUSH_TIMEOUT_SECONDS))
    raise StoppedOnPurpose(f"{reason}: the run ends after step {progress.step}{model}; {how_to_resume}")


def save_at_end(run: Run, progress: Progress, state: LoopState) -> tuple[str | None, str]:
    """Write a checkpoint of a run that ends before its last step, if there are new steps; all processes call it.

    Returns:
        Why it could not be written, or None; and how the run is resumed, in words.
    """
    problem = write_state(run, progress, state) if progress.step > state.saved_step else None
    saved_step = progress.step if problem is None else state.saved_step
    how_to_resume = f"the same command with --resume_from_checkpoint latest resumes from step {saved_step}"
    if problem is not None:
        how_to_resume = f"checkpoint-{progress.step} could not be written: {problem}. {FREE_SPACE}; {how_to_resume}"
    return problem, how_to_resume
