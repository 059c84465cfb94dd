"""A dataset as an endless shuffled stream that can be entered anywhere.

Position p of the stream is a fixed sample: number `p mod len` of epoch `p div len`'s permutation. A training run that
knows its step number therefore knows its data, on any number of processes and after any interruption.

Pictures of several shapes lie in buckets. A batch is of one bucket: an epoch is then the batches of all buckets, each
bucket shuffled and its last batch filled up from its beginning, and these batches shuffled. What fills up a batch has
no weight: every sample counts once per epoch, however rare its shape.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from skipdit.utils.errors import BrokenSample, UserError
from skipdit.utils.seeding import seed_of
from skipdit.utils.signals import leave_signals_to_parent

TRIES = 100  # samples that are read to learn what one looks like, if the first are broken


class Stream(Dataset):
    """Addresses a dataset by stream position.

    A sample is what the dataset gives, with its `index`, `weight` 1 and `broken` "". Where a file cannot be read, it is
    zeros of the usual shapes, `weight` 0 and the message: batches keep their shape, and no neighbour is repeated.
    Where a sample comes again to fill up the last batch of its bucket, `weight` is 0, too.

    A dataset whose samples are random crops has `draw(index, rng)` besides `[index]`; its randomness follows from the
    seed and the position. One whose samples differ in shape has `buckets`, for every sample the index of its shape in
    `sizes` [(height, width)]; positions p of one `p div batch_size` are then of one bucket.
    """

    def __init__(self, dataset: Dataset, seed: int, batch_size: int = 1):
        if len(dataset) == 0:
            raise UserError("the dataset is empty")
        self.dataset, self.seed, self.batch_size = dataset, seed, batch_size
        self._buckets = _members(getattr(dataset, "buckets", None) or [])
        batches = sum(math.ceil(len(members) / batch_size) for members in self._buckets)
        self._length = batches * batch_size if len(self._buckets) > 1 else len(dataset)
        self._epoch, self._order, self._weights, self._blank = -1, None, None, None

    def index(self, position: int) -> int:
        """Dataset index at a stream position."""
        return self._at(position)[0]

    def weight(self, position: int) -> float:
        """0 where the sample at a stream position comes again, to fill up the last batch of its bucket; else 1."""
        return self._at(position)[1]

    def largest(self) -> tuple[int, tuple[int, int] | None]:
        """The first step whose batch is of the largest shape of all, and that (height, width); 0 and None where all
        samples are of one shape.
        """
        if len(self._buckets) < 2:
            return 0, None
        sizes, buckets = self.dataset.sizes, self.dataset.buckets
        shapes = [sizes[buckets[self.index(start)]] for start in range(0, self._length, self.batch_size)]
        step = max(range(len(shapes)), key=lambda step: math.prod(shapes[step]))
        return step, shapes[step]

    def _at(self, position: int) -> tuple[int, float]:
        """Dataset index at a stream position, and its weight."""
        epoch, offset = divmod(position, self._length)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            self._epoch, (self._order, self._weights) = epoch, self._shuffle(generator)
        return int(self._order[offset]), float(self._weights[offset])

    def _shuffle(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The dataset indices of an epoch, in order, and their weights."""
        if len(self._buckets) < 2:
            return torch.randperm(len(self.dataset), generator=generator), torch.ones(len(self.dataset))
        indices, weights = [], []
        for members in self._buckets:
            shuffled = members[torch.randperm(len(members), generator=generator)]
            places = torch.arange(math.ceil(len(members) / self.batch_size) * self.batch_size)
            indices.append(shuffled[places % len(members)])
            weights.append((places < len(members)).float())
        indices, weights = (torch.cat(parts).unflatten(0, (-1, self.batch_size)) for parts in (indices, weights))
        order = torch.randperm(len(indices), generator=generator)
        return indices[order].flatten(), weights[order].flatten()

    def __getitem__(self, position: int) -> dict:
        index, weight = self.index(position), self.weight(position)
        try:
            return {"broken": "", **self.take(index, position), "index": index, "weight": weight}
        except BrokenSample as error:
            return {**self.blank(index), "index": index, "weight": 0.0, "broken": str(error)}

    def take(self, index: int, position: int) -> dict:
        """What the dataset gives at an index, drawn there for a position. Raises BrokenSample."""
        if hasattr(self.dataset, "draw"):
            return self.dataset.draw(index, np.random.default_rng(seed_of(self.seed, position)))
        return self.dataset[index]

    def blank(self, index: int) -> dict[str, Tensor]:
        """Zeros of the shapes and types of a sample. Raises ValueError if none of `TRIES` can be read."""
        other, blank = self._readable()
        if len(self._buckets) < 2:
            return blank
        height, width = self.dataset.sizes[self.dataset.buckets[index]]
        from_height, from_width = self.dataset.sizes[self.dataset.buckets[other]]

        def reshaped(value: Tensor) -> Tensor:
            """Pixels or latents of the other bucket -> of this one."""
            *leading, h, w = value.shape
            return value.new_zeros(*leading, h * height // from_height, w * width // from_width)

        return {key: reshaped(value) if value.ndim > 1 else value for key, value in blank.items()}

    def _readable(self) -> tuple[int, dict[str, Tensor]]:
        """The index of a sample that can be read, and zeros like it."""
        if self._blank is None:
            reasons, spread = [], torch.linspace(0, len(self.dataset) - 1, min(len(self.dataset), TRIES))
            for index in spread.long().tolist():  # of many folders, the first may be broken as a whole
                try:
                    sample = self.take(index, 0)
                except BrokenSample as error:
                    reasons.append(str(error))
                    continue
                values = {key: torch.as_tensor(value) for key, value in sample.items() if key != "broken"}
                self._blank = index, {key: torch.zeros_like(value) for key, value in values.items()}
                return self._blank
            raise UserError(f"none of {len(reasons)} samples can be read:\n  " + "\n  ".join(reasons))
        return self._blank


def _members(buckets: Sequence[int]) -> list[Tensor]:
    """The indices of the samples of every bucket that has some."""
    numbers = torch.tensor(buckets, dtype=torch.int64)
    return [(numbers == bucket).nonzero().flatten() for bucket in numbers.unique()]


def collate(samples: list[dict]) -> dict[str, Tensor | list[str]]:
    """Stack samples of a `Stream`; `broken` becomes the list of the messages of those that could not be read."""
    keys = [key for key in samples[0] if key != "broken"]
    batch = {key: torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in keys}
    return batch | {"broken": [line for sample in samples for line in sample["broken"].splitlines()]}


class _Positions:
    """Batches of stream positions of one process, from a given optimizer step on."""

    def __init__(self, batch_rows: list[range], global_batch: int, start: int, stop: int):
        self.batch_rows, self.global_batch, self.start, self.stop = batch_rows, global_batch, start, stop

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            for rows in self.batch_rows:
                yield [step * self.global_batch + row for row in rows]

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.batch_rows)


def rows_of(global_batch: int, micro_batch: int, rank: int, world: int) -> list[range]:
    """Which rows of the global batch a process runs, one range per gradient accumulation step.

    Raises ValueError if the numbers do not divide.
    """
    if micro_batch < 1 or global_batch % (micro_batch * world):
        raise UserError(
            f"batch_size {global_batch} is not a multiple of micro_batch_size {micro_batch} x {world} processes; "
            f"change one of them"
        )
    starts = range(rank * micro_batch, global_batch, micro_batch * world)
    return [range(start, start + micro_batch) for start in starts]


def make_loader(
    stream: Stream, rows: list[range], global_batch: int, start: int, stop: int, workers: int
) -> DataLoader:
    """Micro-batches of one process for optimizer steps start .. stop - 1, in order."""
    return DataLoader(
        stream,
        batch_sampler=_Positions(rows, global_batch, start, stop),
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
    )
