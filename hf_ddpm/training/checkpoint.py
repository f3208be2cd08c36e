"""The training state on disk: `output_dir/checkpoint-N` after optimizer step N, whole or absent.

    unet/                    the weights, as diffusers saves a model
    unet_ema/                the averaged weights, likewise
    averages.safetensors     further averages, "name/parameter"
    optimizer.safetensors    the optimizer's tensors, "parameter/name"
    progress.json            Progress
    manifest.json            size and sha256 of each file above

No file belongs to one process. All else that a run depends on, the order of images and all randomness, is a function
of (seed, images seen). A resumed run is therefore the run that was not stopped, on any number of processes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from hf_ddpm.network import require_finite
from hf_ddpm.runtime.errors import UsageError, in_one_line
from hf_ddpm.runtime.files import flush_folder, naming_damage, read_mapping, sha256, write_flushed
from hf_ddpm.runtime.run_files import checkpoint_names
from hf_ddpm.training.averages import EMA
from hf_ddpm.training.sharding import full_moments, full_tensors, is_sharded, load_into, load_moments

FORMAT = 3  # Increase it when what a checkpoint means changes, so that no older run is resumed.
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Progress:
    """The progress of a run.

    Args:
        step: The optimizer steps done.
        images: The images seen in them, which is the position in the stream of images.
        seconds: The seconds spent in them, over all starts.
        num_resumes: The starts after the first one.
        global_batch_size: The images per step.
        schedule_batch_size: The images per step at the first start; `max_train_steps`, `lr_warmup_steps` and the ramp
            of the average count steps of so many images.
        num_images: The images of the data; None where a stream does not say.
        data_fingerprint: A hash of the images.
        train_batch_size: The requested images per process and forward pass.
        gradient_accumulation_steps: The requested forward passes per step.
        num_bad_steps: The steps that were skipped, because the loss or a gradient was not finite.
        bad_steps_in_a_row: How many of the last steps were skipped, one after the other.
        bad_steps_began: The step and the images with which those began.
        num_bad_images: The unreadable images that were left out; a stream counts one each time it meets it.
        losses: The sum and the count of losses since the last line of metrics.jsonl, for each process.
        scaler: The state of fp16's loss scaler.
        label_scales: Mean and standard deviation of each column of numbers, as the network takes them.
        teacher: The checksum of the weights of the model that is tuned for few steps; None: none is.
        stream: num_substreams, chunk_size and block_starts (each as a dict) of `StreamBatches`.
    """

    step: int
    images: int
    seconds: float
    num_resumes: int
    global_batch_size: int
    schedule_batch_size: int
    num_images: int | None
    data_fingerprint: str
    train_batch_size: int = 0
    gradient_accumulation_steps: int = 0
    num_bad_steps: int = 0
    bad_steps_in_a_row: int = 0
    bad_steps_began: str = ""
    num_bad_images: int = 0
    losses: list[list[float]] = field(default_factory=list)
    scaler: dict[str, Any] | None = None
    stream: dict[str, Any] | None = None
    label_scales: dict[str, list[float]] = field(default_factory=dict)
    teacher: str | None = None


@dataclass(frozen=True)
class TrainingState:
    """The things that training changes: a `UNet2DModel`, its optimizer, its averages.

    FSDP may have sharded all of it; the files hold it whole.
    """

    unet: Any
    optimizer: torch.optim.Optimizer
    ema: EMA | None


def save_checkpoint(
    state: TrainingState, progress: Progress, output_dir: Path, total_limit: int | None, is_main_process: bool
) -> str | None:
    """Write and verify `checkpoint-N` under a temporary name, rename it, and delete the oldest above `total_limit`.

    All processes call it; the main one writes. On a full disk, checkpoints that pruning would delete go first, but
    never the newest whole one, and the writing is tried again.

    Returns:
        On the main process, why it could not be written; older checkpoints are then still there.
    """
    target = output_dir / f"checkpoint-{progress.step}"
    partial = output_dir / f"partial-{target.name}"
    # All processes gather the shards, also when the writing has failed.
    sharded = is_sharded(list(state.unet.parameters()))
    files = _files(state, progress, is_main_process) if is_main_process or sharded else iter(())
    if not is_main_process:
        for _ in files:
            pass
        return None
    try:
        try:
            _write(partial, files)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            can_try_again = error.errno in (errno.ENOSPC, errno.EDQUOT) and not sharded
            if not (can_try_again and total_limit and _prune(output_dir, max(1, total_limit - 1), progress.step)):
                raise
            _write(partial, _files(state, progress, is_writer=True))
        # A checkpoint of this step is damaged: else the run would have resumed from it.
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        flush_folder(output_dir)
    except OSError as error:
        for _ in files:
            pass
        shutil.rmtree(partial, ignore_errors=True)
        return str(error)
    if total_limit is not None:
        with contextlib.suppress(OSError):  # it is tried again after the next one
            _prune(output_dir, total_limit, progress.step)
    return None


def checkpoint_bytes(state: TrainingState, progress: Progress, is_main_process: bool) -> int:
    """Return the bytes that `save_checkpoint` would write, without its manifest, on the main process.

    All processes call it; what the others get means nothing.
    """
    if not is_main_process and not is_sharded(list(state.unet.parameters())):
        return 0
    return sum(len(content) for _, content in _files(state, progress, is_main_process))


def find_checkpoint(output_dir: Path, name: str) -> tuple[Path | None, list[str]]:
    """Find the checkpoint `name`, or for `latest` the newest that verifies.

    Returns:
        The checkpoint, None for `latest` if there is none at all; and why newer ones were passed over.

    Raises:
        UsageError: There are checkpoints, and all of them are damaged.
    """
    if name == "latest":
        candidates = [output_dir / n for n in reversed(checkpoint_names(output_dir))]
    else:
        candidates = [output_dir / Path(name).name]
    passed_over = []
    for candidate in candidates:
        problem = verify(candidate)
        if problem is None:
            return candidate, passed_over
        passed_over.append(f"{candidate.name} is passed over: {problem}")
    if candidates:
        raise UsageError(
            f"no checkpoint of {str(output_dir)!r} can be resumed from: {'; '.join(passed_over)}. Restore one from a "
            "backup, or move them away to begin anew"
        )
    return None, []


def verify(checkpoint: Path) -> str | None:
    """Read each file of a checkpoint's manifest and compare its sha256; return what is wrong, or None."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"it has format {manifest['format']}, not {FORMAT}, of another version of hf_ddpm"
        for name, expected in manifest["files"].items():
            size = (checkpoint / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes, not {expected['size']}"
            if sha256(checkpoint / name) != expected["sha256"]:
                return f"the sha256 of {name} is not that of manifest.json"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return in_one_line(error, with_type=True)
    return None


def read_progress(checkpoint: Path) -> Progress:
    """Read how far the run was at a checkpoint.

    Raises:
        UsageError: When the file is damaged.
    """
    path = checkpoint / "progress.json"
    with naming_damage(f"{path} cannot be read", "resume from another checkpoint"):
        return Progress(**read_mapping(path, "resume from another checkpoint"))


def load_checkpoint(state: TrainingState, checkpoint: Path) -> None:
    """Restore weights, optimizer and averages in place, from safetensors alone.

    Raises:
        UsageError: The checkpoint lacks an average that the run needs, is of another network, or is not finite.
    """
    unet, optimizer, ema = state.unet, state.optimizer, state.ema
    parameters = dict(unet.named_parameters())
    try:
        _check_network(json.loads(unet.to_json_string()), checkpoint)
        weights = load_file(checkpoint / "unet" / WEIGHTS)
        require_finite(weights, checkpoint.name)
        load_moments(load_file(checkpoint / "optimizer.safetensors"), parameters, optimizer)
        load_into(weights, parameters)
        for name, buffer in unet.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])
        for i, (average, values) in enumerate(ema.averages.items() if ema is not None else ()):
            prefix, file = ("", f"unet_ema/{WEIGHTS}") if i == 0 else (f"{average}/", "averages.safetensors")
            tensors = load_file(checkpoint / file)
            whole = {name: tensors[f"{prefix}{name}"] for name in parameters}
            require_finite(whole, f"{average} of {checkpoint.name}")
            load_into(whole, dict(zip(parameters, values, strict=True)))
    except (FileNotFoundError, KeyError) as error:
        raise UsageError(
            f"{checkpoint.name} does not hold {error}: resume with the settings of its config.yaml (its averages, "
            "ema_snapshots, ema_halflife_images), or without average by --no_use_ema"
        ) from error
    except SafetensorError as error:
        raise UsageError(f"{checkpoint.name} cannot be read: {error}") from error


def _check_network(settings: dict[str, Any], checkpoint: Path) -> None:
    """Compare the configs: weights of the same shapes may belong to other groups, heads or activations."""
    saved = json.loads((checkpoint / "unet" / "config.json").read_text(encoding="utf-8"))
    for name in sorted(saved.keys() & settings.keys() - {"dropout"}):
        if not name.startswith("_") and settings[name] != saved[name]:
            raise UsageError(
                f"{checkpoint.name} is of another network: {name} was {saved[name]}, got {settings[name]}: give "
                f"the model config its settings again, those of {checkpoint / 'unet' / 'config.json'}"
            )


def model_files(unet: Any, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the files that `UNet2DModel.from_pretrained` loads."""
    yield "config.json", unet.to_json_string().encode()
    buffers = {name: b.cpu() for name, b in unet.named_buffers() if name in unet.state_dict()}
    yield WEIGHTS, to_safetensors({**buffers, **weights}, metadata={"format": "pt"})


def _files(state: TrainingState, progress: Progress, is_writer: bool) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file; on a process that only helps to gather, without the tensors."""
    unet, names = state.unet, [name for name, _ in state.unet.named_parameters()]
    parameters = list(unet.parameters())
    for name, content in model_files(unet, full_tensors(names, parameters, is_writer)):
        yield f"unet/{name}", content
    averages = dict(state.ema.averages) if state.ema is not None else {}
    if averages:
        first = averages.pop(next(iter(averages)))
        for name, content in model_files(unet, full_tensors(names, first, is_writer)):
            yield f"unet_ema/{name}", content
    if averages:
        keys = [f"{average}/{name}" for average in averages for name in names]
        tensors = [tensor for average in averages.values() for tensor in average]
        yield "averages.safetensors", to_safetensors(full_tensors(keys, tensors, is_writer))
    moments = full_moments(dict(unet.named_parameters()), state.optimizer, is_writer)
    yield "optimizer.safetensors", to_safetensors(moments)
    yield "progress.json", json.dumps(asdict(progress), indent=2).encode()


def _write(partial: Path, files: Iterator[tuple[str, bytes]]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    manifest: dict[str, Any] = {}
    partial.mkdir(parents=True)
    for name, content in files:
        (partial / name).parent.mkdir(exist_ok=True)
        write_flushed(partial / name, content)
        manifest[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_flushed(partial / "manifest.json", json.dumps({"format": FORMAT, "files": manifest}, indent=2))
    for folder in (*(p for p in partial.iterdir() if p.is_dir()), partial):
        flush_folder(folder)
    problem = verify(partial)
    if problem is not None:
        raise OSError(f"what was written does not read back: {problem}")


def _prune(output_dir: Path, keep: int, step: int) -> bool:
    """Delete all but the `keep` newest whole checkpoints up to `step`; return whether there were any to delete.

    A checkpoint of a later step is damaged, since the run has passed it over.
    """
    checkpoints = [output_dir / name for name in reversed(checkpoint_names(output_dir))]
    checkpoints = [c for c in checkpoints if int(c.name.rpartition("-")[2]) <= step]
    whole = [c for c in checkpoints if _has_its_files(c)]
    if len(whole) <= keep:
        return False
    oldest_kept = checkpoints.index(whole[keep - 1])
    for old in checkpoints[oldest_kept + 1 :]:
        # Renamed first, so that `latest` does not find one that is deleted in part.
        doomed = old.with_name(f"partial-{old.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        old.rename(doomed)
        shutil.rmtree(doomed)
    return True


def _has_its_files(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
