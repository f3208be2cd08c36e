"""Sets of images: the same files however they are written, resumed after a kill, in each format."""

import errno
import hashlib
import json
import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.cli import app
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.images import load_images
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.sampling import image_set, set_files
from hf_ddpm.sampling.image_set import write_samples
from hf_ddpm.sampling.loading import load_for_sampling
from hf_ddpm.sampling.sampler import iter_samples
from hf_ddpm.solvers import named_scheduler
from tests.support.forks import Process


def child(runs: list[dict], environment: dict[str, str], kill_after: int | None) -> None:
    """Write sets; send this process SIGKILL instead of writing the file after the first `kill_after`."""
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

    image_set.write_atomically = set_files.write_atomically = write_or_die
    for arguments in runs:
        write_samples(**arguments)


def sample(*runs: dict, num_processes: int = 1, kill_after: int | None = None) -> list[int]:
    """Return the exit codes of the processes; the last process is killed after `kill_after` files, then the others."""
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
        children.append(Process(target=child, args=(list(runs), environment, dies)))
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
    """Settings of a set of 20 images: a whole forward pass, or part file, and a smaller one."""
    pipeline.save_pretrained(tmp_path / "model")
    return {"model": str(tmp_path / "model"), "num_images": 20, "seed": 7, "num_inference_steps": 2}


@pytest.mark.slow
def test_write_samples_writes_the_same_files_in_any_number_of_processes_and_batch_size(arguments, tmp_path):
    runs = [{**arguments, "out": tmp_path / f"batches-of-{b}", "batch_size": b} for b in (64, 3)]
    assert sample(*runs) == [0]
    expected = contents(tmp_path / "batches-of-64")
    assert sorted(expected) == [*(f"{seed:06d}.png" for seed in range(7, 27)), "grid.png", "metadata.jsonl"]
    assert len(set(expected.values())) == 22
    assert contents(tmp_path / "batches-of-3") == expected
    assert sample({**arguments, "out": tmp_path / "by-three"}, num_processes=3) == [0] * 3
    assert contents(tmp_path / "by-three") == expected


@pytest.mark.slow
def test_write_samples_resumes_after_a_kill(arguments, tmp_path):
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


@pytest.mark.slow
@pytest.mark.parametrize("num_written", [9, 18])
def test_write_samples_ends_where_a_file_cannot_be_written(arguments, tmp_path, monkeypatch, num_written):
    """Files are written in a thread, whose error is that of the command, also in the last batch."""
    write, written, failed = set_files.write_atomically, [], []

    def write_or_fail(path: Path, content: bytes | str) -> None:
        if len(written) == num_written and not failed:
            failed.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        write(path, content)

    monkeypatch.setattr(set_files, "write_atomically", write_or_fail)
    with pytest.raises(OSError, match="No space left"):
        write_samples(**arguments, out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == sorted(path.name for path in written)


@pytest.mark.slow
def test_write_samples_writes_equal_images_in_each_format(make_unet, tmp_path):
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
    # What one command writes, the others read, with its classes and without its grid.
    for format in ("png", "parquet"):
        settings = {"dataset_name": str(tmp_path / format), "cache_dir": str(tmp_path / "cache")}
        images = load_images(DataConfig(**settings, label_column="label"))
        assert len(images) == 20
        assert images.labels is not None
        assert images.labels.tolist() == [seed % 3 for seed in range(5, 25)]
        assert np.array_equal(np.stack([images.image(i)[0] for i in range(20)]), pixels)
    rows = [json.loads(line) for line in (tmp_path / "png/metadata.jsonl").read_text().splitlines()]
    assert rows == [{"file_name": f"{seed:06d}.png", "seed": seed, "label": seed % 3} for seed in range(5, 25)]
    arrays = np.load(tmp_path / "npz" / "samples.npz")
    assert np.array_equal(arrays["arr_0"], np.stack(pixels)[..., None])
    assert arrays["seeds"].tolist() == [*range(5, 25)]
    assert arrays["labels"].tolist() == [seed % 3 for seed in range(5, 25)]
    assert len({(tmp_path / format / "grid.png").read_bytes() for format in ("png", "parquet", "npz")}) == 1
    assert sorted(path.name for path in (tmp_path / "npz").iterdir()) == ["grid.png", "samples.json", "samples.npz"]


@pytest.mark.slow
@pytest.mark.parametrize("value_range", [None, [0, 4095]])
def test_write_samples_of_a_model_of_deep_images_keeps_their_bits_and_their_values(make_unet, tmp_path, value_range):
    scheduler = DDPMScheduler(20, beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(make_unet(channels=1), scheduler).save_pretrained(tmp_path / "model")
    record = {"data": {"max_value": 65535, "value_range": value_range}}
    (tmp_path / "model/run.json").write_text(json.dumps(record))
    common = {"model": str(tmp_path / "model"), "num_images": 2, "num_inference_steps": 2}
    for format in ("png", "parquet", "npz"):
        write_samples(**common, out=tmp_path / format, format=format)
    arrays = np.load(tmp_path / "npz/samples.npz")["arr_0"][..., 0]
    assert arrays.dtype == np.uint16
    for format in ("png", "parquet"):
        images = load_images(DataConfig(dataset_name=str(tmp_path / format), cache_dir=str(tmp_path / "cache")))
        assert images.max_value == 65535
        assert np.array_equal(np.stack([images.image(i)[0] for i in range(2)]), arrays)
    # Undone again, they are the model's own values: `--value_range` takes them back.
    pipeline, steps = load_for_sampling(str(tmp_path / "model"), num_inference_steps=2)
    expected = np.stack(
        [
            pixels.numpy()[0]
            for _, batch in iter_samples(
                pipeline, [0, 1], batch_size=2, num_inference_steps=steps, value_range=(0, 65535)
            )
            for pixels in batch
        ]
    )
    high = 65535 if value_range is None else value_range[1]
    assert np.abs(arrays.astype(float) / high - expected.astype(float) / 65535).max() <= 0.51 / high
    with Image.open(tmp_path / "png/grid.png") as sheet:
        shown = np.asarray(sheet)[:64, :64][:: 64 // arrays.shape[1], :: 64 // arrays.shape[2]]
    assert np.abs(shown - arrays[0] * 255.0 / high).max() <= 0.5


@pytest.mark.slow
def test_write_samples_rejects_folders_with_other_content(arguments, tmp_path):
    out = tmp_path / "out"
    run = {**arguments, "out": out, "num_images": 2, "num_inference_steps": 1, "device": "cpu"}
    write_samples(**run)
    record = (out / "samples.json").read_text()
    settings = json.loads(record)
    for damaged in (record[:-9], "[]x"):
        (out / "samples.json").write_text(damaged)
        with pytest.raises(UsageError, match=r"samples\.json cannot be read: .*: choose another folder"):
            write_samples(**{**run, "out": str(out)})
    (out / "samples.json").write_text(record)
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
        ({"format": "gif"}, "format must be one of png, parquet, npz, npy, tif, got 'gif'; did you mean tif?"),
        ({"num_images": 0}, "num_images must be at least 1, got 0"),
        ({"out": out / "samples.json"}, r"out must be a folder, got .*samples\.json', which is a file"),
        ({"out": out / "samples.json/x"}, r"out must be a folder that can be written, got .*: see .*samples\.json$"),
        ({"num_inference_steps": 0}, r"num_inference_steps must be in \[1, .*got 0"),
        ({"class_label": 1}, "class_labels must be None"),
        ({"deterministic": True}, "deterministic is for"),
        ({"num_inference_steps": 21}, r"num_inference_steps must be in \[1, 20\], got 21"),
    ):
        with pytest.raises(ValueError, match=message):
            write_samples(**{**run, **change})
    write_samples(**{**run, "num_images": 3})  # more of the same
    assert sorted(contents(out))[3:] == ["grid.png", "metadata.jsonl"]
    assert len((out / "metadata.jsonl").read_text().splitlines()) == 3

    other = tmp_path / "other"
    other.mkdir()
    (other / "000008.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="would be overwritten: choose another folder"):
        write_samples(**{**run, "out": other})
    assert [path.name for path in other.iterdir()] == ["000008.png"]


def hf_ddpm(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_command_line_writes_images(pipeline, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    pipeline.save_pretrained(model)
    done = hf_ddpm("sample", model, "--num_images", 3, "--seed", 7, "--num_inference_steps", 5, "--out", out)
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in out.iterdir()) == [
        *("000007.png", "000008.png", "000009.png"),
        *("grid.png", "metadata.jsonl", "samples.json"),
    ]
    pipeline.scheduler = named_scheduler("unipc", pipeline.scheduler.config, 5)
    ((_, expected),) = iter_samples(pipeline, [8], batch_size=1, num_inference_steps=5)
    with Image.open(out / "000008.png") as image:
        assert np.array_equal(np.asarray(image), expected[0].permute(1, 2, 0))

    again = hf_ddpm("sample", model, "--num_images", 3, "--seed", 7, "--out", out)
    assert again.exit_code == 2
    assert "samples with num_inference_steps=5, got num_inference_steps=20: choose another folder" in again.output


def test_command_line_rejects_what_cannot_work(tmp_path):
    out = tmp_path / "out"
    for arguments, message in (
        ([tmp_path], "must be a folder with model_index.json"),
        ([tmp_path / "nothing"], "nothing"),
        ([tmp_path, "--scheduler", "euler"], "euler"),
        ([tmp_path, "--device", "abacus"], "device must be one that torch finds here, as cpu, got 'abacus'"),
        ([tmp_path, "--num_images", "0"], "num_images"),
        (
            [tmp_path, "--format", "gif"],
            "format must be one of png, parquet, npz, npy, tif, got 'gif'; did you mean tif?",
        ),
    ):
        done = hf_ddpm("sample", *arguments, "--out", out)
        assert done.exit_code == 2
        assert message in done.output
        assert done.exception is None or isinstance(done.exception, SystemExit)
    assert not out.exists()
