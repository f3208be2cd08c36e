"""Streaming: the order of the examples of all shards, cut into micro-batches.

As in batches.py, the seed and the position decide what stands at a position of the endless stream, whatever number of
processes and workers reads it. Several readers share the stream, and each opens files of its own:

position        p = 0, 1, 2, ... in the stream
chunk           c consecutive positions: p lies in chunk q = p // c
substream       chunk q belongs to substream s = q % S; p is its element j = (q // S) c + p % c
epoch           in epoch e, substream s reads shards number (s + e) % S, (s + e) % S + S, ... of a permutation
                of all shards, drawn for e. If there are fewer shards than substreams, it reads every S-th
                example of all shards instead. The e-th epochs of all substreams together hold each image once.
shuffle block   the content of a shuffle buffer: `shuffle_buffer_images` consecutive examples of a substream's
                epoch, permuted. The last block of an epoch is shorter.
block start     where a shuffle block begins: from there a reader continues without what comes before

So element (s, j) is a function of (data set, seed, S, c, size of a block). A run keeps S and c; the number of
processes and workers may change when it is resumed. With the number that it was started with, each worker reads one
substream, and opens only the shards of that substream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_ddpm.data.batches import as_tensor
from hf_ddpm.data.planes import random_crop
from hf_ddpm.data.shard_files import UNKNOWN
from hf_ddpm.data.shards import Example, ImageStream, examples_in
from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.runtime.seeds import FLIP, LEFT, TOP, hashed_uniform

# The second number of a random generator's seed tells what is drawn.
_SHARD_ORDER, _BLOCK_ORDER = 11, 12


class BlockStart(NamedTuple):
    """The place where a shuffle block begins.

    Args:
        substream: The number of the substream.
        element: The number of the block's first element in the substream.
        epoch: The epoch of the substream.
        shard_index: Which of the substream's shards in this epoch holds the first example of the block.
        row: The row of that example in its shard.
    """

    substream: int
    element: int
    epoch: int
    shard_index: int
    row: int


def newest_block_starts(block_starts: Iterable[BlockStart]) -> list[BlockStart]:
    """Return the latest block start of each substream, by the number of the substream."""
    newest: dict[int, BlockStart] = {}
    for start in block_starts:
        if start.substream not in newest or start.element > newest[start.substream].element:
            newest[start.substream] = start
    return [newest[substream] for substream in sorted(newest)]


class _Rows:
    """A reader of every `stride`-th row of some shards, in their order.

    Args:
        stream: The images.
        order: (n,) the numbers of the shards.
        stride: The step between rows.
        shard_index: The index in `order` of the shard to begin with.
        next_row: The next row, counted from the beginning of the current shard. It may be set further to pass over
            rows; a shard is read to pass over it only if its number of rows is unknown.
        first_row: A row of the shard to begin with that is known to exist; no row before it is read.
    """

    def __init__(
        self, stream: ImageStream, order: np.ndarray, stride: int, shard_index: int, next_row: int, first_row: int
    ):
        self.stream, self.order, self.stride = stream, order, stride
        self.shard_index, self.next_row, self.first_row = shard_index, next_row, first_row
        self.rows_per_shard = stream.rows_per_shard
        self.tables: Iterator[Any] | None = None
        self.table: Any = None
        self.table_start = self.table_end = 0  # The table holds the rows [table_start, table_end) of its shard.

    def take(self, number: int) -> list[Example]:
        """Read the next examples; fewer only at the end, where `next_row` is counted from the end."""
        examples: list[Example] = []
        while len(examples) < number and self._load_next_row():
            rows = range(self.next_row, self.table_end, self.stride)[: number - len(examples)]
            shard = int(self.order[self.shard_index])
            examples += examples_in(self.table, shard, self.table_start, rows)
            self.next_row += len(rows) * self.stride
        return examples

    def _load_next_row(self) -> bool:
        """Read on until the table holds the next row; return False if the shards end before it."""
        while self.shard_index < len(self.order):
            shard = int(self.order[self.shard_index])
            num_rows = int(self.rows_per_shard[shard])
            if self.tables is None and (num_rows == UNKNOWN or self.next_row < num_rows):
                self.table_end = self.first_row if num_rows == UNKNOWN else self.next_row
                self.tables = self.stream.tables(shard, self.table_end)
            if self.tables is not None:
                if self._load_next_row_of_shard(self.tables):
                    return True
                num_rows = self._checked_row_count(shard, num_rows)
                self.rows_per_shard[shard] = num_rows
            self.next_row -= num_rows
            self.shard_index, self.first_row, self.tables = self.shard_index + 1, 0, None
        return False

    def _load_next_row_of_shard(self, tables: Iterator[Any]) -> bool:
        while self.next_row >= self.table_end:
            self.table = next(tables, None)
            if self.table is None:
                return False
            self.table_start, self.table_end = self.table_end, self.table_end + len(self.table)
        return True

    def _checked_row_count(self, shard: int, expected: int) -> int:
        """Return the number of rows of a shard that has been read to its end.

        A shard that became shorter is an error: its epoch must not pass for a whole one.
        """
        self.stream.check_row_count(shard, expected, self.table_end)
        if self.first_row and self.table_end == self.first_row:  # The row `first_row` is missing.
            self.stream.check_row_count(shard, self.first_row + 1, self.first_row)
        return self.table_end


class _Substream:
    """A reader of one substream, which keeps the shuffle block that it read last."""

    def __init__(self, batches: StreamBatches, number: int):
        self.batches, self.number = batches, number
        self.has_few_shards = len(batches.stream.files) < batches.num_substreams
        self.stride = batches.num_substreams if self.has_few_shards else 1
        self.block: list[Example] = []
        self.block_start: BlockStart | None = None
        self.element = 0  # the number of the block's first element, or of the epoch's before a block is read
        self.epoch = self.num_empty_epochs = 0
        self.epoch_is_empty = True
        self.rows: _Rows

    def example_at(self, j: int) -> tuple[np.ndarray, int | None, bool]:
        """Return the image at element j; if it is unreadable, the next readable one.

        The next one is sought in the same block, in a circle, and then in the blocks after it.

        Returns:
            The planes (C, h, w), the class, and whether another image stands in for the one at j.
        """
        stream, num_unreadable = self.batches.stream, 0
        for block, first in self._blocks_from(j):
            for i in range(len(block)):
                example = block[(first + i) % len(block)]
                decoded = stream.decode(example)
                if decoded is not None:
                    return decoded.planes, stream.label(example), num_unreadable > 0
                num_unreadable += 1
            if num_unreadable >= max(100, self.batches.shuffle_buffer_images):
                raise UsageError(
                    f"on_bad_image='skip' must leave some images, got {num_unreadable} unreadable ones in a row, up "
                    f"to {stream.name_of(block[-1])}: repair or remove them"
                )
        raise AssertionError("a substream has no end")

    def _blocks_from(self, j: int) -> Iterator[tuple[list[Example], int]]:
        """Yield the block that holds element j and the index of that element, then each later block and 0."""
        block, index = self.block_at(j)
        next_element = self.element + len(block)
        yield block, index
        # Another reader goes ahead, so that this one keeps its block.
        ahead = _Substream(replace(self.batches, block_starts=(self.block_start,)), self.number)
        while True:
            block, _ = ahead.block_at(next_element)
            next_element += len(block)
            yield block, 0

    def block_at(self, j: int) -> tuple[list[Example], int]:
        """Return the shuffle block that holds element j, and the index of that element in it."""
        if self.block_start is None or j < self.block_start.element:
            self._begin_before(j)
        while j >= self.element + len(self.block):
            self._read_block(j)
        return self.block, j - self.element

    def _begin_before(self, j: int) -> None:
        """Go to the nearest known block start that is not after element j, or else to the beginning."""
        self.block, self.num_empty_epochs = [], 0
        usable = [s for s in self.batches.starts_of_substreams.get(self.number, ()) if s.element <= j]
        if usable:
            nearest = max(usable, key=lambda start: start.element)
            self.element = nearest.element
            self._begin_epoch(nearest.epoch, nearest.shard_index, nearest.row)
        else:
            self.element = 0
            self._begin_epoch(0)

    def _begin_epoch(self, epoch: int, shard_index: int = 0, row: int | None = None) -> None:
        """Go to a row of an epoch that is known to exist, or, without `row`, to the beginning of the epoch."""
        stream, num_substreams = self.batches.stream, self.batches.num_substreams
        order = np.random.default_rng((self.batches.seed, _SHARD_ORDER, epoch)).permutation(len(stream.files))
        # The substreams take turns, because their parts of an epoch differ in size.
        part = (self.number + epoch) % num_substreams
        if not self.has_few_shards:
            order = order[part::num_substreams]
        first_row = part if self.has_few_shards else 0
        self.epoch, self.epoch_is_empty = epoch, row is None
        next_row = first_row if row is None else row
        self.rows = _Rows(stream, order, self.stride, shard_index, next_row, first_row=row or 0)

    def _read_block(self, j: int) -> None:
        """Read the block that holds element j; if the epoch ends before it, begin the next epoch instead."""
        size = self.batches.shuffle_buffer_images
        self.element += len(self.block)
        num_skipped = (j - self.element) // size * size  # whole blocks that are passed over
        self.rows.next_row += num_skipped * self.stride
        self.block = []  # Let go of the old block before the next one is read, so that memory never holds two.
        block = self.rows.take(size)
        if block:
            self.element += num_skipped
            self.epoch_is_empty, self.num_empty_epochs = False, 0
            shard_index = int(np.flatnonzero(self.rows.order == block[0].shard)[0])
            self.block_start = BlockStart(self.number, self.element, self.epoch, shard_index, block[0].row)
            order = np.random.default_rng((self.batches.seed, _BLOCK_ORDER, self.number, self.element))
            self.block = [block[i] for i in order.permutation(len(block))]
            return
        # At the end of the epoch, `next_row` says how many of the skipped examples did not exist.
        num_skipped -= self.rows.next_row // self.stride
        self.element += num_skipped
        # A substream may have no examples in some epochs, but not in all.
        if self.epoch_is_empty and not num_skipped:
            self.num_empty_epochs += 1
        else:
            self.num_empty_epochs = 0
        if self.num_empty_epochs > 100 * self.batches.num_substreams:
            raise RunError(f"{self.batches.stream.name!r} has no images any more: put them back")
        self._begin_epoch(self.epoch + 1)


@dataclass(frozen=True, eq=False)
class StreamBatches(torch.utils.data.IterableDataset[dict[str, Any]]):
    """The micro-batches of one process for the next `num_steps` steps, for `DataLoader(..., batch_size=None)`.

    Each item is a dict:

    - `pixels` (B, C, H, W), uint8, or int32 where the images have 16 bits; of arrays as in `MicroBatches`;
    - `positions` (B,) int64, positions in the stream;
    - `labels` (B,) int64, if the images have classes; other labels as in `MicroBatches`;
    - `num_bad`, an int64 scalar, the number of images that stand in for unreadable ones;
    - `block_starts`, a list of `BlockStart`: for each substream that it was read from, the block that was read last.

    Crops and flips are functions of (seed, position).

    Args:
        stream: The images.
        seed: The seed of order, crops and flips.
        random_flip: True to mirror each image with probability 1/2, drawn anew each epoch.
        batch_size: B, the images per micro-batch.
        accumulation_steps: A, the micro-batches per step and process.
        rank: The number of this process, in [0, num_processes).
        num_processes: P.
        first_position: The number of images that the run has already seen.
        num_steps: The number of steps.
        num_substreams: S, the same for the whole run; best num_processes * max(1, workers) of its first start.
        chunk_size: c, the same for the whole run; best the batch size of its first start.
        shuffle_buffer_images: The size of a shuffle block, the same for the whole run.
        block_starts: Block starts that earlier batches told, of any substreams, workers and processes. Without them
            the substreams are read from their beginning, which takes longer and changes nothing else.
    """

    stream: ImageStream
    _: KW_ONLY
    seed: int
    random_flip: bool
    batch_size: int
    accumulation_steps: int
    rank: int
    num_processes: int
    first_position: int
    num_steps: int
    num_substreams: int
    chunk_size: int
    shuffle_buffer_images: int
    block_starts: tuple[BlockStart, ...] = ()

    @cached_property
    def starts_of_substreams(self) -> dict[int, list[BlockStart]]:
        """The known block starts of each substream."""
        starts: dict[int, list[BlockStart]] = {}
        for start in self.block_starts:
            starts.setdefault(start.substream, []).append(start)
        return starts

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        substreams: dict[int, _Substream] = {}
        for k in range(first, self.num_steps * self.accumulation_steps, step):
            start = self.first_position + (k * self.num_processes + self.rank) * self.batch_size
            yield self._batch(substreams, start + np.arange(self.batch_size))

    def _batch(self, substreams: dict[int, _Substream], positions: np.ndarray) -> dict[str, Any]:
        size = self.stream.size
        dtype = self.stream.image_format.dtype
        pixels = np.empty((len(positions), self.stream.channels, *size), dtype)
        labels, num_bad, block_starts = [], 0, {}
        u, v = (hashed_uniform(self.seed, side, positions) for side in (TOP, LEFT))
        for i, position in enumerate(positions.tolist()):
            substream, element = self._element_at(substreams, position)
            planes, label, is_replaced = substream.example_at(element)
            pixels[i] = random_crop(planes, size, u[i], v[i])
            labels.append(label)
            num_bad += is_replaced
            block_starts[substream.number] = substream.block_start
        if self.random_flip:
            is_flipped = hashed_uniform(self.seed, FLIP, positions) < 0.5
            pixels[is_flipped] = pixels[is_flipped, :, :, ::-1]
        batch = {
            "pixels": as_tensor(pixels),
            "positions": torch.from_numpy(positions),
            "num_bad": torch.tensor(num_bad),
            "block_starts": [block_starts[number] for number in sorted(block_starts)],
        }
        if self.stream.labels is not None:
            batch["labels"] = torch.from_numpy(np.stack(labels))
        elif self.stream.class_names is not None:
            batch["labels"] = torch.tensor(labels)
        return batch

    def _element_at(self, substreams: dict[int, _Substream], position: int) -> tuple[_Substream, int]:
        """Return the substream that holds a position, and which of its elements it is."""
        chunk, offset = divmod(position, self.chunk_size)
        number = chunk % self.num_substreams
        if number not in substreams:
            substreams[number] = _Substream(self, number)
        return substreams[number], chunk // self.num_substreams * self.chunk_size + offset
