"""The command line: `main` runs a command and turns what went wrong into one line and an exit code.

Commands are one typed function each, in a file of its name. They import what is heavy inside, so that ``--help`` and a
usage error do not wait for torch.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from mopefuse import __version__
from mopefuse.cli import bench, compare, data, demo, doctor, encoders, eval, export, predict, push, report, study, train
from mopefuse.cli import plugins as plug
from mopefuse.cli import swap_encoder as swap
from mopefuse.cli._render import print_json, speaks_unicode
from mopefuse.core.dependencies import guard_imports, mendable
from mopefuse.core.formatting import visible
from mopefuse.errors import Interrupted, MopefuseError, Notice, ResourceError

app = typer.Typer(
    name="mopefuse",
    help="Fuse two modalities with frozen pretrained encoders: conditional prompts, mixed from prompt experts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("train")(train.train)
app.command("eval")(eval.evaluate)
app.command("predict")(predict.predict)
app.command("swap-encoder")(swap.swap_encoder)
app.command("export")(export.export)
app.command("push")(push.push)
app.command("report")(report.report)
app.command("study")(study.study)
app.command("compare")(compare.compare)
app.command("demo")(demo.demo)
app.add_typer(data.app, name="data")
app.add_typer(encoders.app, name="encoders")
app.add_typer(plug.app, name="plugins")
app.add_typer(bench.app, name="bench")
app.command("doctor")(doctor.doctor)


def _version(asked: bool) -> None:
    if asked:
        print(f"mopefuse {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an internal error.")] = False,
) -> None:
    if debug:
        os.environ["MOPEFUSE_DEBUG"] = "1"


def main() -> None:
    """Entry point of the command ``mopefuse``. Exit codes: see docs/errors.md."""
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show is spelt out instead of ending the program
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    _show_notices()
    guard_imports()
    os.environ.setdefault("MOPEFUSE_FLUSH_DENORMALS", "1")  # see mopefuse.core.device
    try:
        try:
            app()
        except SystemExit:
            _flush()
            raise
    except BrokenPipeError:
        _no_reader()
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # typer makes it exit code 1
            _no_reader()
        if leaving.code == 130:
            _exit(Interrupted(2, "by Ctrl-C before there was anything to save", fix="run the command again"))
        if leaving.code == 2 and "--json" in sys.argv:
            message = "the command line cannot be read; stderr says why"
            body = {"code": "MF-USE-01", "exit": 2, "message": message, "where": "", "hint": "see mopefuse --help"}
            print_json({"ok": False, "error": body})
        raise
    except MopefuseError as error:
        _exit(error)
    except Exception as error:
        known = mendable(error)
        if known is not None:
            _exit(known)
        _crash(error)


def _open_standard_streams() -> None:
    """Have what is closed, as a daemon's streams may be, or open the wrong way read from and write to nowhere.

    Else the next file that is opened would get the number of a standard stream, and what is printed would go into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.write(number, b"") if number else os.read(number, 0)
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.EISDIR):
                continue
            opened = os.open(os.devnull, os.O_RDWR)
            if opened == number:
                os.set_inheritable(number, True)
            else:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 (as long as the program)


def _flush() -> None:
    """Write out what was printed, while an error can still be told.

    Raises:
        ResourceError: stdout cannot be written, as to a full disk. BrokenPipeError: nobody reads any more.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        fix = "send it where it can be written; files that the command wrote are whole"
        raise ResourceError(250, f"the result cannot be printed: {error.strerror}", where="stdout", fix=fix) from None


def _to_nowhere(stream: Any) -> None:
    """Let what a stream still holds be lost in silence."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _show_notices() -> None:
    """Warnings that are meant for users as one line; others as Python shows them."""
    plain = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, Notice):
            if os.environ.get("RANK", "0") == "0":  # every process has something to say, one says it
                print(f"notice: {visible(message)}", file=sys.stderr)
        else:
            plain(message, category, *place, **more)

    warnings.showwarning = show


def _exit(error: MopefuseError) -> None:
    if error.family == "STOP" and os.environ.get("RANK", "0") != "0":
        sys.exit(error.exit_code)  # every process stops, one says so
    if not ("--json" in sys.argv and _print_json(error.as_dict())):
        kind = "stopped" if error.family == "STOP" else f"error[{error.code}]"
        text = f"{kind}: {visible(error)}"
        if not speaks_unicode(sys.stderr):
            text = text.replace(" · ", " | ").replace("…", "...")
        red, plain = ("\x1b[31m", "\x1b[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
        print(f"{red}{kind}{plain}{text[len(kind) :]}", file=sys.stderr)
    _drain()
    sys.exit(error.exit_code)


def _print_json(body: dict[str, object]) -> bool:
    """Print an error on stdout; whether it could be."""
    try:
        print_json({"ok": False, "error": body})
        sys.stdout.flush()
    except OSError:
        return False
    return True


def _drain() -> None:
    """What cannot be written any more is lost in silence: the exit code says what went wrong before."""
    try:
        sys.stdout.flush()
    except OSError:
        _to_nowhere(sys.stdout)


def _no_reader() -> None:
    """Who read our output has stopped to, as ``| head`` does: that is no error, and the rest goes nowhere."""
    _to_nowhere(sys.stdout)
    sys.exit(141)


def _crash(error: Exception) -> None:
    if os.environ.get("MOPEFUSE_DEBUG"):
        traceback.print_exc()
    log = Path("crash.log").resolve()
    try:
        log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        place = f" · {log}"
    except OSError:
        place = ""
    summary = visible(str(error).splitlines()[0]) if str(error) else ""
    body = {"code": "MF-INT-00", "exit": 1, "message": f"{type(error).__name__}: {summary}", "where": str(log), "hint": ""}
    if not ("--json" in sys.argv and _print_json(body)):
        print(f"internal error: {type(error).__name__}: {summary}{place} · fix: please report it", file=sys.stderr)
    _drain()
    sys.exit(1)
