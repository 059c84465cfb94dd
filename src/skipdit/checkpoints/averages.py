"""Averages of weights whose length is chosen after the training (EDM2, arXiv 2312.02696).

A training keeps two averages in which the weights of step t count as t^g, for two exponents g, and saves both now and
then. A sum of what was saved comes as near as least squares can to the average of any other exponent. The length of an
average is the standard deviation of t in it, as a share of the training.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.files import load_checkpoint, saved
from skipdit.checkpoints.released import from_released
from skipdit.utils.errors import UserError

LENGTHS = (0.05, 0.10)  # what a training keeps
LONGEST = 0.28  # nearly that of all steps alike, 1 / sqrt(12)


def exponent(length: float) -> float:
    """The exponent g of an average of the given length: length^2 = (g + 1) / ((g + 2)^2 (g + 3)).

    Raises UserError for a length that no exponent has.
    """
    if not 0 < length <= LONGEST:
        raise UserError(f"the length is a share of the training, above 0 and at most {LONGEST}, not {length:g}")
    inverse = length**-2
    return np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()


class Profile(NamedTuple):
    """How an average weighs the steps: as t^exponent, up to `end`."""

    end: float
    exponent: float


def overlap(a: Sequence[Profile], b: Sequence[Profile]) -> np.ndarray:
    """Inner products of two lists of profiles -> (len(a), len(b)), each profile having the integral 1."""
    (ta, ga), (tb, gb) = np.array(a, dtype=np.float64).T[:, :, None], np.array(b, dtype=np.float64).T[:, None]
    power = ga + gb + 1
    # with a common scale of time, so that nothing overflows
    log = power * np.log(np.minimum(ta, tb)) - (ga + 1) * np.log(ta) - (gb + 1) * np.log(tb)
    return (ga + 1) * (gb + 1) / power * np.exp(log)


def coefficients(kept: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """What to multiply the kept averages with, so that their sum comes nearest to the wanted one -> (len(kept),).

    They add up to 1, so that weights which did not move stay as they are.
    """
    count = len(kept)
    normal = np.ones((count + 1, count + 1))  # with a Lagrange multiplier for the sum
    normal[:count, :count], normal[count, count] = overlap(kept, kept), 0
    return np.linalg.lstsq(normal, np.append(overlap(kept, [wanted])[:, 0], 1), rcond=None)[0][:count]


def combine(run: Path, length: float, step: int | None = None) -> dict[str, torch.Tensor]:
    """The average of a length from what a training saved in `run/averages`: weights, under our names.

    Args:
        step: where the average ends, one that was saved; None is the last.

    Raises:
        FileNotFoundError: there is no such folder, or nothing was saved there.
        UserError: such a step or length is not there.
        WeightsError: a file is damaged.
    """
    if not run.exists():
        raise FileNotFoundError(f"no folder {run}: name that of a training")
    files = [path for path in saved(run / "averages") if step is None or int(path.stem) <= step]
    if not files:
        before = "" if step is None else f" of step {step} or before"
        raise FileNotFoundError(f"no averages{before} in {run / 'averages'}: set train.average_every in a training")
    end = int(files[-1].stem)
    if step not in (None, end):
        raise UserError(f"{run / 'averages'} has no averages of step {step}; the last before it are of step {end}")
    kept = [Profile(int(path.stem), exponent(own)) for path in files for own in LENGTHS]
    factors = coefficients(kept, Profile(end, exponent(length))).reshape(len(files), len(LENGTHS))
    total: dict[str, torch.Tensor] = {}
    for path, row in zip(files, factors, strict=True):
        content = load_checkpoint(path)
        for own, factor in zip(LENGTHS, row, strict=True):
            try:
                state = content["averages"][f"{own:g}"]
            except (KeyError, TypeError) as error:
                raise WeightsError(f"{path} is no file of a training's averages: it lacks {own:g}") from error
            for name, tensor in state.items():
                total[name] = total.get(name, 0) + factor * tensor.double()
    return from_released({name: tensor.float() for name, tensor in total.items()})
