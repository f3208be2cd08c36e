"""TrainingConfig: what a run is, as one dataclass; the command line and the YAML recipes read and write it.

Values come from four places, each overriding the next: a flag, `--config FILE`, `--recipe NAME`, the default here.
Every flag of diffusers' `train_unconditional.py` is here under its name and with its meaning; some defaults differ.
Words: a *step* is one optimizer step; the *global batch* is what one step sees over all processes,
`train_batch_size * gradient_accumulation_steps * num_processes` images.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import write_atomically
from hf_ddpm.training.checks import check_config

# The peaks that go with each optimizer.
LEARNING_RATES = {"muon": 3e-3, "adamw": 1e-3}


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainingConfig:
    # The data
    dataset_name: str | None = _option(
        None,
        "`digits` (ships with the package), a Hub id, a folder of images or of parquet files, or a folder saved by "
        "`datasets`. With neither this nor `train_data_dir`, `config` or `recipe`, the recipe `digits` is run.",
    )
    dataset_config_name: str | None = _option(None, "The configuration of a Hub data set that has several.")
    train_data_dir: str | None = _option(None, "A folder of images; instead of `dataset_name`.")
    image_column: str | None = _option(None, "The column of images; needed only where there are several.")
    label_column: str | None = _option(None, "A column of classes: the model is then conditioned on them.")
    channels: Literal[1, 3, 4] | None = _option(None, "Channels of x_0: 1 gray, 3 RGB, 4 RGBA; default: the data's.")
    resolution: int | None = _option(None, "Side of x_0 in pixels; default: the data's, if it is square and uniform.")
    center_crop: bool = _option(False, "Crop the middle of an oblong image; without it, a new random part each epoch.")
    random_flip: bool = _option(False, "Mirror half of the images, others in each epoch.")
    preserve_input_precision: bool = _option(True, "Keep 16-bit images in 16 bits; without it they become 8-bit.")
    on_bad_image: Literal["raise", "skip"] = _option(
        "raise", "An unreadable image: stop and name it, or leave it out and count it."
    )
    cache_dir: str | None = _option(None, "Where downloads and decoded images are kept; default: Hugging Face's.")
    dataloader_num_workers: int = _option(0, "Processes that assemble batches; 0: the training process does.")
    streaming: bool = _option(
        False, "Read the images in passing, for data that are too large to decode into a cache first."
    )
    shuffle_buffer_images: int = _option(1000, "Neighbors in a stream that are shuffled among themselves.")

    # The model
    model_config_name_or_path: str | None = _option(
        None,
        "A UNet2DModel's config: a JSON file, a folder, a recipe's name or a Hub id; default: sized for the data.",
    )
    dropout: float = _option(0.0, "Dropout of the UNet that is sized for the data.")
    init_from: str | None = _option(
        None,
        "Begin with a model, a folder or Hub id: with its weights, network, prediction type and noise schedule.",
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction", "previous_sample"] = _option(
        "v_prediction", "What the network's output means."
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = _option(
        "fixed_small", "The variance of p(x_{t-1} | x_t); `learned_range` doubles the output's channels."
    )
    ddpm_num_steps: int = _option(1000, "T, the length of the Markov chain.")
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = _option(
        "squaredcos_cap_v2", "How beta_t grows."
    )
    ddpm_beta_start: float = _option(1e-4, "The first beta of a schedule that is given by its ends.")
    ddpm_beta_end: float = _option(0.02, "The last beta of a schedule that is given by its ends.")
    rescale_betas_zero_snr: bool = _option(False, "Rescale the betas so that x_T holds no signal (alpha_bar_T = 0).")

    # The objective
    loss_weighting: Literal["constant", "min_snr"] = _option(
        "constant", "Weight of a noise level: 1 on the network's own output, or min(SNR, gamma) on x_0."
    )
    min_snr_gamma: float = _option(5.0, "gamma of `min_snr`.")
    timestep_density: Literal["lognormal", "stratified", "uniform"] = _option(
        "lognormal",
        "Draws of t: nine tenths of a log-normal noise level, or all t alike; one from each of as many parts of equal "
        "probability as the batch holds, or independent (`uniform`).",
    )
    noise_level_mean: float = _option(
        -0.4, "Of `lognormal`: the mean of log(sigma_t), sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t)."
    )
    noise_level_std: float = _option(1.2, "Of `lognormal`: the standard deviation of log(sigma_t).")

    stable_target_images: int = _option(
        0,
        "Stable target (Xu et al. 2023): average a target over so many other images (of its class) too, by how "
        "probably x_t came from each; 0: none. 4096 of 28x28 pixels helped, of 32x32 in color less; larger "
        "ones were not measured. The others are held in float32.",
    )

    # The optimization
    seed: int = _option(
        0, "With the number of images seen, decides the order, crops, flips, t and eps; with the step, dropout."
    )
    train_batch_size: int = _option(32, "Images per process and forward pass.")
    gradient_accumulation_steps: int = _option(1, "Forward passes per optimizer step.")
    num_epochs: int = _option(100, "Passes over the data, unless `max_train_steps` is given.")
    max_train_steps: int | None = _option(None, "Optimizer steps; overrides `num_epochs`.")
    max_train_hours: float | None = _option(
        None, "Hours after which this start writes a checkpoint and exits with code 75; the next one counts anew."
    )
    max_bad_steps: int = _option(
        20, "Steps in a row without finite loss and gradients, each of them skipped, after which the run fails."
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _option(None, "Default: what `accelerate launch` says.")
    optimizer: Literal["muon", "adamw"] = _option(
        "muon", "Muon for the matrices of the network's blocks and AdamW for all else, or AdamW for all."
    )
    learning_rate: float = _option(None, "The peak of the schedule; default: 0.003 for muon, 0.001 for adamw.")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = _option("linear", "Its shape over the run's images, whatever the accumulation and process count.")
    lr_warmup_steps: int = _option(100, "Optimizer steps until the peak.")
    adam_beta1: float = _option(0.9, "AdamW's beta_1.")
    adam_beta2: float = _option(0.999, "AdamW's beta_2.")
    adam_weight_decay: float = _option(1e-6, "AdamW's weight decay, and Muon's.")
    adam_epsilon: float = _option(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = _option(1.0, "Gradients are scaled down to this norm.")
    use_ema: bool = _option(True, "Average the weights; previews and the saved model use the average.")
    ema_halflife_images: list[float] | None = _option(  # noqa: RUF009
        None,
        "Images after which a weight counts half; default: that of `ema_max_decay` at this global batch. The first of "
        "several is that of previews and of the saved model; the others are saved in `output_dir`/ema.",
    )
    ema_rampup_ratio: float | None = _option(
        None, "The half-life is at most this part of the images seen, as in EDM (0.05), instead of the ramp below."
    )
    ema_inv_gamma: float = _option(1.0, "The decay of step k is at most 1 - (1 + k / inv_gamma) ** -power.")
    ema_power: float = _option(3 / 4, "See `ema_inv_gamma`.")
    ema_max_decay: float = _option(0.9999, "The largest decay per optimizer step.")
    ema_snapshots: int = _option(
        16,
        "Snapshots of two power-function averages, evenly over the run: `hf-ddpm ema` makes an average of any length "
        "of them. Each takes 8 bytes per parameter on the disk; 0: none.",
    )

    # What the run writes
    output_dir: str = _option(
        "ddpm-model", "The run's model, card, pictures, metrics and checkpoints; shared by all machines of a run."
    )
    overwrite_output_dir: bool = _option(False, "Delete the run that `output_dir` holds.")
    checkpointing_steps: int = _option(500, "Steps between checkpoints, which also refresh the model in `output_dir`.")
    checkpoints_total_limit: int | None = _option(2, "Checkpoints kept; the oldest goes first.")
    resume_from_checkpoint: str | None = _option(
        None, "The name of a checkpoint in `output_dir`, or `latest`: the newest whole one, or a new run without any."
    )
    save_images_epochs: int | None = _option(None, "Epochs between previews; default: with each checkpoint.")
    save_model_epochs: int | None = _option(None, "Epochs between saves of the model; default: with each checkpoint.")
    eval_batch_size: int = _option(36, "Images of a preview.")
    eval_steps: int | None = _option(
        None,
        "Steps between measurements: kernel distance of samples, loss on held-out images by noise level; default: "
        "none.",
    )
    eval_split: str = _option("test", "The split of the data that is held out for them.")
    eval_num_images: int = _option(2000, "Samples of a measurement, and held-out images at most.")
    eval_network: Literal["inception", "dinov2", "clip", "efficientnet-lite0"] = _option(
        "efficientnet-lite0", "The feature network of the kernel distance."
    )
    eval_network_path: str | None = _option(None, "Its file or folder, if it is not to be downloaded.")
    ddpm_num_inference_steps: int | None = _option(
        None, "Steps of a preview; default: 20 of UniPC, all T where only ddpm can sample the model."
    )
    logging_steps: int = _option(10, "Steps between lines of metrics.jsonl.")
    logger: Literal["tensorboard", "wandb", "trackio"] | None = _option(None, "A tracker beside metrics.jsonl.")
    logging_dir: str = _option("logs", "TensorBoard's folder in `output_dir`.")
    push_to_hub: bool = _option(
        False, "Upload model, card and figures with each save of the model, in the background, and at the end."
    )
    hub_token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "A Hub token; better: `hf auth login`. It is never written anywhere."},
    )
    hub_model_id: str | None = _option(None, "The repository; default: the name of `output_dir`, in your namespace.")
    hub_private_repo: bool = _option(True, "A private repository; one that exists keeps its visibility.")
    hub_revision: str = _option("main", "The branch that is pushed to.")
    hub_averages: bool = _option(False, "At the end also push each average in `ema`, as a branch with its name.")

    # The machine
    dry_run: bool = _option(
        False,
        "Start no run: check settings and data, take a few steps, and say what the run would cost. All that it writes "
        "is the cache of decoded images.",
    )
    compile: bool = _option(
        False, "Compile the network by torch.compile: a minute or more at the start, then faster steps."
    )
    gradient_checkpointing: bool = _option(
        False, "Keep what blocks take in instead of all activations: less memory, a forward pass more per step."
    )
    cpu_threads_per_process: int | None = _option(
        None, "Threads of torch on the CPU; default: the processors, shared by the processes of this machine."
    )
    local_rank: int = _option(-1, "Set by launchers of old; must agree with LOCAL_RANK.")
    enable_xformers_memory_efficient_attention: bool = _option(False, "Attention by xFormers instead of torch.")

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", LEARNING_RATES.get(self.optimizer))


# These say how this start of the run is made, not what the run is; they are not written into its config.
_OF_ONE_START = (
    *("resume_from_checkpoint", "overwrite_output_dir", "max_train_hours", "hub_token", "local_rank", "dry_run"),
)


def parse_config(arguments: Sequence[str] | None = None) -> TrainingConfig:
    """The command line (default: `sys.argv`) as a checked config; exits with status 2 and a message if it is wrong."""
    from transformers.hf_argparser import HfArgumentParser

    parser = HfArgumentParser(TrainingConfig, description="Trains a pixel-space diffusion model.", allow_abbrev=False)  # pyright: ignore[reportArgumentType]
    parser.add_argument("--config", metavar="FILE", help="A YAML file of these settings, which flags override.")
    parser.add_argument("--recipe", metavar="NAME", help=f"Settings that ship: {', '.join(recipe_names())}.")
    try:
        given = parser.parse_args(arguments)
        names = ("dataset_name", "train_data_dir", "config", "recipe")
        recipe = given.recipe if any(getattr(given, name) is not None for name in names) else "digits"
        settings = _file_settings(recipe, given.config)
        words = [word.partition("=")[0] for word in (sys.argv[1:] if arguments is None else arguments)]
        flags = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
        # A flag overrides a file's setting that it replaces under another name.
        for flag, replaced in _REPLACES.items():
            # An optimizer that the file names, too, keeps the file's rate.
            is_said = flag in flags and not (flag == "optimizer" and settings.get(flag) == given.optimizer)
            if is_said or (getattr(given, flag) != parser.get_default(flag) and flag != "optimizer"):
                settings = {name: value for name, value in settings.items() if name not in replaced}
        if given.init_from is not None and (beside := sorted(flags & OF_INIT_FROM.keys())):
            raise UsageError(f"{beside[0]} is that of the model in init_from: leave it out")
        parser.set_defaults(**_as_defaults(settings))
        config, _ = parser.parse_args_into_dataclasses(args=arguments, look_for_args_file=False)
        check_config(config)
    except UsageError as error:
        parser.error(str(error))
    return config


def load_config(path: str | None = None, recipe: str | None = None, **settings: Any) -> TrainingConfig:
    """A config from a recipe, a YAML file and keyword arguments, each overriding the one named earlier."""
    from transformers.hf_argparser import HfArgumentParser

    parser = HfArgumentParser(TrainingConfig, allow_abbrev=False)  # pyright: ignore[reportArgumentType]
    _check_names(settings, "keyword argument")
    merged = _over(_file_settings(recipe, path), settings)
    parser.set_defaults(**_as_defaults(merged))
    try:
        (config,) = parser.parse_args_into_dataclasses(args=[], look_for_args_file=False)
    except SystemExit:
        shown = {name: value for name, value in merged.items() if name != "hub_token"}
        raise UsageError(f"a setting has a value of the wrong type; argparse has named it: {shown}") from None
    return config


def _over(settings: dict[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """With what is named later, in the place of what that replaces under other names."""
    replaced = {
        other
        for name, others in _REPLACES.items()
        if later.get(name) is not None and not (name == "optimizer" and settings.get(name) == later[name])
        for other in others
    }
    return {**{name: value for name, value in settings.items() if name not in replaced}, **later}


# What is named -> what of a recipe or a file before it it stands in for.
_REPLACES = {
    "dataset_name": ("train_data_dir", "dataset_config_name", "image_column"),
    "train_data_dir": ("dataset_name", "dataset_config_name", "image_column"),
    "num_epochs": ("max_train_steps",),
    "init_from": ("model_config_name_or_path", "dropout"),
    "optimizer": ("learning_rate",),
}
# What `init_from` decides -> its name in the config of that model's scheduler.
OF_INIT_FROM = {
    "prediction_type": "prediction_type",
    "variance_type": "variance_type",
    "ddpm_num_steps": "num_train_timesteps",
    "ddpm_beta_schedule": "beta_schedule",
    "ddpm_beta_start": "beta_start",
    "ddpm_beta_end": "beta_end",
    "rescale_betas_zero_snr": "rescale_betas_zero_snr",
}


def _as_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    # argparse converts and checks defaults that are text as it does flags, but not lists.
    return {
        name: _numbers(name, value) if name in _LISTS else None if value is None else _word(name, value)
        for name, value in settings.items()
    }


def _word(name: str, value: Any) -> str:
    # YAML takes a bare `no` for false.
    return "no" if name == "mixed_precision" and value is False else str(value)


_LISTS = ("ema_halflife_images",)


def _numbers(name: str, value: Any) -> list[float] | None:
    try:
        return None if value is None else [float(v) for v in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be a number or a list of numbers, got {value!r}") from None


def save_config(config: TrainingConfig, path: Path) -> None:
    """Writes the YAML file that `--config` replays; tokens and what concerns one start only are left out.

    A network that was sized for the data is not in it, but in the run's unet/config.json.
    """
    settings = {name: value for name, value in _settings(config).items() if name not in _OF_ONE_START}
    write_atomically(path, yaml.safe_dump(settings, sort_keys=False))


def _settings(config: TrainingConfig) -> dict[str, Any]:
    """By name; folders so that they are found from everywhere, and are not taken for Hub ids."""
    settings = asdict(config)
    for name in ("dataset_name", "train_data_dir", "init_from"):
        if settings[name] not in (None, "digits") and Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
    return settings


def check_same_run(config: TrainingConfig, path: Path) -> None:
    """Raises UsageError if the settings of a resumed run are not those in `path`, its config.yaml."""
    before = asdict(load_config(str(path)))
    if "optimizer" not in _file_settings(None, str(path)):
        before["optimizer"] = "adamw"  # there was no other
    for name, value in _settings(config).items():
        has_no_effect = name == "lr_warmup_steps" and config.lr_scheduler == "constant"
        if name not in (*_OF_ONE_START, *_MAY_CHANGE) and not has_no_effect and value != before[name]:
            raise UsageError(
                f"{name} was {before[name]} in this run, got {value}: resume with --config {path}, "
                "or change that file to change it on purpose"
            )


# What does not decide which model comes out. That the data and the global batch are the same is checked by themselves.
_MAY_CHANGE = (
    *("dataset_name", "dataset_config_name", "train_data_dir", "image_column", "cache_dir", "output_dir"),
    *("dataloader_num_workers", "on_bad_image", "num_epochs", "max_train_steps", "max_bad_steps", "ema_snapshots"),
    *("train_batch_size", "gradient_accumulation_steps", "mixed_precision", "use_ema", "checkpointing_steps"),
    *("checkpoints_total_limit", "save_images_epochs", "save_model_epochs", "eval_batch_size", "logging_steps"),
    *("eval_steps", "eval_split", "eval_num_images", "eval_network", "eval_network_path"),
    *("ddpm_num_inference_steps", "logger", "logging_dir", "push_to_hub", "hub_model_id", "hub_private_repo"),
    *("hub_revision", "hub_averages"),
    *("compile", "gradient_checkpointing", "cpu_threads_per_process", "enable_xformers_memory_efficient_attention"),
)


def recipe_names() -> list[str]:
    return sorted(p.name[: -len(".yaml")] for p in _recipes().iterdir() if p.name.endswith(".yaml"))


def recipe_model_config(name: str) -> Path | None:
    """The UNet config that ships with the recipe `name`, if one does."""
    path = Path(str(_recipes() / f"{name}.json"))
    return path if path.is_file() else None


def _recipes() -> Any:
    return resources.files("hf_ddpm") / "recipes"


def _file_settings(recipe: str | None, path: str | None) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if recipe is not None:
        if recipe not in recipe_names():
            raise UsageError(f"recipe must be one of {', '.join(recipe_names())}, got {recipe!r}")
        settings |= _read_settings((_recipes() / f"{recipe}.yaml").read_text(encoding="utf-8"), f"recipe {recipe}")
    if path is not None:
        if not Path(path).is_file():
            raise UsageError(f"config must be a YAML file, got {path!r}, which is not there")
        try:
            settings = _over(settings, _read_settings(Path(path).read_text(encoding="utf-8"), path))
        except UnicodeDecodeError as error:
            raise UsageError(f"config must be a YAML file in UTF-8, got {path!r}: {error}") from error
    return settings


def _read_settings(text: str, source: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"{source} must hold `name: value` lines, got {type(settings).__name__}")
    _check_names(settings, source)
    return settings


def _check_names(settings: Mapping[str, Any], source: str) -> None:
    known = [f.name for f in fields(TrainingConfig)]
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else "see --help for the names"
            raise UsageError(f"{source}: unknown setting {name!r}; {remedy}")
