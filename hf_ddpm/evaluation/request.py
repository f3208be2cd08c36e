"""The request of an evaluation: the settings that the user of `evaluate` gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_ddpm.data.config import DataConfig
from hf_ddpm.evaluation.model_data import DEFAULT_TEST_SPLIT
from hf_ddpm.evaluation.names import FIDELITY, METRICS, OF_IMAGES_FROM_IMAGES
from hf_ddpm.names import DTYPES, SCHEDULERS
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.seeds import check_seeds
from hf_ddpm.runtime.settings import check_values, require_choice, with_plain_paths
from hf_ddpm.sampling.loading import check_guidance


@dataclass(frozen=True, kw_only=True)
class Request:
    """The model that `evaluate` measures, and how it does so.

    Attributes:
        model: A folder that holds a pipeline, stock diffusers' or ours, or a Hub id.
        metrics: Some of fd (Fréchet distance), kid, precision (with recall, density and coverage), cmmd, nll (bits per
            dimension), memorization and values (moments and spectra). For a model that makes images from images: some
            of psnr, ssim, lpips and the distances, of samples that are made from the conditions of `test_split`.
        reference: A folder of `hf-ddpm reference`; of values for the metric `values` without one of features. None: it
            is made of `data`, and kept in the cache of the data; of `split`, or of `test_split`, which is the truth,
            for a model that makes images from images.
        other_reference: A second reference, of other images: what real images get is measured with both. None: with
            halves of `reference`. It needs `reference`.
        data: The settings of the data. None: those of the run in the model's folder. nll and memorization need data,
            and so do distances without `reference`.
        split: The split of the reference, and of training.
        test_split: The split of images that were not trained on.
        num_images: The number of samples, from the seeds `seed`, `seed` + 1, ...; nll takes at most as many images of
            the test split.
        seed: The first seed.
        num_inference_steps: The numbers of steps of a grid. Empty: the default of `sample`.
        schedulers: The schedulers of a grid. Empty: the default of `sample`.
        guidance_scales: The scales of guidance of a grid, 1 for none. Empty: the default of `sample`.
        guidance_interval: Where guidance acts, see `sample`.
        guidance_method: How it guides, see `sample`.
        autoguidance_scale: The scale of autoguidance beside it, see `sample`.
        guidance_model: The weaker model, see `sample`.
        network: The feature network: `inception`, `dinov2`, `clip` or `efficientnet-lite0`. None: that of the
            reference, or inception.
        network_path: The file of the feature network; of `dinov2` and `clip` a folder or a Hub id. None: the
            published weights.
        timesteps_per_image: K of nll, the number of terms of the bound for each image. None: 20, or all T of a model
            that has fewer.
        batch_size: Images per network evaluation; on a CPU always 16. Elsewhere it changes rounding.
        device: A device of torch. None: the best one of this process.
        dtype: The type that the network computes in when it samples, fp32 or bf16; nll is always one of float32.
        compile: Whether the network is compiled when it samples.
        uniform: Whether to ignore timesteps that were searched for.
        out: The folder to write to. None: the model's folder; a Hub id needs another one.

    Raises:
        UsageError: When a value cannot work. This is found out before a file is read.
    """

    model: str | Path
    metrics: Sequence[str] = ("fd", "kid", "precision")
    reference: str | Path | None = None
    other_reference: str | Path | None = None
    data: DataConfig | None = None
    split: str = "train"
    test_split: str = DEFAULT_TEST_SPLIT
    num_images: int = 5000
    seed: int = 0
    num_inference_steps: Sequence[int] = ()
    schedulers: Sequence[str] = ()
    guidance_scales: Sequence[float] = ()
    guidance_interval: Sequence[float] | None = None
    guidance_method: str | None = None
    autoguidance_scale: float | None = None
    guidance_model: str | None = None
    network: str | None = None
    network_path: str | Path | None = None
    timesteps_per_image: int | None = None
    batch_size: int = 64
    device: str | None = None
    dtype: str = "fp32"
    compile: bool = False
    uniform: bool = False
    out: str | Path | None = None

    def __post_init__(self) -> None:
        if not self.metrics or set(self.metrics) - set(METRICS):
            raise UsageError(f"metrics must be of {', '.join(METRICS)}, got {', '.join(self.metrics) or 'none'}")
        if {*FIDELITY} & {*self.metrics} and not {*OF_IMAGES_FROM_IMAGES} >= {*self.metrics}:
            raise UsageError(
                f"metrics must be of {', '.join(OF_IMAGES_FROM_IMAGES)} with {' or '.join(FIDELITY)}, got "
                f"{', '.join(self.metrics)}: leave the others out"
            )
        for scheduler in self.schedulers:
            require_choice("scheduler", scheduler, SCHEDULERS)
        require_choice("dtype", self.dtype, DTYPES)
        for name, least in (("num_images", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")
        check_seeds(self.seed, self.num_images)
        method, autoguidance_scale = self.guidance_method, self.autoguidance_scale
        check_guidance(self.guidance_scales or [None], self.guidance_interval, method, autoguidance_scale)
        self._check_guidance_takes_effect()
        if self.data is not None:
            object.__setattr__(self, "data", with_plain_paths(self.data, DataConfig))
            check_values(self.data)
        if self.other_reference is not None and self.reference is None:
            raise UsageError(
                f"other_reference goes with a reference, got {str(self.other_reference)!r} alone: "
                "give --reference, too"
            )

    def _check_guidance_takes_effect(self) -> None:
        """Check that guidance is asked for only where something is sampled."""
        given = {
            "guidance_scale": [scale for scale in self.guidance_scales if scale != 1] or None,
            "guidance_interval": self.guidance_interval,
            "guidance_method": self.guidance_method,
            "autoguidance_scale": self.autoguidance_scale,
            "guidance_model": self.guidance_model,
        }
        for name, value in given.items():
            if value is not None and {*self.metrics} == {"nll"}:
                shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
                raise UsageError(
                    f"{name} has no effect on nll, which is of the model without guidance, got {shown}: leave it out, "
                    "or measure distances"
                )
