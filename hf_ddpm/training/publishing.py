"""A run on the Hub: creating its repository, pushing while it trains and at its end."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi

from hf_ddpm.hub.upload import KEPT_README, create_repository, push
from hf_ddpm.runtime.errors import PushError, UsageError, in_one_line
from hf_ddpm.runtime.run_files import previews
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.run import Run, print_once, try_to_write

# The pauses between attempts to push the finished run, and how long a push that is on its way may take.
FINAL_RETRY_PAUSES_SECONDS = (2.0, 10.0)
FINAL_PUSH_TIMEOUT_SECONDS = 600.0


def repository_of(config: TrainingConfig) -> tuple[str, str | None, str]:
    """Return name, token and branch of a run's repository."""
    return config.hub_model_id or Path(config.output_dir).resolve().name, config.hub_token, config.hub_revision


def create_run_repository(config: TrainingConfig, print_line: Callable[[str], None]) -> None:
    """Create the repository before a run begins; if the Hub cannot be reached now, only print that.

    Raises:
        UsageError: The Hub will not take the run.
    """
    repo_id, token, _ = repository_of(config)
    try:
        create_repository(HfApi(token=token), repo_id, public=not config.hub_private_repo)
    except PushError as error:
        if not error.is_transient:
            raise UsageError(f"push_to_hub cannot work: {error}") from None
        print_line(f"nothing can be pushed to {repo_id} yet, training begins nonetheless: {error}")


def start_push(run: Run, progress: Progress) -> None:
    """Push the model that was saved last, in the background."""
    if run.pusher is None:
        return
    pusher, message = run.pusher, f"Step {progress.step:,}, {progress.images:,} images"
    pictures = [path for _, path in previews(run.output_dir)]
    try_to_write(run, lambda: pusher.start(message, pictures[-1] if pictures else None))


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
