"""FLOPs of model calls and sampling runs."""

import functools
import json

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from skipdit.caching.runtime import SkipCache
from skipdit.caching.steps import CacheStep
from skipdit.layers.skip import SkipTransformer


def flop_counter() -> FlopCounterMode:
    """Return torch's counter of FLOPs, two per multiply-add, which knows the attention of CPUs, too."""
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    )


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *args, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def step_flops(model: SkipTransformer, batch: int, branch: int = 1, **sizes: int) -> dict[str, float]:
    """FLOPs of one full and one cached forward pass, two per multiply-add, attention included.

    Counted on the meta device, and once for models of one config: nothing is computed. `sizes` are those that the
    model's `random_inputs` takes.
    """
    return dict(_step_flops(type(model), json.dumps(model.config), batch, branch, tuple(sorted(sizes.items()))))


@functools.cache
def _step_flops(
    kind: type[SkipTransformer], config: str, batch: int, branch: int, sizes: tuple[tuple[str, int], ...]
) -> dict[str, float]:
    with torch.device("meta"):
        model = kind.from_config(json.loads(config)).to("meta").eval()
    inputs = model.random_inputs(batch, **dict(sizes))

    def count(cache: CacheStep | None) -> float:
        with torch.no_grad(), flop_counter() as counter:
            model(**inputs, cache=cache)
        return float(counter.get_total_flops())

    full = CacheStep(branch, None)
    flops = {"full": count(full)}
    flops["cached"] = count(CacheStep(branch, full.kept_feature)) if branch else 0.0
    return flops


def run_flops(cache: SkipCache, per_step: dict[str, float]) -> float:
    """FLOPs of a whole run, from those of one full and one cached step; a forecast costs none."""
    return cache.full_steps * per_step["full"] + cache.cached_steps * per_step["cached"]
