"""The model card, written from what the run recorded.

    config.yaml                      every setting
    run.json                         what was measured: versions, data, model, training, samples
    metrics.jsonl                    one line per logged step
    scheduler/scheduler_config.json, unet/config.json
                                     the model as saved; overrides config.yaml
    evaluation.json                  exists once a metric was measured; of the weights whose sha256 it names
    average.json                     of which average the weights are, if not of the run's own
    figures/                         pictures

A number is measured or absent: what is not in these files is not on the card. What stands between BEGIN and END is
written anew each time; the rest of a README, and what else its metadata say, is its author's.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_ddpm.hub.readme import BEGIN, END, REFERENCE, merged, named_repository
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import in_a_line, read_mapping, weights_sha256, write_atomically
from hf_ddpm.timesteps import read_searched

# Those of https://huggingface.co/docs/hub/repositories-licenses that data may have; the Hub rejects any other word.
LICENSE = re.compile(
    r"apache-2\.0|mit|isc|zlib|unlicense|bsd(-[23]-clause)?|[al]?gpl-3\.0|gpl-2\.0|mpl-2\.0|gfdl|c-uda|cc0-1\.0"
    r"|cc-by(-sa)?-[34]\.0|cc-by-2\.[05]|cc-by-nc(-sa)?-[234]\.0|cc-by-nd-4\.0|cc-by-nc-nd-[34]\.0|etalab-2\.0"
    r"|cdla-sharing-1\.0|cdla-permissive-[12]\.0|odc-by|odbl|pddl|openmdw-1\.0"
)


def write_card(output_dir: str | Path, repo_id: str | None = None, revision: str | None = None) -> Path:
    """Write the model card of the run in `output_dir` into its README.md, between BEGIN and END.

    Args:
        output_dir: a run; whatever it did not record is left out.
        repo_id: the repository that the card's examples load; default: the one that they load already,
            `hub_model_id`, or else the folder's name.
        revision: of the repository, if it is not `main`.

    Returns: the card's path. Raises: UsageError if `output_dir` is not a folder, or a file of its is damaged.
    """
    path = Path(output_dir) / "README.md"
    if not path.parent.is_dir():
        raise UsageError(f"output_dir must be the folder of a run, got {str(output_dir)!r}, which is not a folder")
    readme = "README.md cannot be read", ": correct it, or delete it"
    with _damage_said(*readme):
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        repo_id = repo_id or named_repository(before)
    files = "config.yaml, run.json, metrics.jsonl or evaluation.json"
    with _damage_said("the card cannot be written", f": correct what was edited in {files}"):
        card = str(_card(path.parent, repo_id, revision))
    with _damage_said(*readme):
        whole = merged(before, card)
    write_atomically(path, whole)
    return path


@contextlib.contextmanager
def _damage_said(what: str, remedy: str) -> Iterator[None]:
    """Of files that people edit."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{what}: {in_a_line(error)}{remedy}") from error
    except (LookupError, TypeError, AttributeError) as error:  # whose texts say little alone
        raise UsageError(f"{what}: {error!r}{remedy}") from error


def read_evaluation(folder: Path) -> list[dict[str, Any]]:
    """The results in evaluation.json; none if they are of other weights than those in `folder`."""
    evaluation = read_mapping(folder / "evaluation.json")
    weights = weights_sha256(folder) if evaluation else None
    return evaluation.get("results", []) if weights in (None, evaluation.get("weights_sha256")) else []


def read_run(folder: Path) -> dict[str, Any]:
    """run.json; empty if there is none."""
    return read_mapping(folder / "run.json")


def result_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A result of evaluation.json as a row of a table: column -> text."""
    network, reference, floor = row.get("network"), row["reference"], row.get("floor")
    real = ""
    if floor:
        counts = " against ".join(f"{count:,}" for count in floor["num_compared"])
        same = floor["num_compared"] == row["num_compared"]
        of = _said(floor["of"]) if same else f"{_said(floor['of'])}, {counts}"
        real = f"{_measured(floor['value'], floor.get('standard_error'))} ({of})"
    if "likelihood" in row:
        settings = row["likelihood"]
        by = f"{settings['timesteps_per_image']:,} terms of each image"
    else:
        settings = row["sampling"]
        dtype = settings.get("dtype", "fp32")
        by = f"{settings['scheduler']}, {settings['num_inference_steps']:,} steps"
        by += " (searched)" if settings.get("timesteps") else ""
        by += "" if dtype == "fp32" else f", {dtype}"
    config = f" ({reference['config']})" if reference.get("config") else ""
    return {
        "Metric": _said(row["name"]) + (f", k = {row['neighbors']}" if "neighbors" in row else ""),
        "Value": _measured(row["value"], row.get("standard_error")),
        "Real images": real,
        "Images": " against ".join(f"{count:,}" for count in row["num_compared"]),
        "Network": f"{network['network']}, {network['input_size']} px" if network else "",
        "Reference": f"{_said(reference['name'])}{_said(config)}, {reference['split']}, {reference['count']:,}",
        "By": by,
        "Seed": str(settings["seed"]),
    }


def _measured(value: float | None, standard_error: float | None = None) -> str:
    """1.2345678, 0.0123 -> 1.235 ± 0.012: two digits of the error, or else four of the value."""
    if value is None:
        return "not finite"
    if not standard_error:
        return f"{value:.4g}"
    decimals = min(12, max(0, 1 - math.floor(math.log10(standard_error))))
    return f"{value:,.{decimals}f} ± {standard_error:,.{decimals}f}"


def _eval_results(results: list[dict[str, Any]]) -> list[EvalResult]:
    """The finite ones, those of one data set and split together: only so they come back in their order."""
    found: dict[Any, list[EvalResult]] = {}
    for row in results:
        if row["value"] is None:
            continue
        reference, network = row["reference"], row.get("network") or {}
        sampling, likelihood, floor = (row.get(part) or {} for part in ("sampling", "likelihood", "floor"))
        settings = {
            **{"num_compared": row["num_compared"], "standard_error": row.get("standard_error")},
            **{"real_images": floor.get("value"), REFERENCE: reference["fingerprint"]},
            **{"network": network.get("network"), "network_sha256": network.get("weights_sha256")},
            **{key: sampling.get(key) for key in ("scheduler", "num_inference_steps", "timesteps", "dtype")},
            "neighbors": row.get("neighbors"),
            "timesteps_per_image": likelihood.get("timesteps_per_image"),
            "seed": (likelihood or sampling)["seed"],
        }
        result = EvalResult(
            task_type="unconditional-image-generation",
            task_name="Unconditional Image Generation",
            dataset_type=_dataset_type(reference["name"], reference["fingerprint"]),
            dataset_name=reference["name"],
            dataset_config=reference.get("config"),
            dataset_split=reference["split"],
            metric_type=row["metric"],
            metric_name=row["name"],
            metric_value=row["value"],
            metric_args={key: value for key, value in settings.items() if value is not None},
            verified=False,
        )
        found.setdefault(result.unique_identifier, []).append(result)
    return [result for group in found.values() for result in group]


def _dataset_type(name: str, fingerprint: str) -> str:
    """As the Hub wants it, and different for different data: a Hub id, or what has no character but those of one."""
    if re.fullmatch(r"([\w-]+/)?[\w.-]+", name, re.ASCII):
        return name
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-") + f"-{fingerprint[:8]}"


def _card(folder: Path, repo_id: str | None, revision: str | None) -> ModelCard:
    config, run = read_mapping(folder / "config.yaml"), read_mapping(folder / "run.json")
    scheduler, unet = (
        read_mapping(folder / "scheduler/scheduler_config.json"),
        read_mapping(folder / "unet/config.json"),
    )
    average = read_mapping(folder / "average.json")
    if average.get("images") not in (None, (run.get("training") or {}).get("images")):
        run = {**run, "training": {}}  # which went on after the snapshot
    data, training = run.get("data") or {}, run.get("training") or {}
    settings = {
        "num_train_timesteps": config.get("ddpm_num_steps"),
        **{key: config.get(f"ddpm_{key}") for key in ("beta_schedule", "beta_start", "beta_end")},
        **config,
        **scheduler,
        **training,
        **({"ema_halflife_images": [average["halflife_images"]]} if "halflife_images" in average else {}),
        "ema_std": average.get("std"),
        "dropout": unet.get("dropout", None if config.get("model_config_name_or_path") else config.get("dropout")),
    }
    T, step_denoiser = settings["num_train_timesteps"], settings.get("prediction_type") == "previous_sample"
    our_steps = T if step_denoiser or T is None else min(50, T)
    conditional = unet.get("num_class_embeds") is not None or unet.get("class_embed_type") is not None
    license = str(data.get("license") or "").lower().replace(" ", "-")
    metrics = _metrics(folder / "metrics.jsonl")
    losses = [(_said(line["loss"]), _said(line["step"])) for line in metrics if "loss" in line]
    speeds = [line["images_per_second"] for line in metrics if "images_per_second" in line]
    repo_id = str(repo_id or config.get("hub_model_id") or folder.resolve().name)
    title = repo_id.split("/")[-1]
    results = read_evaluation(folder)
    eval_results = _eval_results(results)
    card_data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license=license if LICENSE.fullmatch(license) else None,
        datasets=_hub_datasets(config.get("dataset_name")),
        base_model=_base_model(config.get("init_from")),
        tags=["diffusers", "ddpm", "hf_ddpm", "unconditional-image-generation"],
        eval_results=eval_results or None,
        model_name=title if eval_results else None,
    )
    commands: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        commands.setdefault(row["command"], []).append(row)
    return ModelCard.from_template(
        card_data,
        template_str=_template(),
        title=title,
        loaded=json.dumps(repo_id) + (f", revision={json.dumps(revision)}" if revision else ""),
        begin=BEGIN,
        end=END,
        revision=revision,
        base_model=_base_model(config.get("init_from")),
        monitor={name: _said(config.get(f"eval_{name}")) for name in ("network", "num_images", "split")},
        figures=[path.name for path in folder.glob("figures/*")],
        unet={"size": _size(unet.get("sample_size")), "channels": unet.get("in_channels")},
        conditional=conditional,
        step_denoiser=step_denoiser,
        T=T,
        fast_steps=min(20, T) if T and _is_dpm_solvable(settings, unet) else None,
        searched=[*read_searched(folder).values()],
        our_steps=our_steps,
        trajectory="True" if our_steps is None or our_steps <= 100 else f"range(0, {our_steps}, {our_steps // 10})",
        num_classes=(len(data.get("class_names") or ()) or unet.get("num_class_embeds")) if conditional else None,
        settings=_settings(settings),
        run=_said(run),
        size=_size(data.get("resolution")),
        classes=_classes(data.get("class_names")),
        time=None if training.get("seconds") is None else _duration(training["seconds"]),
        last_loss=losses[-1] if losses else None,
        speed=_said(statistics.median(speeds)) if speeds else None,
        evaluations=[(command, [result_cells(row) for row in rows]) for command, rows in commands.items()],
        remarks=[f"{_said(row['name'])}: {_said(row['remark'])}" for row in results if row.get("remark")],
        evaluated={row["metric"].partition("_")[0] for row in results},
    )


def _template() -> str:
    """Package data of an installed wheel; in a checkout, the folder beside the package."""
    places = (resources.files("hf_ddpm") / "model_card", Path(__file__).resolve().parents[2] / "model_card")
    return next(place / "template.md" for place in places if (place / "template.md").is_file()).read_text("utf-8")


def _metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl with their numbers; a line that a killed run left unfinished is no line."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        lines.append({key: value for key, value in line.items() if isinstance(value, int | float)})
    return [line for line in lines if "step" in line]


def _base_model(name: str | None) -> str | None:
    return name if _hub_datasets(name) else None


def _hub_datasets(name: str | None) -> list[str] | None:
    if name is None or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or Path(name).exists():
        return None
    return [name]


def _is_dpm_solvable(settings: Mapping[str, Any], unet: Mapping[str, Any]) -> bool:
    """Whether stock's `DPMSolverMultistepScheduler` can take over this scheduler's config.

    Stock's `DDPMPipeline` gives a generator to each step, which UniPC does not take.
    """
    return (
        settings.get("prediction_type") in ("epsilon", "sample", "v_prediction")
        and settings.get("beta_schedule") in ("linear", "scaled_linear", "squaredcos_cap_v2")
        # It takes the first 3 channels of a network that also predicts its variance.
        and (unet.get("in_channels") == 3 or not str(settings.get("variance_type")).startswith("learned"))
    )


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the settings table: name, ours, that of Ho et al. 2020 in the same words.

    Theirs: Sec. 4 and App. B; variance, warm-up and the limit of the gradient: the code published with the paper.
    """
    s = {key: value for key, value in settings.items() if value is not None}
    betas = "" if s.get("beta_schedule") == "squaredcos_cap_v2" else ", beta from {beta_start:g} to {beta_end:g}"
    rescaled = ", rescaled to zero terminal SNR" if s.get("rescale_betas_zero_snr") else ""
    weight = "min(SNR, {min_snr_gamma:g}) on x_0" if s.get("loss_weighting") == "min_snr" else "{loss_weighting}"
    adam = "AdamW, weight decay {adam_weight_decay:g}" if s.get("adam_weight_decay") else "Adam"
    adam = "Muon for the matrices of blocks, else " + adam if s.get("optimizer") == "muon" else adam
    warmup = "" if s.get("lr_scheduler") == "constant" else ", {lr_warmup_steps:,} warm-up steps"
    by_halflife = "ema_halflife_images" in s
    average = "half-life {ema_halflife_images[0]:,.0f} images" if by_halflife else "{ema_max_decay:g} per step"
    ramp = ", at most 1 - (1 + k / {ema_inv_gamma:g})^-{ema_power:g} at step k"
    if "ema_rampup_ratio" in s:
        ramp = ", at most {ema_rampup_ratio:g} of the images seen"
    if "ema_std" in s:
        average, ramp = "a power of the images seen, std {ema_std:g} of them", ""
    lognormal = "nine tenths log(sigma_t) normal, mean {noise_level_mean:g}, std {noise_level_std:g}"
    lognormal += "; a tenth uniform; stratified"
    others = s.get("stable_target_images", 0)
    words = {
        "stable_target_images": {others: f"the image and {others:,} others", 0: "the image"},
        "beta_schedule": {"squaredcos_cap_v2": "cosine"},
        "loss_weighting": {"constant": "1"},
        "timestep_density": {"uniform": "uniform, independent"},
        "use_ema": {True: average + ramp, False: "none"},
        "random_flip": {True: "yes", False: "no"},
    }
    table = {
        "Chain length T": ("{num_train_timesteps:,}", "1,000"),
        "Noise schedule": ("{beta_schedule}" + betas + rescaled, "linear, beta from 0.0001 to 0.02"),
        "The network predicts": ("{prediction_type}", "epsilon"),
        "Variance of p": ("{variance_type}", "fixed_large"),
        "Weight of the squared error": (weight, "1"),
        "Target averaged over": ("{stable_target_images}", "the image"),
        "Draws of t": (
            lognormal if s.get("timestep_density") == "lognormal" else "{timestep_density}",
            "uniform, independent",
        ),
        "Optimizer": (adam + ", betas {adam_beta1:g} and {adam_beta2:g}", "Adam, betas 0.9 and 0.999"),
        "Learning rate": (
            "{learning_rate:g}, {lr_scheduler}" + warmup,
            "0.0002, constant_with_warmup, 5,000 warm-up steps",
        ),
        "Images per step": ("{global_batch_size:,}", "128"),
        "Limit of the gradient's norm": ("{max_grad_norm:g}", "1"),
        "Averaged weights (EMA)": (words["use_ema"].get(s.get("use_ema"), "{use_ema}"), "0.9999 per step"),
        "Dropout": ("{dropout:g}", "0.1"),
        "Images mirrored at random": ("{random_flip}", "yes"),
        "Optimizer steps": ("{steps:,}", "800,000"),
    }
    s |= {key: said.get(s[key], s[key]) for key, said in words.items() if key in s}
    rows = []
    for name, (ours, theirs) in table.items():
        # A setting that is not known, in whole or in part, has no row.
        with contextlib.suppress(KeyError):
            rows.append((name, _said(ours.format(**s)), theirs))
    return rows


def _said(value: Any) -> Any:
    """Recorded values as the card writes them, in text that cannot break a table."""
    if isinstance(value, dict):
        return {key: _said(item) for key, item in value.items()}
    if isinstance(value, str):
        return " ".join(value.split()).replace("|", "\\|")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return value


def _size(side: int | list[int] | None) -> str | None:
    if side is None:
        return None
    height, width = (side, side) if isinstance(side, int) else side
    return f"{width} x {height}"


def _classes(names: list[str] | None) -> str | None:
    if not names:
        return None
    return f"{len(names):,}: {_said(', '.join(map(str, names[:20])))}{', ...' if len(names) > 20 else ''}"


def _duration(seconds: float) -> str:
    """3725.4 -> 1 h 2 min 5 s (3,725 s)"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    long = f"{f'{hours:,} h ' if hours else ''}{minutes} min {rest} s ({seconds:,.0f} s)"
    return long if seconds >= 60 else f"{seconds:.3g} s"
