"""Programs in separate processes, without the seconds that importing torch takes.

A server (this file, run as a script) imports third-party libraries, none of mopefuse, and forks a child for every program.
The child runs it as ``python -m MODULE`` or ``python FILE`` would: exit codes, signals and handlers of ``atexit`` are real.
Two things differ. What a library reads from the environment when it is imported was read by the server. And the child leaves
by `os._exit`, so whatever tests the end of the interpreter has to start Python itself.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

LIBRARIES = (  # not onnxruntime, which starts a thread when it is imported: a fork has no other threads
    "torch", "torch._dynamo", "torch.distributed", "torch.utils.data", "torchvision", "timm", "open_clip", "transformers",
    "transformers.models.auto.modeling_auto", "tokenizers", "huggingface_hub", "safetensors.torch", "sklearn.metrics",
    "sklearn.linear_model", "scipy.sparse", "scipy.stats", "pydantic", "typer", "rich.console", "rich.progress", "rich.table",
    "yaml", "jinja2", "PIL.Image",
)  # fmt: skip


class Server:
    """A process that has imported `LIBRARIES` and forks others on request; not for use from several threads."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])

    def run(
        self,
        program: Sequence[str],
        environments: Sequence[Mapping[str, str]] = ({},),
        timeout: float = 240,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program once in every environment, all at the same time. The first exit code other than 0 ends the others.

        Args:
            program: ``-m`` and the name of a module, or the path of a file; then its arguments.
            environments: what is added to the variables of this process, for each process.
            timeout: seconds after which all are killed.
        """
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            request = {
                "program": list(program),
                "environments": [os.environ | environment for environment in environments],
                "folder": str(Path.cwd()),
            }
            message = json.dumps(request).encode() + b"\n"
            socket.send_fds(self._connection, [message], [out.fileno(), err.fileno()])
            codes = self._codes(program, timeout)
            code = next((code for code in codes if code), 0)
            return subprocess.CompletedProcess(list(program), code, _text(out), _text(err))

    def close(self) -> None:
        self._connection.close()
        self._process.wait()

    def _codes(self, program: Sequence[str], timeout: float) -> list[int]:
        with self._connection.makefile("r") as replies:
            processes = json.loads(replies.readline())
            self._connection.settimeout(timeout)
            try:
                codes: list[int] = json.loads(replies.readline())
            except TimeoutError:
                for process in processes:
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                raise subprocess.TimeoutExpired(list(program), timeout) from None
            finally:
                self._connection.settimeout(None)
            return codes


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _serve(connection: socket.socket) -> dict[str, Any]:
    """Fork what is requested until the other end closes. Returns only in children: the request, with one environment."""
    while True:
        received, files, _, _ = socket.recv_fds(connection, 1 << 20, 2)
        if not received:
            sys.exit()
        while not received.endswith(b"\n"):
            received += connection.recv(1 << 20)
        request = json.loads(received)
        processes = []
        for environment in request["environments"]:
            process = os.fork()
            if not process:
                connection.close()
                for file, place in zip(files, (1, 2), strict=True):
                    os.dup2(file, place)
                    os.close(file)
                return {**request, "environment": environment}
            processes.append(process)
        for file in files:
            os.close(file)
        connection.sendall(json.dumps(processes).encode() + b"\n")
        connection.sendall(json.dumps(_wait(processes)).encode() + b"\n")


def _wait(processes: list[int]) -> list[int]:
    """Return exit codes, as those of `subprocess`, in the order in which the processes ended."""
    codes = []
    left = set(processes)
    while left:
        process, status = os.wait()
        left.discard(process)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1]:
            for other in left:
                os.kill(other, signal.SIGTERM)
    return codes


def _become(request: dict[str, Any]) -> None:
    """Make this process look as if Python had been started for a program."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[0:1] = [path for path in added if path not in sys.path[1:]]  # instead of the folder of this file


def _run(program: list[str]) -> None:
    first, *rest = program
    if first == "-m":
        sys.path.insert(0, str(Path.cwd()))
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(first).parent))
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def _exit_code_of(program: list[str]) -> int:
    try:
        _run(program)
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        print(leaving.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _main(connection: socket.socket) -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()
    request = _serve(connection)
    _become(request)
    code = _exit_code_of(request["program"])
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # freeing the memory of all libraries would take longer than most programs


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])))
