"""Settings that say everything about themselves, once: the fields of a dataclass, made by `setting`.

A field holds its default, its help, its range, the other settings that it takes effect with, its group in `--help`,
and whether a resumed run may change it. Parsers, checks and the comparison of runs read these and hold no lists of
names.

Whether a resumed run may change a setting:

    fixed   No: the model would be another one.
    free    Yes.
    start   It belongs to one start of a run, and is not written into its config.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hf_ddpm.runtime.errors import UsageError

Resume = Literal["fixed", "free", "start"]
# For `only_with`: any value but None.
GIVEN = object()


@dataclass(frozen=True)
class SettingInfo:
    """The description of a setting.

    Args:
        help: Its meaning, in a sentence or two.
        group: Its heading in `--help`.
        resume: Whether a resumed run may change it, see the top of this file.
        at_least: The smallest value; of a list, that of each number.
        num_values: Of a list, how many numbers it has, which then rise.
        above: A value that it must exceed.
        below: A value that it must stay under. No number may be infinite.
        names: Of a text, the names that it may hold; several are separated by commas.
        only_with: Other settings, each with the value or the tuple of values that this one takes effect with. A value
            of this one that is neither its default nor `off` is an error beside any other.
        off: A value that switches it off, and so is no error where it has no effect.
        is_secret: Whether its value is never shown.
    """

    help: str
    group: str
    resume: Resume
    at_least: float | None = None
    num_values: int | None = None
    above: float | None = None
    below: float | None = None
    names: tuple[str, ...] = ()
    only_with: Mapping[str, Any] = field(default_factory=dict)
    off: Any = None
    is_secret: bool = False


def setting(default: Any, help: str, *, group: str, resume: Resume, repr: bool = True, **about: Any) -> Any:
    """Make a dataclass field that describes itself.

    Args:
        default: The value of the setting where nothing is given.
        help: See `SettingInfo`, as for all that follows.
        group: The heading in `--help`.
        resume: Whether a resumed run may change it.
        repr: Whether the value is shown when the config is printed.
        about: Further arguments of `SettingInfo`.
    """
    info = SettingInfo(help, group, resume, **about)
    return field(default=default, repr=repr, metadata={"setting": info})


def settings_of(config: Any) -> Iterator[tuple[str, Any, SettingInfo]]:
    """Yield name, default and description of each setting of a config or its class, in order."""
    for each in fields(config):
        yield each.name, each.default, each.metadata["setting"]


def check_values(config: Any) -> None:
    """Check each setting by itself: that it has a value, its type's choices, its range.

    Raises:
        UsageError: When a setting cannot have its value; the message names the first of them.
    """
    hints = get_type_hints(type(config))
    for name, _, info in settings_of(config):
        value, hint = getattr(config, name), hints[name]
        choices = choices_of(hint)
        if value is None:
            if type(None) not in get_args(hint):
                raise UsageError(f"{name} must have a value, got None: leave the setting out for its default")
        elif choices and value not in choices:
            raise UsageError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
        elif info.names:
            _check_names(name, value, info)
        elif isinstance(value, list):
            _check_list(name, value, info)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            _check_range(name, value, info)


def _check_range(name: str, value: float, info: SettingInfo) -> None:
    is_in_range = (
        (info.at_least is None or value >= info.at_least)
        and (info.above is None or value > info.above)
        and (info.below is None or value < info.below)
        and (isinstance(value, int) or math.isfinite(value))
    )
    if not is_in_range:
        raise UsageError(f"{name} {_range_text(info)}, got {value}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UsageError(f"{name} must fit in 64 bits, got {value}")


def _range_text(info: SettingInfo) -> str:
    """Return the range of a setting in words, as in "must be above 0"."""
    if info.below is not None:
        start = f"({info.above:g}" if info.above is not None else f"[{info.at_least or 0:g}"
        return f"must be in {start}, {'2**63' if info.below == 2**63 else f'{info.below:g}'})"
    if info.above is not None:
        return f"must be above {info.above:g}"
    if info.at_least is not None:
        return "must not be negative" if info.at_least == 0 else f"must be at least {info.at_least:g}"
    return "must be a finite number"


def _check_names(name: str, value: str, info: SettingInfo) -> None:
    given = value.split(",")
    if not {*given} <= {*info.names} or len({*given}) < len(given):
        raise UsageError(
            f"{name} must be one of {', '.join(info.names)}, or several with commas and no spaces, got {value!r}"
        )


def _check_list(name: str, values: list[float], info: SettingInfo) -> None:
    if info.num_values is not None:
        is_rising = all(low < high for low, high in itertools.pairwise(values))
        if len(values) != info.num_values or not is_rising or not all(map(math.isfinite, values)):
            raise UsageError(f"{name} must be {info.num_values} rising numbers, got {values}")
        return
    # Folders are named by numbers in this format.
    has_equal = len({f"{value:g}" for value in values}) < len(values)
    smallest = -math.inf if info.at_least is None else info.at_least
    if not values or has_equal or not all(smallest <= value < math.inf for value in values):
        raise UsageError(f"{name} must be different numbers of at least {smallest:g}, got {values}")


def check_effects(config: Any) -> None:
    """Check that each setting that was changed from its default takes effect beside the others.

    Raises:
        UsageError: When one does not; the message names it, and what it takes effect with.
    """
    for name, default, info in settings_of(config):
        value = getattr(config, name)
        if value == default or (info.off is not None and value == info.off):
            continue
        for other, allowed in info.only_with.items():
            if not _is_allowed(getattr(config, other), allowed):
                shown = "..." if info.is_secret else value
                raise UsageError(f"{name} = {shown} has no effect: {_remedy(other, allowed)}")


def choices_of(hint: Any) -> list[Any]:
    """Return the values that a type annotation names by `Literal`, without None; empty if it names none."""
    parts = (hint, *get_args(hint))
    return [choice for part in parts if get_origin(part) is Literal for choice in get_args(part) if choice is not None]


def typed_values(config_type: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values from YAML or from a command line to the types of their settings.

    Raises:
        UsageError: When a value cannot be converted.
    """
    hints = get_type_hints(config_type)
    return {name: typed_value(name, value, hints[name]) for name, value in given.items()}


def typed_value(name: str, value: Any, hint: Any) -> Any:
    """Convert one value; see `typed_values`. None stays None, which `check_values` refuses where it must."""
    kinds = {hint, *get_args(hint)}
    if value is None:
        return None
    if choices := choices_of(hint):
        # YAML takes a bare `no` for false.
        text = "no" if value is False and "no" in choices else str(value)
        return next((choice for choice in choices if str(choice) == text), value)
    if list[float] in kinds:
        values = value if isinstance(value, list | tuple) else [value]
        return [_number(name, each, "a number or a list of numbers") for each in values]
    if bool in kinds:
        return _truth(name, value)
    if int in kinds:
        return _whole_number(name, value)
    if float in kinds:
        return _number(name, value, "a number")
    if isinstance(value, list | tuple | dict):
        raise UsageError(f"{name} must be a text, got {value!r}")
    return str(value)


def _truth(name: str, value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if str(value).lower() not in words:
        raise UsageError(f"{name} must be true or false, got {value!r}")
    return words[str(value).lower()]


def _whole_number(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool | float):
            raise ValueError
        return int(value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be a whole number, got {value!r}") from None


def _number(name: str, value: Any, what: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{name} must be {what}, got {value!r}") from None


def _is_allowed(value: Any, allowed: Any) -> bool:
    if allowed is GIVEN:
        return value is not None
    values = value.split(",") if isinstance(value, str) else [value]
    return any(each in allowed if isinstance(allowed, tuple) else each == allowed for each in values)


def _remedy(other: str, allowed: Any) -> str:
    if allowed is GIVEN or allowed is True:
        return f"give {other}"
    if allowed is None:
        return f"{other} is given"
    if allowed is False:
        return f"leave {other} out"
    values = allowed if isinstance(allowed, tuple) else (allowed,)
    return f"give {other} {', '.join(values[:-1])}{' or ' if values[1:] else ''}{values[-1]}"
