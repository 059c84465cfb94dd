"""The picture of a comparison shows what a cache changes, and that it changes nothing."""

from typing import ClassVar

import numpy as np
import pytest
import torch

from skipdit.caching.policies import CacheSpec
from skipdit.evaluation.compare import AMPLIFIED, difference, picture, rows_for


def test_differences_are_amplified_around_grey():
    base = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    other = base.clone()
    other[0, 0, 0] = torch.tensor([101, 98])
    other[0, 1] = 255
    shown = difference(other, base)[0]
    assert shown.dtype == torch.uint8
    assert shown[0].tolist() == [[128 + AMPLIFIED, 128 - 2 * AMPLIFIED], [128, 128]]
    assert (shown[1] == 255).all() and (shown[2] == 128).all()


class TwoCalls:
    """A sampler whose solver calls the model twice per step, but once in the last."""

    flops: ClassVar = {"full": 1.0, "cached": 0.1}

    def timesteps(self, steps: int) -> list[float]:
        return [900.0 * (1 - i // 2 / steps) for i in range(2 * steps - 1)]


def test_fewer_steps_of_a_solver_with_two_calls_cost_what_reuse_does():
    sampler = TwoCalls()
    _, reuse, _, fewer = rows_for(20, [2], CacheSpec(2, 1000, 0), sampler)
    assert fewer.steps == 11 and fewer.name == "11 steps"
    assert fewer.flops(sampler) == pytest.approx(reuse.flops(sampler), rel=0.05)


def test_every_row_has_its_samples_and_its_differences():
    uncached = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cached = uncached.clone()
    cached[1] = cached[1].clamp(max=250) + 4
    rows = [{"name": "uncached", "identical": True}]
    rows += [{"name": "reuse", "identical": False, "flops_speedup": 2.0, "psnr": 40.0}]
    canvas = np.array(picture(rows, [uncached, cached]))
    assert canvas.shape == (22 + 2 * 98, 130 + 4 * 98, 3)
    tiles = [[canvas[22 + y * 98 :][:96, 130 + x * 98 :][:, :96] for x in range(4)] for y in range(2)]
    for y, samples in enumerate((uncached, cached)):
        for x in range(2):
            assert np.array_equal(tiles[y][x], samples[x].permute(1, 2, 0).numpy())
    assert all((tile == 128).all() for tile in (*tiles[0][2:], tiles[1][2])), "same samples, no difference"
    assert np.array_equal(tiles[1][3], difference(cached, uncached)[1].permute(1, 2, 0).numpy())
    assert (tiles[1][3] != 128).mean() > 0.9
