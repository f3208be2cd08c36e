"""The tables of the page `settings.md`, made from the fields of TrainingConfig."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from hf_ddpm.data import config as data_config
from hf_ddpm.runtime.settings import GIVEN, SettingInfo, choices_of, settings_of
from hf_ddpm.training import config as training_config
from hf_ddpm.training.config import TrainingConfig

# What the tables replace in the page.
PLACE = "<!-- the tables of settings -->"
# The files of the fields.
SOURCES = [str(module.__file__) for module in (data_config, training_config)]
_RESUME = {"fixed": "no", "free": "yes", "start": "each start"}


def tables() -> str:
    """Return a Markdown table for each group of settings, in the order in which the groups begin in `--help`."""
    hints = get_type_hints(TrainingConfig)
    rows: dict[str, list[str]] = {}
    for name, default, info in settings_of(TrainingConfig):
        meaning = " ".join([info.help.replace("|", r"\|"), *_choices(hints[name], info), *_conditions(info)])
        cells = (f"`{name}`", _value(default), meaning, _RESUME[info.resume])
        rows.setdefault(info.group, []).append(f"| {' | '.join(cells)} |")
    head = "| setting | default | meaning | may change |\n|---|---|---|---|"
    return "\n\n".join(f"## {group.capitalize()}\n\n{head}\n" + "\n".join(rows[group]) for group in rows)


def _choices(hint: Any, info: SettingInfo) -> Iterator[str]:
    choices = choices_of(hint) or info.names
    if choices:
        one_of = "A number or" if int in get_args(hint) else "One of"
        yield f"{one_of} {', '.join(_value(choice) for choice in choices)}."


def _conditions(info: SettingInfo) -> Iterator[str]:
    """Yield what the setting takes effect with, in a sentence for each other setting."""
    for other, allowed in info.only_with.items():
        if allowed is None:
            yield f"Only without `{other}`."
        elif allowed is GIVEN:
            yield f"Only with `{other}`."
        else:
            values = allowed if isinstance(allowed, tuple) else (allowed,)
            yield f"Only with `{other}` {' or '.join(map(_value, values))}."


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"
