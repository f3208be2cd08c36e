"""A run on the Hub: creating its places there, pushing while it trains and at its end."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from hf_ddpm.hub.background import FINAL_RETRY_PAUSES_SECONDS, Pusher
from hf_ddpm.hub.checkpoints import (
    SUFFIX,
    Place,
    Record,
    copy_checkpoint,
    create_place,
    create_private,
    find_record,
    full_name,
    read_settings,
    require_older,
    require_write,
    send_checkpoint,
)
from hf_ddpm.hub.upload import KEPT_README, commit, copy_for_upload, create_repository, push
from hf_ddpm.runtime.errors import PushError, UsageError, in_one_line
from hf_ddpm.runtime.run_files import checkpoint_names, previews
from hf_ddpm.runtime.settings import settings_of
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.checks import is_resumed
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import require_same_settings, settings_in, settings_to_save
from hf_ddpm.training.run import Run, print_once, try_to_write

# How long a push that is on its way at the end may take: of a run that is finished, and of one that was asked to end,
# which may be killed soon.
FINAL_PUSH_TIMEOUT_SECONDS = 600.0
STOPPED_PUSH_TIMEOUT_SECONDS = 120.0


def repository_of(config: TrainingConfig) -> tuple[str, str | None, str]:
    """Return name, token and branch of a run's repository."""
    return config.hub_model_id or Path(config.output_dir).resolve().name, config.hub_token, config.hub_revision


def check_places(config: TrainingConfig) -> None:
    """Check, before any work, that a run may push where it will; a Hub that cannot be reached now is no error.

    Raises:
        UsageError: The Hub will not take the run, or holds a checkpoint of a later step than the run starts from.
    """
    repo_id, token, _ = repository_of(config)
    api = HfApi(token=token)
    step = int(checkpoint_names(Path(config.output_dir))[-1].rpartition("-")[2]) if is_resumed(config) else 0
    with _as_usage_error():
        name = full_name(api, repo_id)
        require_write(api, name)
        found = find_record(api, name) if config.hub_strategy == "checkpoint" else None
        if found is not None and not config.overwrite_output_dir:
            place, record = found
            create_private(place)
            settings_of_record(config, place, record)
            require_older(record, step, place.name)


def settings_of_record(config: TrainingConfig, place: Place, record: Record) -> dict[str, Any]:
    """Return the settings of the run of a checkpoint on the Hub, those that it lacks from this one.

    Raises:
        UsageError: It is another run.
        PushError: When the Hub refuses, or cannot be reached.
    """
    saved = settings_in(read_settings(place, record), f"config.yaml of {place.name}")
    settings = {**settings_to_save(config), **saved}
    remedy = (
        f"{place.name} is of another run, whose hub_model_id or settings this one must have; it can be deleted on "
        "the Hub"
    )
    require_same_settings(config, TrainingConfig(**settings), remedy)
    return settings


def create_places(config: TrainingConfig, print_line: Callable[[str], None]) -> None:
    """Create what a run pushes to before it begins; if the Hub cannot be reached now, only print that.

    Raises:
        UsageError: The Hub will not take the run.
    """
    repo_id, token, _ = repository_of(config)
    api = HfApi(token=token)
    with _as_usage_error(f"nothing can be pushed to {repo_id} yet, training begins nonetheless", print_line):
        name = create_repository(api, repo_id, public=not config.hub_private_repo)
        if config.hub_strategy == "checkpoint":
            create_place(api, name)


@contextmanager
def _as_usage_error(text: str = "", print_line: Callable[[str], None] | None = None) -> Iterator[None]:
    """Raise a PushError that comes in a `with` block as a UsageError; print a transient one, after a text."""
    try:
        yield
    except PushError as error:
        if not error.is_transient:
            raise UsageError(f"push_to_hub cannot work: {error}") from None
        if print_line is not None:
            print_line(f"{text}: {error}")


def model_pusher(config: TrainingConfig, print_line: Callable[[str], None]) -> Pusher:
    """Start the thread that pushes the model while a run trains."""
    repo_id, token, revision = repository_of(config)
    api = HfApi(token=token)

    def send(files: Path, message: str, still_wanted: Callable[[], bool]) -> None:
        name = create_repository(api, repo_id, public=not config.hub_private_repo)
        commit(api, files, name, revision, message, still_wanted)

    return Pusher(repo_id, send, print_line)


def checkpoint_pusher(config: TrainingConfig, print_line: Callable[[str], None]) -> Pusher:
    """Start the thread that pushes the newest checkpoint while a run trains."""
    repo_id, token, _ = repository_of(config)
    api = HfApi(token=token)
    model = cache(lambda: full_name(api, repo_id))  # the Hub wants to be asked rarely

    def send(files: Path, message: str, still_wanted: Callable[[], bool]) -> None:
        send_checkpoint(api, model(), files, message, still_wanted, replaces_newer=config.overwrite_output_dir)

    return Pusher(repo_id + SUFFIX, send, print_line)


@contextmanager
def no_upload_bars() -> Iterator[None]:
    """Hide the bars of uploads for the duration of a `with` block: in the background they are in the way."""
    is_free = not are_progress_bars_disabled() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    if is_free:
        disable_progress_bars()
    try:
        yield
    finally:
        if is_free:
            enable_progress_bars()


def start_push(run: Run, progress: Progress) -> None:
    """Push the model that was saved last, in the background."""
    if run.pusher is None or run.config.hub_strategy == "end":
        return
    pusher, message = run.pusher, f"Step {progress.step:,}, {progress.images:,} images"
    pictures = [path for _, path in previews(run.output_dir)]
    copy = partial(copy_for_upload, run.output_dir, preview=pictures[-1] if pictures else None, parent=run.output_dir)
    try_to_write(run, lambda: pusher.start(copy, message))


def start_checkpoint_push(run: Run, step: int) -> None:
    """Push the checkpoint that was written last, in the background."""
    if run.checkpoint_pusher is None:
        return
    pusher, name = run.checkpoint_pusher, f"checkpoint-{step}"
    paths = [name for name, _, info in settings_of(run.config) if info.is_path]
    try_to_write(run, lambda: pusher.start(partial(copy_checkpoint, run.output_dir, name, paths), name))


def finish_checkpoint_push(run: Run, seconds: float) -> None:
    """Give the newest checkpoint `seconds` to arrive on the Hub, and say whether it did. The main process calls it."""
    pusher = run.checkpoint_pusher
    if pusher is None:
        return
    name = pusher.unsent()
    if name is not None and seconds:
        print_once(run.processes, f"the run waits until {name} is in {pusher.name}, {seconds:g} s at most")
    unsent = pusher.finish(seconds)
    if unsent is not None:
        print_once(
            run.processes,
            f"{unsent} is not in {pusher.name}, which keeps the whole checkpoint that it had, if any; the newest one "
            f"is whole in {str(run.output_dir)!r}",
        )
    elif pusher.sent is not None and seconds:
        print_once(run.processes, f"{pusher.sent} is in {pusher.name}, and stays there")


def push_finished(run: Run) -> None:
    """Push the finished run; a failure is printed with the command that pushes it later.

    All processes call it, and only the first one waits.
    """
    if run.pusher is None:
        return
    run.pusher.close(FINAL_PUSH_TIMEOUT_SECONDS)
    repo_id, token, revision = repository_of(run.config)
    for pause in (*FINAL_RETRY_PAUSES_SECONDS, None):
        try:
            pushed = push(
                run.output_dir,
                repo_id,
                public=not run.config.hub_private_repo,
                revision=revision,
                token=token,
                averages=run.config.hub_averages,
            )
        except Exception as error:  # the model is safe, whatever happened
            if pause is not None and isinstance(error, PushError) and error.is_transient:
                time.sleep(pause)
                continue
            print_once(
                run.processes,
                f"the model is whole in {str(run.output_dir)!r}, but was not pushed: {in_one_line(error)}. "
                f"Push it later with: {_push_command(run)}",
            )
        else:
            print_once(run.processes, f"{pushed.url}: {pushed.commit[:12]}")
            if pushed.kept_readme:
                print_once(run.processes, KEPT_README)
        return


def _push_command(run: Run) -> str:
    repo_id, _, revision = repository_of(run.config)
    command = ["hf-ddpm", "push", str(run.output_dir), repo_id]
    command += [] if run.config.hub_private_repo else ["--public"]
    command += [] if revision == "main" else ["--revision", revision]
    command += ["--averages"] if run.config.hub_averages else []
    return shlex.join(command)
