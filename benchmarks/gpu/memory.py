"""The part that compares the memory of a run with what `--dry_run` says of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import torch

from benchmarks.gpu.case import Case, Measured, settings_of
from hf_ddpm.runtime.format import format_amount
from hf_ddpm.training.dry_run import watch_memory
from hf_ddpm.training.loop import train
from hf_ddpm.training.parsing import load_config


def peaks(case: Case) -> Iterator[Measured]:
    """Run a dry run, then the run with its previews and its checkpoint."""
    with settings_of("recipe", case) as settings:
        command = [sys.executable, "-m", "hf_ddpm", "train", "--dry_run", "--mixed_precision", "bf16"]
        command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        done = subprocess.run(command, capture_output=True, text=True)
        said = re.search(r"peak of a step +measured +(.+)", done.stdout)
        if said is None:
            raise SystemExit(done.stderr)
        yield Measured("--dry_run, bf16", said[1].partition(" of ")[0], note=said[1])
        _, _, peak = watch_memory(torch.device(case.device))
        train(load_config(**settings, mixed_precision="bf16", max_train_steps=6, lr_warmup_steps=0))
        yield Measured("a run of 6 steps, bf16", format_amount(peak(), "B"), note="with previews and checkpoint")
        if case.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            held = format_amount(total - free, "B")
            yield Measured("held on the GPU at its end", held, note="by all processes, with what torch keeps")
