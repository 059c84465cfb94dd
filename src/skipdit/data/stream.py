"""A dataset as an endless shuffled stream that can be entered anywhere.

Position p of the stream is a fixed sample: number `p mod len` of epoch `p div len`'s permutation. A training run that
knows its step number therefore knows its data, on any number of processes and after any interruption.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class BrokenSample(Exception):
    """Raised by a dataset whose file cannot be read; the message names the file and the reason."""


@dataclass(frozen=True)
class _Broken:
    message: str


def seed_of(*numbers: int) -> int:
    """One well-mixed 63-bit seed out of several non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Stream(Dataset):
    """Addresses a dataset by stream position. Broken samples become markers that `collate` gives weight zero."""

    def __init__(self, dataset: Dataset, seed: int):
        if len(dataset) == 0:
            raise ValueError("the dataset is empty")
        self.dataset, self.seed = dataset, seed
        self._epoch, self._order = -1, None

    def index(self, position: int) -> int:
        """Dataset index at a stream position."""
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.dataset), generator=generator)
        return int(self._order[offset])

    def __getitem__(self, position: int):
        index = self.index(position)
        try:
            return {**self.dataset[index], "index": index}
        except BrokenSample as error:
            return _Broken(str(error))


def collate(samples: list) -> dict[str, Tensor | list]:
    """Stack samples. A broken one keeps its row, filled with zeros at weight 0: shapes never change, nothing repeats.

    Returns the samples' own keys, `weight` (N,) and `broken`, the messages of the unreadable files.
    """
    good = [sample for sample in samples if not isinstance(sample, _Broken)]
    broken = [sample.message for sample in samples if isinstance(sample, _Broken)]
    if not good:
        raise RuntimeError("no sample of a whole batch could be read:\n  " + "\n  ".join(broken))
    blank = {key: torch.zeros_like(torch.as_tensor(value)) for key, value in good[0].items()}
    rows = [blank if isinstance(sample, _Broken) else sample for sample in samples]
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in blank}
    batch["weight"] = torch.tensor([float(not isinstance(sample, _Broken)) for sample in samples])
    batch["broken"] = broken
    return batch


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
        raise ValueError(
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
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
        prefetch_factor=4 if workers else None,
    )
