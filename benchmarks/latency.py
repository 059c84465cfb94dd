"""How long full and cached steps take, against how many FLOPs they are.

    python benchmarks/latency.py --model DiT-S/2-skip --batch 4
    python benchmarks/latency.py --model DiT-skip --batch 8 --dtype bfloat16 --compile --json results/xl.json
    python benchmarks/latency.py --model Latte-S/2-skip --batch 1
    python benchmarks/latency.py --model demo --batch 4
    python benchmarks/latency.py --model demo-text --batch 2
    python benchmarks/latency.py --model demo-picture --batch 2

Weights are random: they do not change the time. The overhead of a cached step is its share of the time over its share
of the FLOPs; 1.00 means that caching saves exactly what it leaves out.
"""

import argparse
import json
from pathlib import Path
from statistics import median

import torch

from skipdit.caching.steps import CacheStep
from skipdit.class_to_image import DiT
from skipdit.class_to_video import Latte
from skipdit.cli import Parser, friendly_errors
from skipdit.layers.adaln import AdaLNTransformer
from skipdit.layers.flops import step_flops
from skipdit.layers.skip import SkipTransformer
from skipdit.text_to_image import HunyuanDiT
from skipdit.text_to_video import LatteT2V
from skipdit.training.parallel import peak_memory
from skipdit.utils.dtypes import resolve_dtype
from skipdit.utils.provenance import versions
from skipdit.utils.timing import interleaved_seconds

ROOT = Path(__file__).parents[1]
AHEAD = ("the modulations", "keys and values of the text")  # what a run computes before its steps


def build(name: str) -> SkipTransformer:
    """A model of random weights, by published name or as the demos have it."""
    if name == "LatteT2V":
        return LatteT2V()
    if name == "HunyuanDiT":
        return HunyuanDiT()
    if name == "demo-text":
        return LatteT2V.from_config(LatteT2V.load_config(ROOT / "text-to-video/weights/emoji/transformer"))
    if name == "demo-picture":
        texts = {"text_states_dim": 384, "text_states_dim_t5": 384, "text_len": 24, "text_len_t5": 24}
        return HunyuanDiT(input_size=(16, 16), in_channels=16, hidden_size=96, depth=22, num_heads=3, **texts)
    if name == "demo":
        return DiT(input_size=8, patch_size=1, hidden_size=96, depth=28, num_heads=3, num_classes=10)
    if name == "demo-video":
        return Latte(
            input_size=16, patch_size=4, hidden_size=144, depth=16, num_heads=3, num_classes=8, num_frames=16, extras=2
        )
    return Latte.from_name(name) if name.startswith("Latte") else DiT.from_name(name)


def inputs_of(model: SkipTransformer, batch: int, branch: int) -> tuple[dict, dict, dict]:
    """Arguments of a step: as they are; with what a full, and a cached, step of a run finds computed ahead."""
    with torch.no_grad():
        inputs = model.random_inputs(batch)
        if isinstance(model, AdaLNTransformer):
            ahead = [model.condition(inputs["t"][:1], inputs["y"], outer)[0] for outer in (None, branch)]
            return inputs, *(inputs | {"conditioning": conditioning} for conditioning in ahead)
        return model.random_inputs(batch, encoded=False), inputs, inputs


def measure(args: argparse.Namespace) -> dict:
    """All numbers of one model and setting."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(args.dtype, device)
    model = build(args.model)
    for parameter in model.parameters():  # DiT's initialisation is zero in places, and zeros can be fast
        torch.nn.init.normal_(parameter, std=0.02)
    torch.nn.Module.to(model, device, dtype)  # not diffusers' own, which warns of float32 modules that are not there
    model.eval().requires_grad_(False)
    if args.compile:
        model.compile(fullgraph=True)
    plain, full, cached = inputs_of(model, args.batch, args.branch)
    stored = CacheStep(args.branch, None)

    @torch.no_grad()
    def call(inputs: dict, feature: torch.Tensor | None = None):
        return model(**inputs, cache=CacheStep(args.branch, feature))

    with torch.no_grad():
        model(**plain, cache=stored)
    functions = {
        "full": lambda: call(full),
        "cached": lambda: call(cached, stored.kept_feature),
        "full, nothing ahead": lambda: call(plain),
        "cached, nothing ahead": lambda: call(plain, stored.kept_feature),
    }
    steps = {name: median(times) for name, times in interleaved_seconds(functions, args.repeats, device).items()}
    flops = step_flops(model, args.batch, args.branch)
    share = flops["cached"] / flops["full"]
    result = {
        "model": args.model,
        "batch": args.batch,
        "latents": list(next(iter(plain.values())).shape[1:]),
        "dtype": str(dtype),
        "compile": args.compile,
        "branch": args.branch,
        "ahead": AHEAD[not isinstance(model, AdaLNTransformer)],
        "seconds": steps,
        "flops": flops,
        "flop_share_of_cached_step": share,
        "overhead": steps["cached"] / steps["full"] / share,
        "overhead, nothing ahead": steps["cached, nothing ahead"] / steps["full, nothing ahead"] / share,
        "gain of computing ahead": {k: steps[f"{k}, nothing ahead"] / steps[k] for k in ("full", "cached")},
        "tflops_per_second": {kind: flops[kind] / steps[kind] / 1e12 for kind in ("full", "cached")},
        **versions(),
    }
    return result | {"peak_memory_bytes": peak_memory()}


@friendly_errors()
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--model",
        default="DiT-S/2-skip",
        help="a published name with skips, LatteT2V, HunyuanDiT, demo, or demo-video, -text, -picture [%(default)s]",
    )
    parser.add_argument(
        "--batch", type=int, default=4, help="rows of a model call; guidance takes two each [%(default)s]"
    )
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 [%(default)s]")
    parser.add_argument("--compile", action="store_true", help="compile the model")
    parser.add_argument("--branch", type=int, default=1, help="outer layers that a cached step runs [%(default)s]")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each kind [%(default)s]")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    args = parser.parse_args()
    result = measure(args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    compiled = ", compiled" if args.compile else ""
    latents = " x ".join(map(str, result["latents"]))
    print(f"{args.model}, batch {args.batch}, latents {latents}, {result['dtype']}{compiled}, {result['device']}")
    print("\n| step | ms | GFLOP | TFLOP/s |\n|---|---|---|---|")
    for kind in ("full", "cached"):
        ms, gigaflops = result["seconds"][kind] * 1e3, result["flops"][kind] / 1e9
        print(f"| {kind} | {ms:.2f} | {gigaflops:.2f} | {result['tflops_per_second'][kind]:.3f} |")
    print(f"\noverhead of a cached step: {result['overhead']:.2f} of its share of the FLOPs", end="")
    ahead, gain = result["ahead"], result["gain of computing ahead"]
    print(f" ({result['overhead, nothing ahead']:.2f} when {ahead} are computed at every step,", end="")
    print(f" which makes full steps {gain['full']:.3f} and cached ones {gain['cached']:.2f} times as long)")


if __name__ == "__main__":
    main()
