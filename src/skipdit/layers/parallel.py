"""Plans for diffusers' context parallelism, by which several GPUs share the tokens of one sample."""

from collections.abc import Sequence
from typing import Any

try:
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
except ImportError:  # diffusers before 0.36
    ContextParallelInput = ContextParallelOutput = None


def context_parallel_plan(
    first: str, last: str, axis: int, gathered: Sequence[str], split: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Return a plan for `enable_parallelism`, in whose blocks only the attention sees all tokens.

    Args:
        first: name of the first block; its tokens `x`, of `axis` + 2 axes, are split.
        last: name of the module behind the blocks, whose output is gathered.
        axis: of the tokens there.
        gathered: names of linear maps before an attention, whose outputs (G, T, ...) are gathered.
        split: names of those behind it, whose inputs are split again.

    Returns:
        None where diffusers has no context parallelism.
    """
    if ContextParallelInput is None:
        return None
    plan: dict[str, Any] = {first: {"x": ContextParallelInput(split_dim=axis, expected_dims=axis + 2)}}
    plan |= {name: ContextParallelOutput(gather_dim=1, expected_dims=3) for name in gathered}
    plan |= {name: {"input": ContextParallelInput(split_dim=1, expected_dims=3)} for name in split}
    return plan | {last: ContextParallelOutput(gather_dim=axis, expected_dims=axis + 2)}
