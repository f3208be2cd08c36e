"""A network that is exact for images of a normal distribution, whose pixels depend on one another."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from tests.support.networks import smallest_unet_config


def smooth_covariance(side: int, std: float = 0.5, length: float = 2.0) -> Tensor:
    """The covariance of the pixels of smooth images: a Gaussian of their distance, and some noise."""
    axis = torch.arange(side, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    distance = torch.cdist(points, points)
    return std**2 * torch.exp(-(distance**2) / (2 * length**2)) + 1e-3 * torch.eye(side**2, dtype=torch.float64)


class GaussianNetwork(UNet2DModel):
    """A network that predicts E[eps | x_t], or E[x_0 | x_t] or E[v | x_t], for gray images of N(0, covariance).

    If it is consistent, its x_0_hat is not the mean but where the probability flow leads from x_t.
    """

    covariance: Tensor
    alpha_bar: Tensor
    prediction_type: str
    eigen: tuple[Tensor, Tensor]
    is_consistent = False

    def forward(self, sample: Any, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        alpha_bar = self.alpha_bar[torch.as_tensor(timestep).reshape(-1).long()].view(-1, 1, 1)
        values, vectors = self.eigen
        variances = alpha_bar * values + 1 - alpha_bar
        gain = (values / variances).sqrt() if self.is_consistent else alpha_bar.sqrt() * values / variances
        x_t = sample.double().flatten(1)[:, None]
        x_0_hat = (x_t @ vectors * gain) @ vectors.T
        eps = (x_t - alpha_bar.sqrt() * x_0_hat) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0_hat
        prediction = {"epsilon": eps, "sample": x_0_hat, "v_prediction": v}[self.prediction_type]
        return UNet2DOutput(sample=prediction.view(sample.shape).to(sample.dtype))


def gaussian_network(covariance: Tensor, alpha_bar: Tensor, prediction_type: str = "epsilon") -> GaussianNetwork:
    network = GaussianNetwork(**smallest_unet_config(channels=1, sample_size=round(len(covariance) ** 0.5)))
    network.covariance, network.alpha_bar, network.prediction_type = covariance, alpha_bar, prediction_type
    network.eigen = tuple(torch.linalg.eigh(covariance))
    return network
