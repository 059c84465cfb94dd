"""What freezing saves: time and activation memory of one training step.

    python benchmarks/stage1.py --model DiT-S/2-skip --batch 4

In stage 1 nothing before the first skip is trained, and autograd keeps a graph only behind something that is: the first
half runs without one by itself. The middle row forces one all the same, by asking for the gradient of the latents.
"""

from statistics import median

import torch
from torch import nn

from skipdit.class_to_image.model import DiT
from skipdit.cli import Parser, friendly_errors
from skipdit.training.steps import set_trainable
from skipdit.utils.timing import interleaved_seconds


def step(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    model(*inputs).float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def saved_bytes(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    """Bytes of the activations that one step keeps for its backward pass, each storage counted once."""
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(model, inputs)
    return sum(storages.values())


@friendly_errors("starts anew")
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="DiT-S/2-skip", help="a published name with skips [%(default)s]")
    parser.add_argument("--batch", type=int, default=4, help="samples [%(default)s]")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each kind [%(default)s]")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = DiT.from_name(args.model).to(device).train()
    for parameter in model.parameters():  # DiT's initialisation gives most blocks no gradient
        nn.init.normal_(parameter, std=0.02)
    x, t, y = model.random_inputs(args.batch).values()

    def stage(rules: dict[str, bool], x: torch.Tensor):
        def run() -> None:
            set_trainable(model, rules)
            step(model, (x, t, y))

        set_trainable(model, rules)
        return run, saved_bytes(model, (x, t, y))

    skips = {"skips.*": True, "*": False}
    kinds = {
        "all trained (stage 2)": stage({"*": True}, x),
        "skips trained, graph through all": stage(skips, x.clone().requires_grad_()),
        "skips trained (stage 1)": stage(skips, x),
    }
    times = interleaved_seconds({name: run for name, (run, _) in kinds.items()}, args.repeats, device)
    print(
        f"{args.model}, batch {args.batch}, {model.dtype}, {device}\n\n| | s / step | activations MiB |\n|---|---|---|"
    )
    for name, (_, memory) in kinds.items():
        print(f"| {name} | {median(times[name]):.2f} | {memory / 2**20:.0f} |")


if __name__ == "__main__":
    main()
