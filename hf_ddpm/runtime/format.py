"""Numbers and recorded values as people read them: in the terminal, in tables and on the model card."""

from __future__ import annotations

import math
from typing import Any


def format_amount(value: float, unit: str) -> str:
    """Return a value with three digits and a prefix that is a power of 1000: 1234567, "B" -> "1.23 MB"."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while value >= 999.5 and len(prefixes) > 1:
        value, prefixes = value / 1000, prefixes[1:]
    return f"{value:.3g} {prefixes[0]}{unit}".rstrip()


def format_duration(seconds: float) -> str:
    """Return a time in days, hours and minutes, and in seconds below one hour: 93784 -> "1 d 2 h 3 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (0 if days or hours else rest, "s")]
    return " ".join(f"{count:,} {unit}" for count, unit in parts if count) or f"{seconds:.2g} s"


def format_measurement(value: float | None, standard_error: float | None = None) -> str:
    """Return a value with two digits of its standard error, or else four digits of the value.

    For example, 1.2345678 and 0.0123 become "1.235 ± 0.012". None, which stands for a value that is not finite, is
    said to be that.
    """
    if value is None:
        return "not finite"
    if not standard_error:
        return f"{value:.4g}"
    decimals = min(12, max(0, 1 - math.floor(math.log10(standard_error))))
    return f"{value:,.{decimals}f} ± {standard_error:,.{decimals}f}"


def finite_or_none(value: float) -> float | None:
    """Return a value as JSON can hold it: None for infinity and NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def format_value(value: Any) -> Any:
    """Return a recorded value as text that cannot break a table of Markdown; a mapping has its values formatted.

    Truth values, lists and None stay as they are.
    """
    if isinstance(value, dict):
        return {key: format_value(item) for key, item in value.items()}
    if isinstance(value, str):
        return " ".join(value.split()).replace("|", "\\|")
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value
