"""The embedding of several labels at once, which a stock `UNet2DModel` takes in the place of its own.

The network has `class_embed_type="identity"`: it adds what it gets as `class_labels` to the embedding of the
timestep. Stock's embedding is then `torch.nn.Identity`; here a `LabelEmbedding` stands in its place, which sums the
embeddings of the columns. It is taken off while the network is saved, so that stock loads the folder of the network as
it is, and its weights are kept beside the scheduler. Its sum is what stock's network takes.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn

from hf_ddpm.classes import Classes
from hf_ddpm.labels import LABELS_FILE, Columns, read_labels
from hf_ddpm.runtime.files import write_atomically

# Not of safetensors: diffusers takes a folder with such a file for one of a network, and finds no weights in it.
EMBEDDING_FILE = LABELS_FILE.with_suffix(".npz")
# The names of its weights in the network begin so, and so they do in the file.
PREFIX = "class_embedding."
# The sines and cosines of a number.
NUM_FREQUENCIES = 128


class LabelEmbedding(nn.Module):
    """The sum of the embeddings of several labels.

    Args:
        columns: The labels.
        width: The width of the network's embedding of the timestep.
    """

    def __init__(self, columns: Columns, width: int) -> None:
        super().__init__()
        self.columns = nn.ModuleList(
            nn.Embedding(of.num_embeddings, width)
            if isinstance(of, Classes)
            else TimestepEmbedding(NUM_FREQUENCIES, width)
            for _, of in columns.columns
        )

    def forward(self, labels: Tensor) -> Tensor:
        """Embed labels, (B, number of columns) float32, as (B, width)."""
        total: Any = 0
        for column, embedding in zip(labels.unbind(dim=1), self.columns, strict=True):
            if isinstance(embedding, nn.Embedding):
                total = total + embedding(column.long())
                continue
            waves = get_timestep_embedding(column, NUM_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
            total = total + embedding(waves.to(next(embedding.parameters()).dtype))
        return total


def embedding_of(network: Any) -> LabelEmbedding | None:
    """Return the embedding of several labels that a network has; None if it has none."""
    embedding = getattr(network, "class_embedding", None)
    return embedding if isinstance(embedding, LabelEmbedding) else None


def attach_embedding(unet: Any, columns: Columns) -> LabelEmbedding:
    """Give a network with `class_embed_type="identity"` a new embedding of labels, and return it."""
    width = unet.time_embedding.linear_2.out_features
    with torch.device(unet.device):
        embedding = LabelEmbedding(columns, width)
    unet.class_embedding = embedding.to(unet.dtype).train(unet.training)
    return embedding


def attach_saved_embedding(unet: Any, columns: Columns, file: Path) -> None:
    """Give a network the embedding of labels whose weights a file holds.

    Raises:
        OSError: When there is no such file.
        ValueError: When it is damaged.
        RuntimeError: When the weights are of other labels or of another network.
    """
    weights = read_embedding(file)
    embedding = attach_embedding(unet, columns)
    state = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    embedding.load_state_dict({name: tensor.to(unet.dtype) for name, tensor in state.items()})
    embedding.eval()


def attach_embedding_beside(unet: Any, folder: Path) -> None:
    """Give a network that was loaded from a folder of a model the embedding that is kept there, if it needs one.

    Args:
        unet: The network.
        folder: Its folder: that of the model's network, or that of its guide, which holds its own embedding.
    """
    if not isinstance(unet, UNet2DModel) or unet.config.get("class_embed_type") != "identity":
        return
    labels = read_labels(folder.parent)
    if isinstance(labels, Columns):
        own = folder / EMBEDDING_FILE.name
        attach_saved_embedding(unet, labels, own if own.is_file() else folder.parent / EMBEDDING_FILE)


@contextmanager
def embedding_taken_off(network: Any) -> Iterator[LabelEmbedding | None]:
    """Put stock's `Identity` in the place of a network's embedding of labels for the duration of a `with` block."""
    network = getattr(network, "_orig_mod", network)  # which torch.compile has wrapped
    embedding = embedding_of(network)
    if embedding is not None:
        network.class_embedding = nn.Identity()
    try:
        yield embedding
    finally:
        if embedding is not None:
            network.class_embedding = embedding


def write_embedding(file: Path, embedding: LabelEmbedding) -> None:
    """Write the weights of an embedding of labels."""
    write_weights(file, {f"{PREFIX}{name}": tensor for name, tensor in embedding.state_dict().items()})


def write_weights(file: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights of an embedding of labels by their names in the network, in float32."""
    content = io.BytesIO()
    arrays = {name: tensor.detach().float().cpu().numpy() for name, tensor in weights.items()}
    np.savez(content, **arrays)  # pyright: ignore[reportArgumentType]
    write_atomically(file, content.getvalue())


def read_embedding(file: Path) -> dict[str, Tensor]:
    """Read the weights of an embedding of labels, by their names in the network.

    Raises:
        OSError: When there is no such file.
        ValueError: When it is damaged.
    """
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError, zlib.error) as error:
        raise ValueError(f"{file} must hold whole arrays of numpy, got {error}: save or download it again") from error


def save_network(network: Any, folder: Path) -> None:
    """Save a network as diffusers does, with its embedding of labels in a file beside the others."""
    with embedding_taken_off(network) as embedding:
        network.save_pretrained(folder)
        if embedding is not None:
            write_embedding(folder / EMBEDDING_FILE.name, embedding)


def empty_copy(network: Any) -> Any:
    """Return a network of the same config and the same kind of embedding of labels, with numbers of its own."""
    copy: Any = type(network).from_config(network.config)
    embedding = embedding_of(network)
    if embedding is not None:
        copy.class_embedding = _like(embedding)
    return copy


def begin_at_zero(network: Any) -> dict[str, Tensor]:
    """Return weights of a network's embedding of labels with which it gives zero for each label.

    The network then predicts what it would without labels.
    """
    zeros: dict[str, Tensor] = {}
    for name, module in network.class_embedding.named_modules(prefix=PREFIX.removesuffix(".")):
        if isinstance(module, nn.Embedding):
            zeros[f"{name}.weight"] = torch.zeros_like(module.weight)
        elif isinstance(module, TimestepEmbedding):
            last: Any = module.linear_2
            zeros |= {f"{name}.linear_2.{part}": torch.zeros_like(getattr(last, part)) for part in ("weight", "bias")}
    own: Mapping[str, Tensor] = network.state_dict()
    return {name: zeros.get(name, tensor) for name, tensor in own.items() if name.startswith(PREFIX)}


def example_labels(network: Any, batch_size: int = 1) -> dict[str, Tensor]:
    """Return labels that a network takes, as the keyword of its forward pass; none for a network without labels."""
    embedding, config = getattr(network, "class_embedding", None), network.config
    device = network.device
    if isinstance(embedding, LabelEmbedding):
        return {"class_labels": torch.zeros(batch_size, len(embedding.columns), device=device)}
    if isinstance(network, UNet2DModel):
        if isinstance(embedding, nn.Identity):
            width = network.time_embedding.linear_2.out_features  # pyright: ignore[reportAttributeAccessIssue]
            return {"class_labels": torch.zeros(batch_size, width, device=device)}
        if embedding is None:
            return {}
        is_class = isinstance(embedding, nn.Embedding)
        dtype = torch.int64 if is_class else torch.float32
        return {"class_labels": torch.zeros(batch_size, dtype=dtype, device=device)}
    takes_classes = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    return {"class_labels": torch.zeros(batch_size, dtype=torch.int64, device=device)} if takes_classes else {}


def require_same_embedding(guide: Any, unet: Any) -> None:
    """Check that two networks embed several labels alike, if at all.

    Raises:
        ValueError: When one embeds others.
    """
    shapes = []
    for network in (unet, guide):
        embedding = embedding_of(network)
        state = {} if embedding is None else embedding.state_dict()
        shapes.append({name: tuple(tensor.shape) for name, tensor in state.items()})
    if shapes[0] != shapes[1]:
        raise ValueError("guide must have the model's columns of labels, got others: take a model of the same data")


def _like(embedding: LabelEmbedding) -> LabelEmbedding:
    copy = LabelEmbedding.__new__(LabelEmbedding)
    nn.Module.__init__(copy)
    copy.columns = nn.ModuleList(
        nn.Embedding(module.num_embeddings, module.embedding_dim)
        if isinstance(module, nn.Embedding)
        else TimestepEmbedding(NUM_FREQUENCIES, cast(Any, module).linear_2.out_features)
        for module in embedding.columns
    )
    return copy
