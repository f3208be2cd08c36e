"""TrainingConfig: all settings of a run in one dataclass, which the command line, YAML files and recipes fill.

Every flag of diffusers' `train_unconditional.py` is here under its name and with its meaning; some defaults differ.
A *step* is one optimizer step. The *global batch* is what one step sees over all processes:
`train_batch_size * gradient_accumulation_steps * num_processes` images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_ddpm.data.config import DataConfig
from hf_ddpm.runtime.settings import GIVEN, setting

# The default peak of the learning rate under each optimizer.
LEARNING_RATES = {"muon": 3e-3, "adamw": 1e-3}
DEFAULT_BATCH_SIZE = 32
CLASS_DROPOUT = 0.1
# A setting that the model of `init_from` decides -> its name in the config of that model's scheduler.
SCHEDULER_SETTINGS = {
    "prediction_type": "prediction_type",
    "variance_type": "variance_type",
    "ddpm_num_steps": "num_train_timesteps",
    "ddpm_beta_schedule": "beta_schedule",
    "ddpm_beta_start": "beta_start",
    "ddpm_beta_end": "beta_end",
    "rescale_betas_zero_snr": "rescale_betas_zero_snr",
}
# The settings of `hf-ddpm tune` alone, and those of `hf-ddpm train` that the model to tune decides or tuning replaces.
TUNING_SETTINGS = ("tuned_steps", "guidance_scale", "guidance_interval")
NOT_OF_TUNING = (
    *("init_from", "model_config_name_or_path", "dropout", "ddpm_num_inference_steps", "loss_weighting"),
    *("min_snr_gamma", "timestep_density", "noise_level_mean", "noise_level_std", "stable_target_images"),
    *("augment_probability", *SCHEDULER_SETTINGS),
)
_SCHEDULES_BY_ENDS = {"ddpm_beta_schedule": ("linear", "scaled_linear", "sigmoid")}
_LOGNORMAL = {"timestep_density": "lognormal"}
_VALIDATION = {"eval_steps": GIVEN}


@dataclass(frozen=True)
class TrainingConfig(DataConfig):
    """The settings of a run."""

    # The model
    init_from: str | None = setting(
        None,
        "A model to begin with, a folder or Hub id: its weights, network, prediction type and noise schedule.",
        group="model",
        resume="fixed",
        is_path=True,
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction", "previous_sample"] = setting(
        "v_prediction",
        "What the network predicts: the noise, the clean image, the velocity, or x_{t-1}.",
        group="model",
        resume="fixed",
        also_called={"eps": "epsilon", "noise": "epsilon", "v": "v_prediction", "x_0": "sample", "x0": "sample"},
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = setting(
        "fixed_small",
        "The variance of p(x_{t-1} | x_t); `learned_range` doubles the output's channels.",
        group="model",
        resume="fixed",
    )
    model_config_name_or_path: str | None = setting(
        None,
        "The config of a UNet2DModel: a JSON file, a folder, a recipe's name or a Hub id; default: sized for the "
        "data.",
        group="model",
        resume="fixed",
        only_with={"init_from": None},
        is_path=True,
    )
    super_resolution: int | None = setting(
        None,
        "The factor of super-resolution: the model makes each image from a low resolution of it, which is made by "
        "itself, and enlarged again. It divides the resolution.",
        group="model",
        resume="fixed",
        at_least=2,
        only_with={"condition_column": None},
    )
    condition_noise: float = setting(
        0.0,
        "The largest standard deviation of the noise that is added to conditions in [-1, 1], each of which draws its "
        "own below it (Ho et al. 2021). It helps where conditions will be worse than those of the data, as samples of "
        "another model are.",
        group="model",
        resume="fixed",
        at_least=0,
    )
    dropout: float = setting(
        0.0,
        "Dropout of the network that is sized for the data.",
        group="model",
        resume="fixed",
        at_least=0,
        below=1,
        only_with={"model_config_name_or_path": None, "init_from": None},
    )
    ddpm_num_steps: int = setting(
        1000, "T, the length of the Markov chain.", group="model", resume="fixed", at_least=1
    )
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = setting(
        "squaredcos_cap_v2",
        "How beta_t grows with t.",
        group="model",
        resume="fixed",
        also_called={"cosine": "squaredcos_cap_v2"},
    )
    ddpm_beta_start: float = setting(
        1e-4,
        "The first beta of a schedule that is given by its ends.",
        group="model",
        resume="fixed",
        above=0,
        below=1,
        only_with=_SCHEDULES_BY_ENDS,
    )
    ddpm_beta_end: float = setting(
        0.02,
        "The last beta of a schedule that is given by its ends.",
        group="model",
        resume="fixed",
        above=0,
        below=1,
        only_with=_SCHEDULES_BY_ENDS,
    )
    rescale_betas_zero_snr: bool = setting(
        False, "Rescale the betas so that x_T holds no signal (alpha_bar_T = 0).", group="model", resume="fixed"
    )

    # The objective
    loss_weighting: Literal["constant", "min_snr"] = setting(
        "constant",
        "The weight of a noise level: 1 on the network's own output, or min(SNR, gamma) on x_0.",
        group="objective",
        resume="fixed",
    )
    min_snr_gamma: float = setting(
        5.0,
        "gamma of `min_snr`.",
        group="objective",
        resume="fixed",
        above=0,
        only_with={"loss_weighting": "min_snr"},
    )
    timestep_density: Literal["lognormal", "stratified", "uniform"] = setting(
        "lognormal",
        "How t is drawn. `lognormal`: nine tenths of a log-normal noise level and one tenth of all t alike, one draw "
        "from each of as many parts of equal probability as the batch holds. `stratified`: all t alike, one draw "
        "from each part. `uniform`: all t alike, independently.",
        group="objective",
        resume="fixed",
    )
    noise_level_mean: float = setting(
        -0.4,
        "The mean of log(sigma_t) under `lognormal`, where sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t).",
        group="objective",
        resume="fixed",
        only_with=_LOGNORMAL,
    )
    noise_level_std: float = setting(
        1.2,
        "The standard deviation of log(sigma_t) under `lognormal`.",
        group="objective",
        resume="fixed",
        above=0,
        only_with=_LOGNORMAL,
    )
    stable_target_images: int = setting(
        0,
        "Stable target (Xu et al. 2023): average each target over so many further images too (of its class), by how "
        "probably x_t came from each; 0: none. 4096 images of 28x28 pixels helped, of 32x32 in color less; larger "
        "ones were not measured. They are held in float32.",
        group="objective",
        resume="fixed",
        at_least=0,
        only_with={"streaming": False},
    )

    augment_probability: float = setting(
        0.0,
        "Augment images as EDM does (Karras et al. 2022, App. F.2): each transformation with this probability, of "
        "which the network is told, so that samples are not transformed; 0: never. EDM takes 0.12 for CIFAR-10.",
        group="objective",
        resume="fixed",
        at_least=0,
        below=1,
    )
    class_dropout: float = setting(
        CLASS_DROPOUT,
        "How often the label of an image is hidden from the network, which so learns images without a label, too; "
        "guidance compares the two. Each of several columns is also hidden by itself as often. 0: never.",
        group="objective",
        resume="fixed",
        at_least=0,
        below=1,
    )

    # The tuning for few steps
    tuned_steps: list[int] | None = setting(  # noqa: RUF009
        None,
        "The numbers of sampling steps that the model of `init_from` is tuned for (consistency tuning), `--steps` of "
        "`hf-ddpm tune`; default: it is not tuned, but trained on.",
        group="tuning",
        resume="fixed",
        at_least=1,
        only_with={"init_from": GIVEN},
    )
    guidance_scale: float | None = setting(
        None,
        "The scale of the guidance that tuning makes a part of the model, so that one evaluation does what two did: "
        "by the model without a label, or by the weaker network in its folder `guide`; 1: none, the default.",
        group="tuning",
        resume="fixed",
        at_least=1,
        only_with={"tuned_steps": GIVEN},
    )
    guidance_interval: list[float] | None = setting(  # noqa: RUF009
        None,
        "LOW HIGH: this guidance acts where LOW < sigma <= HIGH, the ratio of noise to signal; default: everywhere.",
        group="tuning",
        resume="fixed",
        num_values=2,
        at_least=0,
        only_with={"guidance_scale": GIVEN},
    )

    # The optimization
    max_train_steps: int | None = setting(
        None,
        "The optimizer steps of the run; overrides `num_epochs`.",
        group="optimization",
        resume="free",
        at_least=1,
    )
    num_epochs: int = setting(
        100,
        "Passes over the data, unless `max_train_steps` is given.",
        group="optimization",
        resume="free",
        at_least=1,
    )
    train_batch_size: int | Literal["auto"] = setting(
        DEFAULT_BATCH_SIZE,
        "Images per process and forward pass. `auto`: as many as fit in the free memory; a step sees the "
        "`global_batch_size` images by accumulation. A resumed run keeps what was chosen.",
        group="optimization",
        resume="free",
        at_least=1,
    )
    global_batch_size: int | None = setting(
        None,
        "Images per optimizer step over all processes, which `train_batch_size auto` divides; default: those that "
        f"the recipe or file has for one process, else {DEFAULT_BATCH_SIZE}.",
        group="optimization",
        resume="free",
        at_least=1,
        only_with={"train_batch_size": "auto"},
    )
    gradient_accumulation_steps: int = setting(
        1, "Forward passes per optimizer step.", group="optimization", resume="free", at_least=1
    )
    optimizer: Literal["muon", "adamw"] = setting(
        "muon",
        "Muon for the matrices of the network's blocks and AdamW for all else, or AdamW for all.",
        group="optimization",
        resume="fixed",
    )
    learning_rate: float | None = setting(
        None,
        "The peak of the learning rate; default: 0.003 for muon, 0.001 for adamw.",
        group="optimization",
        resume="fixed",
        above=0,
    )
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = setting(
        "linear",
        "The shape of the learning rate over the run's images, whatever the accumulation and process count.",
        group="optimization",
        resume="fixed",
    )
    lr_warmup_steps: int = setting(
        100,
        "Optimizer steps until the peak.",
        group="optimization",
        resume="fixed",
        at_least=0,
        only_with={"lr_scheduler": ("constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")},
        off=0,
    )
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = setting(
        None,
        "The network's arithmetic; default: what `accelerate launch` says. `auto`: also what that says, but where it "
        "says `no`, `bf16` if the processor has instructions for it; a resumed run keeps what was chosen.",
        group="optimization",
        resume="free",
        also_called={"fp32": "no", "float32": "no", "float16": "fp16", "bfloat16": "bf16"},
    )
    seed: int = setting(
        0,
        "Decides the order, crops, flips, t and eps, with the number of images seen; dropout, with the step.",
        group="optimization",
        resume="fixed",
        at_least=0,
        below=2**63,  # what torch takes
    )
    max_grad_norm: float = setting(
        1.0, "The norm that gradients are scaled down to.", group="optimization", resume="fixed", above=0
    )
    adam_beta1: float = setting(0.9, "beta_1 of AdamW.", group="optimization", resume="fixed", at_least=0, below=1)
    adam_beta2: float = setting(0.999, "beta_2 of AdamW.", group="optimization", resume="fixed", at_least=0, below=1)
    adam_weight_decay: float = setting(
        1e-6, "The weight decay of AdamW and of Muon.", group="optimization", resume="fixed", at_least=0
    )
    adam_epsilon: float = setting(1e-8, "epsilon of AdamW.", group="optimization", resume="fixed", above=0)
    max_bad_steps: int = setting(
        20,
        "Steps in a row without finite loss and gradients, each of them skipped, after which the run fails.",
        group="optimization",
        resume="free",
        at_least=1,
    )
    max_train_hours: float | None = setting(
        None,
        "Hours after which this start writes a checkpoint and exits with code 75; default: no limit, or in a job of "
        "SLURM its time limit, less a margin for the checkpoint. The next start counts anew.",
        group="optimization",
        resume="start",
        above=0,
    )

    # The averages
    use_ema: bool = setting(
        True,
        "Average the weights; previews and the saved model use the average.",
        group="averages",
        resume="free",
    )
    ema_halflife_images: list[float] | None = setting(  # noqa: RUF009
        None,
        "Images after which a weight counts half; default: what `ema_max_decay` gives at this global batch. Previews "
        "and the saved model use the first of several; the others are saved in `output_dir`/ema.",
        group="averages",
        resume="fixed",
        at_least=1,
        only_with={"use_ema": True},
    )
    ema_snapshots: int = setting(
        16,
        "Snapshots of two power-function averages, evenly over the run: `hf-ddpm average` makes an average of any "
        "length from them. Each takes 8 bytes per parameter on the disk; 0: none.",
        group="averages",
        resume="free",
        at_least=0,
        only_with={"use_ema": True},
        off=0,
    )
    ema_max_decay: float = setting(
        0.9999,
        "The largest decay per optimizer step.",
        group="averages",
        resume="fixed",
        above=0,
        below=1,
        only_with={"use_ema": True, "ema_halflife_images": None},
    )
    ema_rampup_ratio: float | None = setting(
        None,
        "The half-life is at most this part of the images seen, as in EDM (0.05), instead of the ramp below.",
        group="averages",
        resume="fixed",
        above=0,
        only_with={"use_ema": True},
    )
    ema_inv_gamma: float = setting(
        1.0,
        "The decay of step k is at most 1 - (1 + k / inv_gamma) ** -power.",
        group="averages",
        resume="fixed",
        above=0,
        only_with={"use_ema": True, "ema_rampup_ratio": None},
    )
    ema_power: float = setting(
        3 / 4,
        "See `ema_inv_gamma`.",
        group="averages",
        resume="fixed",
        above=0,
        only_with={"use_ema": True, "ema_rampup_ratio": None},
    )

    # What the run writes
    output_dir: str = setting(
        "ddpm-model",
        "The folder of the run's model, card, pictures, metrics and checkpoints; shared by all machines of a run.",
        group="output",
        resume="free",
        is_path=True,
    )
    resume_from_checkpoint: str | None = setting(
        None,
        "The name of a checkpoint in `output_dir`, or `latest`: the newest whole one, or a new run without any. "
        "`hub`: the newest of those and of the one that `hub_strategy checkpoint` has left on the Hub, also into an "
        "empty folder.",
        group="output",
        resume="start",
    )
    overwrite_output_dir: bool = setting(
        False,
        "Replace the run that `output_dir` holds. It is deleted when the new run has saved its first model.",
        group="output",
        resume="start",
    )
    checkpointing_steps: int = setting(
        500,
        "Steps between checkpoints, which also refresh the model in `output_dir`.",
        group="output",
        resume="free",
        at_least=1,
    )
    checkpoints_total_limit: int | None = setting(
        2, "How many checkpoints are kept; the oldest goes first.", group="output", resume="free", at_least=1
    )
    logging_steps: int = setting(
        10, "Steps between lines of metrics.jsonl.", group="output", resume="free", at_least=1
    )
    logger: str | None = setting(
        None,
        "A tracker beside metrics.jsonl: tensorboard, wandb or trackio; or several, separated by commas.",
        group="output",
        resume="free",
        names=("tensorboard", "wandb", "trackio"),
    )
    tracker_project: str = setting(
        "hf_ddpm",
        "The project of W&B or Trackio; a run in it has the name of its folder.",
        group="output",
        resume="free",
        only_with={"logger": ("wandb", "trackio")},
    )
    logging_dir: str = setting(
        "logs",
        "TensorBoard's folder in `output_dir`.",
        group="output",
        resume="free",
        only_with={"logger": "tensorboard"},
    )
    save_images_epochs: int | None = setting(
        None,
        "Epochs between previews; default: after 1/50, 1/20 and each tenth of the run, 10 steps apart at least.",
        group="output",
        resume="free",
        at_least=1,
    )
    save_model_epochs: int | None = setting(
        None,
        "Epochs between saves of the model; default: with each checkpoint.",
        group="output",
        resume="free",
        at_least=1,
    )
    save_figures: bool = setting(
        True,
        "Draw the loss, an image that dissolves in noise, and two samples that emerge from it, when the run ends. The "
        "samples take less time than 5 % of the run's steps, or than 10 of them.",
        group="output",
        resume="free",
    )
    eval_batch_size: int = setting(16, "The images of a preview.", group="output", resume="free", at_least=1)
    ddpm_num_inference_steps: int | None = setting(
        None,
        "The steps of a preview; default: 20 of UniPC, all T where only ddpm can sample the model.",
        group="output",
        resume="free",
        at_least=1,
        only_with={"tuned_steps": None},
    )
    eval_steps: int | None = setting(
        None,
        "Steps between validations: kernel distance of samples, loss on held-out images by noise level, and PSNR "
        "where images are made from images; default: none.",
        group="output",
        resume="free",
        at_least=1,
    )
    eval_split: str = setting(
        "test",
        "The split of the data that is held out for validation.",
        group="output",
        resume="free",
        only_with=_VALIDATION,
    )
    eval_num_images: int = setting(
        2000,
        "The samples of a validation, and the most held-out images.",
        group="output",
        resume="free",
        at_least=4,
        only_with=_VALIDATION,
    )
    eval_network: Literal["inception", "dinov2", "clip", "efficientnet-lite0"] = setting(
        "efficientnet-lite0",
        "The feature network of the kernel distance.",
        group="output",
        resume="free",
        only_with=_VALIDATION,
    )
    eval_network_path: str | None = setting(
        None,
        "The file or folder of that network, if it is not to be downloaded.",
        group="output",
        resume="free",
        only_with=_VALIDATION,
        is_path=True,
    )

    # Sharing
    push_to_hub: bool = setting(
        False,
        "Upload model, card and figures to the Hub, see `hub_strategy`.",
        group="sharing",
        resume="free",
    )
    hub_strategy: Literal["end", "every_save", "checkpoint"] = setting(
        "every_save",
        "When to upload. `end`: the finished model. `every_save`: also each save of the model, in the background. "
        "`checkpoint`: also the newest checkpoint, which replaces the one before it, for `resume_from_checkpoint "
        "hub`. It is in `hub_model_id` + `-checkpoint`, which is private also where the model is public.",
        group="sharing",
        resume="free",
        only_with={"push_to_hub": True},
    )
    hub_model_id: str | None = setting(
        None,
        "The repository; default: the name of `output_dir`, in your namespace.",
        group="sharing",
        resume="free",
        only_with={"push_to_hub": True},
    )
    hub_private_repo: bool = setting(
        True,
        "Create a private repository; one that exists keeps its visibility.",
        group="sharing",
        resume="free",
        only_with={"push_to_hub": True},
    )
    hub_revision: str = setting(
        "main", "The branch that is pushed to.", group="sharing", resume="free", only_with={"push_to_hub": True}
    )
    hub_averages: bool = setting(
        False,
        "At the end also push each average in `ema`, as a branch with its name.",
        group="sharing",
        resume="free",
        only_with={"push_to_hub": True},
    )
    hub_token: str | None = setting(
        None,
        "A Hub token. Other users of the machine can read a command line: better `hf auth login` or HF_TOKEN.",
        group="sharing",
        resume="start",
        repr=False,
        only_with={"push_to_hub": True},
        is_secret=True,
    )

    # The machine
    dry_run: bool = setting(
        False,
        "Start no run: check settings and data, take a few steps, and say what the run would cost. All that it writes "
        "is the cache of decoded images.",
        group="machine",
        resume="start",
    )
    compile: Literal[True, False, "auto"] = setting(  # pyright: ignore[reportInvalidTypeForm]
        False,
        "Compile the network by torch.compile: a minute or more at the start, then faster steps. `auto`: where that "
        "pays, by the processor and the length of the run; a resumed run keeps what was chosen.",
        group="machine",
        resume="free",
    )
    gradient_checkpointing: bool = setting(
        False,
        "Keep the inputs of blocks instead of all activations: less memory, one more forward pass per step.",
        group="machine",
        resume="free",
    )
    cpu_threads_per_process: int | None = setting(
        None,
        "Threads of torch on the CPU; default: the processors, shared by the processes of this machine.",
        group="machine",
        resume="free",
        at_least=1,
    )
    max_data_wait_minutes: float = setting(
        60.0,
        "Minutes without images from the processes that assemble batches, after which the run writes a checkpoint and "
        "fails.",
        group="machine",
        resume="free",
        above=0,
    )
    enable_xformers_memory_efficient_attention: bool = setting(
        False, "Attention by xFormers instead of torch.", group="machine", resume="free"
    )
    local_rank: int = setting(-1, "Set by old launchers; must agree with LOCAL_RANK.", group="machine", resume="start")

    @property
    def batch_size(self) -> int:
        """The images per process and forward pass, after `auto` was chosen."""
        assert self.train_batch_size != "auto"
        return self.train_batch_size

    @property
    def is_guided(self) -> bool:
        """True if a run that tunes a model for few steps makes guidance a part of it."""
        return self.guidance_scale not in (None, 1)

    @property
    def makes_from_images(self) -> bool:
        """True if the model makes images from images: those of a column, or in a low resolution."""
        return self.condition_column is not None or self.super_resolution is not None

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at its peak: `learning_rate`, or the default of the optimizer."""
        return LEARNING_RATES[self.optimizer] if self.learning_rate is None else self.learning_rate
