"""The command line that all commands share: parsing, and errors as one line."""

import argparse
import errno
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, NoReturn

from skipdit.utils.errors import UserError
from skipdit.utils.files import FULL, explained
from skipdit.utils.signals import stop_signals


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line, as all errors are, with what to type instead.

    A shell that asks what can be typed next is answered by argcomplete.
    """

    keys: tuple[str, ...] = ()  # of settings, which are written without dashes
    answers = True  # a shell; False for a parser of the first words, after which another one comes
    _answering = False  # of all parsers

    def __init__(self, *args, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs):
        super().__init__(*args, formatter_class=formatter_class, **kwargs)  # descriptions are docstrings

    def parse_known_args(self, args=None, namespace=None):
        self._answer_shell()
        return super().parse_known_args(args, namespace)

    def parse_known_intermixed_args(self, args=None, namespace=None):
        self._answer_shell()  # before positionals are put aside
        return super().parse_known_intermixed_args(args, namespace)

    def _answer_shell(self) -> None:
        if self.answers and not Parser._answering and "_ARGCOMPLETE" in os.environ:
            import argcomplete

            Parser._answering = True  # it parses what is there
            argcomplete.autocomplete(self, always_complete_options="long")

    def error(self, message: str) -> NoReturn:
        if match := re.match("unrecognized arguments: (--[^ =]+)", message):
            key, near = match[1][2:].replace("-", "_"), get_close_matches(match[1], self._switches(), n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists what there is"
            message += f"; write {key}=VALUE" if key in self.keys else f"; {hint}"
        elif message.endswith("required") or "are required: " in message:
            message += "; --help tells more"
        self.exit(2, f"error: {message}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        near = get_close_matches(str(value), map(str, action.choices), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(map(str, action.choices))}"
        name = "/".join(action.option_strings) or action.metavar or action.dest
        raise argparse.ArgumentError(None, f"no {name} {value!r}; {hint}")

    def _switches(self) -> list[str]:
        """Return its own, and those of its subcommands: what these do not know is a mistake of the whole."""
        below = [
            name
            for action in self._actions
            if isinstance(action.choices, dict)
            for parser in action.choices.values()
            if isinstance(parser, Parser)
            for name in parser._switches()
        ]
        return [*self._option_string_actions, *below]


def make_parser(
    schema: type, description: str, default: str | None = None, prog: str | None = None
) -> argparse.ArgumentParser:
    """The command line that all tasks share: `--config FILE [key=value ...]`.

    Args:
        default: what runs without --config; None requires it.
        prog: the program's name, if it is not that of the script.
    """
    parser = Parser(
        prog or None,
        description=description,
        epilog="settings:\n" + describe(schema),
    )
    parser.keys = tuple(entry.name for entry in fields(schema))
    parser.add_argument(
        "--config",
        required=default is None,
        metavar="FILE",
        help="YAML file with the run's settings" + (f"; without one: {default}" if default else ""),
    )
    overrides = parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that override the file's"
    )
    overrides.completer = lambda **_: [f"{name}=" for name in _setting_names(schema)]  # argcomplete's name
    return parser


def _setting_names(schema: type, prefix: str = "") -> Iterator[str]:
    for entry in fields(schema):
        if is_dataclass(entry.type):
            yield from _setting_names(entry.type, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name


def say_start(program: str | None = None) -> None:
    """Tell that a program has begun, before it imports what takes seconds; by default it is called as its script."""
    if os.environ.get("RANK", "0") == "0":
        program = program or os.path.basename(sys.argv[0])
        print(f"{program}: loading libraries and models, which takes some seconds", file=sys.stderr, flush=True)


_WORKER = re.compile(r"\ACaught \w+ in DataLoader worker.*^[\w.]*(Error|Sample): ", re.DOTALL | re.MULTILINE)  # torch's


@contextmanager
def friendly_errors(again: str = "goes on with what is complete") -> Iterator[None]:
    """Ends the program with a message, not a traceback, for what the user can mend: settings, files, checkpoints, a
    server that cannot be reached. A defect keeps its traceback, and all do with SKIPDIT_TRACEBACK=1.

    After Ctrl-C and SIGTERM the message says how to go on, by `again` what the same command does then unless the block
    told more, and the exit code is that of the signal, 130 or 143. What the terminal cannot show, such as names of
    files that are no UTF-8, is shown as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with stop_signals():
            yield
    except KeyboardInterrupt as stop:
        # What the signal met half made, such as a progress bar, complains as it goes.
        sys.unraisablehook = lambda _: None
        traceback.clear_frames(stop.__traceback__)  # what holds processes that load data, which would be waited for
        told = getattr(stop, "told", None)
        told = f"stopped; the same command {again}" if told is None else told
        if told and os.environ.get("RANK", "0") == "0":
            print(told, file=sys.stderr)
        raise SystemExit(128 + getattr(stop, "signum", signal.SIGINT)) from None
    except (UserError, OSError, FloatingPointError) as error:
        if getattr(error, "errno", None) in (*FULL, errno.EROFS):
            error = explained(error, error.filename or "a file")
        if os.environ.get("SKIPDIT_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exception(error)
        else:
            print(f"error: {_WORKER.sub('', str(error)).rstrip()}", file=sys.stderr)
        raise SystemExit(2) from error


def at_least(least: int) -> Callable[[str], int]:
    """A type of a command line: whole numbers from the least one on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is no number from {least} on")
        return int(text)

    return number


def describe(schema: type, prefix: str = "  ") -> str:
    """Every setting with its default, one per line, for `--help`."""
    lines = []
    for entry in fields(schema):
        if is_dataclass(entry.type):
            lines.append(describe(entry.type, f"{prefix}{entry.name}."))
        else:
            default = entry.default if entry.default is not MISSING else entry.default_factory()
            default = "(required)" if default == "???" else default
            lines.append(f"{prefix}{entry.name}={default}".ljust(44) + f" {entry.metadata.get('help', '')}")
    return "\n".join(lines)
