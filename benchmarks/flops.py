"""What full and cached steps, and whole runs, cost in FLOPs: counted on the full-size model, nothing is computed.

    python benchmarks/flops.py                          # text-to-video, Latte T2V at 512x512, 16 frames
    python benchmarks/flops.py --model HunyuanDiT       # text-to-image, Hunyuan-DiT at 1024x1024
    python benchmarks/flops.py --steps 100 --specs N2-700-50 N3-700-50-b2

True FLOPs are two per multiply-add, with attention; the text, which is encoded once per run, is not among them: 0.05 %
of one step of Latte T2V, 0.7 % of one of Hunyuan-DiT. The paper's TFLOPs are multiply-adds of the linear layers alone,
without attention; `paper_macs` counts them as the released code runs the models.
"""

import argparse
import math
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from torch.utils.flop_counter import FlopCounterMode

from skipdit.caching.runtime import SkipCache
from skipdit.cli import Parser, friendly_errors
from skipdit.layers.flops import run_flops, step_flops
from skipdit.text_to_image import HunyuanDiT, sample_t2i
from skipdit.text_to_video import LatteT2V, sample_t2v

PAPER_TOKENS = 36  # of Latte's prompt: the paper does not say; with so many all of its rows come out to 0.01 %


@dataclass
class Table:
    """A table of the paper.

    Attributes:
        kind: class of the model.
        plain: name of the row of the model without skips.
        scheduler: of the runs.
        paper: TFLOPs per row, for 50 steps with guidance.
        times: how often the released code encodes the text at an uncached step, and `again` in words.
    """

    kind: type[LatteT2V] | type[HunyuanDiT]
    plain: str
    scheduler: SchedulerMixin
    paper: dict[str, float]
    times: int
    again: str


TABLES = {
    "LatteT2V": Table(
        LatteT2V,
        "plain Latte",
        sample_t2v.make_scheduler("ddim"),
        {
            "plain Latte": 1587.25,
            "none": 1648.13,
            "N2-700-50": 1127.83,
            "N3-700-50": 974.80,
            "N4-700-50": 882.98,
            "N2-800-50": 1066.62,
            "N3-800-50": 852.38,
            "N4-800-50": 760.56,
        },
        times=16,
        again="for every frame",
    ),
    "HunyuanDiT": Table(
        HunyuanDiT,
        "plain Hunyuan-DiT",
        sample_t2i.make_scheduler("ddpm"),
        {
            "none": 514.02,
            "N2-700-50": 348.24,
            "N3-700-50": 299.48,
            "N4-700-50": 270.22,
            "N5-700-50": 260.47,
            "N6-700-50": 240.96,
        },
        times=1,
        again="again",
    ),
}


def paper_macs(model: LatteT2V | HunyuanDiT, layers: int, skips: int, tokens: int = PAPER_TOKENS) -> float:
    """Multiply-adds of the linear layers of one step of one clip or picture, as the released code runs the model.

    Args:
        layers, skips: how many of them the step runs; a layer of Latte is a pair.
        tokens: of Latte's text. Hunyuan-DiT's has a fixed number.
    """
    c = model.config
    if isinstance(model, LatteT2V):
        d, pixels = c.num_attention_heads * c.attention_head_dim, c.video_length * (c.sample_size // c.patch_size) ** 2
        spatial = 4 + 2 + 8  # d^2 for self-attention, queries and output of cross-attention, MLP
        temporal = 4 + 8
        layer, outputs, text = spatial + temporal, c.out_channels, _latte_text(model, layers, tokens)
    else:
        d, pixels = c.hidden_size, math.prod(c.input_size) // c.patch_size**2
        layer, outputs = 4 + 2 + 2 * int(d * c.mlp_ratio) / d, c.in_channels * (2 if c.learn_sigma else 1)
        text = _hunyuan_text(model, layers)
    ends = c.patch_size**2 * (c.in_channels + outputs) * d
    return pixels * ((layers * layer + skips * 2) * d**2 + ends) + text


def _latte_text(model: LatteT2V, pairs: int, tokens: int) -> float:
    """Its projection, and its keys and values, which are computed for every frame."""
    c = model.config
    d = c.num_attention_heads * c.attention_head_dim
    return c.video_length * tokens * pairs * 2 * d**2 + tokens * (c.caption_channels + d) * d


def _hunyuan_text(model: HunyuanDiT, blocks: int) -> float:
    """Both texts' keys and values, the projection of the T5's, and its pooling."""
    c = model.config
    keys_values = blocks * (c.text_len + c.text_len_t5) * c.text_states_dim * 2 * c.hidden_size
    projection = c.text_len_t5 * 4 * c.text_states_dim_t5 * (c.text_states_dim_t5 + c.text_states_dim)
    pooling = (1 + 2 * (c.text_len_t5 + 1)) * c.text_states_dim_t5**2
    return keys_values + projection + pooling


@friendly_errors()
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", choices=TABLES, default="LatteT2V", help="[%(default)s]")
    parser.add_argument("--specs", nargs="+", metavar="SPEC", help="cache specs [those of the paper's table]")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps [%(default)s]")
    parser.add_argument("--tokens", type=int, default=120, help="of Latte's text, for the true FLOPs [%(default)s]")
    args = parser.parse_args()
    report(TABLES[args.model], args)


def report(table: Table, args: argparse.Namespace) -> None:
    with torch.device("meta"):
        model, plain = table.kind(), table.kind(skip=False)
    sizes = {"tokens": args.tokens} if table.kind is LatteT2V else {}
    table.scheduler.set_timesteps(args.steps)
    timesteps = table.scheduler.timesteps
    specs = args.specs or [name for name in table.paper if name.startswith("N")]
    rows = [(table.plain, plain, "none"), *(("none" if s == "none" else s, model, s) for s in ["none", *specs])]
    tokens = args.tokens if sizes else len(model.text_embedding_padding)
    print(f"{args.model}, guidance (2 rows a step), {args.steps} steps, text of {tokens} tokens\n")
    columns = ("", "full + cached steps", "full step TFLOP", "cached step TFLOP", "run PFLOP", "gain", "paper's way T")
    print(f"| {' | '.join(columns)} | paper | off |")
    print("|---|---|---|---|---|---|---|---|---|")
    base = run_flops(SkipCache("none", timesteps), step_flops(model, 2, **sizes))
    for name, net, spec in rows:
        cache = SkipCache(spec, timesteps)
        branch = cache.spec.branch
        true = step_flops(net, 2, branch, **sizes)
        run = run_flops(cache, true)
        full = 2 * paper_macs(net, net.depth, net.n_skips)
        paper = run_flops(cache, {"full": full, "cached": 2 * paper_macs(net, 2 * branch, branch)}) / 1e12
        known = table.paper.get(name) if args.steps == 50 else None
        compared = f"{known} | {paper / known - 1:+.3%}" if known else "|"
        cached = f"{true['cached'] / 1e12:.3f}" if cache.cached_steps else ""
        print(
            f"| {name} | {cache.full_steps} + {cache.cached_steps} | {true['full'] / 1e12:.3f} | {cached} | "
            f"{run / 1e15:.3f} | {base / run:.2f} | {paper:.2f} | {compared} |"
        )
    once = encode_flops(model, sizes)
    print(
        f"\nthe text, encoded once per run: {once / 1e12:.3f} TFLOP; {table.again} at every uncached step, as the "
        f"released code does: {args.steps * table.times * once / 1e12:.0f} TFLOP"
    )


def encode_flops(model: LatteT2V | HunyuanDiT, sizes: dict[str, int]) -> float:
    """True FLOPs of projecting prompt and negative prompt, and their keys and values in all blocks."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.random_inputs(2, **sizes)  # computes nothing else
    return float(counter.get_total_flops())


if __name__ == "__main__":
    main()
