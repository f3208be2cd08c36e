"""The results of `hf-ddpm evaluate` on disk: evaluation.json, pictures and the card.

result           a value, its standard error, what real images get in the samples' place, and the settings behind it
evaluation.json  {format, weights_sha256, results}: results of one network's weights only
key              all that determines a result besides the weights; a new result replaces the stored one of equal key
grid             results whose keys differ only in the sampler: scheduler, number of steps and timesteps
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

from hf_ddpm.evaluation.measure import NEIGHBORS
from hf_ddpm.evaluation.names import DISTANCES
from hf_ddpm.hub.card import write_card
from hf_ddpm.names import SCHEDULERS
from hf_ddpm.plots import Curve, Level, draw_curves
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import naming_damage, one_at_a_time, read_mapping, write_atomically
from hf_ddpm.runtime.run_files import EVALUATION_PICTURES

FORMAT = 1
SAMPLER_KEYS = ("scheduler", "num_inference_steps", "timesteps", "guidance")
# Seconds compare only between results for which these are equal.
TIMING_KEYS = ("device", "batch_size", "num_processes")
LOWER_IS_BETTER = ("fd", "kid", "cmmd")

Draw: TypeAlias = Callable[[Path], None]


def write_evaluation(
    out: Path,
    weights: str,
    rows: list[dict[str, Any]],
    pictures: dict[str, Draw] | None = None,
    repo_id: str | None = None,
) -> Path:
    """Add results to evaluation.json and to the card in `out`.

    Args:
        out: A folder; it is made if it does not exist.
        weights: The `weights_sha256` of the model; results of other weights are removed, and their pictures.
        rows: Results, each of which replaces the one that was measured in the same way.
        pictures: For each name in `figures`, the function that draws it into a path.
        repo_id: The model's repository in the card's examples, if it is known.

    Returns:
        The card's path.
    """
    out.mkdir(parents=True, exist_ok=True)
    # Another evaluation may read and write at the same time: without waiting, the rows of one would be lost.
    with one_at_a_time(out):
        return _add_results(out, weights, rows, pictures or {}, repo_id)


def _add_results(
    out: Path, weights: str, rows: list[dict[str, Any]], pictures: dict[str, Draw], repo_id: str | None
) -> Path:
    before = stored_results(out, weights)
    if not before:
        for name in EVALUATION_PICTURES:
            (out / "figures" / name).unlink(missing_ok=True)
    new = {_key(row): row for row in rows}
    results = [row for row in before if _key(row) not in new] + [*new.values()]
    for name, draw in {**pictures, **_grid_pictures(results, rows)}.items():
        if draw is None:
            (out / "figures" / name).unlink(missing_ok=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder) / name)
            write_atomically(out / "figures" / name, (Path(folder) / name).read_bytes())
    content = {"format": FORMAT, "weights_sha256": weights, "results": results}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(out / "evaluation.json", text)
    return write_card(out, repo_id)


def stored_results(out: Path, weights: str) -> list[dict[str, Any]]:
    """Return the results of these weights that are stored in `out`.

    Raises:
        UsageError: When evaluation.json is damaged or of another format.
    """
    path = out / "evaluation.json"
    content = read_mapping(path, "move it away")
    if not content:
        return []
    with naming_damage(f"{path} cannot be read", "move it away"):
        if content["format"] != FORMAT:
            raise UsageError(f"{path} must have the format {FORMAT}, got {content['format']}: move it away")
        results: list[dict[str, Any]] = content["results"] if content["weights_sha256"] == weights else []
        for row in results:
            _key(row)
        return results


def _key(row: dict[str, Any]) -> str:
    """Return all that determines a result besides the weights, as text."""

    def select(part: str, *names: str) -> dict[str, Any]:
        # Results of older versions do not state these two.
        values = {"dtype": "fp32", "compile": False, **(row.get(part) or {})}
        return {name: values.get(name) for name in names}

    network = {key: value for key, value in (row.get("network") or {}).items() if key != "information"}
    key = [
        row["metric"],
        network,
        select("reference", "fingerprint", "split", "count"),
        select("held_out", "fingerprint", "split", "count"),
        select("sampling", *SAMPLER_KEYS, "seed", "num_images", "classes", "dtype", "compile"),
        row.get("neighbors", NEIGHBORS if row["metric"] in DISTANCES["precision"] else None),
        select("likelihood", "num_images", "timesteps_per_image", "seed"),
    ]
    return json.dumps(key, sort_keys=True)


def _grid_pictures(results: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Draw | None]:
    """Return what draws quality against cost for the grid of the new rows; None for a picture to be removed.

    The pictures show the first metric of DISTANCES that the new rows contain.
    """
    names = [name for metric in DISTANCES.values() for name in metric]
    distances = [row for row in rows if row["metric"] in names]
    if not distances:
        return {}
    new = min(distances, key=lambda row: names.index(row["metric"]))
    comparable = [row for row in results if _key(_without_sampler(row)) == _key(_without_sampler(new))]
    pictures: dict[str, Draw | None] = {}
    grid = [row for row in comparable if _guidance_of(row) == _guidance_of(new)]
    if len(grid) > 1:
        timed = [row for row in grid if _timing_environment(row) == _timing_environment(new)]
        pictures["steps.png"] = partial(_draw_grid, grid, "network_evaluations")
        pictures["seconds.png"] = partial(_draw_grid, timed, "seconds_per_image") if len(timed) > 1 else None
    solver = ("scheduler", "num_inference_steps", "timesteps")
    scales = [row for row in comparable if all(row["sampling"].get(k) == new["sampling"].get(k) for k in solver)]
    if len({scale_of(row) for row in scales}) > 1:
        pictures["guidance.png"] = partial(_draw_scales, scales)
    return pictures


def scale_of(row: dict[str, Any]) -> float:
    """Return the scale of guidance that a result was measured with; 1 without guidance."""
    return (row["sampling"].get("guidance") or {}).get("scale", 1.0)


def _guidance_of(row: dict[str, Any]) -> dict[str, Any] | None:
    return row["sampling"].get("guidance")


def _draw_scales(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw one metric over the scale of guidance, a curve for each interval, method and weaker network.

    Each begins with what no guidance gives, the scale 1. That is no point of a curve with autoguidance beside it.
    """
    without = [row for row in rows if _guidance_of(row) is None]
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if (guidance := _guidance_of(row)) is not None:
            curves.setdefault(_name_of_curve(guidance), []).append(row)
    metric, real = rows[-1]["metric"], rows[-1]["real_vs_real"]
    better = "lower" if metric in LOWER_IS_BETTER else "higher"
    drawn = []
    for name, measured in curves.items():
        is_led_twice = any("autoguidance_scale" in row["sampling"]["guidance"] for row in measured)
        points = sorted(measured if is_led_twice else without + measured, key=scale_of)
        errors = [row.get("standard_error") for row in points]
        drawn.append(
            Curve(
                name,
                [scale_of(row) for row in points],
                [row["value"] for row in points],
                [float("nan") if error is None else error for error in errors],
            )
        )
    draw_curves(
        path,
        drawn,
        title="Quality against the scale of guidance",
        x_label="scale of guidance (1 is none)",
        y_label=f"{rows[-1]['name']}\n({better} is better)",
        log_y=metric == "fd",
        y_from_zero=metric != "fd",
        level=Level(f"real images ({real['of']})", real["value"], real.get("standard_error")),
    )


def _name_of_curve(guidance: dict[str, Any]) -> str:
    low, high = guidance.get("interval") or (0, None)
    name = "all sigma" if (low, high) == (0, None) else f"sigma from {low:g}" + (f" to {high:g}" if high else "")
    method = guidance.get("method", "cfg")
    weaker = guidance["weaker"]
    name = name if method == "cfg" else f"{method}, {name}"
    if "autoguidance_scale" in guidance:
        return f"{name}, autoguidance {guidance['autoguidance_scale']:g} by {weaker[:7]}"
    return name if weaker == "without a class" else f"{name}, weaker model {weaker[:7]}"


def _timing_environment(row: dict[str, Any]) -> list[Any]:
    return [row["sampling"].get(name) for name in TIMING_KEYS]


def _without_sampler(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "sampling": {**(row.get("sampling") or {}), **dict.fromkeys(SAMPLER_KEYS)}}


def _draw_grid(grid: list[dict[str, Any]], cost: str, path: Path) -> None:
    """Draw one metric over the cost of sampling, a curve for each scheduler with and without searched timesteps."""
    curves = []
    for (color, name), is_searched in product(enumerate(SCHEDULERS), (False, True)):
        rows = [
            row
            for row in grid
            if row["sampling"]["scheduler"] == name and bool(row["sampling"].get("timesteps")) == is_searched
        ]
        rows.sort(key=lambda row: (row["sampling"][cost], row["value"]))
        if not rows:
            continue
        label = f"{name}, searched" if is_searched else name
        if len(rows) == 1:
            label += f", only {rows[0]['sampling']['num_inference_steps']} steps"
        costs = [row["sampling"][cost] for row in rows]
        errors = [row.get("standard_error") for row in rows]
        curves.append(
            Curve(
                label,
                costs,
                [row["value"] for row in rows],
                [float("nan") if error is None else error for error in errors],
                color=color,
                is_dashed=is_searched,
            )
        )
    metric, real = grid[-1]["metric"], grid[-1]["real_vs_real"]
    better = "lower" if metric in LOWER_IS_BETTER else "higher"
    title, x_label = "Quality against the cost of sampling", "network evaluations per image"
    if cost == "seconds_per_image":
        title = f"Quality against the time of sampling on {grid[-1]['sampling'].get('device', 'one device')}"
        x_label = "seconds per image"
    draw_curves(
        path,
        curves,
        title=title,
        x_label=x_label,
        y_label=f"{grid[-1]['name']}\n({better} is better)",
        log_x=True,
        log_y=metric == "fd",
        y_from_zero=metric != "fd",
        level=Level(f"real images ({real['of']})", real["value"], real.get("standard_error")),
    )
