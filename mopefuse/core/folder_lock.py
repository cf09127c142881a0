"""The file ``.lock`` in a folder that one process at a time may write to: a run, a study."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mopefuse.core.artifact import alive, born
from mopefuse.core.regular_files import read_regular
from mopefuse.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class FolderLock:
    """A lock that holds the number, machine and time of birth of its process. Creating the object touches nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / ".lock"
        self._content = ""  # what this object wrote into the file

    def take(self) -> str:
        """Claim the folder for this process; a notice if the lock of a dead process was taken over.

        Raises:
            ConfigError: another process holds it.
        """
        notice = ""
        mine = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "born": born(os.getpid())})
        with _one_at_a_time(self.folder):  # of several that find a lock to take over, the first has it
            while True:
                try:
                    descriptor = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                except FileExistsError:
                    owner = self.refuse_if_taken()
                    self.file.unlink(missing_ok=True)
                    notice = f"took over the lock of a process that is gone ({owner['pid'] if owner else 'unknown'})"
                    continue
                os.write(descriptor, mine.encode())
                os.close(descriptor)
                break
        self._content = mine
        return notice

    def release(self) -> None:
        """Give the folder up, if it is still this object's."""
        if self.is_ours():
            self.file.unlink(missing_ok=True)
        self._content = ""

    @property
    def claimed(self) -> bool:
        """Whether this object has taken the lock, and not released it."""
        return bool(self._content)

    def is_ours(self) -> bool:
        """Whether this object holds the lock still: nobody has removed it or taken it over."""
        try:
            return self.claimed and read_regular(self.file).decode("utf-8", "replace") == self._content
        except OSError:
            return False

    def refuse_if_taken(self) -> dict[str, Any] | None:
        """Who held the lock and is gone. A process that was killed a moment ago is given a second to be gone.

        Raises:
            ConfigError: another process holds it.
        """
        for _ in range(10):
            owner = self._owner()
            if not _is_another(owner):
                return owner
            if owner and owner["host"] != socket.gethostname():
                break
            time.sleep(0.1)
        raise self._taken(owner)

    def _owner(self) -> dict[str, Any] | None:
        for wait in (0.0, 0.2):  # who has just made the file may not have written to it yet
            time.sleep(wait if self.file.exists() else 0.0)
            try:
                owner = json.loads(read_regular(self.file).decode("utf-8"))
                if type(owner["pid"]) is int and isinstance(owner["host"], str):
                    return {"pid": owner["pid"], "host": owner["host"], "born": str(owner.get("born", ""))}
            except (OSError, ValueError, TypeError, KeyError):
                continue
        return None

    def _taken(self, owner: dict[str, Any] | None) -> ConfigError:
        who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
        fix = "wait for it, or name another --out"
        if owner and owner["host"] != socket.gethostname():
            fix += f"; if it is gone, remove {self.file.name} there"
        return ConfigError(24, f"{who} is writing this run", where=str(self.folder), fix=fix)


def _is_another(owner: dict[str, Any] | None) -> bool:
    """Whether a lock's owner is another process that lives: a number may come again, as in containers."""
    if owner is None or (owner["host"] == socket.gethostname() and owner["pid"] == os.getpid()):
        return False
    if owner["host"] != socket.gethostname():
        return True
    return alive(owner["pid"]) and owner["born"] in ("", born(owner["pid"]))


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """A part of the program that one process at a time is in, for each folder; where the system has no such locks, all."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of file systems that have none
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
