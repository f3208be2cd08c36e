"""The model card, written from the files that a run recorded (`runtime/run_files.py` lists them).

A number on the card was measured by the run, or it is absent. What the saved model says (`scheduler` and `unet`)
overrides what `config.yaml` says. Results in `evaluation.json` count only for the weights whose checksum it names.

The card is the part of README.md between BEGIN and END, and is written anew each time. All else in a README, and what
else its metadata say, is its author's.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from hf_ddpm.classes import Classes
from hf_ddpm.condition import Condition, describe_condition
from hf_ddpm.hub.card_metadata import card_metadata
from hf_ddpm.hub.card_records import RunRecords
from hf_ddpm.hub.card_settings import settings_rows
from hf_ddpm.hub.download import is_hub_id
from hf_ddpm.hub.readme import BEGIN, END, merge_readme, named_repository
from hf_ddpm.image_size import format_size, to_size
from hf_ddpm.labels import Columns, Values, describe_labels
from hf_ddpm.names import TUNED_STEPS
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import naming_damage, read_metrics, write_atomically
from hf_ddpm.runtime.format import format_duration, format_measurement, format_value
from hf_ddpm.timesteps import read_searched
from hf_ddpm.value_range import read_value_range

if TYPE_CHECKING:
    from jinja2 import Template

FEW_STEPS = 20  # of the card's example with a solver
MAX_TRAJECTORY_STEPS = 100  # up to which the example returns each step
STOCK_NETWORK = "UNet2DModel"  # which stock's DDPMPipeline samples
MAX_CLASS_NAMES = 20
UNREADABLE = "README.md cannot be read", "correct it, or delete it"


def write_card(output_dir: str | Path, repo_id: str | None = None, revision: str | None = None) -> Path:
    """Write the model card of a run into its README.md, between BEGIN and END.

    Args:
        output_dir: The folder of a run. The card leaves out whatever the run did not record.
        repo_id: The repository that the card's examples load. Default: the one that they load already, or the run's
            `hub_model_id`; the path of the folder as long as there is none.
        revision: The branch of the repository, if it is not `main`.

    Returns:
        The path of README.md.

    Raises:
        UsageError: When `output_dir` is not a folder, or one of its files is damaged.
    """
    path = Path(output_dir) / "README.md"
    if not path.parent.is_dir():
        raise UsageError(f"output_dir must be the folder of a run, got {str(output_dir)!r}, which is not a folder")
    readme = check_readme(path.parent)
    named = named_repository(readme)
    repo_id = repo_id or (named if named is not None and is_hub_id(named) else None)
    edited_files = "config.yaml, run.json, metrics.jsonl or evaluation.json"
    with naming_damage("the card cannot be written", f"correct what was edited in {edited_files}"):
        card = str(_card(RunRecords(path.parent), repo_id, revision))
    with naming_damage(*UNREADABLE):
        new_readme = merge_readme(readme, card)
    write_atomically(path, new_readme)
    return path


def check_readme(folder: Path) -> str:
    """Return the text of the README.md in a folder, "" if there is none, after trying to put a card into it.

    Raises:
        UsageError: When it may not be read, or its metadata are damaged: no card could be written.
    """
    path = folder / "README.md"
    with naming_damage(*UNREADABLE):
        readme = path.read_text(encoding="utf-8") if path.is_file() else ""
        named_repository(readme)
        merge_readme(readme, f"---\ntags: []\n---\n{BEGIN}\n{END}\n")
    return readme


def result_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a result of evaluation.json as a row of a table: column -> text."""
    network, reference = row.get("network"), row["reference"]
    config = f" ({reference['config']})" if reference.get("config") else ""
    settings = row["likelihood"] if "likelihood" in row else row["sampling"]
    return {
        "Metric": format_value(row["name"]) + (f", k = {row['neighbors']}" if "neighbors" in row else ""),
        "Value": format_measurement(row["value"], row.get("standard_error")),
        "Real images": _real_images_cell(row),
        "Images": _counts(row["num_compared"]),
        "Network": _network_cell(network) if network else "",
        "Reference": (
            f"{format_value(reference['name'])}{format_value(config)}, {reference['split']}, {reference['count']:,}"
        ),
        "By": _method_cell(row),
        "Seed": str(settings["seed"]),
    }


def _network_cell(network: Mapping[str, Any]) -> str:
    """Return which feature network saw the images, and which channels of arrays."""
    channels = f", channels {' '.join(map(str, network['channels']))}" if "channels" in network else ""
    return f"{network['network']}, {network['input_size']} px{channels}"


def _real_images_cell(row: Mapping[str, Any]) -> str:
    """Return what real images get in the place of samples; the number of images is named if it is another one."""
    real = row.get("real_vs_real")
    if not real:
        return ""
    compared = format_value(real["of"])
    if real["num_compared"] != row["num_compared"]:
        compared += f", {_counts(real['num_compared'])}"
    return f"{format_measurement(real['value'], real.get('standard_error'))} ({compared})"


def _method_cell(row: Mapping[str, Any]) -> str:
    if "likelihood" in row:
        return f"{row['likelihood']['timesteps_per_image']:,} terms of each image"
    sampling = row["sampling"]
    dtype = sampling.get("dtype", "fp32")
    method = f"{sampling['scheduler']}, {sampling['num_inference_steps']:,} steps"
    method += " (searched)" if sampling.get("timesteps") else ""
    if guidance := sampling.get("guidance"):
        low, high = guidance.get("interval") or (0, None)
        method += f", guidance {guidance['scale']:g}" + (f" from sigma {low:g}" if low else "")
        method += f" to {high:g}" if high is not None else ""
        method += f" by {guidance['method']}" if "method" in guidance else ""
        if "autoguidance_scale" in guidance:
            method += f", autoguidance {guidance['autoguidance_scale']:g} by {guidance['weaker'][:7]}"
        elif guidance["weaker"] != "without a class":
            method += f", weaker model {guidance['weaker'][:7]}"
    return method + ("" if dtype == "fp32" else f", {dtype}")


def _counts(num_compared: list[int]) -> str:
    return " against ".join(f"{count:,}" for count in num_compared)


def _card(records: RunRecords, repo_id: str | None, revision: str | None) -> ModelCard:
    hub_model_id = records.config.get("hub_model_id")
    title = str(repo_id or hub_model_id or records.folder.resolve().name).split("/")[-1]
    # A name without a namespace is one of the Hub only for whoever pushes it.
    name = repo_id or (hub_model_id if is_hub_id(str(hub_model_id)) else loadable_path(records.folder))
    metadata = card_metadata(
        title,
        license=records.data.get("license"),
        dataset=records.config.get("dataset_name"),
        base_model=records.base_model,
        results=records.results,
        makes_from_images=records.condition is not None,
    )
    variables = {
        "title": title,
        "begin": BEGIN,
        "end": END,
        "revision": revision,
        "from_pretrained_arguments": json.dumps(name) + (f", revision={json.dumps(revision)}" if revision else ""),
        "base_model": records.base_model,
        "figures": [path.name for path in records.folder.glob("figures/*")],
        **_model_variables(records),
        **_training_variables(records),
        **_evaluation_variables(records.results),
    }
    # What ModelCard.from_template does, but that compiles the template each time.
    content = _compiled(_template()).render(card_data=metadata.to_yaml(), **{**metadata.to_dict(), **variables})
    return ModelCard(content)


def loadable_path(folder: Path) -> str:
    """Return a path that `from_pretrained` cannot take for the name of a repository."""
    return folder.as_posix() if folder.is_absolute() else f"./{folder.as_posix()}"


def _model_variables(records: RunRecords) -> dict[str, Any]:
    """Return what the template says of the model and its use."""
    settings, unet = records.settings, records.unet
    T = settings["num_train_timesteps"]
    is_step_denoiser = settings.get("prediction_type") == "previous_sample"
    # A step denoiser is its chain: it takes all T steps.
    tuned_steps = _tuned_steps(settings)
    example_steps = T if is_step_denoiser or T is None else tuned_steps[-1] if tuned_steps else min(50, T)
    if example_steps is None or example_steps <= MAX_TRAJECTORY_STEPS:
        trajectory = "True"
    else:
        trajectory = f"range(0, {example_steps}, {example_steps // 10})"
    searched = [*read_searched(records.folder).values()]
    condition, values = records.condition, _describe_values(records.folder)
    condition_channels = 0 if condition is None else condition.channels
    size = None if unet.get("sample_size") is None else to_size(unet["sample_size"])
    return {
        "values": values,
        "as_array": "" if values is None else ', output_type="np"',
        "condition": None if condition is None else _describe_condition(condition),
        "unet": {
            "size": _format_resolution(unet.get("sample_size")),
            "channels": None if "in_channels" not in unet else unet["in_channels"] - condition_channels,
            "height": None if size is None else size[0],
            "width": None if size is None else size[1],
            "is_square": size is not None and size[0] == size[1],
        },
        "conditional": records.is_conditional,
        "network": unet.get("_class_name", STOCK_NETWORK),
        "is_stock_network": unet.get("_class_name", STOCK_NETWORK) == STOCK_NETWORK,
        "num_classes": None if records.classes is None else len(records.classes),
        "unconditional": None if records.classes is None else records.classes.unconditional,
        "first_class": None if records.classes is None else json.dumps(records.classes.names[0], ensure_ascii=False),
        "labels": None if records.labels is None else _describe_labels(records.labels),
        "step_denoiser": is_step_denoiser,
        "T": T,
        "example_steps": example_steps,
        "trajectory": trajectory,
        "chain_steps": (records.facts.get("figures") or {}).get("reverse_chain_steps"),
        # Stock takes few steps evenly in t, which loses the small scales of fields.
        "few_steps": min(FEW_STEPS, T) if T and not values and _is_solvable_by_stock(settings, unet) else None,
        "tuned": _describe_tuning(tuned_steps),
        "searched": searched,
        "kernel_network": next((row.network for row in searched if row.network), None),
    }


def _describe_condition(condition: Condition) -> dict[str, Any]:
    """Return what the template says of what a model makes images from."""
    dtype = None if condition.value_range is None else condition.value_range.dtype
    return {**asdict(condition), "words": describe_condition(condition), "dtype": dtype}


def _describe_values(folder: Path) -> dict[str, str] | None:
    """Return what the template says of the values of a model of arrays; None for other models."""
    values = read_value_range(folder)
    if values is None:
        return None
    low, width = (f"{value:.9g}" for value in (values.low, values.high - values.low))
    shown = " ".join(map(str, values.display_channels or ()))
    return {"words": str(values), "low": low, "width": width, "shown": shown, "dtype": values.dtype}


def _tuned_steps(settings: Mapping[str, Any]) -> list[int]:
    """Return the numbers of steps that the model is tuned for, rising; none for another model."""
    from hf_ddpm.scheduler import is_tuned  # which loads torch, see below

    if not is_tuned(settings):
        return []
    return sorted(settings.get("tuned_steps") or [TUNED_STEPS])


def _describe_tuning(steps: list[int]) -> dict[str, Any] | None:
    """Return what the template says of the numbers of steps that a model is tuned for; None for another model."""
    if not steps:
        return None
    numbers = ", ".join(map(str, steps[:-1])) + (" or " if len(steps) > 1 else "") + str(steps[-1])
    return {"words": f"{numbers} step{'s' if steps != [1] else ''}", "most": steps[-1], "has_several": len(steps) > 1}


def _is_solvable_by_stock(settings: Mapping[str, Any], unet: Mapping[str, Any]) -> bool:
    """Return whether diffusers' own pipeline can sample the model with `DPMSolverMultistepScheduler`.

    The solver takes the first three channels of a network that also predicts its variance. UniPC is not the card's
    example, since the pipeline gives a generator to each step, which UniPC does not accept.
    """
    has_learned_variance = str(settings.get("variance_type")).startswith("learned")
    from hf_ddpm.scheduler import is_solvable  # which loads torch; `hf-ddpm info` shows results without it

    if _tuned_steps(settings) or not is_solvable(settings):
        return False
    return unet.get("in_channels") == 3 or not has_learned_variance


def _training_variables(records: RunRecords) -> dict[str, Any]:
    """Return what the template says of the data, the training and its cost."""
    config, data, training = records.config, records.data, records.training
    losses = [line for line in records.metrics if line.get("loss") is not None]
    speeds = [line["images_per_second"] for line in records.metrics if line.get("images_per_second") is not None]
    seconds = training.get("seconds")
    validations = read_metrics(records.folder / "eval.jsonl")
    by_class = (validations[-1].get("by_class") if validations else None) or {}
    return {
        "class_rows": [
            (
                format_value(name),
                format_measurement(measured["kid"], measured["kid_standard_error"]),
                format_value(measured["val_loss"]),
            )
            for name, measured in by_class.items()
        ],
        "rows_by_steps": [
            (num_steps, format_measurement(measured["kid"], measured["kid_standard_error"]))
            for num_steps, measured in ((validations[-1].get("kid_by_steps") if validations else None) or {}).items()
        ],
        "class_rows_step": format_value(validations[-1]["step"]) if validations else None,
        "run": format_value(records.facts),
        "settings": settings_rows(records.settings),
        "held_out": _format_held_out(data.get("held_out")),
        "monitor": {name: format_value(config.get(f"eval_{name}")) for name in ("network", "num_images", "split")},
        "random_crop": data.get("random_crop"),
        "size": _format_resolution(data.get("resolution")),
        "classes": None if records.classes is None else _format_classes(records.classes.names),
        "label_texts": None if records.labels is None else format_value(describe_labels(records.labels)),
        "time": None if seconds is None else _format_time(seconds),
        "last_loss": {name: format_value(losses[-1][name]) for name in ("loss", "step")} if losses else None,
        "speed": format_value(statistics.median(speeds)) if speeds else None,
    }


def _format_held_out(held_out: dict[str, Any] | None) -> str | None:
    """Return in words how many images were held out of those of training, in which groups; None if none were."""
    if held_out is None:
        return None
    text = f"{held_out['num_images']:,}"
    if held_out["group_column"] is not None:
        text += f", in {held_out['num_groups']:,} whole groups of `{held_out['group_column']}`"
    return format_value(f"{text}; the split `{held_out['split']}`")


def _evaluation_variables(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the template says of the results: a table for each command that measured some."""
    tables: dict[str, list[dict[str, str]]] = {}
    for row in results:
        tables.setdefault(row["command"], []).append(result_cells(row))
    return {
        "evaluations": list(tables.items()),
        "class_distances": [
            (
                format_value(row["name"]),
                _method_cell(row),
                [
                    (format_value(name), format_measurement(measured["value"], measured["standard_error"]))
                    for name, measured in row["by_class"].items()
                ],
            )
            for row in results
            if row.get("by_class")
        ],
        "remarks": [
            f"{format_value(row['name'])}: {format_value(row['remark'])}" for row in results if row.get("remark")
        ],
        "evaluated": {row["metric"].partition("_")[0] for row in results},
    }


def _template() -> str:
    """Return the card's template: package data of an installed wheel, or the folder beside the package."""
    folders = (resources.files("hf_ddpm") / "model_card", Path(__file__).resolve().parents[2] / "model_card")
    return next(folder / "template.md" for folder in folders if (folder / "template.md").is_file()).read_text("utf-8")


@cache
def _compiled(template: str) -> Template:
    import jinja2

    return jinja2.Template(template)


def _format_resolution(resolution: int | list[int] | None) -> str | None:
    return None if resolution is None else format_size(to_size(resolution))


def _describe_labels(labels: Values | Columns) -> dict[str, Any]:
    """Return what the template says of numbers and of several columns of labels."""
    is_one = isinstance(labels, Values)
    columns: Sequence[tuple[str, Any]] = ((labels.name, labels),) if is_one else labels.columns
    example = {name: of.names[0] if isinstance(of, Classes) else _example(of) for name, of in columns}
    first = next(iter(example.values()))
    return {
        "rows": [
            (format_value(name), _format_classes(of.names) if isinstance(of, Classes) else of.range)
            for name, of in columns
        ],
        "is_one": is_one,
        "example": json.dumps(first if is_one else example, ensure_ascii=False),
        "option": f"{first:g}"
        if is_one
        else ", ".join(f"{name}={_as_text(value)}" for name, value in example.items()),
        "has_unconditional": labels.has_unconditional,
        "mean": labels.mean if is_one else None,
        "std": labels.std if is_one else None,
    }


def _example(values: Values) -> float:
    """Return a number in the middle of a column, with few digits where it has to be no other."""
    middle = values.in_turn[len(values.in_turn) // 2]
    rounded = float(f"{middle:.3g}")
    return rounded if values.quantiles[0] <= rounded <= values.quantiles[-1] else middle


def _as_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _format_classes(names: Sequence[str]) -> str:
    first_names = format_value(", ".join(names[:MAX_CLASS_NAMES]))
    return f"{len(names):,}: {first_names}{', ...' if len(names) > MAX_CLASS_NAMES else ''}"


def _format_time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 60 else f"{format_duration(seconds)} ({seconds:,.0f} s)"
