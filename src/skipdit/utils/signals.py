"""Ctrl-C and SIGTERM: a program ends early, leaves nothing half done, and says how to go on."""

import _thread
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME = 0.2  # seconds within which a second signal is the first once more: `timeout` and some launchers send two
_NOTE = b"\nstopping after this step; once more ends at once\n"


class Stopped(KeyboardInterrupt):
    """What a signal raises, or a run that was asked to stop, once it has saved what it had.

    Attributes:
        signum: the signal's number.
        told: a line that says how to go on; empty if it has been said.
    """

    def __init__(self, signum: int, told: str | None = None):
        super().__init__(signal.Signals(signum).name)
        self.signum, self.told = signum, told


class StopSignals:
    """Whether a process was asked to stop.

    Attributes:
        signum: the first signal that came, or None.
    """

    def __init__(self, finish: bool):
        self.signum: int | None = None
        self._finish, self._when = finish, 0.0

    def receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._when = signum, time.monotonic()
            if not self._finish:
                raise Stopped(signum)
            if os.environ.get("RANK", "0") == "0":
                os.write(2, _NOTE)  # print could be interrupted by itself
        elif time.monotonic() - self._when > _SAME:
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + signum)


@contextmanager
def stop_signals(finish: bool = False) -> Iterator[StopSignals]:
    """What Ctrl-C and SIGTERM do within the block: the first raises `Stopped`, a second ends the process at once.

    With `finish`, the first is only noted, for a loop to end at a good moment. In threads other than the main one,
    which get no signals, nothing changes.
    """
    stop = StopSignals(finish)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before, hook = {number: signal.signal(number, stop.receive) for number in SIGNALS}, sys.unraisablehook

    def dropped(unraisable: Any) -> None:
        """Python drops what is raised in a destructor, such as that of a data loader that ends: send it once more."""
        error = unraisable.exc_value
        if not isinstance(error, Stopped):
            hook(unraisable)
            return
        stop.signum = None
        timer = threading.Timer(0.05, _send, (error.signum,))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = dropped
    try:
        yield stop
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _send(signum: int) -> None:
    """Send a signal to this process."""
    if os.name == "posix":
        os.kill(os.getpid(), signum)
    else:
        _thread.interrupt_main(signum)


@contextmanager
def telling(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Adds to an interruption of the block what to tell the user; what was added within it stays."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if getattr(stop, "told", None) is None:
            stop.told = how_to_go_on()
        raise


def leave_signals_to_parent(worker: int) -> None:
    """For a process that loads data: Ctrl-C and SIGTERM to all processes must not end it, since its parent may need one
    batch more. It ends when its parent says so, or has ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows, where nobody sends SIGTERM to groups
        parent = multiprocessing.parent_process().pid
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(parent,), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
