"""Seeds of steps and samples."""

import numpy as np
import torch

from skipdit.utils.errors import UserError


def seed_of(*numbers: int) -> int:
    """One well-mixed 63-bit seed out of several non-negative numbers. Raises ValueError for a negative one."""
    if min(numbers) < 0:
        raise UserError(f"seed is {min(numbers)}; a seed is 0 or larger")
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generators(seed: int, indices: list[int], device: torch.device | str) -> list[torch.Generator]:
    """One generator per sample, seeded by (seed, index): the noise of sample i is the same in any batch and process."""
    return [torch.Generator(device).manual_seed(seed_of(seed, index)) for index in indices]
