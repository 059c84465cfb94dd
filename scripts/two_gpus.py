"""One video on two GPUs or more, by diffusers' context parallelism, with a cache.

    torchrun --nproc-per-node 2 scripts/two_gpus.py --weights checkpoints/Latte-skip.pt --prompt "a red fox trots"

Every GPU holds the model and computes its share of each frame's tokens; they meet in the attention of spatial blocks.
"""

import os

import torch
from diffusers import ContextParallelConfig, LattePipeline
from diffusers.utils import export_to_gif

from skipdit import enable_cache, load_weights
from skipdit.cli import Parser, friendly_errors
from skipdit.text_to_video import LatteT2V
from skipdit.utils.errors import UserError


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--weights", default="checkpoints/Latte-skip.pt")
    parser.add_argument("--pipeline", default="maxin-cn/Latte-1", help="folder or name of the other parts")
    parser.add_argument("--prompt", default="a red fox trots through snow")
    parser.add_argument("--cache", default="N2-700-50")
    parser.add_argument("--out", default="two-gpus.gif")
    args = parser.parse_args()
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.device_count() < max(processes, 2):
        raise UserError(f"{max(processes, 2)} GPUs are needed, and there are {torch.cuda.device_count()}")
    if processes < 2:
        raise UserError("this is one process: start it by `torchrun --nproc-per-node 2 scripts/two_gpus.py`")

    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl")
    model = LatteT2V().half()
    load_weights(model, args.weights)
    pipe = LattePipeline.from_pretrained(args.pipeline, transformer=model, torch_dtype=torch.float16).to("cuda")
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=processes))
    enable_cache(pipe, args.cache)
    frames = pipe(args.prompt, generator=torch.Generator("cpu").manual_seed(0)).frames[0]  # all GPUs: the same noise
    if rank == 0:
        export_to_gif(frames, args.out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with friendly_errors():
        main()
