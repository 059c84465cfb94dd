"""Rows in order of importance, run for as long as the time lasts.

Every row says how long it takes on an H100. Before a row the time that is left is looked at; a row that does not fit is
left out, and told so. A row that fails is recorded with its error, and the next one goes on.
"""

import contextlib
import gc
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from gpu.bench import Bench
from gpu.record import Record, shorten

RESERVE = 8  # seconds for the table at the end
GRACE = 40  # seconds after the end of the time until a process that hangs is ended
RESTARTS = 3  # of the process, after errors that leave the GPU unusable to it


class OutOfTime(BaseException):
    """Raised into a row that takes much longer than it should. Not an Exception: compilers catch those."""


class Wrong(Exception):
    """A row whose numbers are there, and say that something is not right.

    Args:
        result: the numbers, kept with the row.
    """

    def __init__(self, message: str, result: dict[str, Any]):
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class Row:
    """Something to measure.

    Attributes:
        section: of `--only`.
        name: within the section.
        measure: does it, and returns numbers for the JSON file.
        seconds: how long it takes on an H100, if its model is in memory in the form that it wants.
        form: of a compiled model, by `Bench.form`; rows in a row share it. Empty without a compiled model.
        tracing: further seconds if the form is not in memory, and was compiled ahead.
        compiling: further seconds if nobody has compiled it.
        compile: compiles what the row needs, for a child process that does so ahead of time.
    """

    section: str
    name: str
    measure: Callable[[Bench], dict[str, Any]]
    seconds: float
    form: str = ""
    tracing: float = 0
    compiling: float = 0
    compile: Callable[[Bench], None] | None = None

    @property
    def key(self) -> str:
        return f"{self.section}/{self.name}"


class Clock:
    """The time of a call of the program.

    Args:
        minutes: from its beginning to the end of the last row.
        began: seconds since the epoch; None: now.
    """

    def __init__(self, minutes: float, began: float | None = None):
        self.minutes, self.began = minutes, time.time() if began is None else began

    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.time() - self.began

    def left(self) -> float:
        """Seconds for rows; negative when the time is over."""
        return self.minutes * 60 - RESERVE - self.spent()


class Plan:
    """Runs rows in the order in which they are given.

    Attributes:
        compiled: forms that were compiled ahead.
        left_out: names of the rows for which there was no time.
    """

    def __init__(self, bench: Bench, record: Record, clock: Clock):
        self.bench, self.record, self.clock = bench, record, clock
        self.compiled: set[str] = set()
        self.left_out: list[str] = []
        self._pace: dict[bool, list[float]] = {True: [], False: []}  # actual over expected seconds: compiled, or not

    def expected(self, row: Row) -> float:
        """Seconds that a row takes on an H100, as things are."""
        if not row.form or row.form == self.bench.form:
            return row.seconds
        return row.seconds + row.tracing + (0 if row.form in self.compiled else row.compiling)

    def need(self, row: Row) -> float:
        """Seconds that a row will take here, judged by the last ones of its kind."""
        recent = self._pace[bool(row.form)][-5:]
        return self.expected(row) * max(1.0, statistics.median(recent) if recent else 1.0)

    def run(self, rows: Sequence[Row]) -> None:
        """Run the rows that the time allows, and that this call has not run before a restart."""
        done = {key for key, row in self.record.data["rows"].items() if row["run"] == self.record.run["id"]}
        for row in rows:
            if row.key in done:
                continue
            expected, need, left = self.expected(row), self.need(row), self.clock.left()
            if need > left:
                self.left_out.append(row.key)
                continue
            print(f"{self.clock.spent():5.0f} s  {row.key}", flush=True)
            seconds = self.run_row(row, limit=min(left + RESERVE, 3 * need + 45))
            self._pace[bool(row.form)].append(seconds / expected)

    def end(self) -> None:
        """Note what was left out."""
        self.record.run |= {"left_out": self.left_out, "seconds": round(self.clock.spent(), 1)}
        self.record.save()

    def run_row(self, row: Row, limit: float) -> float:
        """Run a row and record what comes of it. Returns its seconds."""
        began, entry, ahead = time.perf_counter(), {}, row.form in self.compiled
        try:
            with alarm(limit):
                entry = {"status": "ok", "result": row.measure(self.bench)}
        except Wrong as error:
            entry = {"status": "failed", "error": str(error), "result": error.result}
        except OutOfTime:
            entry = {"status": "failed", "error": f"took longer than {limit:.0f} s and was ended"}
        except Exception as error:
            told, trace = shorten(f"{type(error).__name__}: {error}"), shorten(traceback.format_exc())
            entry = {"status": "failed", "error": told[:2000], "trace": trace[-3000:]}
        seconds = time.perf_counter() - began
        self.record.put(row.key, **entry, seconds=round(seconds, 2), compiled_ahead=ahead)
        if entry["status"] != "ok":  # outside of the handlers: they hold on to the tensors of the frames that failed
            print(f"         failed: {entry['error'].splitlines()[0][:200]}", flush=True)
            self.bench.close()
            if not usable(self.bench.device):
                self.restart()
        return seconds

    def restart(self) -> None:
        """Start the process anew, after an error that its CUDA context does not recover from, to go on behind it."""
        restarts = self.record.run["restarts"] = self.record.run.get("restarts", 0) + 1
        self.record.save()
        if restarts > RESTARTS:
            raise RuntimeError("the GPU fails again and again; see the errors above")
        print("         the GPU does not answer this process any more: starting it anew", flush=True)
        environment = os.environ | {"GPU_CHECK_RUN": self.record.run["id"], "GPU_CHECK_BEGAN": str(self.clock.began)}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def usable(device: torch.device) -> bool:
    """Whether a device still computes: after an illegal access, nothing does in the same process."""
    gc.collect()
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        return torch.ones(2, device=device).sum().item() == 2
    except Exception:
        return False


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside the block if it takes longer than this. Waiting for a GPU that hangs goes on."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1), 5)  # again, should the first be swallowed
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def end_if_stuck(clock: Clock, tell: Callable[[], None]) -> Iterator[None]:
    """End the process if the block goes on when its time is long over, for instance because the GPU hangs. Results are
    in the file by then.

    Args:
        tell: called before that.
    """

    def end() -> None:
        print("the time is over, and a row does not end: giving up", flush=True)
        try:
            tell()
        finally:
            os._exit(3)

    timer = threading.Timer(max(clock.left() + RESERVE + GRACE, 1), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
