"""A run on the Hub: creating its repository, pushing while it trains and at its end."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi

from hf_ddpm.hub.upload import KEPT_README, create_repository, push
from hf_ddpm.runtime.errors import PushError, UsageError
from hf_ddpm.runtime.run_files import previews
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.run import Run, say, try_to_write


def repository_of(config: TrainingConfig) -> tuple[str, str | None, str]:
    """Name, token and branch of a run's repository."""
    return config.hub_model_id or Path(config.output_dir).resolve().name, config.hub_token, config.hub_revision


def create_for_run(config: TrainingConfig, say: Callable[[str], None]) -> None:
    """Makes the repository before a run begins.

    Raises:
        UsageError: the Hub will not take the run. That it cannot be reached now is said only.
    """
    repo_id, token, _ = repository_of(config)
    try:
        create_repository(HfApi(token=token), repo_id, public=not config.hub_private_repo)
    except PushError as error:
        if not error.is_transient:
            raise UsageError(f"push_to_hub cannot work: {error}") from None
        say(f"nothing can be pushed to {repo_id} yet, training begins nonetheless: {error}")


LAST_PAUSES_SECONDS = (2.0, 10.0)  # between attempts to push the finished run,


LONGEST_PUSH_SECONDS = 600.0  # for which one that is on its way has so long to arrive


def start_push(run: Run, progress: Progress) -> None:
    """The model as it was saved last goes to the Hub, while training goes on."""
    if run.pusher is not None:
        pusher, message = run.pusher, f"Step {progress.step:,}, {progress.images:,} images"
        pngs = [path for _, path in previews(run.output_dir)]
        try_to_write(run, lambda: pusher.start(message, pngs[-1] if pngs else None))


def push_finished(run: Run) -> None:
    """A failure is said, and harms nothing that was trained; for all processes to call, none of which waits."""
    if run.pusher is None:
        return
    run.pusher.close(LONGEST_PUSH_SECONDS)
    repo_id, token, revision = repository_of(run.config)
    for pause in (*LAST_PAUSES_SECONDS, None):
        try:
            pushed = push(
                run.output_dir,
                repo_id,
                public=not run.config.hub_private_repo,
                revision=revision,
                token=token,
                averages=run.config.hub_averages,
            )
        except Exception as error:  # the model is safe
            if pause is not None and getattr(error, "is_transient", False):
                time.sleep(pause)
                continue
            command = ["hf-ddpm", "push", str(run.output_dir), repo_id]
            command += [] if run.config.hub_private_repo else ["--public"]
            command += [] if revision == "main" else ["--revision", revision]
            command += ["--averages"] if run.config.hub_averages else []
            say(
                run.processes,
                f"the model is whole in {str(run.output_dir)!r}, but was not pushed: {error}. "
                f"{shlex.join(command)} does it later",
            )
        else:
            say(run.processes, f"{pushed.url}: {pushed.commit[:12]}")
            if pushed.kept_readme:
                say(run.processes, KEPT_README)
        return
