"""Every formula of the forward process q and the reverse process p (Ho et al. 2020, arXiv 2006.11239).

Code t is 0-based: t = 0 is the first noising step, the paper's t = 1. With x_{-1} standing for the clean image x_0,

    beta                (T,)  the variance of one forward step
    alpha_bar           (T,)  prod_{s <= t} (1 - beta_s); stock's float32 copy is `alphas_cumprod`; 1 for t = -1
    posterior_variance  (T,)  beta-tilde_t of q(x_{t-1} | x_t, x_0), Eq. 7; 0 for t = 0
    snr                       alpha_bar / (1 - alpha_bar), a ratio of powers
    prediction                the network's raw output: eps, x_0, v or the mean of x_{t-1}

Tables are float64 on the CPU. Each coefficient is computed from them in float64 and only then rounded to the type of
the computation, which is never below float32. `timesteps` is an int, a scalar tensor or a (B,) integer tensor.
Sampling may skip timesteps: "x_{t-1}" is then x at the next timestep of the list, and -1 stands for the clean image.
"""

from __future__ import annotations

import math
import operator
import warnings
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from diffusers import DDPMScheduler as StockDDPMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput, rescale_zero_terminal_snr
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hf_ddpm.runtime.errors import UsageError

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"]
PredictionType = Literal["epsilon", "sample", "v_prediction", "previous_sample"]
VarianceType = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]
TimestepSpacing = Literal["linspace", "leading", "trailing"]

LEARNED_VARIANCES = ("learned", "learned_range")
# Those whose step stock computes correctly.
STOCK_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
# The noise schedules that diffusers' solvers know.
SOLVABLE_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# What the config of a tuned model's scheduler says that ours does not know.
OF_LCM = ("original_inference_steps", "timestep_scaling")
# Up to this share of the image's power, x_T cannot be told from noise, so that sampling may start from N(0, I).
MAX_TERMINAL_ALPHA_BAR = 1e-3


class _Coefficients(NamedTuple):
    """The coefficients of one reverse step from t to s, each (B, 1, 1, 1)."""

    alpha_bar: Tensor
    beta: Tensor  # 1 - alpha_bar_t / alpha_bar_s
    posterior_mean_x_0: Tensor
    posterior_mean_x_t: Tensor
    posterior_variance: Tensor
    is_last: Tensor  # s < 0
    is_adjacent: Tensor  # s = t - 1


class DDPMScheduler(StockDDPMScheduler):
    """diffusers' `DDPMScheduler` with all formulas of q and p, and without the faults of stock.

    It is saved and loaded as the stock class, whose config keys it has. Where stock is right, `step` is stock's own
    arithmetic, bit for bit. The arguments are stock's, but they are checked here.

    Args:
        num_train_timesteps: T, at least 1.
        beta_start: beta of t = 0, for the schedules that have ends.
        beta_end: beta of t = T - 1, for the schedules that have ends.
        beta_schedule: `linear`, `scaled_linear`, `squaredcos_cap_v2`, `laplace` or `sigmoid`, see `_beta_table`.
        trained_betas: T values of beta instead of a schedule.
        variance_type: One of stock's six. The network's output for `learned` is a log-variance, that for
            `learned_range` is the v of Nichol & Dhariwal 2021, Eq. 15. With either the network has twice the
            channels, the prediction first.
        clip_sample: Clip x_0_hat to [-clip_sample_range, clip_sample_range].
        prediction_type: `epsilon`, `sample` (x_0), `v_prediction` (Salimans & Ho 2022) or `previous_sample`, the step
            denoiser, whose output is the mean of x_{t-1}.
        thresholding: Threshold x_0_hat dynamically (Saharia et al. 2022, Sec. 2.3) instead.
        dynamic_thresholding_ratio: The quantile of the absolute values of x_0_hat that becomes the threshold.
        clip_sample_range: The bound of clipping.
        sample_max_value: The largest threshold.
        timestep_spacing: How `set_timesteps` spaces the steps of sampling.
        steps_offset: What `leading` spacing adds to each timestep.
        rescale_betas_zero_snr: Rescale the betas so that alpha_bar_T = 0 (Lin et al. 2023, Algorithm 1).

    Raises:
        ValueError: When sampling or training cannot work with these values.
    """

    if TYPE_CHECKING:

        @property
        # A dict to type checkers, but its keys are attributes, too.
        def config(self) -> Any: ...  # noqa: D102

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: list[float] | None = None,
        variance_type: VarianceType = "fixed_small",
        clip_sample: bool = True,
        prediction_type: PredictionType = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: TimestepSpacing = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ):
        if isinstance(trained_betas, np.ndarray):
            trained_betas = trained_betas.tolist()
        _check_choice("beta_schedule", beta_schedule, BetaSchedule)
        _check_choice("prediction_type", prediction_type, PredictionType)
        _check_choice("variance_type", variance_type, VarianceType)
        _check_choice("timestep_spacing", timestep_spacing, TimestepSpacing)
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1, got {num_train_timesteps}")
        if trained_betas is not None and len(trained_betas) != num_train_timesteps:
            raise ValueError(
                f"trained_betas must hold num_train_timesteps = {num_train_timesteps} values, got {len(trained_betas)}"
            )
        if rescale_betas_zero_snr and prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr leaves no signal in x_T, and x_0 cannot be recovered from eps there, "
                "got prediction_type='epsilon': use 'v_prediction', 'sample' or 'previous_sample'"
            )
        if rescale_betas_zero_snr and timestep_spacing == "leading":
            raise ValueError(
                "rescale_betas_zero_snr takes effect only if sampling starts at T-1, "
                "got timestep_spacing='leading': use 'trailing' or 'linspace'"
            )
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,  # pyright: ignore[reportArgumentType]
            trained_betas=trained_betas,
            variance_type=variance_type,
            clip_sample=clip_sample,
            prediction_type=prediction_type,  # pyright: ignore[reportArgumentType]
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            steps_offset=steps_offset,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        # Otherwise `from_config` would drop arguments that were given by position, see `complete_config`, and another
        # class would take its own defaults for those that were not given: HeunDiscreteScheduler's betas end at 0.012.
        self.register_to_config(_use_default_values=[])
        if trained_betas is not None:
            beta = torch.as_tensor(trained_betas, dtype=torch.float64)
        else:
            beta = _beta_table(beta_schedule, num_train_timesteps, beta_start, beta_end)
        if rescale_betas_zero_snr:
            beta = rescale_zero_terminal_snr(beta)
        if not (beta.min() > 0 and beta.max() <= 1):
            raise ValueError(f"each beta must be in (0, 1], got {beta.min():g} to {beta.max():g}: change the schedule")
        if beta[-1] == 1 and (prediction_type == "epsilon" or timestep_spacing == "leading"):
            raise ValueError(
                "the last beta is 1, which leaves no signal in x_T: with prediction_type='epsilon' x_0 cannot be "
                "recovered there, and timestep_spacing='leading' never starts there, got "
                f"{prediction_type!r} and {timestep_spacing!r}"
            )
        self.beta = beta
        self.alpha_bar = torch.cumprod(1 - beta, dim=0)
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        self.posterior_variance = beta * (1 - alpha_bar_prev) / (1 - self.alpha_bar)
        self._alpha_bar_on: dict[torch.device, Tensor] = {}
        if self.alpha_bar[-1] > MAX_TERMINAL_ALPHA_BAR:
            scale = 1000 / num_train_timesteps
            ends = f", or beta_start={1e-4 * scale:g}, beta_end={min(0.02 * scale, 0.999):g}"
            warnings.warn(
                f"alpha_bar_T = {self.alpha_bar[-1]:.3g} with num_train_timesteps={num_train_timesteps}: x_T still "
                "shows the image, but sampling starts from N(0, I). Use beta_schedule='squaredcos_cap_v2'"
                f"{ends if beta_schedule == 'linear' and trained_betas is None and scale != 1 else ''}",
                stacklevel=3,
            )

    # The forward process q

    def forward_step(
        self,
        previous_samples: Tensor,
        noise: Tensor,
        timesteps: int | Tensor,
        previous_timesteps: int | Tensor | None = None,
    ) -> Tensor:
        """Return x_t after one step of the Markov chain, Ho et al. Eq. 2, or after several at once.

        ::

            x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps

        For a step from s that skips timesteps, 1 - beta_t is alpha_bar_t / alpha_bar_s.

        Args:
            previous_samples: x_{t-1}, (B, C, H, W); the clean image for t = 0.
            noise: eps, (B, C, H, W), N(0, I).
            timesteps: t in [0, T).
            previous_timesteps: s with -1 <= s < t; None: t - 1.

        Returns:
            x_t, (B, C, H, W).
        """
        c = self._coefficients(timesteps, previous_timesteps, previous_samples)
        return _weighted_sum((1 - c.beta).sqrt(), previous_samples, c.beta.sqrt(), noise)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Return x_t by the closed form of the forward process, Ho et al. Eq. 4.

        ::

            x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps

        Args:
            original_samples: x_0, (B, C, H, W) in [-1, 1].
            noise: eps, (B, C, H, W), N(0, I).
            timesteps: t in [0, T).

        Returns:
            x_t, (B, C, H, W), in the type of x_0 and eps, computed in float32 at least.
        """
        alpha_bar = self._alpha_bar_like(timesteps, original_samples)
        return _weighted_sum(alpha_bar.sqrt(), original_samples, (1 - alpha_bar).sqrt(), noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Return v, Salimans & Ho 2022, Sec. 4.

        ::

            v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0

        Args:
            sample: x_0, (B, C, H, W) in [-1, 1].
            noise: eps, (B, C, H, W), N(0, I).
            timesteps: t in [0, T).

        Returns:
            v, (B, C, H, W), in the type of x_0 and eps, computed in float32 at least.
        """
        alpha_bar = self._alpha_bar_like(timesteps, sample)
        return _weighted_sum(alpha_bar.sqrt(), noise, -(1 - alpha_bar).sqrt(), sample)

    def posterior(
        self,
        original_samples: Tensor,
        samples: Tensor,
        timesteps: int | Tensor,
        previous_timesteps: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and variance of q(x_{t-1} | x_t, x_0), Ho et al. Eq. 6 and 7.

        ::

            mean = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x_0
                   + sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t
            variance = (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t

        Args:
            original_samples: x_0, (B, C, H, W).
            samples: x_t, (B, C, H, W).
            timesteps: t in [0, T).
            previous_timesteps: s with -1 <= s < t, for a step that skips timesteps; None: t - 1.

        Returns:
            The mean, the variance and the log-variance, each (B, C, H, W). The variance is 0 where s = -1, and the
            log-variance there is that of t = 1.
        """
        c = self._coefficients(timesteps, previous_timesteps, samples)
        mean = _weighted_sum(c.posterior_mean_x_0, original_samples, c.posterior_mean_x_t, samples)
        log_variance = self._log_clipped_at_t1(c.posterior_variance)
        return mean, c.posterior_variance.to(mean).expand_as(mean), log_variance.to(mean).expand_as(mean)

    def snr(self, timesteps: int | Tensor) -> Tensor:
        """Return the signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t), a ratio of powers.

        Args:
            timesteps: t in [0, T).

        Returns:
            The ratio, (B,) float64, or float32 on devices without float64.
        """
        t = _as_vector(timesteps, timesteps.device if isinstance(timesteps, Tensor) else torch.device("cpu"))
        alpha_bar = self._alpha_bar_like(t, t)
        return alpha_bar / (1 - alpha_bar)

    # What the network's output means

    def training_target(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Return what the network should put out for x_t = `add_noise(x_0, eps, t)`.

        By prediction type::

            epsilon           eps
            sample            x_0
            v_prediction      v
            previous_sample   the mean of q(x_{t-1} | x_t, x_0)

        That mean has the expectation of x_{t-1} (Ho et al. Table 2, "mu-tilde prediction") and less variance than a
        draw of x_{t-1}.

        Args:
            original_samples: x_0, (B, C, H, W).
            noise: eps, (B, C, H, W).
            timesteps: t in [0, T).

        Returns:
            The target, (B, C, H, W).
        """
        match self.config.prediction_type:
            case "epsilon":
                return noise
            case "sample":
                return original_samples
            case "v_prediction":
                return self.get_velocity(original_samples, noise, timesteps)
            case _:
                x_t = self.add_noise(original_samples, noise, timesteps)
                return self.posterior(original_samples, x_t, timesteps)[0]

    def predict_original(self, model_output: Tensor, samples: Tensor, timesteps: int | Tensor) -> Tensor:
        """Return x_0_hat, unclipped, from the network's output at x_t.

        By prediction type::

            epsilon           (x_t - sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_bar_t), Ho et al. Eq. 15
            sample            the output itself
            v_prediction      sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v_hat
            previous_sample   the x_0 for which Eq. 7 has the output as its mean

        Args:
            model_output: The output, (B, C, H, W), or (B, 2C, H, W) with a learned variance, whose first half counts.
            samples: x_t, (B, C, H, W).
            timesteps: t in [0, T).

        Returns:
            x_0_hat, (B, C, H, W).
        """
        prediction, x_t = model_output[:, : samples.shape[1]], samples
        if self.config.prediction_type == "sample":
            return prediction
        c = self._coefficients(timesteps, None, x_t)
        match self.config.prediction_type:
            case "epsilon":
                return _weighted_sum(c.alpha_bar.rsqrt(), x_t, -(1 / c.alpha_bar - 1).sqrt(), prediction)
            case "v_prediction":
                return _weighted_sum(c.alpha_bar.sqrt(), x_t, -(1 - c.alpha_bar).sqrt(), prediction)
            case _:
                mean_x_t = c.posterior_mean_x_t / c.posterior_mean_x_0
                return _weighted_sum(1 / c.posterior_mean_x_0, prediction, -mean_x_t, x_t)

    def predict_noise(self, model_output: Tensor, samples: Tensor, timesteps: int | Tensor) -> Tensor:
        """Return eps_hat, the noise in x_t beside x_0_hat.

        By prediction type::

            epsilon           the output itself
            v_prediction      sqrt(alpha_bar_t) v_hat + sqrt(1 - alpha_bar_t) x_t
            otherwise         (x_t - sqrt(alpha_bar_t) x_0_hat) / sqrt(1 - alpha_bar_t)

        Args:
            model_output: The output, (B, C, H, W), or (B, 2C, H, W) with a learned variance, whose first half counts.
            samples: x_t, (B, C, H, W).
            timesteps: t in [0, T).

        Returns:
            eps_hat, (B, C, H, W).
        """
        prediction, x_t = model_output[:, : samples.shape[1]], samples
        if self.config.prediction_type == "epsilon":
            return prediction
        alpha_bar = self._alpha_bar_like(timesteps, x_t)
        if self.config.prediction_type == "v_prediction":
            return _weighted_sum(alpha_bar.sqrt(), prediction, (1 - alpha_bar).sqrt(), x_t)
        x_0_hat = self.predict_original(model_output, x_t, timesteps)
        return _weighted_sum((1 - alpha_bar).rsqrt(), x_t, -(alpha_bar / (1 - alpha_bar)).sqrt(), x_0_hat)

    # The reverse process p

    def reverse_distribution(
        self,
        model_output: Tensor,
        samples: Tensor,
        timesteps: int | Tensor,
        previous_timesteps: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean and log-variance of p(x_{t-1} | x_t), Ho et al. Eq. 1 and Sec. 3.2.

        The mean is that of Eq. 7 for x_0_hat, which is clipped or thresholded first if the config says so. The output
        of a step denoiser is the mean itself, unless the step skips timesteps. With v the second half of the output
        (Nichol & Dhariwal 2021, Eq. 15), the log-variance is, by variance type::

            fixed_small, fixed_small_log   log posterior_variance; that of t = 1 where it would be log 0
            fixed_large, fixed_large_log   log beta_t; that of `fixed_small` in the step to x_0
            learned                        v
            learned_range                  (v + 1)/2 log beta_t + (1 - v)/2 log posterior_variance

        Args:
            model_output: The network's output, (B, C, H, W), or (B, 2C, H, W) with a learned variance.
            samples: x_t, (B, C, H, W).
            timesteps: t in [0, T).
            previous_timesteps: s with -1 <= s < t, for a step that skips timesteps; None: t - 1.

        Returns:
            The mean, the log-variance and x_0_hat, each (B, C, H, W).

        Raises:
            ValueError: When the channels of `model_output` do not fit the variance type.
        """
        prediction, variance_output = self.split_output(model_output, samples)
        x_t = samples
        c = self._coefficients(timesteps, previous_timesteps, x_t)
        x_0_hat = self.predict_original(prediction, x_t, timesteps)
        if self.config.thresholding:
            x_0_hat = self._threshold_sample(x_0_hat)
        elif self.config.clip_sample:
            x_0_hat = x_0_hat.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        mean = _weighted_sum(c.posterior_mean_x_0, x_0_hat, c.posterior_mean_x_t, x_t)
        if self.config.prediction_type == "previous_sample":
            mean = torch.where(c.is_adjacent, prediction, mean)

        min_log = self._log_clipped_at_t1(c.posterior_variance).to(mean)
        max_log = c.beta.log().to(mean)
        match self.config.variance_type:
            case "learned":
                log_variance = variance_output
            case "learned_range":
                fraction = (variance_output + 1) / 2
                log_variance = fraction * max_log + (1 - fraction) * min_log
            case "fixed_large" | "fixed_large_log":
                log_variance = torch.where(c.is_last, min_log, max_log)
            case "fixed_small" | "fixed_small_log":
                log_variance = min_log
            case other:
                raise ValueError(f"no variance is defined for the variance_type {other!r}")
        return mean, log_variance.expand_as(mean), x_0_hat

    def split_output(self, model_output: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Split the network's output into prediction and variance part.

        Args:
            model_output: The output, (B, C, H, W), or (B, 2C, H, W) with a learned variance.
            samples: x_t, (B, C, H, W).

        Returns:
            The prediction, (B, C, H, W), and the variance part of the same shape, or (B, 0, H, W) if the variance is
            not learned.

        Raises:
            ValueError: When the channels of `model_output` do not fit the variance type.
        """
        channels = samples.shape[1]
        expected = 2 * channels if self.config.variance_type in LEARNED_VARIANCES else channels
        if model_output.shape[1] != expected:
            raise ValueError(
                f"variance_type={self.config.variance_type!r} needs a model output of {expected} channels for samples "
                f"of {channels}, got {model_output.shape[1]}: change the network's out_channels or variance_type"
            )
        return model_output[:, :channels], model_output[:, channels:]

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        deterministic: bool = False,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Draw x_{t-1} from p(x_{t-1} | x_t), Ho et al. Algorithm 2, without noise in the step that ends at x_0.

        Args:
            model_output: The network's output at x_t, (B, C, H, W), or (B, 2C, H, W) with a learned variance.
            timestep: t, a scalar or (B,), each in `timesteps`.
            sample: x_t, (B, C, H, W).
            generator: The generator of the noise; a list of B gives each image its own.
            return_dict: Return a `DDPMSchedulerOutput` rather than the tuple (prev_sample, pred_original_sample).
            deterministic: Add no noise: x_{t-1} is the mean, for a step denoiser x_{t-1} = f(x_t).

        Returns:
            x_{t-1} and x_0_hat, each (B, C, H, W) in the type of `sample`.
        """
        previous = self.previous_timestep(timestep)
        if self._stock_is_right(timestep, previous, sample, model_output) and not deterministic:
            self.split_output(model_output, sample)
            return super().step(model_output, timestep, sample, generator, return_dict)  # type: ignore[arg-type]

        t, s = _as_vector(timestep, sample.device), _as_vector(previous, sample.device)
        x_t = sample.to(torch.promote_types(sample.dtype, torch.float32))
        mean, log_variance, x_0_hat = self.reverse_distribution(model_output.to(x_t.dtype), x_t, t, s)
        noisy = (s >= 0).view(-1, *[1] * (sample.ndim - 1))
        if not deterministic and bool(noisy.any()):
            noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            mean = torch.where(noisy, mean + (log_variance / 2).exp() * noise, mean)
        x_prev, x_0_hat = mean.to(sample.dtype), x_0_hat.to(sample.dtype)
        return DDPMSchedulerOutput(x_prev, x_0_hat) if return_dict else (x_prev, x_0_hat)

    def _stock_is_right(
        self, timestep: int | Tensor, previous: int | Tensor, sample: Tensor, model_output: Tensor
    ) -> bool:
        """Return whether stock's `step` computes this step correctly, so that it is taken as it is.

        Images are then equal to those of stock, bit for bit. The cost is that this class computes the same step in two
        ways, which round differently: stock's, and the one in `step` for all other cases. A test compares them.
        """
        return (
            (isinstance(timestep, int) or timestep.ndim == 0)
            and sample.dtype == model_output.dtype == torch.float32
            and self.config.prediction_type != "previous_sample"
            and self.config.variance_type in STOCK_VARIANCES
            # Stock adds noise in a last step from t > 0. Only a fixed_small variance is 0 there, so that it adds none
            # that matters.
            and (int(previous) >= 0 or int(timestep) == 0 or self.config.variance_type.startswith("fixed_small"))
        )

    # The list of timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Set the timesteps of sampling, strictly falling in [0, T), after Lin et al. 2023, Table 2.

        By spacing, with i = 0, ..., n-1::

            linspace   round(i (T-1)/(n-1)), or T-1 for n = 1
            leading    floor(i T/n) + steps_offset
            trailing   round(T - i T/n) - 1

        `leading` is stock's list if n divides T; otherwise it starts closer to T.

        Args:
            num_inference_steps: n in [1, T].
            device: The device of the list.
            timesteps: A list of one's own instead of n.

        Raises:
            ValueError: When the list cannot be made, or is not strictly falling in [0, T).
        """
        num_train: int = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                "give one of num_inference_steps and timesteps, got "
                + ("both" if timesteps is not None else "neither")
            )
        if timesteps is not None:
            chosen = [int(t) for t in timesteps]
            if not chosen or any(later >= t for t, later in pairwise(chosen)):
                raise ValueError(f"timesteps must fall strictly, got {chosen}")
            if chosen[0] >= num_train or chosen[-1] < 0:
                raise ValueError(f"timesteps must be in [0, {num_train}), got {chosen[0]} to {chosen[-1]}")
        else:
            n = require_num_inference_steps(num_inference_steps, num_train)
            chosen = _spaced_timesteps(self.config.timestep_spacing, n, num_train, self.config.steps_offset)
            if chosen[0] >= num_train:
                raise ValueError(
                    f"the first timestep must be below {num_train}, got {chosen[0]}: "
                    f"use steps_offset=0, not {self.config.steps_offset}, with num_inference_steps={n}"
                )
            if self.alpha_bar[chosen[0]] > MAX_TERMINAL_ALPHA_BAR >= self.alpha_bar[-1]:
                warnings.warn(
                    f"sampling starts from N(0, I) at t={chosen[0]}, where alpha_bar = "
                    f"{self.alpha_bar[chosen[0]]:.3g}: noisy images still show something there. "
                    "Use timestep_spacing='trailing'",
                    stacklevel=2,
                )
            self.num_inference_steps = n
        self.custom_timesteps = timesteps is not None
        self.timesteps = torch.tensor(chosen, dtype=torch.int64, device=device)

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """Return the next timestep of the list, or t - 1 if there is no list.

        Args:
            timestep: t, a scalar or (B,), each in the list.

        Returns:
            The timestep that sampling visits after t, in the shape of `timestep`; -1 after the last.

        Raises:
            ValueError: When t is not in the list.
        """
        if not self.custom_timesteps and not self.num_inference_steps:
            return timestep - 1
        t = torch.as_tensor(timestep, device=self.timesteps.device)
        found = self.timesteps == t.unsqueeze(-1)
        if not bool(found.any(dim=-1).all()):
            raise ValueError(
                f"timestep must be one of the scheduler's {len(self.timesteps)} timesteps, got {timestep}"
            )
        following = torch.cat([self.timesteps[1:], self.timesteps.new_tensor([-1])])
        return following[found.int().argmax(dim=-1)]

    # Coefficients at timesteps

    def _alpha_bar_at(self, timesteps: Tensor) -> Tensor:
        """Return alpha_bar in float64 at t >= -1, where alpha_bar_{-1} = 1."""
        device = timesteps.device
        if device not in self._alpha_bar_on:
            one = torch.ones(1, dtype=torch.float64)
            self._alpha_bar_on[device] = torch.cat([one, self.alpha_bar]).to(device)
        return self._alpha_bar_on[device][timesteps + 1]

    def _alpha_bar_like(self, timesteps: int | Tensor, samples: Tensor) -> Tensor:
        """Return alpha_bar_t alone, as `_coefficients` does."""
        device = _device_of_tables(samples)
        alpha_bar = self._alpha_bar_at(self._checked(timesteps, device))
        if samples.device != device:
            alpha_bar = alpha_bar.float().to(samples.device)
        return alpha_bar.view(-1, *[1] * (samples.ndim - 1))

    def _checked(self, timesteps: int | Tensor, device: torch.device) -> Tensor:
        """Return the timesteps as a vector on a device, (B,); raise ValueError where one is not in [0, T)."""
        t = _as_vector(timesteps, device)
        # On other devices the check would wait for the device in each training step.
        if device.type == "cpu" and not bool((t >= 0).all() & (t < len(self.alpha_bar)).all()):
            raise ValueError(f"timesteps must be in [0, {len(self.alpha_bar)}), got {t.tolist()}")
        return t

    def _coefficients(
        self, timesteps: int | Tensor, previous_timesteps: int | Tensor | None, samples: Tensor
    ) -> _Coefficients:
        """Return the coefficients of the step from t to s on the device of `samples`; s = t - 1 if it is None."""
        device = _device_of_tables(samples)
        t = self._checked(timesteps, device)
        s = t - 1 if previous_timesteps is None else _as_vector(previous_timesteps, device)
        if device.type == "cpu" and not bool((s >= -1).all() & (s < t).all()):
            raise ValueError(f"previous_timesteps must be in [-1, t), got {s.tolist()} for t = {t.tolist()}")
        alpha_bar, alpha_bar_prev = self._alpha_bar_at(t), self._alpha_bar_at(s)
        alpha = alpha_bar / alpha_bar_prev
        beta = 1 - alpha
        values = _Coefficients(
            alpha_bar=alpha_bar,
            beta=beta,
            posterior_mean_x_0=alpha_bar_prev.sqrt() * beta / (1 - alpha_bar),
            posterior_mean_x_t=alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar),
            posterior_variance=beta * (1 - alpha_bar_prev) / (1 - alpha_bar),
            is_last=s < 0,
            is_adjacent=s == t - 1,
        )
        if samples.device != device:
            tables = (v if v.dtype == torch.bool else v.float() for v in values)
            values = _Coefficients(*(v.to(samples.device) for v in tables))
        return _Coefficients(*(v.view(-1, *[1] * (samples.ndim - 1)) for v in values))

    def _log_clipped_at_t1(self, posterior_variance: Tensor) -> Tensor:
        """Return log posterior_variance, where a variance of 0 is replaced by that of t = 1."""
        smallest = float(self.posterior_variance[1]) if len(self.posterior_variance) > 1 else float(self.beta[0])
        return torch.where(posterior_variance > 0, posterior_variance, smallest).log()


def require_num_inference_steps(num_inference_steps: Any, num_train_timesteps: int) -> int:
    """Return a number of sampling steps as an int, if the model can take that many.

    Raises:
        UsageError: When it is no integer in [1, num_train_timesteps].
    """
    is_integer = hasattr(num_inference_steps, "__index__")
    if not is_integer or not 1 <= operator.index(num_inference_steps) <= num_train_timesteps:
        raise UsageError(
            f"num_inference_steps must be in [1, {num_train_timesteps}], got {num_inference_steps}: "
            f"the model was trained with {num_train_timesteps} timesteps"
        )
    return operator.index(num_inference_steps)


def complete_config(config: Any) -> dict[str, Any]:
    """Return a scheduler's config for `from_config`, without diffusers' list of the values that were defaults.

    `from_config` drops every value that the list names, and the list names every argument that was given by position:
    with stock, `from_config(DDPMScheduler(100).config)` has 1000 timesteps.
    """
    return {name: value for name, value in config.items() if name != "_use_default_values"}


def as_our_scheduler(config: Any) -> Any:
    """Return our `DDPMScheduler` for the config of any scheduler of diffusers with a beta schedule.

    Values that the config lacks get the defaults of stock `DDPMScheduler`, and so does a variance type of None, which
    solvers have. If no signal is left in x_T, the spacing `leading` would start at T-1 only with all T steps. It then
    becomes `trailing`, whose list of T steps is the same.
    """
    ours = {name: value for name, value in complete_config(config).items() if name not in OF_LCM}
    if ours.get("variance_type", "fixed_small") is None:
        del ours["variance_type"]
    betas = ours.get("trained_betas")
    has_no_signal = ours.get("rescale_betas_zero_snr") or (betas is not None and betas[-1] == 1)
    if has_no_signal and ours.get("timestep_spacing", "leading") == "leading":
        ours["timestep_spacing"] = "trailing"
    scheduler: Any = DDPMScheduler.from_config(ours)
    if is_tuned(config):  # which its config goes on to say
        scheduler.register_to_config(**{name: config[name] for name in OF_LCM if name in config})
    return scheduler


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")


def _device_of_tables(samples: Tensor) -> torch.device:
    """Return where to compute what is multiplied with samples: MPS has no float64, the CPU computes (B,) values."""
    return torch.device("cpu") if samples.device.type == "mps" else samples.device


def _as_vector(timesteps: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(timesteps, float) or (isinstance(timesteps, Tensor) and timesteps.is_floating_point()):
        raise ValueError(f"timesteps must be integers in [0, T), got {timesteps}")
    return torch.as_tensor(timesteps, dtype=torch.int64, device=device).reshape(-1)


def _weighted_sum(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Return a x + b y in the type of x and y, computed in float32 at least."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    compute = torch.promote_types(dtype, torch.float32)
    return (a.to(compute) * x + b.to(compute) * y).to(dtype)


def _beta_table(schedule: str, num_steps: int, start: float, end: float) -> Tensor:
    """Return beta of a schedule, (T,) float64.

    ::

        linear              evenly from `start` to `end`
        scaled_linear       the square of the even steps from sqrt(start) to sqrt(end)
        sigmoid             from `start` to `end` along a sigmoid over [-6, 6]
        squaredcos_cap_v2   1 - f((t+1)/T) / f(t/T), at most 0.999; Nichol & Dhariwal 2021, Eq. 17
        laplace             the same with another f, for which log SNR has a Laplace distribution
    """
    match schedule:
        case "linear":
            return torch.linspace(start, end, num_steps, dtype=torch.float64)
        case "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, num_steps, dtype=torch.float64) ** 2
        case "sigmoid":
            return torch.linspace(-6, 6, num_steps, dtype=torch.float64).sigmoid() * (end - start) + start
    u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    if schedule == "squaredcos_cap_v2":
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    else:
        log_snr = -torch.sign(0.5 - u) * torch.log(1 - 2 * (0.5 - u).abs() + 1e-6)
        f = torch.sigmoid(log_snr / 2).sqrt()
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def _spaced_timesteps(spacing: str, n: int, num_train: int, offset: int) -> list[int]:
    """Return the n falling timesteps of `set_timesteps`."""
    # numpy rounds halves here as it does in stock, so that the lists are equal where stock's are right.
    match spacing:
        case "leading":
            rising = [i * num_train // n + offset for i in range(n)]
        case "linspace":
            rising = np.linspace(0, num_train - 1, n).round().astype(int).tolist() if n > 1 else [num_train - 1]
        case _:
            # For 62 of the n up to 1000 rounding makes this list one too long, with t = -1 at its end.
            falling = np.arange(num_train, 0, -num_train / n)[:n]
            rising = (falling.round().astype(int) - 1).tolist()[::-1]
    return rising[::-1]


def is_solvable(config: Any) -> bool:
    """Return whether DDIM, DPM-Solver++ and UniPC can sample a model whose scheduler has this config.

    They need a prediction of eps, x_0 or v, which a step denoiser does not make, and one of the noise schedules that
    diffusers' solvers know. Tables of one's own (`trained_betas`) must leave signal in x_T.

    Args:
        config: The scheduler's config. A value that it lacks makes the answer False.
    """
    betas = config.get("trained_betas")
    return (
        config.get("prediction_type") in ("epsilon", "sample", "v_prediction")
        and config.get("beta_schedule") in SOLVABLE_SCHEDULES
        and (betas is None or betas[-1] < 1)
    )


def is_tuned(config: Any) -> bool:
    """Return whether a model was tuned for few steps: its scheduler is an `LCMScheduler` that knows all T timesteps.

    By its defaults that scheduler knows 50 timesteps, as those of models that were distilled so.

    Args:
        config: The scheduler's config.
    """
    steps = config.get("original_inference_steps")
    return steps is not None and steps == config.get("num_train_timesteps")
