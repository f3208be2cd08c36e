"""Muon: equal to torch's of matrices, AdamW's beside it, still where a step is skipped."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_ddpm.network import make_unet
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.optimizer import Muon, make_optimizer, orthogonal

SHAPES = [(16, 40), (40, 16), (16, 40), (24, 24)]


@pytest.fixture
def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in (*SHAPES, (5,))]


def set_gradients(*several):
    for parameters in zip(*several, strict=True):
        gradient = torch.randn_like(parameters[0])
        for parameter in parameters:
            parameter.grad = gradient.clone().view(parameter.shape)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_equals_torch_on_matrices(parameters):
    """torch.optim.Muon of each matrix and torch.optim.AdamW of the rest; bfloat16 rounds in another order."""
    theirs = copy.deepcopy(parameters)
    ours = Muon(parameters[:-1], parameters[-1:], lr=0.1, weight_decay=0.1, dtype=torch.bfloat16)
    muon = torch.optim.Muon(theirs[:-1], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(theirs[-1:], lr=0.1, weight_decay=0.1, fused=True)
    before = copy.deepcopy(parameters)
    for _ in range(5):
        set_gradients(parameters, theirs)
        for optimizer in (ours, muon, adam):
            optimizer.step()
    for start, mine, other in zip(before[:-1], parameters[:-1], theirs[:-1], strict=True):
        assert (mine - other).norm() < 0.02 * (mine - start).norm()
    assert torch.equal(parameters[-1], theirs[-1])


def test_muon_takes_a_convolution_as_the_matrix_of_its_outputs():
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(8, 36))
    kernel = nn.Parameter(matrix.detach().view(8, 4, 3, 3).clone())
    for parameter in (matrix, kernel):
        torch.manual_seed(1)
        optimizer = Muon([parameter], [nn.Parameter(torch.zeros(1))], lr=0.1)
        for _ in range(3):
            parameter.grad = torch.randn(8, 36).view(parameter.shape)
            optimizer.step()
    assert torch.equal(kernel.view(8, 36), matrix)


def test_muon_of_parameters_of_one_shape_is_that_of_each(parameters):
    """To the last bit, also in a step that is skipped: they are stacked, and nothing else."""
    rest = parameters.pop()
    several, ones = copy.deepcopy(parameters), copy.deepcopy(parameters)
    together = Muon(several, [rest], lr=0.1, weight_decay=0.1)
    each = [Muon([p], [nn.Parameter(torch.zeros(1))], lr=0.1, weight_decay=0.1) for p in ones]
    for found in (0.0, 1.0, 0.0):
        set_gradients(several, ones)
        for optimizer in (together, *each):
            optimizer.found_inf = torch.tensor(found)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(several, ones, strict=True))


def test_muon_dispatches_as_many_operations_for_any_number_of_parameters_of_one_shape():
    def count(number):
        parameters = [nn.Parameter(torch.randn(16, 4, 3, 3)) for _ in range(number)]
        optimizer = Muon(parameters, [nn.Parameter(torch.zeros(1))], lr=0.1)
        for _ in range(2):  # the first step also makes the state
            set_gradients(parameters)
            optimizer.found_inf = torch.zeros(())
            with Operations() as operations:
                optimizer.step()
        return operations.count

    assert count(2) == count(5) > 0


class Operations(TorchDispatchMode):
    """Counts what torch dispatches."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_orthogonal_keeps_directions_and_equalizes_lengths():
    torch.manual_seed(0)
    for rows, columns in ((16, 40), (40, 16)):
        matrices = torch.randn(3, rows, columns)
        U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
        found = orthogonal(matrices)
        lengths = torch.linalg.svdvals(found)
        assert lengths.min() > 0.6
        assert lengths.max() < 1.2
        # The same singular vectors: U^T X V is diagonal.
        inner = U.mT @ found @ Vh.mT
        assert (inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4
        assert inner.diagonal(dim1=1, dim2=2).min() > 0.6


def test_muon_leaves_everything_as_it_is_in_a_skipped_step(parameters):
    optimizer = Muon(parameters[:-1], parameters[-1:], lr=0.1, weight_decay=0.5)
    for found in (0.0, 1.0, 0.0):
        set_gradients(parameters)
        if found:
            parameters[0].grad[0, 0] = torch.nan
        before = [t.clone() for p in parameters for t in (p.detach(), *optimizer.state[p].values())]
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
        after = [t for p in parameters for t in (p.detach(), *optimizer.state[p].values())]
        if len(before) == len(after):
            assert all(torch.equal(a, b) == bool(found) for a, b in zip(before, after, strict=True))
        assert all(t.isfinite().all() for t in after)


def test_muon_continues_from_its_saved_state(parameters):
    def steps(optimizer, parameters, seed):
        torch.manual_seed(seed)
        for _ in range(2):
            set_gradients(parameters)
            optimizer.step()

    whole = Muon(parameters[:-1], parameters[-1:], lr=0.1)
    steps(whole, parameters, 1)
    copied = copy.deepcopy(parameters)
    resumed = Muon(copied[:-1], copied[-1:], lr=0.1)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    steps(whole, parameters, 2)
    steps(resumed, copied, 2)
    assert all(torch.equal(a, b) for a, b in zip(parameters, copied, strict=True))


def test_muon_loads_step_numbers_onto_the_device_of_parameters(parameters):
    """Where fused AdamW wants them; CPU and meta device stand for CPU and GPU."""
    group = Muon(parameters[:-1], parameters[-1:], lr=0.1).param_groups[1]
    place = torch.optim.Optimizer._process_value_according_to_param_policy
    on_device = torch.empty(3, device="meta")
    assert place(on_device, torch.zeros(()), 0, [{**group, "params": [0]}], "step").device.type == "meta"


def test_make_optimizer_gives_muon_the_matrices_of_blocks():
    unet = make_unet(channels=1, size=(8, 8), num_classes=3)
    optimizer = make_optimizer(unet, TrainingConfig(optimizer="muon"))
    of_muon = {id(p) for p in optimizer.param_groups[0]["params"]}
    names = {name for name, p in unet.named_parameters() if id(p) in of_muon}
    assert "down_blocks.0.resnets.0.conv1.weight" in names
    assert any(name.endswith("to_q.weight") for name in names)
    assert not any(name.startswith(("conv_in", "conv_out", "time_embedding", "class_embedding")) for name in names)
    assert not any("time_emb_proj" in name or name.endswith("bias") or "norm" in name for name in names)
    every = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert every == {id(p) for p in unet.parameters()}
    assert type(make_optimizer(unet, TrainingConfig(optimizer="adamw"))) is torch.optim.AdamW
