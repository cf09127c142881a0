"""The command line: `main` runs a command and turns an error into one line and an exit code.

Each command is one typed function in a file of its name. Heavy imports are inside it, so that ``--help`` and a usage
error do not wait for torch.
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
from mopefuse.cli import (
    bench,
    compare,
    data,
    demo,
    doctor,
    encoders,
    eval,
    export,
    fit,
    plugins,
    predict,
    push,
    report,
    serve,
    study,
    train,
)
from mopefuse.cli import swap_encoder as swap
from mopefuse.cli._render import can_encode_unicode, print_json
from mopefuse.cli.settings import add_command
from mopefuse.core.dependencies import convert_error, guard_imports
from mopefuse.core.error_codes import ResourceCode
from mopefuse.core.formatting import visible
from mopefuse.core.launcher import end_with_launcher
from mopefuse.errors import Interrupted, MopefuseError, Notice, ResourceError

app = typer.Typer(
    name="mopefuse",
    help="Train, evaluate and export classifiers on two or more modalities, such as image and text, with frozen encoders.",
    epilog="Start with mopefuse demo, or with mopefuse fit TABLE on your own data. COMMAND --help explains a command.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
add_command(app, "train", train.train)
add_command(app, "fit", fit.fit, defaults=False)
add_command(app, "eval", eval.evaluate, defaults=False)
add_command(app, "predict", predict.predict, defaults=False)
app.command("swap-encoder")(swap.swap_encoder)
app.command("export")(export.export)
app.command("serve")(serve.serve)
app.command("push")(push.push)
app.command("report")(report.report)
app.command("study")(study.study)
app.command("compare")(compare.compare)
app.command("demo")(demo.demo)
app.add_typer(data.app, name="data")
app.add_typer(encoders.app, name="encoders")
app.add_typer(plugins.app, name="plugins")
app.add_typer(bench.app, name="bench")
app.command("doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mopefuse {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an internal error.")] = False,
) -> None:
    if debug:
        os.environ["MOPEFUSE_DEBUG"] = "1"


def main() -> None:
    """Run the command line; the entry point of ``mopefuse``. Exit codes: see docs/errors.md."""
    end_with_launcher()
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):  # characters that a terminal cannot show are escaped instead of being an error
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    _show_notices()
    guard_imports()
    os.environ.setdefault("MOPEFUSE_FLUSH_DENORMALS", "1")  # see mopefuse.core.device
    try:
        _run()
    except BrokenPipeError:
        _stop_without_reader()
    except KeyboardInterrupt:  # before Typer began, or while it ended
        _exit(_interrupted())
    except MopefuseError as error:
        _exit(error)
    except Exception as error:
        known = convert_error(error)
        if known is not None:
            _exit(known)
        _crash(error)


def _run() -> None:
    """Run the command.

    Raises:
        SystemExit: always, unless the command raises another error.
    """
    try:
        try:
            app()
        except SystemExit:
            _flush()
            raise
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # Typer makes it exit code 1
            _stop_without_reader()
        if leaving.code == 130:
            _exit(_interrupted())
        if leaving.code == 2 and "--json" in sys.argv:
            message = "the command line is invalid; see stderr"
            body = {"code": "MF-USE-01", "exit": 2, "message": message, "where": "", "hint": "see mopefuse --help"}
            print_json({"ok": False, "error": body})
        raise


def _interrupted() -> Interrupted:
    return Interrupted(2, "by Ctrl-C before anything could be saved", fix="run the command again")


def _open_standard_streams() -> None:
    """Connect standard streams that are closed (as a daemon's may be), or open the wrong way, to /dev/null.

    Otherwise the next file that is opened would get the number of a standard stream, and output would be written into it.
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
    """Write buffered output, while an error can still be reported.

    Raises:
        ResourceError: stdout cannot be written, such as to a full disk. BrokenPipeError: the reader is gone.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        fix = "write the output elsewhere; files that the command wrote are complete"
        raise ResourceError(
            ResourceCode.OUTPUT_CLOSED, f"cannot print the result: {error.strerror}", where="stdout", fix=fix
        ) from None


def _discard(stream: Any) -> None:
    """Discard the output that a stream still holds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _show_notices() -> None:
    """Print warnings that are meant for users as one line; others as Python does."""
    plain = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, Notice):
            if os.environ.get("RANK", "0") == "0":  # of several processes, only the first prints it
                print(f"notice: {visible(message)}", file=sys.stderr)
        else:
            plain(message, category, *place, **more)

    warnings.showwarning = show


def _exit(error: MopefuseError) -> None:
    if error.family == "STOP" and os.environ.get("RANK", "0") != "0":
        sys.exit(error.exit_code)  # of several processes, only the first reports it
    if not ("--json" in sys.argv and _print_json(error.as_dict())):
        kind = "stopped" if error.family == "STOP" else f"error[{error.code}]"
        text = f"{kind}: {visible(error)}"
        if not can_encode_unicode(sys.stderr):
            text = text.replace(" · ", " | ").replace("…", "...")
        red, plain = ("\x1b[31m", "\x1b[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
        print(f"{red}{kind}{plain}{text[len(kind) :]}", file=sys.stderr)
    _drain()
    sys.exit(error.exit_code)


def _print_json(body: dict[str, object]) -> bool:
    """Print an error on stdout; return whether that was possible."""
    try:
        print_json({"ok": False, "error": body})
        sys.stdout.flush()
    except OSError:
        return False
    return True


def _drain() -> None:
    """Discard output that can no longer be written: the exit code already reports the error."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard(sys.stdout)


def _stop_without_reader() -> None:
    """Exit quietly: the reader of the output has stopped reading, as ``| head`` does, which is not an error."""
    _discard(sys.stdout)
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
