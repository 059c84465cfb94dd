"""What full and cached steps, and whole runs, cost in FLOPs: counted on the full-size model, nothing is computed.

    python benchmarks/flops.py                          # text-to-video, Latte T2V at 512x512, 16 frames
    python benchmarks/flops.py --steps 100 --specs N2-700-50 N3-700-50-b2

True FLOPs are two per multiply-add, with attention; the text, which is encoded once per run, is not among them: 0.05 %
of one step. The paper's TFLOPs are multiply-adds of the linear
layers alone, without attention; `paper_macs` counts them as the released code runs the model.
"""

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from skipdit.bench import run_flops, step_flops
from skipdit.cache import SkipCache
from skipdit.config import friendly_errors
from skipdit.text_to_video import LatteT2V
from skipdit.text_to_video.sample_t2v import make_scheduler

PAPER = {  # TFLOPs of table 2: DDIM-50, guidance
    "plain Latte": 1587.25,
    "none": 1648.13,
    "N2-700-50": 1127.83,
    "N3-700-50": 974.80,
    "N4-700-50": 882.98,
    "N2-800-50": 1066.62,
    "N3-800-50": 852.38,
    "N4-800-50": 760.56,
}
PAPER_TOKENS = 36  # of the prompt: the paper does not say; with so many all of its rows come out to 0.01 %


def paper_macs(model: LatteT2V, pairs: int, skips: int, tokens: int = PAPER_TOKENS) -> float:
    """Multiply-adds of the linear layers of one step of one clip.

    Args:
        pairs, skips: how many of them the step runs.
        tokens: of the text. The released code projects it, and its keys and values, at every step, for every frame.
    """
    c = model.config
    d, frames, patch = c.num_attention_heads * c.attention_head_dim, c.video_length, c.patch_size**2
    pixels = frames * (c.sample_size // c.patch_size) ** 2
    spatial = 4 + 2 + 8  # d^2 for self-attention, queries and output of cross-attention, MLP
    temporal = 4 + 8
    linear = pixels * (pairs * (spatial + temporal) + skips * 2) * d**2
    ends = pixels * patch * (c.in_channels + c.out_channels) * d
    text = frames * tokens * pairs * 2 * d**2 + tokens * (c.caption_channels + d) * d
    return linear + ends + text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    specs = [f"N{n}-{start}-50" for start in (700, 800) for n in (2, 3, 4)]
    parser.add_argument(
        "--specs", nargs="+", default=specs, metavar="SPEC", help="cache specs [N2, N3, N4 in 2 windows]"
    )
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps [%(default)s]")
    parser.add_argument("--tokens", type=int, default=120, help="of the text, for the true FLOPs [%(default)s]")
    args = parser.parse_args()
    with friendly_errors():
        report(args)


def report(args: argparse.Namespace) -> None:
    with torch.device("meta"):
        model, plain = LatteT2V(), LatteT2V(skip=False)
    layers = model.config.num_layers
    scheduler = make_scheduler("ddim")
    scheduler.set_timesteps(args.steps)
    rows = [("plain Latte", plain, "none"), *(("none" if s == "none" else s, model, s) for s in ["none", *args.specs])]
    print(f"LatteT2V, guidance (2 rows a step), {args.steps} steps, text of {args.tokens} tokens\n")
    columns = ("", "full + cached steps", "full step TFLOP", "cached step TFLOP", "run PFLOP", "gain", "paper's way T")
    print(f"| {' | '.join(columns)} | paper | off |")
    print("|---|---|---|---|---|---|---|---|---|")
    base = run_flops(SkipCache("none", scheduler.timesteps), step_flops(model, 2, tokens=args.tokens))
    for name, net, spec in rows:
        cache = SkipCache(spec, scheduler.timesteps)
        branch = cache.spec.branch
        true = step_flops(net, 2, branch, tokens=args.tokens)
        run = run_flops(cache, true)
        full = 2 * paper_macs(net, layers, net.n_skips)
        paper = run_flops(cache, {"full": full, "cached": 2 * paper_macs(net, 2 * branch, branch)}) / 1e12
        known = PAPER.get(name) if args.steps == 50 else None
        compared = f"{known} | {paper / known - 1:+.3%}" if known else "|"
        cached = f"{true['cached'] / 1e12:.3f}" if cache.cached_steps else ""
        print(
            f"| {name} | {cache.full_steps} + {cache.cached_steps} | {true['full'] / 1e12:.3f} | {cached} | "
            f"{run / 1e15:.3f} | {base / run:.2f} | {paper:.2f} | {compared} |"
        )
    once = encode_flops(model, args.tokens)
    often = args.steps * model.config.video_length * once
    print(
        f"\nthe text, encoded once per run: {once / 1e12:.3f} TFLOP; for every frame at every uncached step, as the "
        f"released code does: {often / 1e12:.0f} TFLOP"
    )


def encode_flops(model: LatteT2V, tokens: int) -> float:
    """True FLOPs of projecting prompt and negative prompt, and their keys and values in all blocks."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode_text(torch.randn(2, tokens, model.config.caption_channels, device="meta"))
    return float(counter.get_total_flops())


if __name__ == "__main__":
    main()
