"""The files that a run writes into its folder: one table, from which everything that must know them is derived.

    --overwrite_output_dir          replaces the files of every row but those that it must leave alone
    a resumed run                   takes back what a later step has written (`undo_later_steps`)
    an upload                       takes the files of UPLOADED, and deletes those of REPLACED that it lacks
    an upload of an average         takes the files of OF_WEIGHTS from the average's own folder
    an upload of a checkpoint       takes the files of OF_CHECKPOINT beside it
    `hf-ddpm evaluate`              deletes EVALUATION_PICTURES that show other weights

A tracker's logs (`logging_dir`) and what people add to the folder are nobody's but theirs, and in no row. Pictures
that people add to `figures` are the exception: they are uploaded with the others.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_ddpm.runtime.files import NETWORK_FOLDERS, cut_metrics, read_mapping, weights_sha256

EVALUATION = "evaluation.json"
SEARCHED_TIMESTEPS = "scheduler/searched_timesteps.json"
MODEL_INDEX = "model_index.json"
REPLACED_RUN = "replaced-run"


@dataclass(frozen=True)
class RunFile:
    """A kind of file or folder that a run writes.

    Args:
        pattern: A pattern of `Path.glob` that begins at the run's folder. The pattern of a folder stands for
            everything in it.
        is_uploaded: A push takes it to the Hub.
        is_replaced: A push deletes it on the Hub when the run has no such file: it would contradict the model.
        is_of_weights: It holds, describes or shows the weights in the same folder, so that an average of the run
            has a file of its own with this name.
        names_weights: The file whose `weights_sha256` says of which weights this one is; it is valid for no others.
        is_of_checkpoint: A run that resumes on another machine needs it, beside the checkpoint itself.
        on_resume: What becomes of it when the run resumes from an earlier step: it is kept, it is deleted, the
            lines of later steps are cut off, or it is deleted if the number in its name is larger than the
            number of steps or of images.
        is_numbered: The `*` of the pattern stands for a whole number; other names are not the run's.
        is_deleted: `--overwrite_output_dir` moves it into REPLACED_RUN, and deletes it when the new model stands.
    """

    pattern: str
    is_uploaded: bool = False
    is_replaced: bool = False
    is_of_weights: bool = False
    names_weights: str | None = None
    is_of_checkpoint: bool = False
    on_resume: Literal["keep", "delete", "cut lines", "delete later steps", "delete later images"] = "keep"
    is_numbered: bool = False
    is_deleted: bool = True


def _picture(
    name: str,
    is_replaced: bool = False,
    names_weights: str | None = None,
    on_resume: Literal["keep", "delete"] = "keep",
) -> RunFile:
    return RunFile(
        f"figures/{name}",
        is_uploaded=True,
        is_replaced=is_replaced,
        is_of_weights=True,
        names_weights=names_weights,
        on_resume=on_resume,
    )


RUN_FILES = (
    # What the run was told, and what it recorded.
    RunFile("config.yaml", is_uploaded=True, is_of_checkpoint=True),  # every setting
    RunFile("run.json", is_uploaded=True, is_replaced=True, on_resume="delete"),  # the facts of a run at its end
    # One line per logged step, and one per measurement.
    RunFile("metrics.jsonl", is_uploaded=True, is_of_checkpoint=True, on_resume="cut lines"),
    RunFile("eval.jsonl", is_uploaded=True, is_replaced=True, is_of_checkpoint=True, on_resume="cut lines"),
    RunFile("tracker.json", is_of_checkpoint=True),  # the id by which trackers find the run again
    RunFile("README.md", is_uploaded=True),  # the model card
    # The model.
    RunFile(MODEL_INDEX, is_uploaded=True, is_of_weights=True),
    *(
        RunFile(f"{network}/{name}", is_uploaded=True, is_replaced=True, is_of_weights=True)
        for network in NETWORK_FOLDERS
        for name in ("*.json", "*.safetensors")
    ),
    RunFile("scheduler/*.json", is_uploaded=True, is_of_weights=True),
    RunFile("scheduler/labels.json", is_uploaded=True, is_replaced=True, is_of_weights=True),
    RunFile("scheduler/values.json", is_uploaded=True, is_replaced=True, is_of_weights=True),
    RunFile("scheduler/labels.npz", is_uploaded=True, is_replaced=True, is_of_weights=True),
    RunFile(
        SEARCHED_TIMESTEPS,
        is_uploaded=True,
        is_replaced=True,
        is_of_weights=True,
        names_weights=SEARCHED_TIMESTEPS,
    ),
    # A weaker version of its network, for guidance.
    RunFile("guide/*.json", is_uploaded=True, is_replaced=True, is_of_checkpoint=True),
    RunFile("guide/*.safetensors", is_uploaded=True, is_replaced=True, is_of_checkpoint=True),
    RunFile("guide/labels.npz", is_uploaded=True, is_replaced=True, is_of_checkpoint=True),
    # Which average of which run the weights are; it stands in the folders of averages.
    RunFile("average.json", is_uploaded=True, is_replaced=True, is_of_weights=True),
    # Weights in other forms, which no run writes, but which others may have saved or uploaded.
    *(RunFile(f"{network}/*.bin", is_replaced=True, is_of_weights=True) for network in NETWORK_FOLDERS),
    RunFile("diffusion_pytorch_model.*", is_replaced=True, is_of_weights=True, is_deleted=False),
    # What was measured of the model, and its pictures.
    RunFile(EVALUATION, is_uploaded=True, is_replaced=True, is_of_weights=True, names_weights=EVALUATION),
    _picture("steps.png", is_replaced=True, names_weights=EVALUATION),
    _picture("seconds.png", is_replaced=True, names_weights=EVALUATION),
    _picture("guidance.png", is_replaced=True, names_weights=EVALUATION),
    _picture("bound.png", is_replaced=True, names_weights=EVALUATION),
    _picture("spectrum.png", is_replaced=True, names_weights=EVALUATION),
    _picture("memorization.png", is_replaced=True, names_weights=EVALUATION),
    # Pictures of a run at its end, and those that people add.
    _picture("samples.png", on_resume="delete"),
    _picture("loss.png", on_resume="delete"),
    _picture("kid.png", is_replaced=True),
    _picture("val_loss.png", is_replaced=True),
    _picture("psnr.png", is_replaced=True),
    _picture("training_distance.png", is_replaced=True),
    _picture("training_share.png", is_replaced=True),
    _picture("forward.png", on_resume="delete"),
    _picture("reverse.png", on_resume="delete"),
    _picture("reverse.gif", on_resume="delete"),
    RunFile("figures/*.png", is_uploaded=True, is_of_weights=True, is_deleted=False),
    RunFile("figures/*.gif", is_uploaded=True, is_of_weights=True, is_deleted=False),
    # What stays on this machine.
    RunFile("checkpoint-*", is_numbered=True),
    RunFile("previews/step-*.png", is_numbered=True, is_of_checkpoint=True, on_resume="delete later steps"),
    RunFile("best", is_of_checkpoint=True),  # the model that measured best so far
    RunFile("ema/halflife-*"),  # averages, each of them a model
    RunFile("ema/std-*"),
    RunFile("ema/snapshot-*.safetensors", is_numbered=True, is_of_checkpoint=True, on_resume="delete later images"),
    RunFile(".lock", is_deleted=False),  # held by the run that overwrites
    RunFile(REPLACED_RUN, is_deleted=False),  # the run that was overwritten, until the new model stands
    # What a killed process left unfinished.
    RunFile("partial-checkpoint-*", on_resume="delete"),
    RunFile("partial-model", on_resume="delete"),
    RunFile("partial-guide", on_resume="delete"),
    RunFile("partial-push-*", on_resume="delete"),
    RunFile("partial-download", on_resume="delete"),
    RunFile(f"partial-{REPLACED_RUN}", is_deleted=False, on_resume="delete"),
    RunFile("ema/partial-*"),  # `hf-ddpm average` may be at work while the run continues
)

UPLOADED = tuple(row.pattern for row in RUN_FILES if row.is_uploaded)
REPLACED = tuple(row.pattern for row in RUN_FILES if row.is_replaced)
# The pictures that a run draws at its end, which are those of another model as soon as it goes on.
LAST_PICTURES = tuple(
    row.pattern for row in RUN_FILES if row.pattern.startswith("figures/") and row.on_resume == "delete"
)
OF_WEIGHTS = tuple(row.pattern for row in RUN_FILES if row.is_of_weights)
OF_CHECKPOINT = tuple(row.pattern for row in RUN_FILES if row.is_of_checkpoint)
# The file that names the weights -> the files that are valid for those weights alone.
VALID_WITH = {
    source: tuple(row.pattern for row in RUN_FILES if row.names_weights == source)
    for source in (EVALUATION, SEARCHED_TIMESTEPS)
}
EVALUATION_PICTURES = tuple(Path(name).name for name in VALID_WITH[EVALUATION] if name.startswith("figures/"))


def checkpoint_names(folder: Path) -> list[str]:
    """Return the names `checkpoint-N` of a run's checkpoints, N rising."""
    return [path.name for _, path in _numbered_paths(folder, "checkpoint-*")]


def previews(folder: Path) -> list[tuple[int, Path]]:
    """Return the previews of a run with their steps, rising."""
    return _numbered_paths(folder, "previews/step-*.png")


def run_files(folder: Path) -> list[Path]:
    """Return what `--overwrite_output_dir` replaces in a folder: what the run in it wrote.

    A folder without a run has none, so that the files of somebody who named a wrong folder are safe.
    """
    is_run = any((folder / name).exists() for name in ("config.yaml", MODEL_INDEX))
    if not is_run and not checkpoint_names(folder):
        return []
    # Each is listed once, though several rows may have it.
    return list(dict.fromkeys(path for row in RUN_FILES if row.is_deleted for path in _paths(folder, row)))


def undo_later_steps(folder: Path, num_steps: int, num_images: int) -> None:
    """Delete what a run wrote after the step from which it resumes, and what it must write anew.

    Args:
        folder: The run's folder, which no other process writes into.
        num_steps: The optimizer steps that the run has taken.
        num_images: The images that it has seen.
    """
    limits = {"delete later steps": num_steps, "delete later images": num_images}
    # Lines are written anew, which may fail: nothing is deleted before.
    for row in RUN_FILES:
        if row.on_resume == "cut lines":
            for path in _paths(folder, row):
                cut_metrics(path, num_steps)
    for row in RUN_FILES:
        if row.on_resume == "delete":
            for path in _paths(folder, row):
                _delete(path)
        elif row.on_resume in limits:
            for number, path in _numbered_paths(folder, row.pattern):
                if number > limits[row.on_resume]:
                    path.unlink()


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _paths(folder: Path, row: RunFile) -> list[Path]:
    if row.is_numbered:
        return [path for _, path in _numbered_paths(folder, row.pattern)]
    return list(folder.glob(row.pattern))


def _numbered_paths(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """Return the paths whose name has a whole number in the place of the pattern's `*`, that number rising."""
    name = re.escape(Path(pattern).name).replace(r"\*", r"(\d+)")
    matches = [(re.fullmatch(name, path.name), path) for path in folder.glob(pattern)]
    return sorted((int(match[1]), path) for match, path in matches if match)


def read_run(folder: Path) -> dict[str, Any]:
    """Return the facts of a run that is finished or stopped, which run.json holds, or an empty mapping."""
    return read_mapping(folder / "run.json")


def run_folder_of(model: Path) -> Path:
    """Return the folder of the run that a model belongs to: its own, or that above `best` or `ema/NAME`."""
    if model.parent.name == "ema":
        return model.parent.parent
    return model.parent if model.name == "best" else model


def read_evaluation(folder: Path) -> list[dict[str, Any]]:
    """Return the results in evaluation.json, or none if they were measured with other weights than the folder's."""
    evaluation = read_mapping(folder / "evaluation.json")
    weights = weights_sha256(folder) if evaluation else None
    return evaluation.get("results", []) if weights in (None, evaluation.get("weights_sha256")) else []
