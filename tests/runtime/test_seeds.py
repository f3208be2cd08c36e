"""Draws as functions of seed and position."""

import pytest
import torch

from hf_ddpm.runtime.seeds import IMAGE, STEP, box_muller, image_draws, philox4x32, random_words

SHAPE = (3, 5, 7)  # not a multiple of the four numbers of a block

# Counter, key and output of philox4x32-10 in the file kat_vectors of the library Random123.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, output):
    k0, k1 = words(key)
    random = philox4x32([torch.tensor(word) for word in words(counter)], (k0, k1))
    assert [int(word) for word in random] == words(output)


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_broadcasts_the_words_of_its_counter(counter, key, output):
    c0, c1, c2, c3 = (torch.tensor(word) for word in words(counter))
    k0, k1 = words(key)
    random = philox4x32([c0.expand(3, 1), c1.expand(4), c2, c3.expand(3, 4)], (k0, k1))
    assert all(word.shape == (3, 4) and bool((word == w).all()) for word, w in zip(random, words(output), strict=True))


def test_draws_have_the_moments_of_their_distributions():
    uniform, normal = image_draws(0, torch.arange(20_000), (1, 8, 8), "cpu")
    assert uniform.dtype == normal.dtype == torch.float32
    for values, moments in ((uniform, (1 / 2, 1 / 3, 1 / 4, 1 / 5)), (normal, (0, 1, 0, 3))):
        x = values.double().flatten()
        for power, moment in enumerate(moments, start=1):
            y = x**power
            assert abs(y.mean() - moment) < 4 * y.std() / len(x) ** 0.5
    # The largest of 1,280,000 normal numbers is between these with a probability of 99.99 %.
    assert 4.3 < normal.abs().max() < 6.5


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (0, 2), (0, 4), (0, 16), (0, 32)])
def test_normal_draws_of_neighbors_are_uncorrelated(shift):
    """Neighbors in the stream, in an image, in a block (16 apart) and in a pair."""
    _, normal = image_draws(1, torch.arange(5000), (1, 8, 8), "cpu")
    x = normal.flatten(1).double()
    rows, columns = shift
    first, second = x[rows:, columns:], x[: len(x) - rows, : 64 - columns]
    for power in (1, 2):
        a, b = first**power, second**power
        product = ((a - a.mean()) * (b - b.mean())).flatten()
        assert abs(product.mean()) < 4 * product.std() / len(product) ** 0.5


def test_uniform_draws_are_uncorrelated_with_their_neighbors_and_the_noise():
    uniform, normal = image_draws(2, torch.arange(50_000), (1, 2, 2), "cpu")
    u = uniform.double() - 0.5
    for other in (u.roll(1), *normal.flatten(1).double().T):
        product = u * other
        assert abs(product.mean()) < 4 * product.std() / len(u) ** 0.5


def test_draws_do_not_depend_on_the_batch():
    positions = torch.tensor([7, 0, 2**40, 7 + 2**32, 1])
    uniform, normal = image_draws(3, positions, SHAPE, "cpu")
    assert uniform.shape == (5,)
    assert normal.shape == (5, *SHAPE)
    for i in range(5):
        u, eps = image_draws(3, positions[i : i + 1], SHAPE, "cpu")
        assert torch.equal(u[0], uniform[i])
        assert torch.equal(eps[0], normal[i])
    assert len(uniform.unique()) == 5


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_draws_do_not_depend_on_the_type_of_the_positions(dtype):
    positions = torch.tensor([5, 200])
    for one, other in zip(
        image_draws(0, positions, SHAPE, "cpu"), image_draws(0, positions.to(dtype), SHAPE, "cpu"), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("seed", [1, 2**32, 2**62])
def test_draws_depend_on_all_bits_of_the_seed(seed):
    positions = torch.arange(4)
    pairs = zip(image_draws(0, positions, SHAPE, "cpu"), image_draws(seed, positions, SHAPE, "cpu"), strict=True)
    for one, other in pairs:
        assert not bool((one == other).any())


def test_box_muller_is_finite_for_all_words():
    extremes = torch.tensor([0, 1, 2**31, 2**32 - 1])
    first, second = torch.meshgrid(extremes, extremes, indexing="ij")
    cosine, sine = box_muller(first, second)
    radius = (cosine.square() + sine.square()).sqrt()
    expected = (-2 * ((first.double() + 1) / 2**32).log()).sqrt().float()
    torch.testing.assert_close(radius, expected, rtol=1e-5, atol=1e-3)
    assert radius.max() == pytest.approx(6.66, abs=0.01)


def test_streams_differ():
    positions = torch.arange(100)
    one, other = (random_words(0, stream, positions, 10, "cpu") for stream in (IMAGE, STEP))
    assert not any(bool((a == b).any()) for a, b in zip(one, other, strict=True))


def test_draws_leave_the_global_generator_alone():
    torch.manual_seed(0)
    image_draws(0, torch.arange(4), SHAPE, "cpu")
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.cuda
@pytest.mark.skipif("not torch.cuda.is_available()", reason="needs a GPU")  # not asked before processes have forked
def test_draws_are_the_same_on_all_devices():
    positions = torch.arange(64) + 2**33
    for on_cpu, on_gpu in zip(
        random_words(9, IMAGE, positions, 11, "cpu"), random_words(9, IMAGE, positions, 11, "cuda"), strict=True
    ):
        assert torch.equal(on_cpu, on_gpu.cpu())
    uniform, normal = image_draws(9, positions, SHAPE, "cpu")
    uniform_gpu, normal_gpu = image_draws(9, positions.cuda(), SHAPE, "cuda")
    assert torch.equal(uniform, uniform_gpu.cpu())
    torch.testing.assert_close(normal, normal_gpu.cpu(), rtol=1e-5, atol=1e-5)
