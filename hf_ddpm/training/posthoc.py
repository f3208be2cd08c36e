"""The averages of any length, reconstructed after training (Karras et al. 2024, "EDM2", sec. 3 and App. C).

    n               images seen; time is counted in images, and weights(tau) are constant within a step
    average         int_0^n p(tau) weights(tau) dtau
    profile         p(tau) = (gamma + 1) tau^gamma / n^(gamma + 1) on [0, n]; 0 after n
    std             (gamma + 1)^(1/2) / ((gamma + 2) (gamma + 3)^(1/2)), of p, relative to n: the average's length
    decay           (1 - G / n)^(gamma + 1), of the step of G images that brings the images seen to n
    survival        S(tau) = int_tau^n p = 1 - (tau / n)^(gamma + 1) on [0, n]; 0 after n
    snapshot        averages of a few stds at one n, tracked and saved while training
    profile error   rms over [0, n] of the survival of a combination of snapshots minus that of the requested average

The survival is fitted, not the profile. Weights move by steps dw, average = w(0) + int S dw, so that for a combination
whose coefficients sum to 1 the error of the average is int (error of S) dw: its expected square is the integral of
(error of S)^2 if steps are independent, that of (error of p)^2 only if the weights themselves were. A run moves its
weights by about their own size, which makes the profile error an estimate of the relative error of the average.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from hf_ddpm.classes import CLASSES_FILE
from hf_ddpm.condition import CONDITION_FILE
from hf_ddpm.label_embedding import EMBEDDING_FILE, read_embedding, write_weights
from hf_ddpm.labels import LABELS_FILE
from hf_ddpm.network import naming_weights, require_finite
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import look_at, network_folder
from hf_ddpm.runtime.run_files import MODEL_INDEX
from hf_ddpm.value_range import VALUES_FILE

TRACKED_STDS = (0.05, 0.10)
MAX_STD = 1 / math.sqrt(12)  # gamma = 0, where every image counts alike
MAX_PROFILE_ERROR = 1e-3

_COPIED_IF_THERE = tuple(path.as_posix() for path in (CLASSES_FILE, LABELS_FILE, VALUES_FILE, CONDITION_FILE))
_DESCRIPTION = "average.json"


def std_from_gamma(gamma: float) -> float:
    """Return the std of a profile, relative to n (Karras et al. 2024, sec. 3.1).

    std = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2)
    """
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_from_std(std: float) -> float:
    """Return the gamma >= 0 whose profile has this std; it falls as std rises.

    Raises:
        UsageError: `std` is not in (0, 12^(-1/2)].
    """
    if not 0 < std <= MAX_STD:
        raise UsageError(
            f"std must be above 0 and at most {math.floor(MAX_STD * 1e4) / 1e4}, got {std:g}: it is relative to the "
            "images seen, and the largest is that of an average in which they all count alike"
        )
    # With x = gamma + 2 the definition is x^3 + x^2 - x / std^2 + 1 / std^2 = 0; its largest root, by Viete.
    q = std**-2
    r = math.sqrt(1 / 9 + q / 3)
    angle = math.acos(-(1 / 27 + 2 / 3 * q) / r**3)
    return max(0.0, 2 * r * math.cos(angle / 3) - 1 / 3 - 2)


def power_decay(images_seen: int, global_batch_size: int, std: float) -> float:
    """Return the decay of the step that starts after `images_seen` images, in [0, 1); 0 at the first step.

        decay = ((n - G) / n)^(gamma + 1),  n - G = images_seen      (Karras et al. 2024, sec. 3.1)

    It is exact for weights that are constant within a step, whatever the sizes of the steps.
    """
    return (images_seen / (images_seen + global_batch_size)) ** (gamma_from_std(std) + 1)


def inner_product(n_1: Any, gamma_1: Any, n_2: Any, gamma_2: Any) -> Any:
    """Return int S_1 S_2 dtau of two survivals; arguments are broadcast.

    With m = n_1 <= n_2, a = gamma + 1 and r = (m / n_2)^a_2 it is m (1 - 1/(a_1+1) - r/(a_2+1) + r/(a_1+a_2+1)).
    """
    m, n, first = np.minimum(n_1, n_2), np.maximum(n_1, n_2), np.less_equal(n_1, n_2)
    a, b = np.where(first, gamma_1, gamma_2) + 1, np.where(first, gamma_2, gamma_1) + 1
    r = (m / n) ** b
    return m * (1 - 1 / (a + 1) - r / (b + 1) + r / (a + b + 1))


def mixture(snapshots: Sequence[tuple[float, float]], images: float, std: float) -> tuple[np.ndarray, float]:
    """Find the combination of averages with the least profile error to the average of `std` at `images`.

    The coefficients sum to 1: an error of their sum would multiply the weights themselves, not only their movement.

    Args:
        snapshots: (images, std) of each average.

    Returns:
        The coefficients, (len(snapshots),) float64, and the profile error. A snapshot that is the requested average
        has coefficient 1 and error 0.
    """
    n, stds = np.array(snapshots, dtype=np.float64).T
    matches = np.flatnonzero((n == images) & (stds == std))
    if len(matches):
        return np.eye(len(n))[matches[0]], 0.0
    # In units of `images`, the profile error squared is c A c - 2 b c + d.
    n, gammas, gamma = n / images, np.array([gamma_from_std(s) for s in stds]), gamma_from_std(std)
    A = inner_product(n[:, None], gammas[:, None], n, gammas)
    b = inner_product(n, gammas, 1.0, gamma)
    d = inner_product(1.0, gamma, 1.0, gamma)
    # Snapshots are rounded to float32, independently: that adds the square of its unit to each diagonal element, and
    # keeps coefficients small where neighboring snapshots hardly differ.
    ones = np.ones((len(n), 1))
    lagrange = np.block([[A + 2.0**-48 * np.eye(len(n)), ones], [ones.T, np.zeros((1, 1))]])
    c = np.linalg.solve(lagrange, np.append(b, 1.0))[:-1]
    return c, math.sqrt(max(0.0, c @ A @ c - 2 * b @ c + d))


def snapshot_bytes(images: int, averages: Mapping[float, Mapping[str, Tensor]]) -> bytes:
    """Return the content of a snapshot file: float32 tensors with keys "{std:g}/{name of the parameter}".

    Args:
        averages: std -> name -> average; the same stds and names in every snapshot of a run.
    """
    tensors = {
        f"{std:g}/{name}": tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for std, average in averages.items()
        for name, tensor in average.items()
    }
    return save(tensors, {"images": str(images)})


def snapshot_path(run: Path, images: int) -> Path:
    """Return the path of the snapshot of a run at `images` images."""
    return run / "ema" / f"snapshot-{images:012d}.safetensors"


def snapshots(run: Path) -> list[tuple[int, Path]]:
    """Return (images, file) of each snapshot of a run, images rising."""
    paths = (run / "ema").glob("snapshot-*")
    matches = [(re.fullmatch(r"snapshot-(\d{12,})\.safetensors", path.name), path) for path in paths]
    return sorted((int(match[1]), path) for match, path in matches if match)


def reconstruct(run: Path, std: float, images: int | None = None) -> tuple[dict[str, Tensor], int, float]:
    """Reconstruct the average of `std` at `images` from the snapshots up to then; later ones add nothing.

    Args:
        images: The images at one of the snapshots; None: at the last. Between snapshots the weights are not known
            well enough.

    Returns:
        Name -> float32 average, summed in float64, one file after the other; the images; the profile error.

    Raises:
        UsageError: There are no snapshots, none at `images`, unlike or broken ones, weights that are not finite,
            or the profile error is above MAX_PROFILE_ERROR.
    """
    gamma_from_std(std)
    files = snapshots(run)
    if not files:
        raise UsageError(f"{run} must be a run with snapshots of its averages, and has none in {run / 'ema'}")
    times = [n for n, _ in files]
    images = times[-1] if images is None else images
    if images not in times:
        raise UsageError(f"images must be those of a snapshot, one of {times}, got {images}")
    files = files[: times.index(images) + 1]
    shapes = _shapes(*files[-1])
    for file in files[:-1]:
        if _shapes(*file) != shapes:
            raise UsageError(f"{file[1]} must hold the averages and shapes of {files[-1][1]}: it is of another run")

    prefixes = sorted({key.partition("/")[0] for key in shapes})
    averages = [(float(n), float(prefix)) for n, _ in files for prefix in prefixes]
    coefficients, error = mixture(averages, images, std)
    if error > MAX_PROFILE_ERROR:
        stds = [*map(float, prefixes), *(k / 1000 for k in range(1, int(MAX_STD * 1000) + 1))]
        possible = [s for s in stds if mixture(averages, images, s)[1] <= MAX_PROFILE_ERROR]
        nearest = min(possible, key=lambda s: abs(s - std))
        raise UsageError(
            f"std must be one that {len(files)} snapshots up to {images} images can give, got {std:g}: the profile "
            f"error would be {error:.1e}, above {MAX_PROFILE_ERROR:g}; the nearest that they give is {nearest:g}"
        )
    total: dict[str, Tensor] = {}
    for (_, path), row in zip(files, coefficients.reshape(len(files), -1).tolist(), strict=True):
        coefficient = dict(zip(prefixes, row, strict=True))
        with safe_open(path, framework="pt") as file:
            for key in shapes:
                prefix, _, name = key.partition("/")
                if coefficient[prefix] != 0:
                    term = coefficient[prefix] * file.get_tensor(key).double()
                    total[name] = total[name].add_(term) if name in total else term
    average = {name: tensor.float() for name, tensor in total.items()}
    require_finite(average, f"the snapshots in {str(run / 'ema')!r}")
    return average, images, error


def write_average(run: Path, std: float, out: Path | None = None, images: int | None = None) -> Path:
    """Write the average of `std` as a stock diffusers pipeline: the run's own, with other weights of its network.

    Tensors keep the run's dtype; those that snapshots lack, such as buffers, are the run's. `average.json` beside
    `model_index.json` holds std, images and profile error.

    Args:
        out: The folder; None: RUN/ema/std-{std:g}. An earlier average there is replaced.
        images: The images at one of the snapshots; None: at the last.

    Raises:
        UsageError: Nothing can be reconstructed, `run` is no pipeline or another run's, or `out` holds anything else.
    """
    run = look_at("run", run)
    out = run / "ema" / f"std-{std:g}" if out is None else look_at("out", out)
    network = network_folder(run).name
    copied = (MODEL_INDEX, "scheduler/scheduler_config.json", f"{network}/config.json")
    weights = f"{network}/diffusion_pytorch_model.safetensors"
    for name in (*copied, weights):
        if not (run / name).is_file():
            raise UsageError(f"{run} must be a run that has saved its pipeline: {name} is not there")
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if not p.is_dir()}
    ours = {_DESCRIPTION, weights, EMBEDDING_FILE.as_posix(), *copied, *_COPIED_IF_THERE}
    foreign = files - ours if _DESCRIPTION in files else files
    if foreign or out.is_file():
        raise UsageError(f"{out} must be new, empty or an earlier average: {min(foreign, default='it')} would be lost")

    state, images, error = reconstruct(run, std, images)
    with naming_weights(f"run {str(run)!r}"):
        tensors = load_file(run / weights)
        of_labels = read_embedding(run / EMBEDDING_FILE) if (run / EMBEDDING_FILE).is_file() else {}
    tensors |= of_labels
    for name, tensor in state.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise UsageError(f"the snapshots must be of the network in {run / network}, which has no such {name}")
        tensors[name] = tensor.to(tensors[name].dtype)

    # Made beside `out` and renamed, so that `out` is always whole, and the old average stays until the new one is.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="partial-") as partial:
        new = Path(partial) / "new"
        for name in (*copied, *(name for name in _COPIED_IF_THERE if (run / name).is_file())):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / name, new / name)
        if of_labels:
            write_weights(new / EMBEDDING_FILE, {name: tensors.pop(name) for name in of_labels})
        save_file(tensors, new / weights, {"format": "pt"})
        description = {"std": std, "images": images, "profile_error": error}
        (new / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            out.rename(Path(partial) / "old")
        new.rename(out)
    return out


def _shapes(images: int, path: Path) -> dict[str, tuple[int, ...]]:
    """Return key -> shape of a snapshot, after checking that it holds the same tensors for each std.

    Raises:
        UsageError: It cannot be read, or is not the snapshot that its name says.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys, stored_images = file.keys(), (file.metadata() or {}).get("images")
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} must be a whole safetensors file, or be deleted: {error}") from error
    prefixes = {key.partition("/")[0] for key in shapes}
    tensors = {(key.partition("/")[2], shape) for key, shape in shapes.items()}
    whole = shapes and len(shapes) == len(prefixes) * len(tensors)
    if (
        stored_images != str(images)
        or not whole
        or not all(re.fullmatch(r"0\.\d+|\de-\d+", prefix) for prefix in prefixes)
    ):
        raise UsageError(f"{path} must hold the averages after {images} images under std/name: it is no snapshot")
    return shapes
