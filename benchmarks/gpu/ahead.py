"""Compiling in child processes while the tests run.

What torch.compile makes lies in a cache on disk, by what was compiled. A child that makes a row's calls once, on the
same card, leaves there what the row needs: compiling it then takes seconds instead of a minute. Children end before
anything is timed.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from gpu.bench import Bench
from gpu.plan import Row

MEMORY_SHARE = {"training": 0.55}  # of the card, for a child; by section
OTHER_SHARE = 0.2
THREADS = 4  # that a child compiles kernels with


class Ahead:
    """Child processes that compile rows, most important first, a few at a time.

    Args:
        rows: to compile; of those of one form, the first.
        workers: children at a time; 0 for none.
        arguments: of the program, so that a child has the same rows.

    Attributes:
        done: forms that were compiled.
        failed: the last line that other children left, by form.
    """

    def __init__(self, rows: list[Row], workers: int, arguments: list[str]):
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}
        self._arguments = arguments
        self._waiting: dict[str, str] = {}  # form -> name of a row
        for row in rows:
            self._waiting.setdefault(row.form, row.key)
        self._lock, self._children, self._stopped = threading.Lock(), set(), False
        workers = min(workers, len(self._waiting))
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def finish(self, seconds: float) -> None:
        """Wait so long at most for the children that run, start no more, and end those that are left."""
        with self._lock:
            self._waiting.clear()
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))
        with self._lock:
            self._stopped = True
            for child in self._children:
                child.kill()
        for thread in self._threads:
            thread.join(10)

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._stopped or not self._waiting:
                    return
                form = next(iter(self._waiting))
                key = self._waiting.pop(form)
                child = subprocess.Popen(
                    self.command(key),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(THREADS)},
                )
                self._children.add(child)
            told = child.communicate()[1]
            with self._lock:
                self._children.discard(child)
                if child.returncode == 0:
                    self.done.add(form)
                else:
                    self.failed[form] = (told.strip().splitlines() or [f"ended with {child.returncode}"])[-1][:300]

    def command(self, key: str) -> list[str]:
        """The command line of a child."""
        return [sys.executable, str(Path(__file__).parent), "compile", key, *self._arguments]


def compile_row(row: Row, bench: Bench) -> None:
    """What a child does. It takes a share of the memory only: several run at once, beside the tests."""
    if bench.cuda:
        torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE.get(row.section, OTHER_SHARE))
    row.compile(bench)
    bench.synchronize()
