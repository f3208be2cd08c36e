"""Training state on disk: `output_dir/checkpoint-N` after optimizer step N, whole or absent.

    unet/                    the weights, as diffusers saves a model
    unet_ema/                the averaged weights, likewise
    averages.safetensors     further averages, "name/parameter"
    optimizer.safetensors    its tensors, "parameter/name"
    progress.json            Progress
    manifest.json            size and sha256 of each file above

No file is of a process: what a run depends on besides these, the order of images and all randomness, is a function of
(seed, images seen), so that a resumed run is the run that was not stopped, on any number of processes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from hf_ddpm.config import UsageError, checkpoint_names
from hf_ddpm.ema import EMA, assign
from hf_ddpm.files import flush_folder, write_flushed

FORMAT = 2
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        step: optimizer steps done.
        images: seen in them, which is where the stream of images goes on.
        seconds: spent in them, over all starts.
        num_resumes: starts after the first.
        global_batch_size: images per step.
        schedule_batch_size: images per step at the first start; `max_train_steps`, `lr_warmup_steps` and the ramp of
            the average count steps of so many images.
        num_images: of the data; None where a stream does not say.
        data_fingerprint: of the images.
        num_bad_steps: skipped, because the loss or a gradient was not finite.
        bad_steps_in_a_row: up to the last step; and how the first of them came about.
        num_bad_images: unreadable ones that were left out; those of a stream are counted each time they come.
        losses: of each process, sum and count since the last line of metrics.jsonl.
        scaler: state of fp16's loss scaler.
        stream: num_lanes, chunk_size and places of `StreamBatches`.
    """

    step: int
    images: int
    seconds: float
    num_resumes: int
    global_batch_size: int
    schedule_batch_size: int
    num_images: int | None
    data_fingerprint: str
    num_bad_steps: int = 0
    bad_steps_in_a_row: int = 0
    bad_steps_began: str = ""
    num_bad_images: int = 0
    losses: list[list[float]] = field(default_factory=list)
    scaler: dict[str, Any] | None = None
    stream: dict[str, Any] | None = None


@dataclass(frozen=True)
class TrainingState:
    """What training changes: a `UNet2DModel`, its optimizer, its averages.

    Under FSDP parameters, averages and the optimizer's tensors are shards; the files hold them whole.
    """

    unet: Any
    optimizer: torch.optim.Optimizer
    ema: EMA | None


def save_checkpoint(
    state: TrainingState, progress: Progress, output_dir: Path, total_limit: int | None, is_main_process: bool
) -> str | None:
    """Writes and verifies `checkpoint-N` under a temporary name, renames it, deletes the oldest above `total_limit`.

    Each process calls it; one writes. On a full disk what pruning would delete goes first, but never the newest whole
    checkpoint, and the writing is tried again.

    Returns: on the process that writes, why it could not be written; what was there before is then still there.
    """
    target = output_dir / f"checkpoint-{progress.step}"
    partial = output_dir / f"partial-{target.name}"
    # Gathering the shards is for all processes, also when the writing has failed.
    files = _files(state, progress) if is_main_process or _is_sharded(state) else iter(())
    if not is_main_process:
        for _ in files:
            pass
        return None
    try:
        try:
            _write(partial, files)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            can_try_again = error.errno in (errno.ENOSPC, errno.EDQUOT) and not _is_sharded(state)
            if not (can_try_again and _prune(output_dir, max(1, (total_limit or 2**63) - 1))):
                raise
            _write(partial, _files(state, progress))
        # One that is there failed its verification, or the run would have gone on from it.
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        flush_folder(output_dir)
        if total_limit is not None:
            _prune(output_dir, total_limit)
    except OSError as error:
        for _ in files:
            pass
        shutil.rmtree(partial, ignore_errors=True)
        return str(error)
    return None


def find_checkpoint(output_dir: Path, name: str) -> tuple[Path | None, list[str]]:
    """The checkpoint `name`, or for `latest` the newest that verifies, and why others were passed over.

    Returns: None for `latest` if there is no checkpoint at all.

    Raises:
        UsageError: those that are there are damaged.
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
    """What is wrong with a checkpoint, or None: each file of its manifest is read and its sha256 compared."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"it has format {manifest['format']}, not {FORMAT}, of another version of hf_ddpm"
        for name, expected in manifest["files"].items():
            size = (checkpoint / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes, not {expected['size']}"
            if _sha256(checkpoint / name) != expected["sha256"]:
                return f"the sha256 of {name} is not that of manifest.json"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def read_progress(checkpoint: Path) -> Progress:
    return Progress(**json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))


def load_checkpoint(state: TrainingState, checkpoint: Path) -> None:
    """Restores weights, optimizer and averages in place, from safetensors alone.

    Raises:
        UsageError: the checkpoint is without an average that is wanted, or of another network.
    """
    unet, optimizer, ema = state.unet, state.optimizer, state.ema
    parameters, names = list(unet.parameters()), [name for name, _ in unet.named_parameters()]
    try:
        weights = load_file(checkpoint / "unet" / WEIGHTS)
        if set(weights) != set(unet.state_dict()):
            raise UsageError(f"{checkpoint.name} is of another network: resume with the settings of its config.yaml")
        assign(parameters, [_placed_as(weights[name], p) for name, p in zip(names, parameters, strict=True)])
        for name, buffer in unet.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])
        moments = load_file(checkpoint / "optimizer.safetensors")
        states: dict[int, dict[str, Tensor]] = {}
        number = {name: i for i, name in enumerate(names)}
        for key, value in moments.items():
            name, _, kind = key.rpartition("/")
            placed = value if value.ndim == 0 else _placed_as(value, parameters[number[name]])
            states.setdefault(number[name], {})[kind] = placed
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
        for i, average in enumerate(ema.averages if ema is not None else ()):
            prefix, file = ("", f"unet_ema/{WEIGHTS}") if i == 0 else (f"{average}/", "averages.safetensors")
            tensors = load_file(checkpoint / file)
            values = [_placed_as(tensors[f"{prefix}{n}"], p) for n, p in zip(names, parameters, strict=True)]
            assign(ema.averages[average], values)  # pyright: ignore[reportOptionalMemberAccess]
    except (FileNotFoundError, KeyError) as error:
        raise UsageError(
            f"{checkpoint.name} does not hold {error}: resume with the settings of its config.yaml, or without "
            "average by --no_use_ema"
        ) from error
    except SafetensorError as error:
        raise UsageError(f"{checkpoint.name} cannot be read: {error}") from error


def gathered(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tensors by name, whole and on the CPU; for all processes to call where they are sharded."""
    return {n: _whole(t).detach().cpu().contiguous() for n, t in zip(names, tensors, strict=True)}


def model_files(unet: Any, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, bytes]]:
    """The files of a folder that `UNet2DModel.from_pretrained` loads."""
    yield "config.json", unet.to_json_string().encode()
    buffers = {name: b.cpu() for name, b in unet.named_buffers() if name in unet.state_dict()}
    yield WEIGHTS, to_safetensors({**buffers, **weights}, metadata={"format": "pt"})


def _files(state: TrainingState, progress: Progress) -> Iterator[tuple[str, bytes]]:
    unet, names = state.unet, [name for name, _ in state.unet.named_parameters()]
    parameters = list(unet.parameters())
    for name, content in model_files(unet, gathered(names, parameters)):
        yield f"unet/{name}", content
    averages = dict(state.ema.averages) if state.ema is not None else {}
    if averages:
        first = averages.pop(next(iter(averages)))
        for name, content in model_files(unet, gathered(names, first)):
            yield f"unet_ema/{name}", content
    if averages:
        keys = [f"{average}/{name}" for average in averages for name in names]
        yield "averages.safetensors", to_safetensors(gathered(keys, [t for a in averages.values() for t in a]))
    moments = {
        f"{name}/{kind}": value
        for name, p in zip(names, parameters, strict=True)
        for kind, value in state.optimizer.state.get(p, {}).items()
    }
    yield "optimizer.safetensors", to_safetensors(gathered(list(moments), list(moments.values())))
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


def _prune(output_dir: Path, keep: int) -> bool:
    """Deletes all but the `keep` newest whole checkpoints; whether there were any to delete."""
    checkpoints = [output_dir / name for name in reversed(checkpoint_names(output_dir))]
    whole = [c for c in checkpoints if _has_its_files(c)]
    if len(whole) <= keep:
        return False
    oldest_kept = checkpoints.index(whole[keep - 1])
    for old in checkpoints[oldest_kept + 1 :]:
        # First out of the way of `latest`, so that one deleted in part is not taken for a damaged one.
        doomed = old.with_name(f"partial-{old.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        old.rename(doomed)
        shutil.rmtree(doomed)
    return True


def _has_its_files(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == known["size"] for name, known in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_sharded(state: TrainingState) -> bool:
    return any(hasattr(p, "full_tensor") for p in state.unet.parameters())


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def _placed_as(value: Tensor, like: Tensor) -> Tensor:
    """`value` on the device of `like`, and sharded as it is."""
    if not hasattr(like, "full_tensor"):
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(value.to(like.device), sharded.device_mesh, sharded.placements)
