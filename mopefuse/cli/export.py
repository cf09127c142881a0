"""``mopefuse export`` and ``mopefuse export verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mopefuse.cli.shared_options import Checkpoint, Json
from mopefuse.core.error_codes import ConfigCode

if TYPE_CHECKING:
    from mopefuse.export.export import Exported


def export(
    run: Annotated[str, typer.Argument(metavar="RUN|verify", help="Run or adapter: a folder, or hf-hub:repo/name.")],
    exported: Annotated[
        Path | None, typer.Argument(metavar="EXPORTED", help="After verify: the exported folder to check.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", metavar="onnx|pt2|adapter", help="What to write; adapter: only the trained weights.")
    ] = "onnx",
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")] = None,
    checkpoint: Checkpoint = "best",
    routing: Annotated[
        bool, typer.Option("--routing", help="The exported model also returns the weights of the prompt experts.")
    ] = False,
    int8: Annotated[bool, typer.Option("--int8", help="onnx: 8-bit weights; measures their effect on validation.")] = False,
    half: Annotated[bool, typer.Option("--half", help="adapter: 16-bit floats, half the size.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in --out.")] = False,
    json: Json = False,
) -> None:
    """Export a trained model: ONNX, pt2 or adapter.

    An exported model is compared with the trained one before it is written. mopefuse export verify FOLDER checks an exported
    folder later: its files, and its prediction for an example.

    \b
    Example:
      mopefuse export runs/first --format onnx -o bundle
    """
    from mopefuse.cli._render import err, print_json
    from mopefuse.errors import ConfigError

    if run == "verify" and exported is not None:
        _verify(exported, json=json)
        return
    if exported is not None or out is None:
        what = "no output folder given" if out is None else "two folders given"
        fix = "write mopefuse export RUN -o OUT, or mopefuse export verify FOLDER"
        raise ConfigError(ConfigCode.NOT_ONE_OUTPUT, what, where="export", fix=fix)
    from mopefuse.export.export import export as run_export

    with err().status("loading the model") as status:
        result = run_export(
            Path(run),
            out,
            form=form,  # type: ignore[arg-type]
            checkpoint=checkpoint,
            routing=routing,
            int8=int8,
            half=half,
            overwrite=overwrite,
            notice=status.update,
        )
    if json:
        print_json({"ok": True, **result.as_dict()})
    else:
        _print(result)


def _verify(folder: Path, *, json: bool) -> None:
    from mopefuse.cli._render import out, print_json
    from mopefuse.export.verify import verify_export

    found = verify_export(folder)
    if json:
        print_json({"ok": True, "folder": str(folder), "found": found})
    else:
        out().print(f"{folder}: {found}")


def _print(result: Exported) -> None:
    from mopefuse.cli._render import out, percent, size, table
    from mopefuse.core.formatting import several

    if result.parity is not None:
        parity = result.parity
        milliseconds = parity.milliseconds
        rows = [
            [f"largest difference of {parity.outputs}", f"{parity.max_difference:.2g}"],
            ["same predictions", f"{percent(parity.labels_agree)} of {parity.probes}"],
            [f"one row, {several(parity.threads, 'thread')}: exported", f"{milliseconds['graph']:.1f} ms"],
            [f"one row, {several(parity.threads, 'thread')}: PyTorch", f"{milliseconds['model']:.1f} ms"],
        ]
        table("compared with the trained model, batches of 1, 2 and 7", ["", ""], rows)
    if result.int8 is not None:
        names = list(result.int8["before"])
        rows = [[when, *(f"{metrics[name]:.4g}" for name in names)] for when, metrics in result.int8.items()]
        table("validation, before and after 8-bit weights", ["", *names], rows)
    out().print(f"{result.form}: {result.folder}, {size(result.size)}", markup=False)
