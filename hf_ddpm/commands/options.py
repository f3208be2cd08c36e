"""The arguments and options of several commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from hf_ddpm.data.config import DataConfig, check_data_paths
from hf_ddpm.evaluation.names import NETWORK_NAMES
from hf_ddpm.names import DTYPES, GUIDANCE_METHODS
from hf_ddpm.runtime.command_line import choice, option, switch
from hf_ddpm.runtime.settings import check_values, typed_values, with_plain_paths

# Arguments and options of several commands.
Model = Annotated[str, typer.Argument(help="A folder that holds a pipeline, or a Hub id.")]


Data = Annotated[
    str,
    typer.Argument(help="`digits`, a Hub id, a folder of images or of parquet files, or one saved by `datasets`."),
]
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


AutoguidanceScale = Annotated[
    float | None,
    option(
        "autoguidance_scale",
        "How far images of classes are also led away from the weaker model, at every sigma. Default: 1, not.",
    ),
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


def data_config(flags: Mapping[str, Any]) -> DataConfig:
    """Return the settings of data that the flags of a command give, after a check of each.

    Raises:
        UsageError: When a value cannot work.
    """
    config = with_plain_paths(DataConfig(**typed_values(DataConfig, flags)), DataConfig)
    check_values(config)
    check_data_paths(config)
    return config
