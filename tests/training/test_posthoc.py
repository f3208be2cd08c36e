"""Reconstructed averages against the integral, quadrature, and averages that were tracked."""

import json
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.posthoc import (
    MAX_PROFILE_ERROR,
    MAX_STD,
    TRACKED_STDS,
    gamma_from_std,
    inner_product,
    mixture,
    power_decay,
    reconstruct,
    snapshot_bytes,
    snapshots,
    std_from_gamma,
    write_average,
)

STDS = (0.035, 0.05, 0.07, 0.1, 0.15, 0.25)


def save_snapshot(run: Path, images: int, averages: dict) -> None:
    (run / "ema").mkdir(parents=True, exist_ok=True)
    (run / "ema" / f"snapshot-{images:012d}.safetensors").write_bytes(snapshot_bytes(images, averages))


def even(count: int) -> list[tuple[float, float]]:
    return [(64.0 * (i + 1), std) for i in range(count) for std in TRACKED_STDS]


def relative_error(actual: dict, expected: dict) -> float:
    error = sum((actual[k].double() - expected[k].double()).square().sum() for k in expected)
    return math.sqrt(error / sum(expected[k].double().square().sum() for k in expected))


def updated(average: dict, weights: dict, decay: float) -> dict:
    return {k: decay * average[k] + (1 - decay) * weights[k].to(average[k].dtype) for k in average}


def test_gamma_from_std_inverts_std_from_gamma():
    for std in (1e-4, 0.03, *TRACKED_STDS, 0.2, 0.2886):
        assert std_from_gamma(gamma_from_std(std)) == pytest.approx(std, rel=1e-12)
    assert gamma_from_std(MAX_STD) == pytest.approx(0, abs=1e-12)
    # A Beta(gamma + 1, 1) distribution has this standard deviation.
    tau = (np.arange(10**5) + 0.5) / 10**5
    p = (gamma_from_std(0.1) + 1) * tau ** gamma_from_std(0.1) / 10**5
    assert math.sqrt(p @ tau**2 - (p @ tau) ** 2) == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("std", [0, -0.1, 0.289, 1, math.nan, math.inf])
def test_gamma_from_std_refuses_impossible_stds(std):
    with pytest.raises(UsageError, match=r"std must be above 0 and at most 0\.2886, got"):
        gamma_from_std(std)


@pytest.mark.parametrize("std", [0.03, 0.1, 0.25])
def test_power_decay_recursion_is_the_integral(std):
    rng = np.random.default_rng(0)
    weights, steps = rng.normal(size=500), np.repeat([48, 16, 64], [200, 200, 100])
    average, n = 1e9, 0
    for weight, step in zip(weights, steps.tolist(), strict=True):
        decay = power_decay(n, step, std)
        assert decay == 0 if n == 0 else 0 < decay < 1
        average, n = decay * average + (1 - decay) * weight, n + step
    cumulative = (np.concatenate([[0], np.cumsum(steps)]) / n) ** (gamma_from_std(std) + 1)
    assert average == pytest.approx(weights @ np.diff(cumulative), abs=1e-12)


@pytest.mark.slow
def test_inner_product_and_profile_error_are_the_integrals():
    tau = (np.arange(2 * 10**5) + 0.5) / 10**5

    def survival(n, std):
        return 1 - np.minimum(tau / n, 1) ** (gamma_from_std(std) + 1)

    pairs = [(0.3, 0.05), (0.9, 0.25), (1.0, 0.1), (1.7, 0.05)]
    for n, std in pairs:
        for m, other in pairs:
            exact = inner_product(n, gamma_from_std(std), m, gamma_from_std(other))
            assert exact == pytest.approx(survival(n, std) @ survival(m, other) / 10**5, rel=1e-6)
    c, error = mixture(pairs, 1.0, 0.15)
    fit = sum(a * survival(*pair) for a, pair in zip(c, pairs, strict=True)) - survival(1.0, 0.15)
    assert error == pytest.approx(math.sqrt(fit @ fit / 10**5), rel=1e-4)
    assert c.sum() == pytest.approx(1, abs=1e-12)
    # The least one: any other combination that sums to 1 is worse.
    for change in np.random.default_rng(0).normal(size=(20, 4)) * 1e-3:
        c_2 = c + change - change.mean()
        other = sum(a * survival(*pair) for a, pair in zip(c_2, pairs, strict=True)) - survival(1.0, 0.15)
        assert other @ other >= fit @ fit


@pytest.mark.parametrize("std", TRACKED_STDS)
def test_mixture_of_a_tracked_average_is_its_snapshot(std):
    for count in (1, 16, 64):
        c, error = mixture(even(count), 64.0 * count, std)
        assert c == pytest.approx(np.eye(2 * count)[-2 + TRACKED_STDS.index(std)], abs=1e-8)
        assert error == 0
    # Nor is it a special case: a neighboring std has almost the same coefficients.
    assert c == pytest.approx(mixture(even(64), 64.0 * 64, std * (1 + 1e-7))[0], abs=1e-4)


def test_mixture_of_more_snapshots_is_nearer_with_small_coefficients():
    for std in STDS:
        errors = [mixture(even(count), 64.0 * count, std)[1] for count in (4, 16, 64)]
        assert errors[0] > 10 * errors[1] > 100 * errors[2] or std in TRACKED_STDS
        assert errors[1] < MAX_PROFILE_ERROR
    for count in (64, 256):
        c, error = mixture(even(count), 64.0 * count, 0.02)
        assert np.abs(c).sum() < 50
        assert error < 2e-4
    # A run that stopped just after its last snapshot.
    c, error = mixture([*even(16), (1024.5, 0.05), (1024.5, 0.1)], 1024.5, 0.07)
    assert np.abs(c).sum() < 100
    assert error < MAX_PROFILE_ERROR


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict]:
    """A run with 16 snapshots of a small network, and averages tracked in float64: (images, std) -> average."""
    run = tmp_path_factory.mktemp("run")
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.SiLU(), torch.nn.Linear(32, 2))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]))
    named = {k: p.detach() for k, p in network.named_parameters()}
    tracked = {std: {k: torch.zeros_like(p) for k, p in named.items()} for std in TRACKED_STDS}
    direct = {std: {k: torch.zeros_like(p, dtype=torch.float64) for k, p in named.items()} for std in STDS}
    optimizer, steps, n = torch.optim.Adam(network.parameters()), 1200, 0
    kept = {}
    for step in range(steps):
        batch = 16 if step < 400 else 8
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 + math.cos(math.pi * step / steps))
        x = torch.randn(batch, 4, generator=generator)
        y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1) + 0.3 * torch.randn(batch, 2, generator=generator)
        optimizer.zero_grad()
        (network(x) - y).square().mean().backward()
        optimizer.step()
        for averages in (tracked, direct):
            for std in averages:
                averages[std] = updated(averages[std], named, power_decay(n, batch, std))
        n += batch
        if n % 800 == 0:
            save_snapshot(run, n, tracked)
            kept |= {(n, std): direct[std] for std in STDS}
    return run, kept


@pytest.mark.slow
def test_snapshots_lists_files_by_images(trained, tmp_path):
    assert [n for n, _ in snapshots(trained[0])] == [800 * (i + 1) for i in range(16)]
    (tmp_path / "ema").mkdir()
    for name in ("snapshot-12.safetensors", "partial-snapshot-000000000012.safetensors", "snapshot-000000000012.tmp"):
        (tmp_path / "ema" / name).touch()
    assert snapshots(tmp_path) == []
    tensors = load_file(snapshots(trained[0])[0][1])
    assert sorted(tensors) == [
        f"{std}/{i}.{kind}" for std in ("0.05", "0.1") for i in "02" for kind in ("bias", "weight")
    ]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("std", STDS)
def test_reconstruct_equals_the_tracked_average(trained, std):
    run, direct = trained
    state, images, profile_error = reconstruct(run, std)
    assert images == 12800
    assert profile_error <= MAX_PROFILE_ERROR
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    error = relative_error(state, direct[images, std])
    assert error < 1e-3
    # Much nearer than the averages that were tracked, which stand for what is known without a combination.
    known = min(relative_error(direct[images, tracked], direct[images, std]) for tracked in TRACKED_STDS)
    assert error < 1e-6 if std in TRACKED_STDS else error < known / 50


def test_reconstruct_at_an_earlier_snapshot(trained):
    run, direct = trained
    state, images, profile_error = reconstruct(run, 0.07, images=9600)
    assert images == 9600
    assert profile_error == mixture([(n, s) for n, _ in snapshots(run)[:12] for s in TRACKED_STDS], 9600, 0.07)[1]
    assert relative_error(state, direct[9600, 0.07]) < 1e-3


def test_reconstruct_of_constant_weights_is_the_weights(tmp_path):
    weights = {"a.weight": torch.randn(7, 5), "scale": torch.tensor(3.0)}
    for n in range(1, 17):
        save_snapshot(tmp_path, n, {std: weights for std in TRACKED_STDS})
    for std in STDS:
        state, _, _ = reconstruct(tmp_path, std)
        assert relative_error(state, weights) < 1e-6
        assert state["scale"].shape == ()


def test_reconstruct_refuses_weights_that_are_not_finite(tmp_path):
    weights = {"weight": torch.tensor([1.0, math.inf])}
    for n in range(1, 17):
        save_snapshot(tmp_path, n, {std: weights for std in TRACKED_STDS})
    with pytest.raises(UsageError, match=r"the snapshots in .* must have finite weights"):
        reconstruct(tmp_path, TRACKED_STDS[0])


def test_reconstruct_refuses_what_it_cannot_give(trained, tmp_path):
    run, _ = trained
    with pytest.raises(UsageError, match="has none"):
        reconstruct(tmp_path, 0.1)
    with pytest.raises(UsageError, match=r"one of \[800, 1600, .*\], got 900"):
        reconstruct(run, 0.1, images=900)
    with pytest.raises(UsageError, match=r"got 0\.5"):
        reconstruct(run, 0.5)
    with pytest.raises(UsageError, match=r"got 0\.28: .*; the nearest that they give is 0\.25"):
        reconstruct(run, 0.28)
    with pytest.raises(UsageError, match=r"1 snapshots up to 800 images can give, got 0\.07: .* is 0\.05"):
        reconstruct(run, 0.07, images=800)


def test_reconstruct_refuses_a_snapshot_of_another_run(tmp_path):
    weights = {"a": torch.zeros(3)}
    save_snapshot(tmp_path, 8, {std: weights for std in TRACKED_STDS})
    save_snapshot(tmp_path, 16, {std: {"a": torch.zeros(4)} for std in TRACKED_STDS})
    with pytest.raises(UsageError, match="of another run"):
        reconstruct(tmp_path, 0.1)
    (first, _), (_, last) = snapshots(tmp_path)[0], snapshots(tmp_path)[1]
    assert first == 8
    for content in (
        snapshot_bytes(15, {std: weights for std in TRACKED_STDS}),
        snapshot_bytes(16, {0.05: weights, 0.1: {"b": torch.zeros(3)}}),
        snapshot_bytes(16, {}),
    ):
        last.write_bytes(content)
        with pytest.raises(UsageError, match="no snapshot"):
            reconstruct(tmp_path, 0.1)
    last.write_bytes(content[:-1] + b"?")
    with pytest.raises(UsageError, match="whole safetensors file"):
        reconstruct(tmp_path, 0.1)


@pytest.fixture
def pipeline_run(tmp_path, make_unet):
    """A run of a stock pipeline, with a snapshot after each of two random weights."""
    run = tmp_path / "run"
    unet = make_unet()
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(50)).save_pretrained(run)
    for i in (1, 2):
        weights = dict(make_unet(seed=i).named_parameters())
        save_snapshot(run, 64 * i, {std: {k: p * std for k, p in weights.items()} for std in TRACKED_STDS})
    return run


@pytest.mark.slow
def test_write_average_writes_a_stock_pipeline(pipeline_run):
    folder = write_average(pipeline_run, 0.1)
    assert folder == pipeline_run / "ema" / "std-0.1"
    loaded = diffusers.DDPMPipeline.from_pretrained(folder)
    assert loaded.scheduler.config["num_train_timesteps"] == 50
    expected, images, error = reconstruct(pipeline_run, 0.1)
    assert all(torch.equal(loaded.unet.state_dict()[k], v) for k, v in expected.items())
    assert expected.keys() == loaded.unet.state_dict().keys()
    assert json.loads((folder / "average.json").read_text()) == {"std": 0.1, "images": images, "profile_error": error}
    assert sorted(p.name for p in (pipeline_run / "ema").iterdir()) == [
        *(f"snapshot-{n:012d}.safetensors" for n in (64, 128)),
        "std-0.1",
    ]
    # Again, at another time: the average of before is replaced.
    assert write_average(pipeline_run, 0.1, images=64) == folder
    assert json.loads((folder / "average.json").read_text())["images"] == 64
    again = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert not torch.equal(again["conv_in.weight"], expected["conv_in.weight"])


def test_write_average_keeps_dtype_and_buffers_of_the_run(pipeline_run, make_unet, tmp_path):
    weights = pipeline_run / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {k: v.half() for k, v in load_file(weights).items()} | {"buffer": torch.arange(3)}
    save_file(tensors, weights, {"format": "pt"})
    folder = write_average(pipeline_run, 0.05, tmp_path / "new" / "folder")
    written = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == tensors.keys()
    assert torch.equal(written["buffer"], torch.arange(3))
    expected, _, _ = reconstruct(pipeline_run, 0.05)
    assert all(torch.equal(written[k], v.half()) for k, v in expected.items())


def test_write_average_overwrites_no_foreign_files(pipeline_run, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    for out in (tmp_path / "file", tmp_path / "mine", pipeline_run, pipeline_run / "ema"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UsageError, match="would be lost"):
            write_average(pipeline_run, 0.1, out)
        assert sorted(tmp_path.rglob("*")) == before
    folder = write_average(pipeline_run, 0.1)
    (folder / "README.md").touch()
    with pytest.raises(UsageError, match=r"README\.md would be lost"):
        write_average(pipeline_run, 0.1)


def test_write_average_refuses_a_run_without_its_pipeline(pipeline_run, trained):
    with pytest.raises(UsageError, match=r"model_index\.json is not there"):
        write_average(trained[0], 0.1)
    save_snapshot(pipeline_run, 192, {std: {"other": torch.zeros(3)} for std in TRACKED_STDS})
    with pytest.raises(UsageError, match="of another run"):
        write_average(pipeline_run, 0.1)
    for _, path in snapshots(pipeline_run)[:-1]:
        path.unlink()
    with pytest.raises(UsageError, match="no such other"):
        write_average(pipeline_run, 0.1)
    assert not (pipeline_run / "ema" / "std-0.1").exists()
