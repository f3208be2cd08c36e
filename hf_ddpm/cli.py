"""The commands of `hf-ddpm`. Each imports what it needs when it runs, so that help and errors come at once."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_ddpm import recipes
from hf_ddpm.data.config import DataConfig, check_data_paths
from hf_ddpm.evaluation.names import (
    DEFAULT_NUM_RECONSTRUCTIONS,
    DEFAULT_STRENGTHS,
    METRICS,
    NETWORK_NAMES,
    check_strengths,
)
from hf_ddpm.names import DTYPES, FORMATS, GUIDANCE_METHODS, SCHEDULERS
from hf_ddpm.runtime.command_line import (
    Command,
    CommandLine,
    choice,
    completer,
    finish,
    option,
    report_errors,
    say,
    say_loading,
    split_commas,
    split_decimals,
    split_numbers,
    switch,
    table,
    with_options_of,
    with_underscores,
)
from hf_ddpm.runtime.errors import RunError, UnwrittenError, UsageError
from hf_ddpm.runtime.launch import (
    exit_with_launcher,
    is_launched,
    let_threads_sleep,
    start_missing_processes,
    start_processes,
)
from hf_ddpm.runtime.settings import check_values, typed_values, with_plain_paths
from hf_ddpm.training.config import TrainingConfig

app = typer.Typer(
    cls=CommandLine,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": with_underscores},
)

# Arguments and options of several commands.
Model = Annotated[str, typer.Argument(help="A folder that holds a pipeline, or a Hub id.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Image i has the seed SEED + i.")]
BatchSize = Annotated[int, option("batch_size", "Images per forward pass; on a CPU always 16.", min=1)]
Device = Annotated[str | None, typer.Option(help="Default: cuda or mps if there is one, else cpu.")]
Dtype = Annotated[str, choice("dtype", "The network's arithmetic: fp32, or bf16, which is faster.", DTYPES)]
Compile = Annotated[bool, switch("compile", "Compile the network; for many images.")]
Uniform = Annotated[bool, switch("uniform", "Ignore the timesteps of `hf-ddpm schedule`.")]
Network = Annotated[
    str | None, choice("network", "inception (for the FID), dinov2, clip or efficientnet-lite0.", NETWORK_NAMES)
]
NetworkPath = Annotated[
    str | None, option("network_path", "The network's file; of dinov2 and clip a folder or Hub id.")
]
GuidanceScale = Annotated[
    float | None, option("guidance_scale", "How far images are led away from a weaker model. Default: 1, not.")
]
GuidanceInterval = Annotated[
    tuple[float, float] | None,
    typer.Option(
        "--guidance_interval",
        metavar="LOW HIGH",
        help="Guidance acts where LOW < sigma <= HIGH, the ratio of noise to signal. Default: everywhere.",
    ),
]
GuidanceMethod = Annotated[
    str | None, choice("guidance_method", "cfg, cfg-zero*, apg or tcfg. Default: cfg.", GUIDANCE_METHODS)
]
GuidanceModel = Annotated[
    str | None,
    option(
        "guidance_model",
        "A weaker model that images are led away from, a folder or a Hub id. Default: the model without a class, or "
        "the one in its folder guide.",
    ),
]
Json = Annotated[bool, switch("json", "Print one JSON object instead of sentences.")]


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    """Train, measure and share pixel-space diffusion models on the Hugging Face stack."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    let_threads_sleep()  # before torch is loaded


@app.command(cls=Command)
@with_options_of(TrainingConfig)
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
    from hf_ddpm.data.sources import check_source
    from hf_ddpm.training.parsing import config_from_flags

    settings = config_from_flags(flags, config, recipe)
    check_source(settings, settings.output_dir)
    say_loading()
    code = start_processes(settings.hub_token)
    if code is not None:
        raise typer.Exit(code)
    # torch is loaded here, so that a wrong setting is answered before.
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


@app.command(cls=Command)
def sample(
    model: Model,
    out: Annotated[Path, option("out", "The folder for images and grid.png; an interrupted set is continued.")],
    image: Annotated[
        Path | None,
        option("image", "For a model that makes images from images: an image, or a folder of them, one sample each."),
    ] = None,
    num_images: Annotated[int | None, option("num_images", "How many images. Default: 16.", min=1)] = None,
    seed: Seed = 0,
    num_inference_steps: Annotated[
        int | None, option("num_inference_steps", "Default: the model's own choice; else 20, or all T of ddpm.", min=1)
    ] = None,
    scheduler: Annotated[
        str | None,
        choice(
            "scheduler",
            "ddpm, ddim, dpmsolver++ or unipc. Default: the model's own choice; else unipc, dpmsolver++ where its "
            "searched timesteps are better, or ddpm where only that can sample the model.",
            SCHEDULERS,
        ),
    ] = None,
    class_label: Annotated[
        str | None,
        option(
            "class_label",
            "The label: a class by its name or number, a number, or for several columns COLUMN=LABEL, COLUMN=LABEL. "
            "Default: each in turn.",
        ),
    ] = None,
    guidance_scale: GuidanceScale = None,
    guidance_interval: GuidanceInterval = None,
    guidance_method: GuidanceMethod = None,
    guidance_model: GuidanceModel = None,
    deterministic: Annotated[bool, switch("deterministic", "With ddpm: iterate the mean, add no noise.")] = False,
    batch_size: BatchSize = 64,
    device: Device = None,
    dtype: Dtype = "fp32",
    compile: Compile = False,
    uniform: Uniform = False,
    format: Annotated[
        str | None,
        choice(
            "format",
            "png, npy or tif, named by seed; parquet, for `datasets`; or npz. Default: png, but npy for arrays that "
            "it cannot hold.",
            FORMATS,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Sample images of a model.

    In several processes: accelerate launch -m hf_ddpm sample
    """
    with report_errors():
        settings: dict[str, Any] = {
            "seed": seed,
            "num_inference_steps": num_inference_steps,
            "scheduler": scheduler,
            "class_label": class_label,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "guidance_method": guidance_method,
            "guidance_model": guidance_model,
            "deterministic": deterministic,
            "batch_size": batch_size,
            "device": device,
            "dtype": dtype,
            "compile": compile,
            "uniform": uniform,
        }
        if image is not None:
            return _sample_from_images(model, image, out, num_images, format or "png", json, settings)
        _join_launcher()
        from hf_ddpm.sampling.image_set import write_samples

        num_images = 16 if num_images is None else num_images
        format = write_samples(model, out, num_images=num_images, format=format, **settings)
    result = {"out": str(out), "num_images": num_images, "grid": str(out / "grid.png"), "format": format}
    first = "all of them" if num_images <= 64 else "the first 64"
    finish(json, result, f"{num_images:,} images are in {out}; grid.png shows {first}.")


@app.command(cls=Command)
def edit(
    model: Model,
    image: Annotated[Path, option("image", "An image of the model's size, or a folder of them.")],
    out: Annotated[Path, option("out", "The folder for the edits and edits.png.")],
    mask: Annotated[
        Path | None,
        option("mask", "What is white here is repainted: one image for all, or a folder of one for each."),
    ] = None,
    strength: Annotated[
        float | None, option("strength", "In (0, 1], how much changes. Default: 0.5, or 1 with --mask.")
    ] = None,
    seed: Seed = 0,
    num_inference_steps: Annotated[
        int | None, option("num_inference_steps", "See `sample`; the last STRENGTH of them are taken.", min=1)
    ] = None,
    scheduler: Annotated[str | None, choice("scheduler", "See `sample`.", SCHEDULERS)] = None,
    class_label: Annotated[str | None, option("class_label", "The label, see `sample`.")] = None,
    guidance_scale: GuidanceScale = None,
    guidance_interval: GuidanceInterval = None,
    guidance_method: GuidanceMethod = None,
    guidance_model: GuidanceModel = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    dtype: Dtype = "fp32",
    json: Json = False,
) -> None:
    """Edit images with a model: vary them, or repaint a part of them.

    Without --mask an image is noised and denoised again (SDEdit). With it, all but its white part stays as it is. In
    several processes: accelerate launch -m hf_ddpm edit
    """
    with report_errors():
        _join_launcher()
        from hf_ddpm.sampling.edit_set import PICTURE, edit_images

        edits = edit_images(
            model,
            image,
            out,
            mask=mask,
            strength=strength,
            seed=seed,
            num_inference_steps=num_inference_steps,
            scheduler=scheduler,
            class_label=class_label,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_method=guidance_method,
            guidance_model=guidance_model,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
        )
    result = {"out": str(out), "edits": [str(path) for path in edits], "picture": str(out / PICTURE)}
    finish(
        json,
        result,
        f"The edited images ({len(edits):,}) are in {out}; {PICTURE} shows them beside the originals.",
        "Others come with another --seed, and need another --out.",
    )


@app.command(cls=Command)
@with_options_of(
    DataConfig,
    (
        *("dataset_name", "dataset_config_name", "image_column", "label_column", "condition_column", "center_crop"),
        *("value_range", "max_image_pixels", "cache_dir"),
    ),
)
def evaluate(
    model: Model,
    metrics: Annotated[
        str,
        choice(
            "metrics",
            "Comma-separated: fd (of Inception: the FID), kid, precision (with recall, density, coverage), cmmd, "
            "nll (bits per dimension), memorization, values (moments and spectra, without a network). Of a model that "
            "makes images from images: psnr, ssim, lpips, and these distances.",
            METRICS,
            is_list=True,
        ),
    ] = "fd,kid,precision",
    reference: Annotated[
        str | None, option("reference", "A folder of `hf-ddpm reference`. Default: a cached one.")
    ] = None,
    other_reference: Annotated[
        str | None, option("other_reference", "Another one, for what real images get. Default: halves.")
    ] = None,
    split: Annotated[str, option("split", "The split of the reference and of training.")] = "train",
    test_split: Annotated[str, option("test_split", "Images that were not trained on.")] = "test",
    num_images: Annotated[int, option("num_images", "How many images to sample.", min=1)] = 5000,
    seed: Seed = 0,
    num_inference_steps: Annotated[
        str | None, option("num_inference_steps", "See `sample`; several are separated by commas.")
    ] = None,
    scheduler: Annotated[
        str | None, choice("scheduler", "See `sample`; several are separated by commas.", SCHEDULERS, is_list=True)
    ] = None,
    guidance_scale: Annotated[
        str | None, option("guidance_scale", "See `sample`; several, of which 1 is none, are separated by commas.")
    ] = None,
    guidance_interval: GuidanceInterval = None,
    guidance_method: GuidanceMethod = None,
    guidance_model: GuidanceModel = None,
    network: Network = None,
    network_path: NetworkPath = None,
    timesteps_per_image: Annotated[
        int | None, option("timesteps_per_image", "Terms of nll for each image. Default: 20, or all T.", min=2)
    ] = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    dtype: Dtype = "fp32",
    compile: Compile = False,
    uniform: Uniform = False,
    out: Annotated[str | None, option("out", "Where to write. Default: the model's folder.")] = None,
    json: Json = False,
    **flags: Any,
) -> None:
    """Measure a model and write it on its card.

    The data are those that the run in the model's folder learned from, unless --dataset_name names others. In several
    processes: accelerate launch -m hf_ddpm evaluate
    """
    with report_errors():
        steps = split_numbers("num_inference_steps", num_inference_steps)
        scales = split_decimals("guidance_scale", guidance_scale)
        if flags and "dataset_name" not in flags:
            raise UsageError(f"{min(flags)} needs --dataset_name, got none: the settings of data go together")
        data = _data_config(flags) if flags else None
        _join_launcher()
        from hf_ddpm.evaluation.evaluate import evaluate

        result, failure = _despite_the_disk(
            evaluate,
            model,
            metrics=split_commas(metrics),
            reference=reference,
            other_reference=other_reference,
            data=data,
            split=split,
            test_split=test_split,
            num_images=num_images,
            seed=seed,
            num_inference_steps=steps,
            schedulers=split_commas(scheduler),
            guidance_scales=scales,
            guidance_interval=guidance_interval,
            guidance_method=guidance_method,
            guidance_model=guidance_model,
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
    remarks = [f"{row['name']}: {row['remark']}" for row in result["results"] if row.get("remark")]
    table = _table_of_results(result["results"])
    ending = f"The results are in {Path(result['out']) / 'evaluation.json'}, and on the card {result['card']}."
    finish(json, result, *table, *remarks, *([] if failure else [ending]))
    if failure:
        raise failure


@app.command(cls=Command)
@with_options_of(
    DataConfig,
    (
        *("dataset_config_name", "image_column", "label_column", "channels", "value_range", "max_image_pixels"),
        "cache_dir",
    ),
)
def anomaly(
    model: Model,
    data: Annotated[
        str,
        typer.Argument(help="`digits`, a Hub id, a folder of images or of parquet files, or one saved by `datasets`."),
    ],
    out: Annotated[Path, option("out", "A new folder for scores.csv, anomaly.json, maps and grid.png.")],
    split: Annotated[str, option("split", "train, test, ...")] = "train",
    normal: Annotated[
        str | None,
        option("normal", "The normal classes, by name or number, with --label_column: the AUROC is computed."),
    ] = None,
    strength: Annotated[
        str, option("strength", "Shares of the steps by which images are noised and denoised; separated by commas.")
    ] = ",".join(map(str, DEFAULT_STRENGTHS)),
    num_reconstructions: Annotated[
        int, option("num_reconstructions", "Of each image by each strength, from different noise.", min=1)
    ] = DEFAULT_NUM_RECONSTRUCTIONS,
    num_maps: Annotated[int, option("num_maps", "How many maps to write, those of the highest scores.", min=0)] = 64,
    seed: Seed = 0,
    num_inference_steps: Annotated[
        int | None, option("num_inference_steps", "The steps of strength 1. Default: see `sample`.", min=1)
    ] = None,
    scheduler: Annotated[str | None, choice("scheduler", "See `sample`.", SCHEDULERS)] = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    dtype: Dtype = "fp32",
    compile: Compile = False,
    json: Json = False,
    **flags: Any,
) -> None:
    """Find images that are unlike those that a model learned.

    Each image is noised and denoised; where the model makes something else of it, its map is bright, and its score is
    high. In several processes: accelerate launch -m hf_ddpm anomaly
    """
    with report_errors():
        strengths = split_decimals("strength", strength)
        check_strengths(strengths)
        config = _data_config({**flags, "dataset_name": data})
        _join_launcher()
        from hf_ddpm.evaluation.detection import find_anomalies

        result = find_anomalies(
            model,
            config,
            out,
            split=split,
            normal=split_commas(normal),
            strengths=strengths,
            num_reconstructions=num_reconstructions,
            num_maps=num_maps,
            seed=seed,
            num_inference_steps=num_inference_steps,
            scheduler=scheduler,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            compile=compile,
        )
    num_images = result["data"]["num_images"]
    maps = f", the maps of the highest {min(num_maps, num_images):,} in {out / 'maps'}" if num_maps else ""
    ending = (
        f"The scores of {num_images:,} images are in {out / 'scores.csv'}{maps}; {out / 'grid.png'} shows the first."
    )
    hint = "Name the normal classes to measure how well scores tell: --label_column label --normal CLASS"
    finish(json, {"out": str(out), **result}, *(_table_of_auroc(result) or [hint]), ending)


@app.command(cls=Command)
@with_options_of(
    DataConfig,
    (
        *("dataset_config_name", "image_column", "resolution", "channels", "center_crop", "value_range"),
        *("max_image_pixels", "cache_dir"),
    ),
)
def reference(
    dataset: Annotated[
        str,
        typer.Argument(help="`digits`, a Hub id, a folder of images or of parquet files, or one saved by `datasets`."),
    ],
    out: Annotated[Path, option("out", "A new folder for the statistics.")],
    split: Annotated[str, option("split", "train, test, ...")] = "train",
    network: Network = "inception",
    network_path: NetworkPath = None,
    num_features: Annotated[int, option("num_features", "Images whose features are kept.", min=4)] = 10_000,
    batch_size: Annotated[int, option("batch_size", "Images per step.", min=1)] = 64,
    device: Annotated[str, option("device", "cpu, cuda, ...")] = "cpu",
    json: Json = False,
    **flags: Any,
) -> None:
    """Measure a data set to compare samples with."""
    with report_errors():
        config = _data_config({**flags, "dataset_name": dataset})
        say_loading()
        from hf_ddpm.evaluation.features import load_network
        from hf_ddpm.evaluation.statistics import check_new_reference, make_reference

        check_new_reference(config, out)
        loaded = load_network(network or "inception", network_path, device)
        made = make_reference(config, split, loaded, out, num_features=num_features, batch_size=batch_size)
    data = made.metadata["data"]
    for warning in made.metadata["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    finish(
        json,
        {"out": str(out), "num_images": made.count, "metric": loaded.frechet_name, **made.metadata},
        f"{out} holds the statistics of {made.count:,} images of {data['name']}, split {split}, "
        f"{data['resolution']} x {data['resolution']}, {data['channels']} channels; {loaded.frechet_name}, "
        f"{loaded.dimensions:,} dimensions. Compare a model with them: hf-ddpm evaluate MODEL --reference {out}",
    )


@app.command(cls=Command)
def schedule(
    model: Model,
    steps: Annotated[str, option("steps", "Comma-separated numbers of steps.")] = "5,8,10",
    scheduler: Annotated[
        str, option("scheduler", "The solvers: unipc, dpmsolver++, ddim; several are separated by commas.")
    ] = "unipc,dpmsolver++",
    num_images: Annotated[int, option("num_images", "Noises to search on, and to measure on.", min=1)] = 32,
    seed: Seed = 0,
    batch_size: Annotated[int, option("batch_size", "Images per forward pass.", min=1)] = 32,
    device: Device = None,
    dtype: Dtype = "fp32",
    compile: Compile = False,
    json: Json = False,
) -> None:
    """Search timesteps for sampling in few steps.

    Those whose images come nearest to the images of many steps are kept with the model, and the better solver becomes
    its default for so many steps.
    """
    results: list[dict[str, Any]] = []
    failure = None
    with report_errors():
        numbers = split_numbers("steps", steps)
        if not numbers:
            raise UsageError(f"steps must be whole numbers, got {steps!r}")
        if min(numbers) < 2:
            raise UsageError(f"steps must be at least 2, got {min(numbers)}")
        from dataclasses import asdict

        from hf_ddpm.timesteps import check_search

        check_search(numbers, split_commas(scheduler))
        # torch is loaded here, so that a wrong number is answered before.
        say_loading()
        from hf_ddpm.evaluation.search import search_and_keep

        found = search_and_keep(
            model,
            numbers,
            schedulers=split_commas(scheduler),
            num_images=num_images,
            seed=seed,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            compile=compile,
        )
        try:
            for searched, path in found:
                results.append({**asdict(searched), "path": path and str(path)})
                if not json:
                    say(*_describe_search(searched, path))
        except RunError as error:
            failure = error
    kept = sum(result["path"] is not None for result in results)
    ending = (
        f"{kept} of {len(results)} schedules are kept with the model; `hf-ddpm sample` uses the best at so many steps."
    )
    finish(json, {"results": results}, ending)
    if failure:
        raise failure


@app.command(cls=Command)
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
        from hf_ddpm.training.posthoc import write_average

        folder = write_average(run, std, out, images)
        about = read_mapping(folder / "average.json")
    finish(
        json,
        {"out": str(folder), **about},
        f"{folder} holds the average of std {about['std']:g} at {about['images']:,} images, with a profile error of "
        f"{about['profile_error']:.1e}. Measure it with: hf-ddpm evaluate {folder}",
    )


@app.command(cls=Command)
def push(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or of any DDPMPipeline.")],
    repo_id: Annotated[str, typer.Argument(help="NAME in your namespace, or NAMESPACE/NAME; created if need be.")],
    public: Annotated[bool, switch("public", "Make a new repository public.")] = False,
    revision: Annotated[str, option("revision", "The branch, created if need be.")] = "main",
    averages: Annotated[bool, switch("averages", "Also push each average in RUN/ema as a branch.")] = False,
    message: Annotated[str | None, option("message", "The commit's. Default: the run's step and images.")] = None,
    json: Json = False,
) -> None:
    """Upload a model, its card and figures to the Hub.

    That is one commit, or none if nothing has changed.
    """
    with report_errors():
        from dataclasses import asdict

        from hf_ddpm.hub import upload

        pushed = upload.push(run, repo_id, public=public, revision=revision, message=message, averages=averages)
    if pushed.kept_readme:
        typer.echo(upload.KEPT_README, err=True)
    change = "was pushed" if pushed.is_new else "is the newest: nothing has changed"
    load = f'DDPMPipeline.from_pretrained("{pushed.repo_id}")'
    finish(json, asdict(pushed), f"{pushed.url}: commit {pushed.commit[:12]} {change}. Load the model with: {load}")


@app.command(cls=Command)
def demo(
    model: Model,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port of http://127.0.0.1.")] = 7860,
    mcp_server: Annotated[bool, switch("mcp_server", "Serve what the page does to agents, too, as tools.")] = False,
) -> None:
    """Open a page that shows a model on this machine."""
    with report_errors():
        from hf_ddpm.hub.space import run_demo

        run_demo(model, port, mcp_server)


@app.command(cls=Command)
def space(
    model: Annotated[str, typer.Argument(help="The folder of a run whose model is on the Hub, or a Hub id.")],
    space_id: Annotated[str, typer.Argument(help="The Space: NAME or NAMESPACE/NAME.")],
    model_id: Annotated[
        str | None,
        typer.Option("--model_id", help="The model on the Hub. Default: as the run says."),
    ] = None,
    public: Annotated[bool, switch("public", "Create the Space public.")] = False,
    out: Annotated[Path | None, option("out", "Write the Space into this folder, and push nothing.")] = None,
    json: Json = False,
) -> None:
    """Make a Space of the page of `hf-ddpm demo`."""
    import tempfile

    with report_errors():
        from hf_ddpm.hub.space import model_id_of, push_space, write_space

        model_id = model_id_of(model, model_id)
        if out is not None:
            write_space(model, model_id, out)
            upload = f"hf upload --repo-type space {space_id} {out}"
            finish(json, {"out": str(out), "model_id": model_id}, f"{out} shows {model_id}. Upload it: {upload}")
            return
        with tempfile.TemporaryDirectory() as folder:
            write_space(model, model_id, Path(folder))
            result = push_space(Path(folder), space_id, model_id, public)
    finish(json, {"url": result, "model_id": model_id}, result)


@app.command(cls=Command)
def info(
    model: Annotated[str | None, typer.Argument(help="A folder that holds a pipeline, or a Hub id.")] = None,
    json: Json = False,
) -> None:
    """Describe a model, or this machine.

    Of a model: its network, how far it was trained, what was measured. Without one: the versions for a bug report.
    """
    with report_errors():
        from hf_ddpm.hub.info import machine_info, model_info

        result = machine_info() if model is None else model_info(model)
    shown = {name: value for name, value in result.items() if name != "measured" and value is not None}
    lines = table([(name, ", ".join(value) if isinstance(value, list) else value) for name, value in shown.items()])
    if model is not None and result["measured"]:
        lines += ["", *_table_of_results(result["measured"])]
    elif model is not None:
        lines.append(f"Nothing was measured yet: hf-ddpm evaluate {model}")
    finish(json, result, *lines)


def _sample_from_images(
    model: str, image: Path, out: Path, num_images: int | None, format: str, json: bool, settings: Mapping[str, Any]
) -> None:
    """Sample an image from each image."""
    for name, value, default in (("num_images", num_images, None), ("format", format, "png")):
        if value != default:
            raise UsageError(f"{name} = {value} has no effect with image: each image gives a PNG file, leave it out")
    _join_launcher()
    from hf_ddpm.sampling.conditional_set import PICTURE, sample_from_images

    files = sample_from_images(model, image, out, **settings)
    result = {"out": str(out), "images": [str(path) for path in files], "picture": str(out / PICTURE)}
    finish(json, result, f"The samples ({len(files):,}) are in {out}; {PICTURE} shows them beside their images.")


def _join_launcher() -> None:
    """Close the gaps of launchers, for a command that several processes share."""
    code = start_missing_processes()
    if code is not None:
        raise typer.Exit(code)
    exit_with_launcher()
    if is_launched():
        from hf_ddpm.runtime.processes import share_cores

        share_cores()
    say_loading()


def _data_config(flags: Mapping[str, Any]) -> DataConfig:
    config = with_plain_paths(DataConfig(**typed_values(DataConfig, flags)), DataConfig)
    check_values(config)
    check_data_paths(config)
    return config


def _despite_the_disk(measure: Callable[..., dict[str, Any]], *arguments: Any, **settings: Any) -> Any:
    """Return what was measured, and the error that kept it from being written if there was one."""
    try:
        return measure(*arguments, **settings), None
    except UnwrittenError as error:
        return error.result, error


def _describe_search(searched: Any, path: Path | None) -> list[str]:
    is_better = searched.is_better_than_uniform
    reason = "there is no folder here that takes them" if is_better else "uniform ones are as good"
    lines = [
        f"{searched.scheduler}, {len(searched.timesteps)} steps: distance {searched.distance:.4f} to "
        f"{searched.reference_steps} steps, uniform {searched.uniform_distance:.4f}, unipc "
        f"{searched.unipc_distance:.4f}, " + (f"kept in {path}" if path else f"not kept: {reason}"),
        f"timesteps={[*searched.timesteps]}",
    ]
    if searched.network is not None:
        lines.insert(
            1,
            f"kernel distance of {searched.network} {searched.kernel_distance:.4f}, uniform "
            f"{searched.uniform_kernel_distance:.4f}, unipc {searched.unipc_kernel_distance:.4f}",
        )
    return lines


def _table_of_auroc(result: Mapping[str, Any]) -> list[str]:
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


def _table_of_results(results: Sequence[Mapping[str, Any]]) -> list[str]:
    from hf_ddpm.hub.card import result_cells

    rows = [result_cells(row) for row in results]
    return table([list(rows[0]), *([*row.values()] for row in rows)]) if rows else []
