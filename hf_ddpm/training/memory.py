"""The memory of a step, computed before there is one: the tensors that forward and backward passes hold at once.

torch runs two passes, the second beside the gradients of the first, of a copy of the network that has shapes and no
numbers, and counts the bytes of all tensors that are alive. So the numbers are the same on every machine. An allocator
and the scratch memory of convolutions come on top, for which `MEMORY_SHARES` leaves room.
"""

from __future__ import annotations

import weakref
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from hf_ddpm.image_size import to_size
from hf_ddpm.label_embedding import example_labels
from hf_ddpm.runtime.devices import free_memory

# The share of the free memory that the tensors of a step may take. On a CPU the memory of two networks grew by 1.3 and
# 1.8 times the bytes of their tensors.
MEMORY_SHARES = {"cuda": 0.8}
OTHER_SHARE = 0.5
FLOAT_BYTES = 4
# The moments of AdamW, of which Muon has half for its matrices.
NUM_MOMENTS = 2
# x_0, t, eps, x_t, target and what lies between them, each as large as the images.
IMAGE_COPIES = 16
# The images of two forward passes by which the bytes of an image are computed; no number is.
MANY = (256, 512)


@dataclass(frozen=True)
class StepMemory:
    """The bytes of a step: so many whatever the batch, and so many for each image of a forward pass."""

    fixed: int
    per_image: int

    def of(self, batch_size: int) -> int:
        """Return the bytes for a forward pass of so many images."""
        return self.fixed + batch_size * self.per_image


def step_memory(unet: Any, autocast_dtype: torch.dtype | None, num_copies: int, num_processes: int) -> StepMemory:
    """Compute the memory of a step.

    Args:
        unet: The network, on the CPU.
        autocast_dtype: The type that it runs in; None: float32.
        num_copies: The further copies of the weights that are held: averages, and networks that teach.
        num_processes: The processes; several hold their gradients once more, to exchange them.
    """
    one, many, more = (_peak_of_passes(unet, autocast_dtype, count) for count in (1, *MANY))
    # The peak is the largest of sums, each linear in the images: of one image it may be all gradients, of many it is
    # what the backward pass needs. So it grows by no more per image than it does at many, and this bounds it.
    per_image = -(-(more - many) // (MANY[1] - MANY[0]))
    num_parameters = sum(p.numel() for p in unet.parameters())
    copies = 1 + NUM_MOMENTS + num_copies + (num_processes > 1)
    height, width = to_size(unet.config.sample_size)
    of_images = IMAGE_COPIES * FLOAT_BYTES * unet.config.in_channels * height * width
    fixed = max(0, one - per_image) + copies * FLOAT_BYTES * num_parameters
    return StepMemory(fixed, per_image + of_images)


def batch_that_fits(num_images: int, memory: StepMemory, room: int) -> int:
    """Return the largest divisor of `num_images` whose forward pass fits in `room` bytes; 1 if none does."""
    most = min(num_images, (room - memory.fixed) // memory.per_image)
    return next((size for size in range(most, 0, -1) if num_images % size == 0), 1)


def room_for_steps(device: torch.device, processes_of_machine: int) -> int:
    """Return the bytes that the steps of this process may take; processes on a CPU share those of the machine."""
    num_sharing = 1 if device.type == "cuda" else processes_of_machine
    return int(MEMORY_SHARES.get(device.type, OTHER_SHARE) * free_memory(device)) // num_sharing


def _peak_of_passes(unet: Any, autocast_dtype: torch.dtype | None, num_images: int) -> int:
    """Return the most bytes held at once in two forward and backward passes, but for the weights."""
    shapes = FakeTensorMode(allow_non_fake_inputs=True)
    copy = deepcopy(unet).train()
    for module in copy.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = shapes.from_tensor(tensor.detach())
                    tensors[name] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake
    size = to_size(copy.config.sample_size)
    with shapes, torch.enable_grad():
        x_t = torch.zeros(num_images, copy.config.in_channels, *size)
        t = torch.zeros(num_images, dtype=torch.int64)
        labels = {name: value.expand(num_images, *value.shape[1:]) for name, value in example_labels(copy).items()}
        with LiveBytes(copy.parameters()) as bytes_held:
            for _ in range(2):
                with torch.autocast("cpu", autocast_dtype, enabled=autocast_dtype is not None):
                    output = copy(x_t, t, **labels).sample
                output.float().square().mean().backward()
                del output
    return bytes_held.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make and that are alive.

    Attributes:
        peak: The most bytes at once.

    Args:
        excluded: Tensors that are there before and are not counted.
    """

    def __init__(self, excluded: Any) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._seen = WeakIdKeyDictionary()
        for tensor in excluded:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = True
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self.now -= size
