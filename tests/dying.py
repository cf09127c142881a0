"""A process that kills itself at a change in a folder. Run as a script, it runs the command line until then:

    python dying.py MOMENT FOLDER ARGUMENT...
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink"}


def die_at(moment: int, watched: Path) -> None:
    """From now on, kill this process at its change number `moment` in a folder."""
    seen = 0

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in _CHANGES | {"open"} or not str(arguments[0]).startswith(str(watched)):
            return
        flags = int(arguments[2] or 0) if event == "open" else 0
        if event == "open" and not flags & (os.O_WRONLY | os.O_RDWR):
            return
        seen += 1
        if seen == moment + 1:
            if event == "open":
                os.open(arguments[0], flags, 0o644)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


if __name__ == "__main__":
    from mopefuse.cli.app import main

    die_at(int(sys.argv[1]), Path(sys.argv[2]))
    sys.argv = ["mopefuse", *sys.argv[3:]]
    main()
