"""The words by which an evaluation is asked for; they stand apart and answer a wrong one before torch loads."""

from __future__ import annotations

from collections.abc import Sequence

from hf_ddpm.runtime.errors import UsageError

# Metrics that compare features of samples with a reference -> the names of their results.
DISTANCES = {
    "fd": ("fd",),
    "kid": ("kid",),
    "cmmd": ("cmmd",),
    "precision": ("precision", "recall", "density", "coverage"),
}
# The distance between moments and spectra of the values themselves.
VALUES = "values"
VALUES_NAME = "Fréchet distance of values"
# Metrics that compare each sample of a model that makes images from images with the truth -> their names.
FIDELITY = {"psnr": "PSNR in dB", "ssim": "SSIM", "lpips": "LPIPS"}
METRICS = (*DISTANCES, "nll", "memorization", VALUES, *FIDELITY)
OF_IMAGES_FROM_IMAGES = (*FIDELITY, *DISTANCES)
NETWORK_NAMES = ("inception", "dinov2", "clip", "efficientnet-lite0")

# Of anomaly maps.
DEFAULT_STRENGTHS = (0.4,)  # benchmarks/anomaly/table.md
DEFAULT_NUM_RECONSTRUCTIONS = 8


def check_strengths(strengths: Sequence[float]) -> None:
    """Check that strengths are shares of the steps of sampling.

    Raises:
        UsageError: When there are none, or one is not in (0, 1].
    """
    if not strengths:
        raise UsageError("strength must be one or more numbers in (0, 1], got none")
    for strength in strengths:
        if not 0 < strength <= 1:
            raise UsageError(f"strength must be in (0, 1], the share of the steps of sampling, got {strength:g}")
