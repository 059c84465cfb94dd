"""python -m skipdit COMMAND: what runs from the library alone; the task folders hold trainers and samplers."""

import sys
from importlib import import_module

COMMANDS = {  # name -> module whose `main` runs it, and what it does; `commands` has its command line
    "compare": ("evaluation.compare", "the same samples with several caches: speed, fidelity, pictures"),
    "plan": ("planning.command", "plan which steps are cached, measured on the model itself"),
    "analyze": ("analysis.command", "features, skips and caching of a model, in numbers and pictures"),
    "evaluate": ("evaluation.command", "FID, FVD, CLIP score, PSNR and more of samples"),
    "encode": ("data.encode", "encode images or clips to latents, once for many trainings"),
    "encode-text": ("data.encode_text", "the same for captions"),
    "data": ("data.check", "check a data set"),
    "download": ("checkpoints.download", "fetch released checkpoints"),
    "weights": ("checkpoints.convert", "convert, export and verify checkpoints"),
}
USAGE = "usage: python -m skipdit COMMAND ...; python -m skipdit COMMAND --help tells more"


def main(argv: list[str]) -> None:
    """Run a command. Its own module, which takes seconds to import, comes after --help and mistakes are answered."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE + "\n" + "\n".join(f"  {name:12} {help}" for name, (_, help) in COMMANDS.items()))
        return
    if argv[0] not in COMMANDS:
        raise SystemExit(f"error: no command {argv[0]!r}; known: {', '.join(COMMANDS)}")
    args = import_module(f"skipdit.commands.{argv[0].replace('-', '_')}").read_arguments(argv[1:])
    import_module(f"skipdit.{COMMANDS[argv[0]][0]}").main(args)


if __name__ == "__main__":
    main(sys.argv[1:])
