"""The results of commands, in lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_ddpm.runtime.command_line import table


def describe_evaluation(result: Mapping[str, Any], is_written: bool) -> list[str]:
    """Return the table of what `evaluate` measured, remarks on it, and where it was written if it was."""
    remarks = [f"{row['name']}: {row['remark']}" for row in result["results"] if row.get("remark")]
    ending = f"The results are in {Path(result['out']) / 'evaluation.json'}, and on the card {result['card']}."
    return [*table_of_results(result["results"]), *remarks, *([ending] if is_written else [])]


def describe_search(searched: Any, path: Path | None) -> list[str]:
    """Return lines on timesteps that were searched, and on what became of them."""
    is_better = searched.is_better_than_uniform
    reason = "there is no folder here that takes them" if is_better else "the default ones are as good"
    lines = [
        f"{searched.scheduler}, {len(searched.timesteps)} steps: distance {searched.distance:.4f} to "
        f"{searched.reference_steps} steps, default {searched.uniform_distance:.4f}, unipc "
        f"{searched.unipc_distance:.4f}, " + (f"kept in {path}" if path else f"not kept: {reason}"),
        f"timesteps={[*searched.timesteps]}",
    ]
    if searched.network is not None:
        lines.insert(
            1,
            f"kernel distance of {searched.network} {searched.kernel_distance:.4f}, default "
            f"{searched.uniform_kernel_distance:.4f}, unipc {searched.unipc_kernel_distance:.4f}",
        )
    return lines


def table_of_auroc(result: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table of the AUROC of each class and of all; none without normal classes."""
    if result["auroc"] is None:
        return []
    rows = [*result["auroc_by_class"].items()]
    if len(rows) > 1:
        rows.append(("all", result["auroc"]))
    cells = []
    for name, area in rows:
        error = "" if area["standard_error"] is None else f" ± {area['standard_error']:.3f}"
        cells.append((name, f"{area['num_anomalous']:,}", f"{area['num_normal']:,}", f"{area['value']:.3f}{error}"))
    return table([("anomalous", "images", "normal", "AUROC (higher is better)"), *cells])


def table_of_results(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table of measurements, with the columns of the card; none without results."""
    from hf_ddpm.hub.card import result_cells

    rows = [result_cells(row) for row in results]
    return table([list(rows[0]), *([*row.values()] for row in rows)]) if rows else []
