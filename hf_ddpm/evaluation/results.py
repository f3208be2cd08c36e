"""What `hf-ddpm evaluate` found, written down.

result           a value, its standard error, the floor, and all that decides them
evaluation.json  {format, weights_sha256, results}: results of one network's weights only
key              all that decides a result beside the weights; a result replaces the one of the same key
grid             results whose keys differ in scheduler and steps only
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

from hf_ddpm.evaluation.measure import DISTANCES, NEIGHBORS
from hf_ddpm.figures import curve
from hf_ddpm.hub.card import write_card
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import naming_damage, read_mapping, write_atomically
from hf_ddpm.runtime.run_files import EVALUATION_PICTURES
from hf_ddpm.sampling.schedulers import SCHEDULERS

FORMAT = 1
OF_CELL = ("scheduler", "num_inference_steps", "timesteps")

Draw: TypeAlias = Callable[[Path], None]


def write_evaluation(
    out: Path,
    weights: str,
    rows: list[dict[str, Any]],
    pictures: dict[str, Draw] | None = None,
    repo_id: str | None = None,
) -> Path:
    """Adds results to `out`: to evaluation.json, and to the card.

    Args:
        out: made if it does not exist.
        weights: `weights_sha256` of the model; results of other weights, and their pictures, go.
        rows: results, of which each replaces the one that was measured in the same way.
        pictures: names in `figures` -> what draws them into a path.
        repo_id: for the examples of the card, if it is known.

    Returns: the card's path.
    """
    before = stored_results(out, weights)
    if not before:
        for name in EVALUATION_PICTURES:
            (out / "figures" / name).unlink(missing_ok=True)
    new = {_key(row): row for row in rows}
    results = [row for row in before if _key(row) not in new] + [*new.values()]
    for name, draw in {**(pictures or {}), **_grid_pictures(results, rows)}.items():
        if draw is None:
            (out / "figures" / name).unlink(missing_ok=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder) / name)
            write_atomically(out / "figures" / name, (Path(folder) / name).read_bytes())
    content = {"format": FORMAT, "weights_sha256": weights, "results": results}
    write_atomically(
        out / "evaluation.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )
    return write_card(out, repo_id)


def stored_results(out: Path, weights: str) -> list[dict[str, Any]]:
    """The results in `out` of these weights."""
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
    """All that decides a result, beside the weights."""

    def chosen(part: str, *names: str) -> dict[str, Any]:
        values = {"dtype": "fp32", "compile": False, **(row.get(part) or {})}  # what older rows do not say
        return {name: values.get(name) for name in names}

    network = {key: value for key, value in (row.get("network") or {}).items() if key != "information"}
    decisive = [
        row["metric"],
        network,
        chosen("reference", "fingerprint", "split", "count"),
        chosen("held_out", "fingerprint", "split", "count"),
        chosen("sampling", *OF_CELL, "seed", "num_images", "classes", "dtype", "compile"),
        row.get("neighbors", NEIGHBORS if row["metric"] in DISTANCES["precision"] else None),
        chosen("likelihood", "num_images", "timesteps_per_image", "seed"),
    ]
    return json.dumps(decisive, sort_keys=True)


def _grid_pictures(results: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Draw | None]:
    """Quality against cost, of the grid to which the new rows belong, in its first metric; None for what goes."""
    names = [name for metric in DISTANCES.values() for name in metric]
    for new in sorted((row for row in rows if row["metric"] in names), key=lambda row: names.index(row["metric"]))[:1]:
        grid = [row for row in results if _key(_one_cell(row)) == _key(_one_cell(new))]
        if len(grid) > 1:
            alike = [row for row in grid if _place(row) == _place(new)]  # else times do not compare
            costs = {"steps.png": ("network_evaluations", grid), "seconds.png": ("seconds_per_image", alike)}
            return {name: partial(_draw_grid, of, cost) if len(of) > 1 else None for name, (cost, of) in costs.items()}
    return {}


def _place(row: dict[str, Any]) -> list[Any]:
    return [row["sampling"].get(name) for name in ("device", "batch_size", "num_processes")]


def _one_cell(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "sampling": {**(row.get("sampling") or {}), **dict.fromkeys(OF_CELL)}}


def _draw_grid(grid: list[dict[str, Any]], cost: str, path: Path) -> None:
    every = [row["sampling"][cost] for row in grid]
    floor = grid[-1]["floor"]["value"]
    series: dict[str, tuple[list[float], list[float]]] = {
        "real images": ([min(every), max(every)], [floor, floor]),
    }
    for name, is_searched in product(SCHEDULERS, (False, True)):
        of = [r for r in grid if r["sampling"]["scheduler"] == name]
        points = sorted(
            (r["sampling"][cost], r["value"]) for r in of if bool(r["sampling"].get("timesteps")) == is_searched
        )
        if points:
            series[f"{name}, searched" if is_searched else name] = [x for x, _ in points], [y for _, y in points]
    label = {"network_evaluations": "network evaluations per image", "seconds_per_image": "seconds per image"}[cost]
    curve(path, series, label, grid[0]["name"], log_y=grid[0]["metric"] == "fd", log_x=True)
