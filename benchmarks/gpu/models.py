"""The four full-size models, and one call of each as a sampler makes it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from skipdit.caching.steps import CacheStep
from skipdit.layers.skip import SkipTransformer

TIMESTEP = 500
NOISE = 0.02  # standard deviation of weights that begin as zeros: products of zeros take less power, and time


@dataclass(frozen=True)
class Case:
    """A model, at the size that its release has.

    Attributes:
        name: for people; the batch follows it.
        package, kind: where its class is.
        settings: of its constructor, but for `skip`.
        batches: samples per step; guidance makes a call of twice as many.
        branches: of cached steps, that of the released code first.
        window: the released cache spec, with `{}` for the interval.
        steps: of a sampling run.
    """

    name: str
    package: str
    kind: str
    batches: tuple[int, ...]
    branches: tuple[int, ...]
    window: str
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 50

    @property
    def has_classes(self) -> bool:
        """Conditioned on classes, not on texts."""
        return self.kind in ("DiT", "Latte")

    def make(self, skip: bool = True) -> SkipTransformer:
        """The model, on the current default device, in float32."""
        return getattr(import_module(f"skipdit.{self.package}"), self.kind)(**self.settings, skip=skip)


FULL = {
    "DiT": Case("DiT-XL/2 256", "class_to_image", "DiT", (64, 8, 1), (4, 1), "N{}-1000-20-b4"),
    "Latte": Case(
        "Latte-XL/2 16x256", "class_to_video", "Latte", (8, 1), (1,), "N{}-900-49", {"num_classes": 101, "extras": 2}
    ),
    "LatteT2V": Case("Latte T2V 16x512", "text_to_video", "LatteT2V", (1,), (1,), "N{}-700-50"),
    "HunyuanDiT": Case("Hunyuan-DiT 1024", "text_to_image", "HunyuanDiT", (4, 1), (1,), "N{}-700-50"),
}
_TINY = {
    "DiT": {"input_size": 4, "hidden_size": 32, "depth": 4, "num_heads": 2, "num_classes": 10},
    "Latte": {"input_size": 4, "hidden_size": 32, "depth": 8, "num_heads": 2, "num_frames": 4, "num_classes": 5},
    "LatteT2V": {
        **{"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 4, "cross_attention_dim": 32},
        **{"sample_size": 4, "caption_channels": 12, "video_length": 4},
    },
    "HunyuanDiT": {
        **{"input_size": (8, 8), "hidden_size": 32, "depth": 6, "num_heads": 2},
        **{"text_states_dim": 16, "text_states_dim_t5": 16},
    },
}


def cases(tiny: bool = False) -> dict[str, Case]:
    """The models by the names of their classes; tiny ones are of the same classes, under the same names."""
    if not tiny:
        return FULL
    small = {"DiT": {"branches": (2, 1), "window": "N{}-1000-20-b2"}}
    return {
        kind: replace(case, settings=case.settings | _TINY[kind], steps=8, **small.get(kind, {}))
        for kind, case in FULL.items()
    }


def build(case: Case, device: torch.device, dtype: torch.dtype, skip: bool = True) -> SkipTransformer:
    """A model in eval mode whose every weight acts: its own initialisation, with noise where that is zero.

    The same weights in every dtype, to rounding.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = case.make(skip).eval().requires_grad_(False)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=NOISE)
    nn.Module.to(model, dtype=dtype)  # not diffusers' own, which warns of modules that these models have not
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return model


class Step:
    """One sampling step's model call with guidance: full, and cached for every branch.

    What does not depend on the latents is computed before, as samplers do: for models of classes the modulations, for
    those of texts the keys and values.

    Args:
        model: of `build`.
        batch: samples; the call has twice as many rows.
        graphs: whether the model runs as CUDA graphs, whose outputs the next call overwrites.
    """

    def __init__(self, case: Case, model: SkipTransformer, batch: int, graphs: bool = False):
        self.model, self.branches, self.graphs = model, case.branches, graphs
        torch.manual_seed(1)
        with torch.no_grad():
            self.inputs = _class_inputs(case, model, batch) if case.has_classes else _text_inputs(case, model, batch)
        self.feature: Tensor | None = None

    @torch.no_grad()
    def full(self) -> Tensor:
        """Run all layers; keep the feature that cached steps need, from the first call on."""
        step = CacheStep(self.branches[0], None)
        out = self._call(self.inputs[None], step)
        if self.feature is None:
            self.feature = step.kept_feature.clone()
        return out

    @torch.no_grad()
    def cached(self, branch: int) -> Tensor:
        """Run the outer layers."""
        return self._call(self.inputs[branch], CacheStep(branch, self.feature))

    def _call(self, inputs: dict[str, Any], step: CacheStep) -> Tensor:
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        out = self.model(*inputs["arguments"], cache=step, **inputs["named"])
        return out if isinstance(out, Tensor) else out[0]

    def functions(self) -> dict[str, Callable[[], Tensor]]:
        """The calls by name: "full", and the branches of cached steps."""
        return {"full": self.full} | {str(b): (lambda branch=b: self.cached(branch)) for b in self.branches}


def _class_inputs(case: Case, model: SkipTransformer, batch: int) -> dict[int | None, dict[str, Any]]:
    """Arguments of DiT and Latte in a full step (None) and by branch, as `class_sample.generate` gives them."""
    half = torch.randn(batch, *model.sample_shape, device=model.device).to(model.dtype)
    t = torch.full((2 * batch,), TIMESTEP, device=model.device)
    labels = torch.randint(model.null_class, (batch,), device=model.device)
    both = torch.cat([labels, torch.full_like(labels, model.null_class)])
    arguments = (torch.cat([half, half]), t, both)
    return {
        branch: {"arguments": arguments, "named": {"conditioning": model.condition(t[:1], both, branch)[0]}}
        for branch in (None, *case.branches)
    }


def _text_inputs(case: Case, model: SkipTransformer, batch: int) -> dict[int | None, dict[str, Any]]:
    """Arguments of the models of texts, as `end_to_end` gives them; the same in all steps."""
    inputs = {"arguments": (), "named": model.random_inputs(2 * batch) | {"return_dict": False}}
    return dict.fromkeys((None, *case.branches), inputs)
