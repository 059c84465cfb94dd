"""One trainer per run folder."""

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from skipdit.utils.errors import UserError
from skipdit.utils.files import naming

_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_PLACE = 2**30  # of the locked byte: behind the text, which Windows would lock, too


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes from holding a folder at the same time, also on other machines that share it.

    The lock is the operating system's, and the process's: it ends with it, even by SIGKILL, and processes that load
    data do not have it. Warns where a file system knows no locks.

    Raises ValueError that names the process that holds the folder, OSError if it cannot be written.
    """
    path = folder / ".lock"
    with naming(path):
        file = open(path, "ab+", buffering=0)  # noqa: SIM115 (below, where failures are no longer of the writing)
    with file:
        try:
            _lock(file)
        except OSError as error:
            if error.errno in _HELD:
                file.seek(0)
                holder = file.read(1000).decode(errors="replace").strip() or "another process"
                raise UserError(
                    f"{holder} is training in {folder}: wait for it, stop it, or give this run another folder (out=...)"
                ) from error
            warnings.warn(f"{folder} cannot be locked ({error.strerror}): start no second training in it", stacklevel=3)
        with naming(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield  # the file stays: another process may wait to lock it


def _lock(file: IO) -> None:
    """Raises OSError with a number of `_HELD` if another process has locked the file."""
    file.seek(_PLACE)
    try:
        import fcntl
    except ImportError:
        try:
            import msvcrt
        except ImportError as error:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:  # not flock, whose locks children inherit
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _PLACE)
