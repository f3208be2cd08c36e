"""`hf-ddpm`: what is done with a model besides training it. Heavy imports wait until a command runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

# What several commands ask for.
Model = Annotated[str, typer.Argument(help="A folder that holds a pipeline, or a Hub id.")]
Seed = Annotated[int, typer.Option(min=0, help="Image i has the seed SEED + i.")]
BatchSize = Annotated[int, typer.Option("--batch_size", min=1, help="Images per forward pass; on a CPU always 16.")]
Device = Annotated[str | None, typer.Option(help="Default: cuda or mps if there is one, else cpu.")]
Dtype = Annotated[str, typer.Option(help="The network's when it samples: fp32, or bf16, which is faster.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the network first; for many images.")]
Uniform = Annotated[bool, typer.Option("--uniform", help="Do without the timesteps of `hf-ddpm schedule`.")]
DatasetConfigName = Annotated[
    str | None, typer.Option("--dataset_config_name", help="The configuration of a data set that has several.")
]
ImageColumn = Annotated[
    str | None, typer.Option("--image_column", help="The column of images; needed only where there are several.")
]
CenterCrop = Annotated[bool, typer.Option("--center_crop", help="As in training.")]
CacheDir = Annotated[
    str | None, typer.Option("--cache_dir", help="Where downloads, decoded images and references are kept.")
]
NetworkPath = Annotated[
    str | None, typer.Option("--network_path", help="Its file; of dinov2 and clip a folder or Hub id.")
]


@app.callback()
def main() -> None:
    """Pixel-space diffusion models on the Hugging Face stack. To train one: accelerate launch train_accelerate.py"""


@app.command()
def sample(
    model: Model,
    out: Annotated[
        Path, typer.Option(help="The folder for the images and grid.png; an interrupted run goes on in it.")
    ],
    num_images: Annotated[int, typer.Option("--num_images", min=1, help="How many.")] = 16,
    seed: Seed = 0,
    num_inference_steps: Annotated[
        int | None, typer.Option("--num_inference_steps", min=1, help="Default: 20; all T of ddpm.")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="ddpm, ddim, dpmsolver++ or unipc. Default: unipc, dpmsolver++ if searched timesteps for "
            "so many steps are nearer, ddpm where only that can sample the model."
        ),
    ] = None,
    class_label: Annotated[
        int | None, typer.Option("--class_label", min=0, help="For a model of classes; default: each in turn.")
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="ddpm: iterate the mean, add no noise.")
    ] = False,
    batch_size: BatchSize = 64,
    device: Device = None,
    dtype: Dtype = "fp32",
    compile: Compile = False,
    uniform: Uniform = False,
    format: Annotated[
        str, typer.Option(help="png, named by their seeds; parquet, which `datasets` loads; or npz.")
    ] = "png",
) -> None:
    """Writes images of a model. In several processes: accelerate launch -m hf_ddpm sample"""
    import os

    from hf_ddpm.sampling.image_set import write_samples
    from hf_ddpm.sampling.schedulers import SCHEDULERS

    if scheduler is not None and scheduler not in SCHEDULERS:
        raise typer.BadParameter(
            f"must be one of {', '.join(SCHEDULERS)}, got {scheduler!r}", param_hint="--scheduler"
        )
    with _errors_said():
        write_samples(
            model,
            out,
            num_images=num_images,
            seed=seed,
            num_inference_steps=num_inference_steps,
            scheduler=scheduler,
            class_label=class_label,
            deterministic=deterministic,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            compile=compile,
            uniform=uniform,
            format=format,
        )
    if os.environ.get("RANK", "0") == "0":
        typer.echo(
            f"{num_images} images in {out}, {'all' if num_images <= 64 else 'the first 64'} of them in grid.png"
        )


@app.command()
def ema(
    run: Annotated[Path, typer.Argument(help="The folder of a run that saved snapshots of its averages.")],
    std: Annotated[
        float, typer.Option(help="The average's length: the std of its profile, relative to the images seen.")
    ],
    images: Annotated[
        int | None, typer.Option(min=1, help="The images seen at one of the snapshots. Default: at the last.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder. Default: RUN/ema/std-STD.")] = None,
) -> None:
    """Writes the model with an average of its weights of another length, reconstructed from snapshots."""
    import json

    from hf_ddpm.training.posthoc import write_average

    with _errors_said():
        folder = write_average(run, std, out, images)
        about = json.loads((folder / "average.json").read_text(encoding="utf-8"))
    typer.echo(
        f"{folder}: the average of std {about['std']:g} at {about['images']:,} images, "
        f"profile error {about['profile_error']:.1e}"
    )


@app.command()
def reference(
    dataset: Annotated[
        str,
        typer.Argument(help="`digits`, a Hub id, a folder of images or of parquet files, or one saved by `datasets`."),
    ],
    out: Annotated[Path, typer.Option(help="A new folder for the statistics.")],
    split: Annotated[str, typer.Option(help="train, test, ...")] = "train",
    network: Annotated[
        str, typer.Option(help="inception (whose distance is the FID), dinov2, clip or efficientnet-lite0.")
    ] = "inception",
    network_path: NetworkPath = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Of the images; default: the data's, if it is square and uniform.")
    ] = None,
    channels: Annotated[int | None, typer.Option(help="1 gray or 3 RGB; default: the data's.")] = None,
    center_crop: CenterCrop = False,
    dataset_config_name: DatasetConfigName = None,
    image_column: ImageColumn = None,
    num_features: Annotated[
        int, typer.Option("--num_features", min=4, help="Images whose features are kept, for KID and precision.")
    ] = 10_000,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Images per step.")] = 64,
    cache_dir: CacheDir = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Measures a data set once, so that samples can be compared with it."""
    from hf_ddpm.data.config import DataConfig
    from hf_ddpm.evaluation.features import load_network
    from hf_ddpm.evaluation.statistics import make_reference

    config = DataConfig(
        dataset_name=dataset,
        dataset_config_name=dataset_config_name,
        image_column=image_column,
        resolution=resolution,
        channels=channels,  # pyright: ignore[reportArgumentType]; make_reference checks it
        center_crop=center_crop,
        cache_dir=cache_dir,
    )
    with _errors_said():
        loaded = load_network(network, network_path, device)
        made = make_reference(config, split, loaded, out, num_features=num_features, batch_size=batch_size)
    data = made.metadata["data"]
    typer.echo(
        f"{out}: {made.count:,} images of {data['name']}, split {split}, {data['resolution']} x {data['resolution']}, "
        f"{data['channels']} channels; {loaded.frechet_name}, {loaded.dimensions:,} dimensions"
    )
    for warning in made.metadata["warnings"]:
        typer.echo(f"warning: {warning}", err=True)


@app.command()
def evaluate(
    model: Model,
    metrics: Annotated[
        str,
        typer.Option(
            help="Comma-separated: fd (of Inception: the FID), kid, precision (with recall, density, coverage), cmmd, "
            "nll (bits per dimension), memorization."
        ),
    ] = "fd,kid,precision",
    reference: Annotated[
        str | None,
        typer.Option(help="A folder of `hf-ddpm reference`. Default: made of the data, and kept in its cache."),
    ] = None,
    floor: Annotated[
        str | None,
        typer.Option(help="A second one, of other images, for what real images get. Default: halves of the first."),
    ] = None,
    dataset_name: Annotated[
        str | None, typer.Option("--dataset_name", help="The data. Default: what the run in the folder learned from.")
    ] = None,
    dataset_config_name: DatasetConfigName = None,
    image_column: ImageColumn = None,
    label_column: Annotated[
        str | None, typer.Option("--label_column", help="The column of classes, for a model of classes.")
    ] = None,
    center_crop: CenterCrop = False,
    cache_dir: CacheDir = None,
    split: Annotated[str, typer.Option(help="That of the reference, and of training.")] = "train",
    test_split: Annotated[
        str, typer.Option("--test_split", help="Images that were not trained on: of nll, memorization, and the floor.")
    ] = "test",
    num_images: Annotated[int, typer.Option("--num_images", min=1, help="How many to sample.")] = 5000,
    seed: Seed = 0,
    num_inference_steps: Annotated[
        str | None,
        typer.Option("--num_inference_steps", help="Comma-separated. Default: 20; all T of ddpm."),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="Comma-separated: ddpm, ddim, dpmsolver++, unipc. Default: as of `hf-ddpm sample`."),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(help="inception, dinov2, clip or efficientnet-lite0. Default: the reference's, or inception."),
    ] = None,
    network_path: NetworkPath = None,
    timesteps_per_image: Annotated[
        int, typer.Option("--timesteps_per_image", min=2, help="Terms of the bound of nll, for each image.")
    ] = 20,
    batch_size: BatchSize = 64,
    device: Device = None,
    dtype: Dtype = "fp32",
    compile: Compile = False,
    uniform: Uniform = False,
    out: Annotated[
        str | None, typer.Option(help="Where to write. Default: the model's folder; needed for a Hub id.")
    ] = None,
) -> None:
    """Measures a model and says so on its card. In several processes: accelerate launch -m hf_ddpm
    evaluate"""
    import os

    from hf_ddpm.data.config import DataConfig
    from hf_ddpm.evaluation.evaluate import evaluate as measure
    from hf_ddpm.hub.card import result_cells

    of_data = (dataset_name, dataset_config_name, image_column, label_column, cache_dir)
    with _errors_said():
        if dataset_name is None and (center_crop or any(value is not None for value in of_data)):
            raise ValueError("the settings of data go with --dataset_name, got none")
        data = None
        if dataset_name is not None:
            data = DataConfig(
                dataset_name=dataset_name,
                dataset_config_name=dataset_config_name,
                image_column=image_column,
                label_column=label_column,
                center_crop=center_crop,
                cache_dir=cache_dir,
            )
        done = measure(
            model,
            metrics=_listed(metrics),
            reference=reference,
            floor=floor,
            data=data,
            split=split,
            test_split=test_split,
            num_images=num_images,
            seed=seed,
            num_inference_steps=_numbers("num_inference_steps", num_inference_steps),
            schedulers=_listed(scheduler),
            network=network,
            network_path=network_path,
            timesteps_per_image=timesteps_per_image,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            compile=compile,
            uniform=uniform,
            out=out,
        )
    if os.environ.get("RANK", "0") != "0":
        return
    rows = [result_cells(row) for row in done["results"]]
    table = [list(rows[0]), *([*row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        typer.echo("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
    for remark in [f"{row['name']}: {row['remark']}" for row in done["results"] if row.get("remark")]:
        typer.echo(remark)
    typer.echo(f"all of it in {Path(done['out']) / 'evaluation.json'}")


@app.command()
def schedule(
    model: Model,
    steps: Annotated[str, typer.Option(help="Comma-separated numbers of steps.")] = "5,8,10",
    scheduler: Annotated[str, typer.Option(help="The solver: dpmsolver++ or ddim.")] = "dpmsolver++",
    num_images: Annotated[
        int, typer.Option("--num_images", min=1, help="Noises that are searched on, and as many that measure.")
    ] = 32,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Images per forward pass.")] = 32,
    device: Device = None,
    dtype: Dtype = "fp32",
    compile: Compile = False,
) -> None:
    """Finds the few timesteps whose images come nearest to those of many, and keeps them with the model."""
    from hf_ddpm.evaluation.search import search_and_keep

    with _errors_said():
        numbers = _numbers("steps", steps)
        if not numbers:
            raise ValueError(f"steps must be whole numbers, got {steps!r}")
        for found, path in search_and_keep(
            model,
            numbers,
            scheduler=scheduler,
            num_images=num_images,
            seed=seed,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            compile=compile,
        ):
            is_nearer = found.distance < found.uniform_distance
            is_why = "the model is on the Hub, download it to keep them" if is_nearer else "uniform ones are as good"
            typer.echo(
                f"{scheduler}, {len(found.timesteps)} steps: distance {found.distance:.4f} to {found.reference_steps} "
                f"steps, uniform {found.uniform_distance:.4f}, unipc {found.unipc_distance:.4f}"
                + (f", kept in {path}" if path else f", not kept: {is_why}")
            )
            typer.echo(f"timesteps={[*found.timesteps]}")


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or of any DDPMPipeline.")],
    repo_id: Annotated[str, typer.Argument(help="NAME in your namespace, or NAMESPACE/NAME; made if need be.")],
    public: Annotated[
        bool, typer.Option("--public", help="A new repository is public; without this it is private.")
    ] = False,
    revision: Annotated[str, typer.Option(help="The branch, made if need be.")] = "main",
    averages: Annotated[
        bool, typer.Option("--averages", help="Also each average in RUN/ema, as a branch with its name.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit. Default: the run's step and images.")] = None,
) -> None:
    """Uploads a model, its card, figures and numbers to the Hub: one commit, or none if nothing has changed."""
    from hf_ddpm.hub import upload

    with _errors_said():
        done = upload.push(run, repo_id, public=public, revision=revision, message=message, averages=averages)
    typer.echo(f"{done.url}: {done.commit[:12]}" + ("" if done.is_new else ", nothing has changed"))
    if done.kept_readme:
        typer.echo(upload.KEPT_README, err=True)


@app.command()
def demo(
    model: Model,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of http://127.0.0.1.")] = 7860,
) -> None:
    """Opens a page that samples the model and shows both of its processes, on this machine."""
    from hf_ddpm.hub.space import run_demo

    with _errors_said():
        run_demo(model, port)


@app.command()
def space(
    model: Annotated[str, typer.Argument(help="The folder of a run whose model is on the Hub, or a Hub id.")],
    space_id: Annotated[str, typer.Argument(help="The Space: name, or namespace/name.")],
    model_id: Annotated[
        str | None,
        typer.Option("--model_id", help="The model on the Hub. Default: the run's hub_model_id, or its card's."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Create the Space public; default: private.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the Space into this folder, and push nothing.")] = None,
) -> None:
    """Makes a Space of the page that `hf-ddpm demo` opens."""
    import tempfile

    from hf_ddpm.hub.space import model_id_of, push_space, write_space

    with _errors_said():
        model_id = model_id_of(model, model_id)
        if out is not None:
            write_space(model, model_id, out)
            typer.echo(f"{out}: a Space that shows {model_id}; hf upload --repo-type space {space_id} {out}")
            return
        with tempfile.TemporaryDirectory() as folder:
            write_space(model, model_id, Path(folder))
            typer.echo(push_space(Path(folder), space_id, model_id, public))


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _numbers(name: str, text: str | None) -> list[int]:
    parts = _listed(text)
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{name} must be whole numbers, got {text!r}")
    return [int(part) for part in parts]


@contextmanager
def _errors_said() -> Iterator[None]:
    """Within it, what a setting or the disk is to blame for ends the command with its message."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for its name
            raise
        typer.echo(f"error: {str(error).splitlines()[0]} Give a smaller --batch_size, or --device cpu.", err=True)
        raise typer.Exit(1) from error
