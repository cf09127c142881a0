"""``mopefuse export`` and ``mopefuse export verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mopefuse.export.export import Exported


def export(
    run: Annotated[str, typer.Argument(metavar="RUN|verify", help="Run or adapter: a folder, or hf-hub:repo/name.")],
    exported: Annotated[Path | None, typer.Argument(metavar="[EXPORTED]", help="After verify: the folder to compare.")] = None,
    form: Annotated[str, typer.Option("--format", help="onnx, pt2 (torch.export) or adapter (trained weights only).")] = "onnx",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write.")] = None,
    checkpoint: Annotated[str, typer.Option(help="best, last or step-N.")] = "best",
    routing: Annotated[bool, typer.Option("--routing", help="The graph also says which experts it used.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="8-bit weights (onnx); measured on the validation split.")] = False,
    half: Annotated[bool, typer.Option("--half", help="16-bit floats (adapter): half the size.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Write a trained model as a graph, or as an adapter.

    A graph is ONNX or pt2; both are checked before they are published.
    `mopefuse export verify FOLDER` compares an exported folder with its manifest, and its answer with the example.
    """
    from mopefuse.cli._render import err, print_json
    from mopefuse.cli._render import out as out_
    from mopefuse.errors import ConfigError

    if run == "verify" and exported is not None:
        from mopefuse.export.verify import verify_export

        found = verify_export(exported)
        if json:
            print_json({"ok": True, "folder": str(exported), "found": found})
        else:
            out_().print(f"{exported}: {found}")
        return
    if exported is not None or out is None:
        fix = "write mopefuse export RUN -o OUT, or mopefuse export verify FOLDER"
        raise ConfigError(71, "there is not one folder to write", where="export", fix=fix)
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


def _print(result: Exported) -> None:
    from mopefuse.cli._render import out, percent, size, table

    if result.parity is not None:
        parity = result.parity
        took = parity.milliseconds
        rows = [
            ["largest difference of logits", f"{parity.max_difference:.2g}"],
            ["same labels", f"{percent(parity.labels_agree)} of {parity.probes}"],
            [f"one pair, {parity.threads} threads: the graph", f"{took['graph']:.1f} ms"],
            [f"one pair, {parity.threads} threads: PyTorch", f"{took['model']:.1f} ms"],
        ]
        table("compared with the model at batches of 1, 2 and 7", ["", ""], rows)
    if result.int8 is not None:
        names = list(result.int8["before"])
        rows = [[when, *(f"{metrics[name]:.4g}" for name in names)] for when, metrics in result.int8.items()]
        table("validation, before and after 8-bit weights", ["", *names], rows)
    out().print(f"{result.form}: {result.folder}, {size(result.size)}", markup=False)
