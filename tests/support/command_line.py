"""What a command line of `hf-ddpm train` means, without training."""

from collections.abc import Sequence

from typer.main import get_command

from hf_ddpm.cli import app
from hf_ddpm.runtime.command_line import raise_usage_errors, with_underscores
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import config_from_flags


def parse_config(arguments: Sequence[str]) -> TrainingConfig:
    """Return the checked config that these flags of `hf-ddpm train` ask for."""
    command = get_command(app).commands["train"]  # pyright: ignore[reportAttributeAccessIssue]
    with raise_usage_errors():
        values = command.make_context("train", [*arguments], token_normalize_func=with_underscores).params
    path, recipe = values.pop("config"), values.pop("recipe")
    flags = {name: value for name, value in values.items() if value not in (None, [], ())}
    return config_from_flags(flags, path, recipe)
