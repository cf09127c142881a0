"""Workers of torchrun end with it. Imports no torch, since importing that takes longer than many a launcher lives."""

from __future__ import annotations

import os
import signal
import sys

_SEND_WHEN_PARENT_ENDS = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


def end_with_launcher() -> None:
    """Let Linux send SIGTERM to this process when its torchrun ends, if one started it; no-op on other systems.

    A worker whose torchrun was killed would otherwise go on, and block the restart of its run.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    import ctypes

    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_SEND_WHEN_PARENT_ENDS, signal.SIGTERM)
    if os.getppid() != launcher:  # it has just ended
        os.kill(os.getpid(), signal.SIGTERM)
