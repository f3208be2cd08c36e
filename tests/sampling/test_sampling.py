"""Schedulers by name, and sets of images as functions of their seeds, however they were written."""

import hashlib
import json
import os
import signal
import socket
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from typer.testing import CliRunner

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.cli import app
from hf_ddpm.runtime import launch
from hf_ddpm.sampling import image_set, sampler
from hf_ddpm.sampling.image_set import write_samples
from hf_ddpm.sampling.sampler import iter_samples, load_for_sampling, sample_images, share
from hf_ddpm.sampling.schedulers import SCHEDULERS, default_scheduler, default_steps, named_scheduler
from hf_ddpm.timesteps import SearchedTimesteps
from tests.support.runs import processes


@pytest.fixture(autouse=True)
def no_process_state():
    yield
    PartialState._reset_state()


@pytest.fixture
def pipeline(make_unet):
    unet = make_unet()
    # Outputs of a trained network's size; those of a random one send rounding errors across the whole range.
    with torch.no_grad():
        unet.conv_out.weight *= 0.1
    scheduler = DDPMScheduler(
        20, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    pipeline = DDPMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:sampling starts")
def test_each_named_scheduler_has_exact_steps(name):
    config = DDPMScheduler(timestep_spacing="trailing", beta_schedule="squaredcos_cap_v2").config
    for n in (1, 2, 3, 20, 61, 103, 501, 600, 999, 1000):
        scheduler = named_scheduler(name, config, n)
        scheduler.set_timesteps(n)
        timesteps = scheduler.timesteps.tolist()
        assert len(set(timesteps)) == len(timesteps) == n
        assert timesteps[0] == 999
        assert timesteps[-1] >= 0


def run(scheduler, steps):
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), t, x).prev_sample
    return x


def test_ddim_is_diffusers_ddim_where_its_steps_are_right():
    """Trailing steps that divide T evenly are t - T // n apart, as diffusers' DDIM assumes of all."""
    config = DDPMScheduler(clip_sample=False, timestep_spacing="trailing").config
    ddim = diffusers.DDIMScheduler.from_config(config)
    torch.testing.assert_close(run(named_scheduler("ddim", config, 1000), 1000), run(ddim, 1000), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc"])
def test_an_imperfect_noise_predictor_stays_in_range(name):
    """At the end of a cosine schedule x_0_hat magnifies an error of eps_hat 20,000 times: the solvers must clip it."""
    config = DDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing").config
    reference = DDPMScheduler.from_config(config)
    scheduler, mu = named_scheduler(name, config, 20), 0.5
    scheduler.set_timesteps(20)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        abar = reference.alpha_bar[t].float()
        # A network knows no inputs far from those of training.
        seen = x.clamp(-5, 5)
        eps_hat = (seen - abar.sqrt() * mu) / (1 - abar).sqrt() + 0.02 * torch.sin(7 * seen)
        x = scheduler.step(eps_hat, t, x).prev_sample
    assert (x - mu).abs().max() < 0.1


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_solvers_clip_to_the_bits_of_their_thresholding_up_to_1(name, dtype, prediction_type, monkeypatch):
    config = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", prediction_type=prediction_type
    ).config

    def final(scheduler):
        scheduler.set_timesteps(20)
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
        for t in scheduler.timesteps:
            x = scheduler.step(2 * torch.tanh(3 * x), t, x).prev_sample
        return x

    ours = named_scheduler(name, config, 20)
    by_threshold = final(type(ours).from_config(ours.config))
    assert not torch.equal(by_threshold, final(named_scheduler(name, {**config, "clip_sample": False}, 20)))
    monkeypatch.delattr(torch, "quantile")
    assert torch.equal(final(ours), by_threshold)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc"])
def test_a_thresholding_of_the_models_own_goes_before_clip_sample(name):
    config = DDPMScheduler(thresholding=True, sample_max_value=2.0, clip_sample=True).config
    scheduler = named_scheduler(name, config, 20)
    assert scheduler.config.sample_max_value == 2
    x_0_hat = 3 * torch.randn(4, 1, 8, 8)
    expected = DDPMScheduler.from_config(config)._threshold_sample(x_0_hat)
    assert torch.equal(scheduler._threshold_sample(x_0_hat), expected)
    assert not torch.equal(expected, x_0_hat.clamp(-1, 1))


def test_schedules_that_the_solvers_do_not_know_are_left_to_ddpm():
    config = DDPMScheduler(beta_schedule="sigmoid").config
    assert default_scheduler(config) == "ddpm"
    with pytest.raises(ValueError, match=r"must be 'ddpm' for the noise schedule 'sigmoid', got 'unipc'"):
        named_scheduler("unipc", config)


def test_betas_that_end_in_1_are_left_to_ddpm():
    betas = [*np.linspace(0.1, 0.9, 9), 1.0]
    config = DDPMScheduler(10, trained_betas=betas, prediction_type="v_prediction", timestep_spacing="trailing").config
    assert default_scheduler(config) == "ddpm"
    with pytest.raises(ValueError, match=r"must be 'ddpm' for .* with trained_betas that end in 1, got 'unipc'"):
        named_scheduler("unipc", config, 5)


def test_the_default_takes_searched_timesteps_where_there_are_some():
    config = DDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing").config
    rows = [
        SearchedTimesteps(solver, (*range(n - 1, -1, -1),), 0.1, 0.2, 1, 0, 50, unipc_distance=unipc)
        for solver, n, unipc in (
            *(("dpmsolver++", 5, 0.11), ("ddim", 8, 0.11), ("dpmsolver++", 20, None)),
            ("dpmsolver++", 21, 0.09),
        )
    ]
    searched = {row.key: row for row in rows}
    names = {n: default_scheduler(config, searched, n) for n in (None, 5, 8, 20, 21)}
    assert names == {None: "dpmsolver++", 5: "dpmsolver++", 8: "unipc", 20: "dpmsolver++", 21: "unipc"}
    assert default_scheduler(config) == "unipc"


def test_the_default_steps():
    names = ("ddpm", "unipc", "dpmsolver++", "ddim")
    assert [default_steps(name, 1000) for name in names] == [1000, 20, 20, 20]
    assert {default_steps(name, 7) for name in names} == {7}


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc"])
@pytest.mark.parametrize(
    "setting",
    [
        {"final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True},
        {"predict_x0": False},
        {"solver_order": 3},
        {"solver_type": "bh1"},
        {"algorithm_type": "sde-dpmsolver++"},
    ],
    ids=str,
)
def test_settings_that_a_model_was_saved_with_for_a_solver_change_none(name, setting):
    config = DDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing").config
    clean, other = named_scheduler(name, config, 5), named_scheduler(name, {**config, **setting}, 5)
    assert dict(other.config) == dict(clean.config)
    other.set_timesteps(5)
    assert other.sigmas[-1] == 0


@pytest.mark.parametrize("name", ["PNDM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "DDIM"])
@pytest.mark.parametrize("sampler", [None, *SCHEDULERS])
@pytest.mark.filterwarnings("ignore:sampling starts")
def test_a_model_that_was_saved_with_another_scheduler_is_sampled(make_unet, tmp_path, name, sampler):
    scheduler = getattr(diffusers, f"{name}Scheduler")(20, beta_schedule="squaredcos_cap_v2")
    diffusers.DDPMPipeline(make_unet(), scheduler).save_pretrained(tmp_path)
    pipeline, steps = load_for_sampling(str(tmp_path), sampler, 4)
    stock = diffusers.DDPMScheduler(20, beta_schedule="squaredcos_cap_v2")
    expected = named_scheduler(sampler or "unipc", stock.config, steps)
    for settings in (pipeline.scheduler.config, expected.config):
        assert {key: settings[key] for key in ("beta_schedule", "prediction_type", "num_train_timesteps")} == {
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "epsilon",
            "num_train_timesteps": 20,
        }
    pipeline.scheduler.set_timesteps(steps)
    assert len(pipeline.scheduler.timesteps) == 4
    assert sample_images(pipeline, [0], batch_size=1, num_inference_steps=4).isfinite().all()


def test_a_model_that_is_no_ddpm_is_refused(make_unet, tmp_path):
    for name in ("EDMEuler", "FlowMatchEulerDiscrete", "CMStochasticIterative", "ScoreSdeVe"):
        scheduler = getattr(diffusers, f"{name}Scheduler")()
        diffusers.DDPMPipeline(make_unet(), scheduler).save_pretrained(tmp_path / name)
        for by_name in (None, "ddpm"):
            with pytest.raises(ValueError, match=f"with a beta_schedule and a prediction_type, got .*{name}Scheduler"):
                load_for_sampling(str(tmp_path / name), by_name)


def test_a_model_of_more_parts_is_refused(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="a LDMPipeline of scheduler, unet, vqvae"):
        load_for_sampling(str(tmp_path))


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc"])
def test_solvers_clip_to_the_models_own_range(name):
    config = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample_range=2.0).config
    scheduler = named_scheduler(name, config, 1)
    scheduler.set_timesteps(1)
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert scheduler.step(-x, scheduler.timesteps[0], x).prev_sample.abs().max() == 2


@pytest.mark.parametrize("sampler", [None, "ddpm"])
def test_zero_terminal_snr_is_sampled_whatever_its_spacing(make_unet, tmp_path, sampler):
    scheduler = diffusers.DDPMScheduler(20, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert scheduler.config.timestep_spacing == "leading"
    stock = diffusers.DDPMPipeline(make_unet(), scheduler)
    stock.set_progress_bar_config(disable=True)
    stock.save_pretrained(tmp_path)
    pipeline, steps = load_for_sampling(str(tmp_path), sampler, device="cpu")
    images = sample_images(pipeline, [0], batch_size=1, num_inference_steps=steps)
    assert images.isfinite().all()
    if sampler == "ddpm":
        ours = DDPMPipeline(stock.unet, scheduler)
        ours.set_progress_bar_config(disable=True)
        expected = stock(generator=torch.Generator().manual_seed(0), num_inference_steps=20, output_type="np").images
        assert np.array_equal(ours(generator=torch.Generator().manual_seed(0), output_type="np").images, expected)


def test_step_denoisers_are_sampled_by_their_own_chain():
    config = DDPMScheduler(prediction_type="previous_sample").config
    assert type(named_scheduler("ddpm", config)) is DDPMScheduler
    with pytest.raises(ValueError, match=r"scheduler must be 'ddpm' for a step denoiser.*got 'ddim'"):
        named_scheduler("ddim", config)
    with pytest.raises(ValueError, match=r"scheduler must be one of ddpm, ddim, dpmsolver\+\+, unipc, got 'euler'"):
        named_scheduler("euler", config)


def test_an_image_is_a_function_of_its_seed(pipeline):
    whole = sample_images(pipeline, range(5), batch_size=5)
    for batch_size in (1, 2, 3):
        torch.testing.assert_close(sample_images(pipeline, range(5), batch_size=batch_size), whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(sample_images(pipeline, [3], batch_size=1)[0], whole[3], rtol=0, atol=1e-4)


def whole(batches):
    seeds, images = zip(*batches, strict=True)
    return [seed for part in seeds for seed in part], torch.cat(images)


def test_which_images_are_sampled_together_changes_no_bit(pipeline):
    settings = {"num_inference_steps": 5, "batch_size": 64}
    seeds, images = whole(iter_samples(pipeline, range(20), **settings))
    assert seeds == [*range(20)]
    assert images.dtype == torch.uint8
    assert images.shape == (20, 3, 8, 8)
    for chosen, batch_size in (([19, 3, 5], 64), (range(20), 3), (range(2, 19), 1)):
        got, alone = whole(iter_samples(pipeline, chosen, num_inference_steps=5, batch_size=batch_size))
        assert got == [*chosen]
        assert torch.equal(alone, images[got])
    torch.set_num_threads(2)
    assert torch.equal(whole(iter_samples(pipeline, range(20), **settings))[1], images)
    exact = sample_images(pipeline, range(16), batch_size=16, num_inference_steps=5)
    assert torch.equal((exact * 255).round().to(torch.uint8), images[:16])


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_images_that_are_not_finite_are_refused(pipeline, name, value):
    pipeline.scheduler = named_scheduler(name, pipeline.scheduler.config, 2)
    with torch.no_grad():
        pipeline.unet.conv_out.bias[:] = value
    with pytest.raises(ValueError, match="samples must be finite, got NaN for seed 7"):
        next(iter_samples(pipeline, [7, 8], batch_size=2, num_inference_steps=2))


def test_batches_have_an_image(pipeline):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(iter_samples(pipeline, [7], batch_size=0))


def test_shares_are_whole_blocks_of_all_images():
    for count, num in ((1, 1), (40, 3), (100, 4), (5, 2)):
        shares = [share(count, rank, num) for rank in range(num)]
        assert sorted(i for mine in shares for i in mine) == [*range(count)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 16
    assert share(40, 1, 2) == [*range(16, 32)]
    assert share(5, 0, 2, block=2) == [0, 1, 4]


def test_a_stock_folder_is_sampled_as_stock_samples_it(make_unet, tmp_path):
    scheduler = diffusers.DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    stock = diffusers.DDPMPipeline(make_unet(), scheduler)
    stock.set_progress_bar_config(disable=True)
    stock.save_pretrained(tmp_path)
    generators = [torch.Generator().manual_seed(seed) for seed in range(16)]
    expected = stock(batch_size=16, generator=generators, num_inference_steps=20, output_type="np").images
    loaded, steps = load_for_sampling(str(tmp_path), scheduler="ddpm", device="cpu")
    assert steps == 20
    _, images = whole(iter_samples(loaded, range(16), batch_size=16, num_inference_steps=steps))
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), (expected * 255).round().astype(np.uint8))


def test_bf16_is_of_the_network_only_and_near(pipeline, tmp_path, monkeypatch):
    pipeline.save_pretrained(tmp_path)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled.append(dynamic) or function)
    images = {}
    for dtype in ("fp32", "bf16"):
        loaded, steps = load_for_sampling(str(tmp_path), None, 5, "cpu", dtype, compile=dtype == "bf16")
        seen = []
        loaded.scheduler.step = lambda *a, step=loaded.scheduler.step, seen=seen, **k: seen.append(a) or step(*a, **k)
        _, images[dtype] = whole(iter_samples(loaded, range(16), batch_size=16, num_inference_steps=steps))
        assert {tensor.dtype for model_output, _, x_t in seen for tensor in (model_output, x_t)} == {torch.float32}
    assert compiled == [False]
    difference = (images["fp32"].float() - images["bf16"].float()).abs()
    assert 0 < difference.mean() < 3
    with pytest.raises(ValueError, match="dtype must be one of fp32, bf16, got 'fp16'"):
        load_for_sampling(str(tmp_path), dtype="fp16")


def child(runs: list[dict], environment: dict[str, str], kill_after: int | None) -> None:
    """Writes sets; sends itself SIGKILL in place of the file after the first `kill_after`."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    written, write = 0, image_set.write_atomically

    def write_or_die(path: Path, content: bytes | str) -> None:
        nonlocal written
        if written == kill_after:
            path.with_name(f".{path.name}.partial").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        written += 1
        write(path, content)

    image_set.write_atomically = write_or_die
    for arguments in runs:
        write_samples(**arguments)


def sample(*runs: dict, num_processes: int = 1, kill_after: int | None = None) -> list[int]:
    """Exit codes of the processes; the last is the one that is killed, and the others are with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(num_processes):
        environment = {"HF_HUB_OFFLINE": "1"}
        if num_processes > 1:
            environment |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{num_processes}"}
            environment |= {"LOCAL_WORLD_SIZE": f"{num_processes}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "2"}
        dies = kill_after if rank == num_processes - 1 else None
        children.append(processes.Process(target=child, args=(list(runs), environment, dies)))
        children[-1].start()
    if kill_after is not None:
        children[-1].join()
        for other in children:
            other.kill()
    for other in children:
        other.join()
    return [c.exitcode for c in children]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "samples.json"}


@pytest.fixture
def arguments(pipeline, tmp_path):
    """Of 40 images in three blocks, two whole ones and a part."""
    pipeline.save_pretrained(tmp_path / "model")
    return {"model": str(tmp_path / "model"), "num_images": 40, "seed": 7, "num_inference_steps": 3}


def test_any_number_of_processes_and_any_batch_size_write_the_same_images(arguments, tmp_path):
    runs = [{**arguments, "out": tmp_path / f"batches-of-{b}", "batch_size": b} for b in (64, 3)]
    assert sample(*runs) == [0]
    expected = contents(tmp_path / "batches-of-64")
    assert sorted(expected) == [*(f"{seed:06d}.png" for seed in range(7, 47)), "grid.png"]
    assert len(set(expected.values())) == 41
    assert contents(tmp_path / "batches-of-3") == expected
    for num in (2, 3):
        assert sample({**arguments, "out": tmp_path / f"by-{num}"}, num_processes=num) == [0] * num
        assert contents(tmp_path / f"by-{num}") == expected


def test_a_killed_run_goes_on_where_it_was(arguments, tmp_path):
    for format, num_processes, kill_after in (("png", 2, 5), ("parquet", 1, 2), ("npz", 1, 3)):
        whole, out = tmp_path / f"{format}-whole", tmp_path / format
        run = {**arguments, "format": format, "out": out}
        assert sample(run, num_processes=num_processes, kill_after=kill_after)[-1] == -signal.SIGKILL
        before = {path: path.stat() for path in out.rglob("*") if path.name in contents(out) or path.parent != out}
        files = {path: stat for path, stat in before.items() if path.is_file() and not path.name.startswith(".")}
        assert files
        written = sample({**arguments, "format": format, "out": whole}, run)
        assert written == [0]
        assert contents(out) == contents(whole)
        # Whole files are not written again: they have the same inode.
        for path, stat in files.items():
            assert format == "npz" or (path.stat().st_ino, path.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_sets_of_each_format_are_equal(make_unet, tmp_path):
    from datasets import load_dataset

    unet = make_unet(channels=1, num_class_embeds=3)
    scheduler = DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "model")
    common = {"model": str(tmp_path / "model"), "num_images": 20, "seed": 5, "num_inference_steps": 2}
    runs = [{**common, "out": tmp_path / format, "format": format} for format in ("png", "parquet", "npz")]
    assert sample(*runs) == [0]
    pixels = []
    for seed in range(5, 25):
        with Image.open(tmp_path / "png" / f"{seed:06d}.png") as image:
            pixels.append(np.asarray(image))
    rows = load_dataset(str(tmp_path / "parquet"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["seed"][:] == [*range(5, 25)]
    assert rows["label"][:] == [seed % 3 for seed in range(5, 25)]
    assert np.array_equal(np.stack([np.asarray(image) for image in rows["image"]]), pixels)
    arrays = np.load(tmp_path / "npz" / "samples.npz")
    assert np.array_equal(arrays["arr_0"], np.stack(pixels)[..., None])
    assert arrays["seeds"].tolist() == [*range(5, 25)]
    assert arrays["labels"].tolist() == [seed % 3 for seed in range(5, 25)]
    assert len({(tmp_path / format / "grid.png").read_bytes() for format in ("png", "parquet", "npz")}) == 1
    assert sorted(path.name for path in (tmp_path / "npz").iterdir()) == ["grid.png", "samples.json", "samples.npz"]


def test_a_folder_of_something_else_is_refused(arguments, tmp_path):
    out = tmp_path / "out"
    run = {**arguments, "out": out, "num_images": 2, "num_inference_steps": 1, "device": "cpu"}
    write_samples(**run)
    settings = json.loads((out / "samples.json").read_text())
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    assert settings["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert settings["scheduler"] == "unipc"
    for change, message in (
        ({"scheduler": "ddim"}, "scheduler='unipc', got scheduler='ddim'"),
        ({"num_inference_steps": 2}, "num_inference_steps=1, got num_inference_steps=2: choose another folder"),
        ({"seed": 8}, "seed=7, got seed=8"),
        ({"dtype": "bf16"}, "dtype='fp32', got dtype='bf16'"),
        ({"format": "npz"}, "format='png', got format='npz'"),
        ({"num_images": 1}, "num_images=2, got num_images=1"),
        ({"format": "gif"}, "format must be one of png, parquet, npz, got 'gif'"),
        ({"num_images": 0}, "num_images must be at least 1, got 0"),
        ({"class_label": 1}, "class_labels must be None"),
        ({"deterministic": True}, "deterministic is for"),
        ({"num_inference_steps": 21}, r"num_inference_steps must be in \[1, 20\], got 21"),
    ):
        with pytest.raises(ValueError, match=message):
            write_samples(**{**run, **change})
    write_samples(**{**run, "num_images": 3})  # more of the same
    assert len(contents(out)) == 4

    other = tmp_path / "other"
    other.mkdir()
    (other / "000008.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="would be overwritten: choose another folder"):
        write_samples(**{**run, "out": other})
    assert [path.name for path in other.iterdir()] == ["000008.png"]


def test_missing_processes_are_started_for_a_module_too(monkeypatch):
    started = []
    for name, value in (("ACCELERATE_USE_CPU", "true"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.execv", lambda _, arguments: started.append(arguments))
    monkeypatch.setattr("sys.argv", ["sampling.py", "model"])
    line = ["accelerate", "launch", "--cpu", "--num_processes", "3", "-m", "hf_ddpm", "model"]
    parent = type("Parent", (), {"cmdline": lambda self: line})()
    monkeypatch.setattr(launch.psutil.Process, "parent", lambda self: parent)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", sampler.__spec__)
    launch.start_missing_processes()
    assert started[0][-4:] == ["3", "-m", "hf_ddpm", "model"]
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    launch.start_missing_processes()
    assert started[1][-3:] == ["3", "sampling.py", "model"]


def hf_ddpm(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_line_samples(pipeline, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    pipeline.save_pretrained(model)
    done = hf_ddpm("sample", model, "--num_images", 3, "--seed", 7, "--num_inference_steps", 5, "--out", out)
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in out.iterdir()) == [
        *("000007.png", "000008.png", "000009.png"),
        *("grid.png", "samples.json"),
    ]
    pipeline.scheduler = named_scheduler("unipc", pipeline.scheduler.config, 5)
    expected = sample_images(pipeline, [8], batch_size=1, num_inference_steps=5)
    with Image.open(out / "000008.png") as image:
        got = torch.tensor(list(image.tobytes())).view(8, 8, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(got, expected[0], rtol=0, atol=1.01 / 255)

    again = hf_ddpm("sample", model, "--num_images", 3, "--seed", 7, "--out", out)
    assert again.exit_code == 1
    assert "samples with num_inference_steps=5, got num_inference_steps=20: choose another folder" in again.output


def test_command_line_refuses_what_cannot_work(tmp_path):
    out = tmp_path / "out"
    for arguments, message in (
        ([tmp_path], "must be a folder with model_index.json"),
        ([tmp_path / "nothing"], "nothing"),
        ([tmp_path, "--scheduler", "euler"], "euler"),
        ([tmp_path, "--device", "abacus"], "device must be one that torch finds here, as cpu, got 'abacus'"),
        ([tmp_path, "--format", "gif"], "format must be one of png, parquet, npz, got 'gif'"),
    ):
        done = hf_ddpm("sample", *arguments, "--out", out)
        assert done.exit_code in (1, 2)
        assert message in done.output
        assert done.exception is None or isinstance(done.exception, SystemExit)
    assert not out.exists()
