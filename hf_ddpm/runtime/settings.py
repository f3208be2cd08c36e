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

import difflib
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import look_at

Resume = Literal["fixed", "free", "start"]
# For `only_with`: any value but None.
GIVEN = object()
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
# The type in an annotation, in words, and the types of values that it takes.
_TYPES = (
    (list[float], "a list of numbers", (int, float)),
    (list[int], "a whole number, or a list of them", (int,)),
    (bool, "true or false", (bool,)),
    (int, "a whole number", (int,)),
    (float, "a number", (int, float)),
)


@dataclass(frozen=True)
class SettingInfo:
    """The description of a setting.

    Args:
        help: Its meaning, in a sentence or two.
        group: Its heading in `--help`.
        resume: Whether a resumed run may change it, see the top of this file.
        at_least: The smallest value; of a list, that of each number.
        num_values: Of a list, how many numbers it has, which then rise; of whole numbers, how many it has if it is
            not one number.
        above: A value that it must exceed.
        below: A value that it must stay under. No number may be infinite.
        names: Of a text, the names that it may hold; several are separated by commas.
        only_with: Other settings, each with the value or the tuple of values that this one takes effect with. A value
            of this one that is neither its default nor `off` is an error beside any other.
        off: A value that switches it off, and so is no error where it has no effect.
        is_secret: Whether its value is never shown.
        is_path: Whether it names a file or folder, or may do so.
        also_called: Other words for its values, as people call them elsewhere -> the value.
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
    is_path: bool = False
    also_called: Mapping[str, str] = field(default_factory=dict)


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


def with_plain_paths(config: Any, config_type: type) -> Any:
    """Return a config whose paths are texts with `~` expanded, as a shell would have given them.

    Raises:
        UsageError: When it is no config, or a path cannot be looked at.
    """
    if not isinstance(config, config_type):
        name, got = config_type.__name__, type(config).__name__
        raise UsageError(f"config must be a {name}, got a {got}: hf_ddpm.load_config(**settings) makes a config")
    paths = {}
    for name, _, info in settings_of(config):
        value = getattr(config, name)
        if info.is_path and isinstance(value, str | Path):
            paths[name] = str(look_at(name, value)) if str(value).startswith("~") else str(value)
    return replace(config, **paths)


def check_paths(config: Any) -> None:
    """Look at each path of a config.

    Raises:
        UsageError: When one cannot be a path, or what it names may not be read; the message names the setting.
    """
    for name, _, info in settings_of(config):
        value = getattr(config, name)
        if info.is_path and value is not None:
            look_at(name, value)


def check_values(config: Any) -> None:
    """Check each setting by itself: that it has a value, its type, its type's choices, its range.

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
        elif choices and not (int in get_args(hint) and type(value) is int):
            _check_choice(name, value, hint, info)
        else:
            _check_type(name, value, hint)
            if info.names and isinstance(value, str):
                _check_names(name, value, info)
            elif isinstance(value, list) and list[int] in get_args(hint):
                _check_whole_numbers(name, value, info)
            elif isinstance(value, list):
                _check_list(name, value, info)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                _check_range(name, value, info)


def _check_choice(name: str, value: Any, hint: Any, info: SettingInfo) -> None:
    choices = choices_of(hint)
    if int in get_args(hint) and value not in choices:
        raise UsageError(f"{name} must be a whole number or {' or '.join(choices)}, got {shortened(value)}")
    require_choice(name, value, choices, info.also_called)


def require_choice(
    name: str, value: Any, choices: Sequence[Any], also_called: Mapping[str, str] | None = None
) -> None:
    """Check that a value is one of those that are allowed.

    Raises:
        UsageError: When it is none; the message names the nearest one.
    """
    if value not in choices:
        texts = [str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in choices]
        hint = did_you_mean(str(value), texts, also_called)
        raise UsageError(f"{name} must be one of {', '.join(texts)}, got {shortened(value)}{hint}")


def did_you_mean(given: str, names: Sequence[str], also_called: Mapping[str, str] | None = None) -> str:
    """Return the name that is probably meant as the end of a message, or "" if none is near.

    A name that contains the given word is meant before one that is spelled alike.
    """
    alike = difflib.get_close_matches(given, names, n=1)
    word = given.strip("-")
    meant = [(also_called or {}).get(given), *(name for name in names if len(word) > 2 and word in name), *alike]
    first = next(filter(None, meant), None)
    return f"; did you mean {first}?" if first else ""


def shortened(value: Any) -> str:
    """Return a value for a message, its beginning if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _check_type(name: str, value: Any, hint: Any) -> None:
    kinds = {hint, *get_args(hint)}
    types = ((what, allowed) for kind, what, allowed in _TYPES if kind in kinds)
    what, allowed = next(types, ("a text", (str,)))
    values = value if isinstance(value, list) else [value]
    has_type = all(isinstance(each, allowed) and (bool in allowed or type(each) is not bool) for each in values)
    lists = kinds & {list[float], list[int]}
    has_form = bool(lists) if isinstance(value, list) else not lists or int in kinds
    if not has_type or not has_form:
        raise UsageError(f"{name} must be {what}, got {shortened(value)}")


def _check_range(name: str, value: float, info: SettingInfo) -> None:
    is_in_range = (
        (info.at_least is None or value >= info.at_least)
        and (info.above is None or value > info.above)
        and (info.below is None or value < info.below)
        and (isinstance(value, int) or math.isfinite(value))
    )
    if not is_in_range:
        raise UsageError(f"{name} {_range_text(info)}, got {shortened(value)}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UsageError(f"{name} must fit in 64 bits, got {shortened(value)}")


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
    smallest = -sys.float_info.max if info.at_least is None else info.at_least
    if info.num_values is not None:
        is_rising = all(low < high for low, high in itertools.pairwise(values))
        is_in_range = all(smallest <= value < math.inf for value in values)
        if len(values) != info.num_values or not is_rising or not is_in_range:
            limit = "" if info.at_least is None else f" of at least {info.at_least:g}"
            raise UsageError(f"{name} must be {info.num_values} rising numbers{limit}, got {shortened(values)}")
        return
    is_in_range = all(smallest <= value <= sys.float_info.max for value in values)
    # Folders are named by numbers in this format.
    if not values or not is_in_range or len({f"{value:g}" for value in values}) < len(values):
        raise UsageError(f"{name} must be different numbers of at least {smallest:g}, got {shortened(values)}")


def _check_whole_numbers(name: str, values: list[int], info: SettingInfo) -> None:
    if info.num_values is None:
        if not values or len({*values}) < len(values):
            raise UsageError(f"{name} must be different whole numbers, got {shortened(values)}")
    elif len(values) != info.num_values:
        raise UsageError(f"{name} must be one whole number or {info.num_values}, got {shortened(values)}")
    for value in values:
        _check_range(name, value, info)


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


def typed_values(config_type: type, given: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """Convert values from YAML or from a command line to the types of their settings.

    Args:
        config_type: The dataclass of the settings.
        given: The values by the names of their settings.
        source: The file that they are from, which a message then names.

    Raises:
        UsageError: When a value cannot be converted.
    """
    hints = get_type_hints(config_type)
    start = f"{source}: " if source else ""
    return {name: typed_value(f"{start}{name}", value, hints[name]) for name, value in given.items()}


def typed_value(name: str, value: Any, hint: Any) -> Any:
    """Convert one value; see `typed_values`. None stays None, which `check_values` refuses where it must."""
    kinds = {hint, *get_args(hint)}
    if value is None:
        return None
    if choices := choices_of(hint):
        if int in kinds and str(value) not in choices:
            return _whole_number(name, value, f"a whole number or {' or '.join(choices)}")
        if True in choices and str(value).lower() in _TRUTH:
            return _TRUTH[str(value).lower()]
        # YAML takes a bare `no` for false.
        text = "no" if value is False and "no" in choices else str(value)
        return next((choice for choice in choices if str(choice) == text), value)
    if list[float] in kinds:
        values = value if isinstance(value, list | tuple) else [value]
        return [_number(name, each, "a number or a list of numbers") for each in values]
    if list[int] in kinds and (int not in kinds or isinstance(value, list | tuple)):
        numbers = [_whole_number(name, each) for each in (value if isinstance(value, list | tuple) else [value])]
        return numbers[0] if int in kinds and len(numbers) == 1 else numbers
    if bool in kinds:
        return _truth(name, value)
    if int in kinds:
        return _whole_number(name, value)
    if float in kinds:
        return _number(name, value, "a number")
    if isinstance(value, list | tuple | dict):
        raise UsageError(f"{name} must be a text, got {shortened(value)}")
    return str(value)


def _truth(name: str, value: Any) -> bool:
    if str(value).lower() not in _TRUTH:
        raise UsageError(f"{name} must be true or false, got {shortened(value)}")
    return _TRUTH[str(value).lower()]


def _whole_number(name: str, value: Any, what: str = "a whole number") -> int:
    try:
        if isinstance(value, bool | float):
            raise ValueError
        return int(value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be {what}, got {shortened(value)}") from None


def _number(name: str, value: Any, what: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{name} must be {what}, got {shortened(value)}") from None


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
