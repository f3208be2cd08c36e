"""`hf-ddpm`: its commands, in the order of its help.

Each command imports what it needs when it runs, so that help and errors come at once.
"""

from __future__ import annotations

import typer

from hf_ddpm.commands.evaluate import anomaly, evaluate, reference, schedule
from hf_ddpm.commands.hub import demo, info, push, space
from hf_ddpm.commands.sample import edit, sample
from hf_ddpm.commands.train import average, train, tune
from hf_ddpm.runtime.command_line import Command, CommandLine, with_underscores
from hf_ddpm.runtime.launch import let_threads_sleep

app = typer.Typer(
    cls=CommandLine,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": with_underscores},
)


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    """Train, measure and share pixel-space diffusion models on the Hugging Face stack."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    let_threads_sleep()  # before torch is loaded


for command in (train, tune, sample, edit, evaluate, anomaly, reference, schedule, average, push, demo, space, info):
    app.command(cls=Command)(command)
