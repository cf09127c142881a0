"""Lock of a folder that only one process at a time may write to, such as a run or a study: the file ``.lock``."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mopefuse.core.atomic_files import is_alive, start_time
from mopefuse.core.error_codes import ConfigCode
from mopefuse.core.regular_files import read_regular
from mopefuse.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class FolderLock:
    """A lock that records process id, host and start time of its owner. Creating the object does not take the lock.

    It also records the job of torchrun, which ends all processes of a job before it starts them again, possibly on another
    host: the lock of the same job on another host is that of a process that has ended.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / ".lock"
        self._content = ""  # content of the file if this object holds the lock

    def take(self) -> str:
        """Take the lock for this process; return a notice if the lock of a dead process was taken over, else "".

        Raises:
            ConfigError: another process holds the lock.
        """
        notice = ""
        who = {"pid": os.getpid(), "host": socket.gethostname(), "born": start_time(os.getpid()), "job": _job()}
        mine = json.dumps(who)
        with _exclusive(self.folder):  # only one process may take over a stale lock
            while True:
                try:
                    descriptor = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                except FileExistsError:
                    owner = self.raise_if_locked()
                    self.file.unlink(missing_ok=True)
                    notice = f"took over the lock of a process that has ended ({owner['pid'] if owner else 'unknown'})"
                    continue
                os.write(descriptor, mine.encode())
                os.close(descriptor)
                break
        self._content = mine
        return notice

    def release(self) -> None:
        """Release the lock if this object still holds it."""
        if self.is_ours():
            self.file.unlink(missing_ok=True)
        self._content = ""

    @property
    def is_held(self) -> bool:
        """Whether this object has taken the lock and not released it."""
        return bool(self._content)

    def is_ours(self) -> bool:
        """Whether this object still holds the lock, that is, no other process removed it or took it over."""
        try:
            return self.is_held and read_regular(self.file).decode("utf-8", "replace") == self._content
        except OSError:
            return False

    def raise_if_locked(self) -> dict[str, Any] | None:
        """Return the dead owner of the lock, waiting up to a second for a process that was just killed to end.

        Raises:
            ConfigError: another process holds the lock.
        """
        for _ in range(10):
            owner = self._owner()
            if not _is_other_process(owner):
                return owner
            if owner and owner["host"] != socket.gethostname():
                break  # there is no way to see whether it still runs
            time.sleep(0.1)
        raise self._locked_error(owner)

    def _owner(self) -> dict[str, Any] | None:
        for wait in (0.0, 0.2):  # the process that just created the file may not have written to it yet
            time.sleep(wait if self.file.exists() else 0.0)
            try:
                owner = json.loads(read_regular(self.file).decode("utf-8"))
                if type(owner["pid"]) is int and isinstance(owner["host"], str):
                    others = {key: str(owner.get(key, "")) for key in ("born", "job")}
                    return {"pid": owner["pid"], "host": owner["host"], **others}
            except (OSError, ValueError, TypeError, KeyError):
                continue
        return None

    def _locked_error(self, owner: dict[str, Any] | None) -> ConfigError:
        who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
        fix = "wait for it to finish, or choose a different --out"
        if owner and owner["host"] != socket.gethostname():
            fix += f"; if that process has ended, remove {self.file}"
        return ConfigError(
            ConfigCode.RUN_FOLDER_IN_USE, f"{who} is already writing to this run", where=str(self.folder), fix=fix
        )


def _job() -> str:
    """The id of this process's job of torchrun (``--rdzv-id``), which several nodes share; empty without one."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if job == "none" else job


def _is_other_process(owner: dict[str, Any] | None) -> bool:
    """Whether the owner is another running process; compares start times, since process ids are reused."""
    if owner is None or (owner["host"] == socket.gethostname() and owner["pid"] == os.getpid()):
        return False
    if owner["host"] != socket.gethostname():
        return not _job() or owner["job"] != _job()
    return is_alive(owner["pid"]) and owner["born"] in ("", start_time(owner["pid"]))


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Exclude other processes from the context, for each folder; no-op on systems without file locks."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
