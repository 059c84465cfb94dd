"""`skipdit COMMAND`, which is also `python -m skipdit COMMAND`."""

import os
import sys
from difflib import get_close_matches
from importlib import import_module

import skipdit
from skipdit.cli import Parser, say_start

COMMANDS = {  # name -> module whose `main` runs it, and what it does; `commands` has its command line
    "demo": ("evaluation.compare", "the embedded model of a task, without and with caches"),
    "doctor": ("doctor", "what is installed, what this machine has, what is missing for which task, and the fix"),
    "sample": ("commands.sample", "images or clips, with or without a cache"),
    "train": ("commands.train", "train a model: from scratch, or in two stages"),
    "app": ("app.page", "a page to try caches and plans side by side in the browser"),
    "compare": ("evaluation.compare", "the same samples with several caches: speed, fidelity, pictures"),
    "plan": ("planning.command", "plan which steps are cached, measured on the model itself"),
    "analyze": ("analysis.command", "features, skips and caching of a model, in numbers and pictures"),
    "evaluate": ("evaluation.command", "FID, FVD, CLIP score, PSNR and more of samples"),
    "encode": ("data.encode", "encode images or clips to latents, once for many trainings"),
    "encode-text": ("data.encode_text", "the same for captions"),
    "data": ("data.check", "check a data set"),
    "download": ("checkpoints.download", "fetch released checkpoints"),
    "convert": ("checkpoints.convert", "short for weights convert: a folder for from_pretrained"),
    "weights": ("checkpoints.convert", "convert, export and verify checkpoints"),
}
QUICK = ("doctor", "download", "convert", "weights")  # which say something at once, or load no model
USAGE = "usage: skipdit COMMAND ..., or python -m skipdit COMMAND ...; skipdit COMMAND --help tells more"


def main(argv: list[str] | None = None) -> None:
    """Run a command, of `argv` or the program's own arguments.

    Its own module, which takes seconds to import, comes after --help and mistakes are answered.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "_ARGCOMPLETE" in os.environ:
        return answer_shell()
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE + "\n" + "\n".join(f"  {name:12} {help}" for name, (_, help) in COMMANDS.items()))
        return
    if argv[0] == "--version":
        print(f"skipdit {skipdit.__version__}")
        return
    if argv[0] not in COMMANDS:
        near = get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(COMMANDS)}"
        print(f"error: no command {argv[0]!r}; {hint}", file=sys.stderr)
        raise SystemExit(2)
    args = import_module(f"skipdit.commands.{argv[0].replace('-', '_')}").read_arguments(argv[1:])
    if argv[0] not in QUICK:
        say_start(f"skipdit {argv[0]}")
    import_module(f"skipdit.{COMMANDS[argv[0]][0]}").main(args)


def answer_shell() -> None:
    """Tell a shell, by argcomplete, which words can stand where its cursor is."""
    from argcomplete.lexers import split_line

    words = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3][1:]
    if not words:
        parser = Parser("skipdit")
        parser.add_argument("--version", action="store_true")
        parser.add_argument("command", choices=COMMANDS)
        parser.parse_args([])
    elif words[0] in COMMANDS and words[0] != "convert":  # whose parser begins a word later than its line
        # Their parsers begin behind these words.
        depth = 2 if words[0] == "analyze" or words[:2] == ["train", "new"] else 1
        os.environ["_ARGCOMPLETE"] = str(1 + min(depth, len(words)))
        import_module(f"skipdit.commands.{words[0].replace('-', '_')}").read_arguments(words[1:])


if __name__ == "__main__":
    main()
