"""A stream of images -> batches of x_0, in an order that is a function of (seed, images seen), as in data.py.

position   p = 0, 1, 2, ... in the endless stream of images
chunk      c positions in a row: p lies in chunk q = p // c
lane       chunk q is of lane l = q % L; p is element j = (q // L) c + p % c of its lane
epoch      e of lane l: shards (l + e) % L, ... + L, ... of the e-th order of all shards; with fewer shards than lanes,
           of the examples of all shards in that order each L-th. The e-th epochs of all lanes hold each image once
block      `shuffle_buffer_images` examples in a row of a lane's epoch, permuted; the last one of an epoch is shorter
place      where a block begins: (l, j of its first element, e, number of the shard in the lane's order, row in it)

So element (l, j) is a function of (data set, seed, L, c, block size). A run keeps L and c, whatever number of
processes and workers it goes on with; with that of its start each worker reads one lane, and only that lane's shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import numpy as np
import torch

from hf_ddpm.data.shards import Example, ImageStream, examples_in
from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.runtime.seeds import FLIP, LEFT, TOP, hashed_uniform

NUM_PLACE_COLUMNS = 5
_SHARD_ORDER, _BLOCK_ORDER = 11, 12  # what random orders are of


class _Rows:
    """Each `stride`-th row of some shards, in their order, from row `first` of shard order[index] on.

    `row` is the next row, counted from the beginning of shard order[index]; it may be set further to pass over rows,
    of which only those are read whose number is not known. At the end it is counted from the end.
    """

    def __init__(self, stream: ImageStream, order: np.ndarray, stride: int, row: int, index: int, first: int):
        self.stream, self.order, self.stride, self.row = stream, order, stride, row
        self.index, self.first = index, first
        self.counts = stream.counts
        self.tables: Iterator[Any] | None = None
        self.table: Any = None
        self.table_row = self.end = 0  # the table holds the rows [table_row, end) of its shard

    def take(self, number: int) -> list[Example]:
        """The next examples; fewer only at the end."""
        examples: list[Example] = []
        while len(examples) < number and self._find_table():
            rows = range(self.row, self.end, self.stride)[: number - len(examples)]
            shard = int(self.order[self.index])
            examples += examples_in(self.table, shard, self.table_row, rows)
            self.row += len(rows) * self.stride
        return examples

    def _find_table(self) -> bool:
        while self.index < len(self.order):
            shard = int(self.order[self.index])
            count = int(self.counts[shard])
            if self.tables is None and not 0 <= count <= self.row:
                self.end = self.first if count < 0 else self.row
                self.tables = self.stream.tables(shard, self.end)
            if self.tables is not None:
                while self.row >= self.end:
                    self.table = next(self.tables, None)
                    if self.table is None:
                        break
                    self.table_row, self.end = self.end, self.end + len(self.table)
                else:
                    return True
                # An epoch that is shorter than the one before must not pass for a whole one.
                self.stream.check_count(shard, count, self.end)
                if self.first and self.end == self.first:
                    self.stream.check_count(shard, self.first + 1, self.first)
                self.counts[shard] = count = self.end
            self.row -= count
            self.index, self.first, self.tables = self.index + 1, 0, None
        return False


class _Lane:
    """One lane, of which the block that was asked for last is kept."""

    def __init__(self, batches: StreamBatches, lane: int):
        self.batches, self.lane = batches, lane
        # With fewer shards than lanes each lane reads all of them.
        self.by_example = len(batches.stream.files) < batches.num_lanes
        self.stride = batches.num_lanes if self.by_example else 1
        self.block: list[Example] = []
        self.place: tuple[int, ...] | None = None

    def find(self, j: int) -> tuple[list[Example], int]:
        """The block that holds element j, and where in it."""
        if self.place is None or j < self.place[1]:
            places = self.batches.places
            usable = places[(places[:, 0] == self.lane) & (places[:, 1] <= j)]
            nearest = usable[usable[:, 1].argmax()].tolist() if len(usable) else (self.lane, 0, 0, 0, None)
            _, self.start, epoch, index, row = nearest
            self.block, self.num_empty = [], 0
            self._begin(epoch, index, row)
        while j >= self.start + len(self.block):
            self._next(j)
        return self.block, j - self.start

    def pick(self, j: int) -> tuple[np.ndarray, int | None, bool]:
        """The image and label of element j, and whether they are another's: if it is unreadable, the next one's.

        That is the next of its block, in a circle, else the first of the blocks after it.
        """
        block, k = self.find(j)
        stream, reader, after, num_tried = self.batches.stream, self, self.start + len(block), 0
        while True:
            for i in range(len(block)):
                example = block[(k + i) % len(block)]
                planes = stream.decode(example)
                if planes is not None:
                    return planes, stream.label(example), num_tried > 0
                num_tried += 1
            if num_tried >= max(100, self.batches.shuffle_buffer_images):
                raise UsageError(
                    f"on_bad_image='skip' must leave some images, got {num_tried} unreadable ones in a row, up to "
                    f"{stream.name_of(block[-1])}: repair or remove them"
                )
            if reader is self:  # which stays where it is
                reader = _Lane(replace(self.batches, places=np.array([self.place])), self.lane)
            block, k = reader.find(after)
            after += len(block)

    def _begin(self, epoch: int, index: int = 0, row: int | None = None) -> None:
        stream, num_lanes = self.batches.stream, self.batches.num_lanes
        order = np.random.default_rng((self.batches.seed, _SHARD_ORDER, epoch)).permutation(len(stream.files))
        turn = (self.lane + epoch) % num_lanes  # in turns, for parts that differ in size
        if not self.by_example:
            order = order[turn::num_lanes]
        first_row = turn if self.by_example else 0
        self.epoch, self.is_empty = epoch, row is None
        self.rows = _Rows(stream, order, self.stride, first_row if row is None else row, index, row or 0)

    def _next(self, j: int) -> None:
        """Goes on to the block that holds element j, or to the end of the epoch if that comes first."""
        size = self.batches.shuffle_buffer_images
        self.start += len(self.block)
        ahead = (j - self.start) // size * size  # whole blocks to pass over
        self.rows.row += ahead * self.stride
        self.block = []  # before the next is read, so that there are never two
        block = self.rows.take(size)
        if block:
            self.start += ahead
            self.is_empty, self.num_empty = False, 0
            index = int(np.flatnonzero(self.rows.order == block[0].shard)[0])
            self.place = (self.lane, self.start, self.epoch, index, block[0].row)
            order = np.random.default_rng((self.batches.seed, _BLOCK_ORDER, self.lane, self.start))
            self.block = [block[i] for i in order.permutation(len(block))]
            return
        passed = ahead - self.rows.row // self.stride
        self.start += passed
        # A lane may have to wait for its turn, but not forever.
        self.num_empty = self.num_empty + 1 if self.is_empty and not passed else 0
        if self.num_empty > 100 * self.batches.num_lanes:
            raise RunError(f"{self.batches.stream.name!r} has no images any more: put them back")
        self._begin(self.epoch + 1)


@dataclass(frozen=True, eq=False)
class StreamBatches(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """The micro-batches of one process for its next steps, for `DataLoader(..., batch_size=None)` with any workers.

    The batch for accumulation a of step k, both counted from `first_position`, holds the positions first_position +
    ((k A + a) P + rank) B + [0, B): `pixels` (B, C, R, R), uint8 or int32, of 16-bit images; `positions` (B,) int64;
    `labels` (B,) int64, if the images have labels; `num_bad`, int64, how many positions show another image than their
    own, which is unreadable; and `places` (n, 5) int64, of each lane that this worker has read from, where the block
    begins that it read from last. Crops and flips are functions of (seed, position).

    Args:
        random_flip: mirror each image with probability 1/2, drawn anew each epoch.
        batch_size: B, images per micro-batch.
        accumulation_steps: A, micro-batches per step and process.
        rank: this process, in [0, num_processes).
        first_position: images that the run has consumed.
        num_steps: steps to yield batches for.
        num_lanes: L, kept for a whole run; best num_processes * max(1, workers) of its start.
        chunk_size: c, kept for a whole run; best the batch size of its start.
        shuffle_buffer_images: images of a block, kept for a whole run.
        places: (n, 5) int64, what batches said before, of any lanes, workers and processes; without them, the lanes
            are read from their beginning, which changes nothing but the time it takes.
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
    num_lanes: int
    chunk_size: int
    shuffle_buffer_images: int
    places: np.ndarray

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        lanes: dict[int, _Lane] = {}
        for k in range(first, self.num_steps * self.accumulation_steps, step):
            start = self.first_position + (k * self.num_processes + self.rank) * self.batch_size
            yield self._batch(lanes, start + np.arange(self.batch_size))

    def _batch(self, lanes: dict[int, _Lane], positions: np.ndarray) -> dict[str, torch.Tensor]:
        size = self.stream.resolution
        dtype = np.uint8 if self.stream.max_value == 255 else np.uint16
        pixels = np.empty((len(positions), self.stream.channels, size, size), dtype)
        labels, num_bad = [], 0
        u, v = (hashed_uniform(self.seed, side, positions) for side in (TOP, LEFT))
        for i, position in enumerate(positions.tolist()):
            chunk, rest = divmod(position, self.chunk_size)
            lane = chunk % self.num_lanes
            if lane not in lanes:
                lanes[lane] = _Lane(self, lane)
            planes, label, is_bad = lanes[lane].pick(chunk // self.num_lanes * self.chunk_size + rest)
            top, left = int(u[i] * (planes.shape[1] - size + 1)), int(v[i] * (planes.shape[2] - size + 1))
            pixels[i] = planes[:, top : top + size, left : left + size]
            labels.append(label)
            num_bad += is_bad
        if self.random_flip:
            flipped = hashed_uniform(self.seed, FLIP, positions) < 0.5
            pixels[flipped] = pixels[flipped, :, :, ::-1]
        places = np.array([lanes[lane].place for lane in sorted(lanes)], np.int64)
        batch = {
            "pixels": torch.from_numpy(pixels.astype(np.int32) if dtype == np.uint16 else pixels),
            "positions": torch.from_numpy(positions),
            "num_bad": torch.tensor(num_bad),
            "places": torch.from_numpy(places),
        }
        if self.stream.class_names is not None:
            batch["labels"] = torch.tensor(labels)
        return batch
