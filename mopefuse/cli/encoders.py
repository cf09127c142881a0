"""``mopefuse encoders``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mopefuse.cli.shared_options import Json

app = typer.Typer(help="List encoders, or show and test one.", invoke_without_command=True)

EncoderSpec = Annotated[
    str, typer.Argument(metavar="SPEC", help="Encoder: SCHEME:NAME[?KEY=VALUE&...], such as timm:vit_base.")
]


@app.callback()
def list_(
    context: typer.Context,
    json: Json = False,
) -> None:
    """List encoders, or show and test one.

    Without a command: list the schemes (libraries) and the short names that can be used with --main and --comp.
    """
    if context.invoked_subcommand is not None:
        return
    from mopefuse.cli._render import out, print_json, table
    from mopefuse.core.encoder_aliases import ALIASES, COMP_ONLY, FAMILIES
    from mopefuse.core.registry import ENCODERS, distribution, shortest_names

    found = shortest_names(ENCODERS)
    if json:
        schemes = [
            {
                "scheme": name,
                "distribution": distribution(point),
                "aliases": ALIASES.get(name, {}),
                "comp_only": COMP_ONLY.get(name, ()),
            }
            for name, point in found.items()
        ]
        print_json({"ok": True, "schemes": schemes})
        return
    rows = [[f"{name}:", distribution(point), *FAMILIES.get(name, ("", ""))] for name, point in found.items()]
    table("schemes", ["scheme", "from", "main or comp", "comp only"], rows)
    print()
    aliases = [
        [f"{scheme}:{short}", f"{scheme}:{full}{' (comp only)' if short in COMP_ONLY.get(scheme, ()) else ''}"]
        for scheme, names in ALIASES.items()
        for short, full in names.items()
    ]
    table("aliases", ["alias", "stands for"], aliases)
    print()
    out().print("details: mopefuse encoders inspect SPEC; with ?pretrained=false it has random weights and needs no download")


@app.command("inspect")
def inspect(
    spec: EncoderSpec,
    json: Json = False,
) -> None:
    """Show an encoder.

    Shows its modality, layers, widths, preprocessing, tokens per image and number of parameters.

    \b
    Example:
      mopefuse encoders inspect "timm:vit_base?pretrained=false"
    """
    from mopefuse.cli._render import out, print_json, size
    from mopefuse.core.parameters import count_parameters
    from mopefuse.encoders.base import create_encoder
    from mopefuse.modalities.base import get_modality

    encoder = create_encoder(spec)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in encoder.parameters())
    facts: dict[str, Any] = {
        "spec": str(encoder.spec),
        "modality": encoder.modality,
        "use": "main or comp" if encoder.widths else "comp only",
        "layers": len(encoder.widths),
        "widths": list(encoder.widths),
        "heads": list(encoder.heads),
        "feature_width": encoder.feature_width,
        "parameters": count_parameters(encoder),
        "weights_bytes": weights,
        "fingerprint": encoder.fingerprint(),
        "preprocess": encoder.preprocess.describe(),
    }
    if get_modality(encoder.modality).is_picture:
        facts["tokens"] = encoder.count_tokens()
    if not encoder.widths:
        facts["unpromptable_reason"] = encoder.unpromptable_reason
    if json:
        print_json({"ok": True, **facts})
        return
    for key, value in facts.items():
        if key in ("widths", "heads"):
            value = _runs(value)
        if isinstance(value, dict):
            value = ", ".join(f"{name} {inner}" for name, inner in value.items())
        if key == "tokens":
            value = f"{value:,} per image"
        if key == "weights_bytes":
            key, value = "weights", size(value)
        out().print(f"{key:<14} {value:,}" if isinstance(value, int) else f"{key:<14} {value}", markup=False)


@app.command("check")
def check(
    spec: EncoderSpec,
    json: Json = False,
) -> None:
    """Test whether an encoder can be used.

    Runs the tests that every encoder must pass, and shows whether it can be prompted (--main) or only used as --comp.
    """
    from mopefuse.cli._render import lines, out, print_json, table
    from mopefuse.encoders.base import create_encoder
    from mopefuse.testing import contract

    encoder = create_encoder(spec)
    parts = list(contract(encoder))
    broken = [part for part, fault in parts if fault]
    use = f"main or comp, {len(encoder.widths)} layers" if encoder.widths else f"comp only: {encoder.unpromptable_reason}"
    if json:
        rows = [{"part": part, "holds": not fault, "fault": fault or None} for part, fault in parts]
        print_json({"ok": not broken, "spec": str(encoder.spec), "modality": encoder.modality, "use": use, "contract": rows})
    else:
        title = f"{encoder.spec}, {encoder.modality}, {use}"
        table(title, ["contract", ""], [[part, "broken" if fault else "holds"] for part, fault in parts])
        for _, fault in parts:
            if fault:
                out().print(lines(fault))
    if broken:
        raise typer.Exit(5)


def _runs(values: list[int]) -> str:
    """[128, 128, 256] as ``2 x 128, 1 x 256``."""
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][1] == value:
            runs[-1][0] += 1
        else:
            runs.append([1, value])
    return ", ".join(f"{number} x {value}" for number, value in runs)
