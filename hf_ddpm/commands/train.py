"""The commands that train a model, and average its weights."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ddpm import recipes
from hf_ddpm.commands.options import Json
from hf_ddpm.runtime.command_line import (
    completer,
    finish,
    option,
    report_errors,
    say,
    say_loading,
    split_numbers,
    with_options_of,
)
from hf_ddpm.runtime.launch import start_processes
from hf_ddpm.runtime.loading import without_garbage_collection
from hf_ddpm.training.config import NOT_OF_TUNING, TUNING_SETTINGS, TrainingConfig


@with_options_of(TrainingConfig, without=TUNING_SETTINGS)
def train(
    config: Annotated[str | None, typer.Option(metavar="FILE", help="A YAML file of the settings below.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar=f"[{'|'.join(recipes.names())}]",
            autocompletion=completer(recipes.names()),
            help="Settings that ship with the package. A flag counts before --config, and that before --recipe.",
        ),
    ] = None,
    **flags: Any,
) -> None:
    """Train a model.

    There is a process for each GPU, or those that a file of `accelerate config` asks for.
    """
    from hf_ddpm.training.parsing import config_from_flags

    _train(config_from_flags(flags, config, recipe))


@with_options_of(TrainingConfig, without=("tuned_steps", *NOT_OF_TUNING))
def tune(
    model: Annotated[str, typer.Argument(help="The model to tune: a folder or a Hub id.")],
    steps: Annotated[
        str | None, option("steps", "The numbers of sampling steps, separated by commas. Default: 1,2,4.")
    ] = None,
    config: Annotated[str | None, typer.Option(metavar="FILE", help="A YAML file of the settings below.")] = None,
    **flags: Any,
) -> None:
    """Tune a model that was trained so that it samples in one, two or four steps.

    The data, the batch and the classes are those of the model's run unless flags say otherwise. The tuned model is
    written to MODEL-tuned, or to --output_dir.
    """
    from hf_ddpm.training.tuning_settings import config_of_tuning

    _train(config_of_tuning(model, None if steps is None else split_numbers("steps", steps), flags, config))


def _train(settings: TrainingConfig) -> None:
    """Train in all processes, and say what was made."""
    from hf_ddpm.data.sources import check_source

    check_source(settings, settings.output_dir)
    say_loading()
    code = start_processes(settings.hub_token)
    if code is not None:
        raise typer.Exit(code)
    # torch is loaded here, so that a wrong setting is answered before.
    with without_garbage_collection():
        from hf_ddpm.training.loop import train

    train(settings)
    if not settings.dry_run:
        folder = shlex.quote(settings.output_dir)
        pictures = "figures/" if settings.save_figures else "figures/samples.png"
        is_conditional = settings.makes_from_images
        image, metrics = (" --image FILE_OR_FOLDER", " --metrics psnr,ssim") if is_conditional else ("", "")
        say(
            f"The model is in {folder}, with its card, README.md, and its pictures, {pictures}\n"
            f"Sample it with: hf-ddpm sample {folder}{image} --out samples\n"
            f"Measure it with: hf-ddpm evaluate {folder}{metrics}\n"
            f"Share it with: hf-ddpm push {folder} NAME"
        )


def average(
    run: Annotated[Path, typer.Argument(help="The folder of a run that saved snapshots of its averages.")],
    std: Annotated[float, option("std", "Its length: the std of its profile, relative to all images.")],
    images: Annotated[int | None, typer.Option(min=1, help="The images at a snapshot. Default: at the last.")] = None,
    out: Annotated[Path | None, option("out", "A new folder. Default: RUN/ema/std-STD.")] = None,
    json: Json = False,
) -> None:
    """Write a model with another average of its weights.

    An average of any length is reconstructed from the snapshots of a run.
    """
    with report_errors():
        from hf_ddpm.runtime.files import read_mapping

        with without_garbage_collection():
            from hf_ddpm.training.posthoc import write_average

        folder = write_average(run, std, out, images)
        about = read_mapping(folder / "average.json")
    finish(
        json,
        {"out": str(folder), **about},
        f"{folder} holds the average of std {about['std']:g} at {about['images']:,} images, with a profile error of "
        f"{about['profile_error']:.1e}. Measure it with: hf-ddpm evaluate {folder}",
    )
