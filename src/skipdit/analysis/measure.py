"""The numbers of the analyses. Shapes: N rows of latents, T tokens, D width; everything is float32 but the cosines."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from skipdit.analysis.trace import Call, Trace, predict, record, trace
from skipdit.caching.policies import CacheSpec
from skipdit.caching.runtime import SkipCache
from skipdit.caching.steps import CacheStep
from skipdit.layers.skip import SkipTransformer
from skipdit.sampling.sampler import Sampler
from skipdit.utils.device import double
from skipdit.utils.errors import UserError

Direction = dict[str, Tensor]


def relative(new: Tensor, old: Tensor, order: int = 2) -> Tensor:
    """Per row, the L1 or L2 norm of the difference over that of `old`: (N, ...) twice -> (N,)"""
    return (new - old).flatten(1).norm(order, dim=1) / old.flatten(1).norm(order, dim=1)


# perturb ---------------------------------------------------------------------------------------------------------


def random_direction(model: nn.Module, generator: torch.Generator) -> Direction:
    """A Gaussian direction in weight space, every filter of which has the norm of the model's own filter.

    A filter is what makes one output: a row of a linear's weight. Biases and other vectors do not move (Li et al. 2018,
    arXiv 1712.09913, section 4).
    """
    direction = {}
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            scale = weight.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
            direction[name] = noise * scale.view(-1, *[1] * (weight.ndim - 1))
    return direction


@contextmanager
def moved(model: nn.Module) -> Iterator[Callable[..., None]]:
    """Gives `move((amount, direction), ...)`, which puts weights at the original plus these; puts them back after."""
    weights = dict(model.named_parameters())
    originals = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def move(*terms: tuple[float, Direction]) -> None:
        for name in terms[0][1]:
            weights[name].copy_(originals[name] + sum(amount * direction[name] for amount, direction in terms))

    try:
        yield move
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(originals[name])


@torch.no_grad()
def perturbation(
    model: SkipTransformer, calls: list[Call], axis: list[float], branch: int, seed: int
) -> dict[str, Tensor]:
    """How far feature and prediction move when the weights do: theta + a d1 + b d2, on a grid.

    Args:
        calls: to average over.
        axis: the values of a and of b.
        branch: b; the feature is the input of layer L-b.
        seed: of the two directions.

    Returns:
        "feature" and "output", each (a, b): the relative L2 distance to the unmoved model's, a mean over all rows.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = random_direction(model, generator), random_direction(model, generator)
    before = [trace(model, call) for call in calls]
    surface = {kind: torch.zeros(len(axis), len(axis)) for kind in ("feature", "output")}
    points = [(i, j) for i in range(len(axis)) for j in range(len(axis))]
    with moved(model) as move:
        for i, j in tqdm(points, desc="perturbations", unit="point"):
            move((axis[i], first), (axis[j], second))
            after = [trace(model, call) for call in calls]
            pairs = list(zip(after, before, strict=True))
            feature = torch.cat([relative(new.feature(branch), old.feature(branch)) for new, old in pairs])
            surface["feature"][i, j] = feature.mean()
            surface["output"][i, j] = torch.cat([relative(new.noise, old.noise) for new, old in pairs]).mean()
    return surface


def rim(surface: Tensor) -> Tensor:
    """The values on the edge of a grid (P, P), as a vector."""
    inner = torch.zeros_like(surface, dtype=torch.bool)
    inner[1:-1, 1:-1] = True
    return surface[~inner]


# similarity ------------------------------------------------------------------------------------------------------


class Likeness:
    """Collects, step by step of a run, how like a tensor is to the one it stands for; batches are put together."""

    def __init__(self):
        self._cosines: dict[float, list[Tensor]] = defaultdict(list)
        self._errors: dict[float, list[Tensor]] = defaultdict(list)

    def add(self, timestep: float, used: Tensor, true: Tensor, tokens: bool) -> None:
        """`tokens`: (N, ..., D), a cosine per token; else one per row."""
        a, b = (double(part) if tokens else double(part).flatten(1) for part in (used, true))
        self._cosines[timestep].append(F.cosine_similarity(a, b, dim=-1).flatten())
        self._errors[timestep].append(relative(used, true))

    def same(self, timestep: float) -> None:
        """The tensor is the one it stands for."""
        self._cosines[timestep].append(torch.ones(1, dtype=torch.float64))
        self._errors[timestep].append(torch.zeros(1))

    def numbers(self, cached: list[bool]) -> dict[str, Any]:
        """Per step the mean cosine, its standard deviation and the mean relative L2 error; means over cached steps."""
        cosines = [torch.cat(part) for part in self._cosines.values()]
        errors = [torch.cat(part).mean().item() for part in self._errors.values()]
        means = [part.mean().item() for part in cosines]
        counted = [i for i, is_cached in enumerate(cached) if is_cached] or range(len(means))
        return {
            "cosine": means,
            "spread": [part.std(correction=0).item() for part in cosines],
            "relative_l2": errors,
            "mean_cosine": sum(means[i] for i in counted) / len(counted),
            "mean_relative_l2": sum(errors[i] for i in counted) / len(counted),
        }


def _require_one_call(timesteps: list[float]) -> None:
    if len(set(timesteps)) < len(timesteps):
        raise UserError("the sampler calls the model twice at a timestep: take one of a call per step, such as ddim")


def similarity(sampler: Sampler, steps: int, spec: CacheSpec) -> dict[str, Any]:
    """What cached steps of a run see and say, against what a full pass on the very same input would have.

    Returns:
        Timesteps, which steps were cached, and for "feature" (input of layer L-b, a cosine per token) and "output" (the
        predicted noise, a cosine per row) `Likeness.numbers`. On full steps they are one, by definition.
    """
    _require_one_call(sampler.timesteps(steps))
    model, feature, output, cached = sampler.model, Likeness(), Likeness(), {}

    def see(call: Call, cache: CacheStep | None, noise: Tensor) -> None:
        ran = cache is not None and cache.kept_feature is None  # a full call leaves its feature there
        if cached.setdefault(call.timestep, ran) != ran:
            raise UserError(
                f"{spec} decided otherwise for another batch: let all samples be one, batch_size=num_samples"
            )
        if not cached[call.timestep]:
            feature.same(call.timestep)
            output.same(call.timestep)
            return
        true = trace(model, call)
        feature.add(call.timestep, cache.feature, true.feature(spec.branch), tokens=True)
        output.add(call.timestep, noise, true.noise, tokens=False)

    record(sampler, steps, spec, see)
    plan = list(cached.values())
    parts = {"feature": feature.numbers(plan), "output": output.numbers(plan)}
    return {"timesteps": list(cached), "cached": plan, **parts}


@torch.no_grad()
def foresight(model: SkipTransformer, runs: list[list[Call]], specs: list[CacheSpec]) -> dict[str, dict[str, Any]]:
    """As the feature of `similarity`, along uncached runs: what a cache would hand out, were there one.

    For a plain backbone, which has no cached pass, and for one with skips to set beside it.
    """
    _require_one_call([call.timestep for call in runs[0]])
    found = [Likeness() for _ in specs]
    plans = [spec.full_mask([call.timestep for call in runs[0]]) for spec in specs]
    for run in runs:
        caches = [SkipCache(spec, [call.timestep for call in run]) for spec in specs]
        for i, call in enumerate(tqdm(run, desc="features", unit="step")):
            seen = trace(model, call)
            for cache, likeness in zip(caches, found, strict=True):
                step, true = cache.at(i), seen.feature(cache.spec.branch)
                if step is None or step.feature is None:
                    likeness.same(call.timestep)
                    if step is not None:
                        step.kept_feature = true
                else:
                    likeness.add(call.timestep, step.feature, true, tokens=True)
    return {
        str(spec): {
            "timesteps": [call.timestep for call in runs[0]],
            "cached": [not full for full in plan],
            "feature": likeness.numbers([not full for full in plan]),
        }
        for spec, plan, likeness in zip(specs, plans, found, strict=True)
    }


# dynamics --------------------------------------------------------------------------------------------------------


def change(new: list[Tensor], old: list[Tensor]) -> Tensor:
    """How much every layer's feature (N, ..., D) differs from the step before: (3, layers, N), relative L1, relative
    L2, and the cosine, a mean over tokens.
    """
    cosines = [
        F.cosine_similarity(double(a), double(b), dim=-1).flatten(1).mean(1).to(a)
        for a, b in zip(new, old, strict=True)
    ]
    norms = [[relative(a, b, order) for a, b in zip(new, old, strict=True)] for order in (1, 2)]
    return torch.stack([torch.stack(part) for part in (*norms, cosines)])


@torch.no_grad()
def dynamics(model: SkipTransformer, runs: list[list[Call]]) -> Tensor:
    """`change` over runs: (3, layers, steps - 1), means over all rows."""
    batches = []
    for run in runs:
        before, changes = None, []
        if len({len(call.x) for call in run}) > 1:
            raise UserError(
                "guidance begins or ends within the run, so steps cannot be compared: leave out guidance_low and _high"
            )
        for call in tqdm(run, desc="features", unit="step"):
            now = trace(model, call).outputs
            if before is not None:
                changes.append(change(now, before))
            before = now
        batches.append(torch.stack(changes, dim=2))
    return torch.cat(batches, dim=3).mean(3)


# jacobian --------------------------------------------------------------------------------------------------------


def largest_singular_values(
    function: Callable[[Tensor], Tensor], x: Tensor, iterations: int = 50, tolerance: float = 1e-3, seed: int = 0
) -> tuple[Tensor, int]:
    """Largest singular value of the Jacobian of a function at x, for every row by itself, by power iteration on J^T J.

    Args:
        function: (N, ...) -> (N, ...), whose rows do not depend on each other.
        x: (N, ...).
        iterations: at most; each takes J v in forward and J^T u in backward mode.
        tolerance: stop when no row's value changes by more than this part of it.
        seed: of the first v.

    Returns:
        (N,), reached from below; and the iterations it took.
    """

    def norms(v: Tensor) -> Tensor:
        return v.flatten(1).norm(dim=1)

    def unit(v: Tensor) -> Tensor:
        return v / norms(v).clamp_min(torch.finfo(v.dtype).tiny).view(-1, *[1] * (v.ndim - 1))

    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype).to(x.device)
    values = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():  # the only kernel with a forward mode
        warnings.filterwarnings("ignore", message=".*torch.jit")  # PyTorch's own, in its forward mode
        pull = torch.func.vjp(function, x)[1]
        for count in range(1, iterations + 1):  # noqa: B007
            v = unit(v)
            pushed = torch.func.jvp(function, (x,), (v,))[1]
            v = pull(unit(pushed))[0]
            before, values = values, norms(v)
            if ((values - before).abs() <= tolerance * values).all():
                break
    return values, count


def layer_norms(seen: Trace, i: int, **limits: Any) -> tuple[Tensor, Tensor, int]:
    """Largest singular values of layer i's Jacobian, the joining of its skip included.

    Returns:
        (N,) with respect to the output of the layer before, the shallow feature held fixed; (N,) with respect to both
        together, the same where there is no skip; iterations, the more of the two.
    """
    x, *rest = seen.inputs(i)
    own, count = largest_singular_values(lambda x: seen.layer(i, x, *rest), x, **limits)
    if not rest:
        return own, own, count
    joint = torch.cat([x, *rest], dim=-1)
    both, more = largest_singular_values(lambda z: seen.layer(i, *z.chunk(2, dim=-1)), joint, **limits)
    return own, both, max(count, more)


def jacobian(model: SkipTransformer, calls: list[Call], **limits: Any) -> dict[str, Any]:
    """Largest singular values of Jacobians, layer by layer and from latents to predicted noise.

    Args:
        calls: several per timestep count together.
        limits: `iterations` and `tolerance` of `largest_singular_values`.

    Returns:
        "timesteps"; "layers" and "layers_with_skip_input" [timestep][layer], see `layer_norms`; "end_to_end"
        [timestep]; all means over rows. "iterations": the most that one took.
    """
    found: dict[float, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
    most = 0
    for call in tqdm(calls, desc="jacobians", unit="call"):
        with torch.no_grad():
            seen = trace(model, call)
        layers = []
        for i in tqdm(range(seen.depth), desc="layers", unit="layer", leave=False):
            *values, count = layer_norms(seen, i, **limits)
            layers.append(torch.stack(values))
            most = max(most, count)
        through, count = largest_singular_values(lambda x, call=call: predict(model, call, x), call.x, **limits)
        most = max(most, count)
        found[call.timestep].append((*torch.stack(layers, dim=1), through))  # (layers, N) twice, (N,)
    means = [[torch.cat(part, dim=-1).mean(-1).tolist() for part in zip(*rows, strict=True)] for rows in found.values()]
    own, both, through = (list(part) for part in zip(*means, strict=True))
    return {
        "timesteps": list(found),
        "layers": own,
        "layers_with_skip_input": both,
        "end_to_end": through,
        "iterations": most,
    }


def bound(plain: list[float], n_skips: int) -> list[dict[str, float]]:
    """What the paper's bound says of the layers that a skip feeds, next to the plain norm g that goes into it.

        sigma_max(J_skip) <= (1 - a) g + a g^(2l - L),   layers l counted from 1, a the weight of the skip

    The weight a of a learned linear is not defined: both ends, a = 0 (which is g) and a = 1, are given. The bound lies
    below g only where g < 1, or where 2l - L is 0.

    Args:
        plain: g of every layer, measured on a plain model.
    """
    depth = len(plain)
    return [
        {"layer": l - 1, "g": plain[l - 1], "at_a_1": plain[l - 1] ** (2 * l - depth)}
        for l in range(depth - n_skips + 1, depth + 1)  # noqa: E741 (the paper's name)
    ]
