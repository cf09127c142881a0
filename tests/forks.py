"""Forks of this process, which share the modules that it has imported."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from mopefuse.errors import MopefuseError


def fork(action: Callable[[], Any]) -> int:
    """Run a function in a child process and return its process id. Its exit code is 0, or that of the error, whose traceback it
    prints."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        action()
        code = 0
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        code = error.exit_code if isinstance(error, MopefuseError) else 1
    finally:
        os._exit(code)


def end_of(child: int, timeout: float = 240) -> int:
    """Wait for a child to end; return its exit code, or minus the signal that killed it. A child that hangs is killed."""
    deadline = time.monotonic() + timeout
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"the child process did not end in {timeout:g} s; what it runs may not survive a fork")
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(ended[1])


def has_ended(child: int) -> bool:
    """Whether a child has ended; it can still be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
