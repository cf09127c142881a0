"""``mopefuse train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mopefuse.cli.settings import Settings
from mopefuse.cli.shared_options import Json, Set
from mopefuse.core.error_codes import ConfigCode

if TYPE_CHECKING:
    from mopefuse.config.schema import RunConfig
    from mopefuse.training.plan import Plan


def train(
    settings: Settings,
    out: Annotated[Path | None, typer.Option(help="Run folder to write. Default: runs/<date>-<time>.")] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="FILE|NAME", help="YAML file with settings. Flags and --set override it.")
    ] = None,
    set_: Set = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint, or start it if there is none.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print what would be trained, without training.")
    ] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard logs into the run.")] = False,
    json: Json = False,
) -> None:
    """Train a classifier on pretrained encoders.

    The best checkpoint on validation is evaluated once on the test split. Encoders are written SCHEME:NAME[?KEY=VALUE]; see
    mopefuse encoders. Under torchrun, training is data parallel.

    \b
    Examples; the second is a strong, simple baseline to start with:
      mopefuse train --main timm:vit_base --comp hf:bert-base --data DIR
      mopefuse train --method linear --main SPEC --comp SPEC --data DIR
    """
    from mopefuse.runs.folder import RunFolder, default_path

    folder = RunFolder(out or default_path())
    config = _resolve(settings, recipe, set_ or [], folder, named=out is not None, resume=resume)
    if dry_run:
        _dry_run(config, json=json)
        return
    if os.environ.get("RANK", "0") == "0":
        folder.prepare(resume=resume, overwrite=overwrite)
    from mopefuse.cli._train_display import Display
    from mopefuse.training.train import train as run_training

    with Display(folder.path, json=json, tensorboard=tensorboard) as display:
        result = run_training(config, folder.path, resume=resume, overwrite=overwrite, listener=display)
    display.result(result)


def _resolve(
    settings: Settings, recipe: str | None, sets: list[str], folder: Any, *, named: bool, resume: bool
) -> RunConfig:
    """The configuration of the run.

    Args:
        named: whether ``--out`` was given.

    Raises:
        ConfigError: the run to resume is not named or does not exist, or settings are invalid.
        CheckpointError: a file of weights does not exist.
    """
    from mopefuse.config.encoder_sides import check_weights, specs
    from mopefuse.config.recipe import resolve
    from mopefuse.errors import ConfigError

    if resume and not named:
        raise ConfigError(
            ConfigCode.RESUME_WITHOUT_RUN, "--resume needs the folder of the run", where="--resume", fix="add --out RUN"
        )
    if resume and "main" not in settings and recipe is None and not folder.exists():
        raise ConfigError(
            ConfigCode.NO_RUN_TO_RESUME,
            f"run not found: {folder.path}",
            where="--resume",
            fix="pass the folder of a run with --out",
        )
    saved = folder.config() if resume and folder.exists() else None
    config = resolve(recipe=recipe, flags=settings, sets=sets, saved=saved)
    check_weights(specs(config))
    return config


def _dry_run(config: RunConfig, *, json: bool) -> None:
    from mopefuse.cli._train_display import Display
    from mopefuse.training.plan import plan

    with Display(Path(), json=json) as display:
        found = plan(config, display)
    if json:
        from mopefuse.cli._render import print_json

        print_json({**_as_dict(found), "notices": display.notices})
        return
    _print_plan(found)


def _as_dict(found: Plan) -> dict[str, Any]:
    return {
        "ok": True,
        "config": found.config.model_dump(mode="json"),
        "rows": found.rows,
        "labels": len(found.labels),
        "task": found.task.name,
        "encoders": found.encoders,
        "preprocess": found.preprocess,
        "parameters": {
            "trainable": sum(found.trainable.values()),
            "total": found.total,
            "share": found.share,
            "by_part": found.trainable,
        },
        "estimated_memory_bytes": found.memory,
    }


def _print_plan(found: Plan) -> None:
    from mopefuse.cli._render import count, lines, out, table
    from mopefuse.config.recipe import to_yaml

    console = out()
    console.print(lines(to_yaml(found.config)))
    rows = ", ".join(f"{name} {number:,}" for name, number in found.rows.items())
    console.print(f"data       {rows} rows; {found.task}: {found.task.describe(found.labels)}", markup=False)
    for side, spec in found.encoders.items():
        console.print(f"{side:<10} {spec}  ({_limits(found.preprocess[side])})", markup=False)
    trainable = sum(found.trainable.values())
    parts = [[part, f"{number:,}", f"{100 * number / found.total:.3f} %"] for part, number in found.trainable.items()]
    parts.append(["trainable", f"{trainable:,}", f"{100 * found.share:.3f} %"])
    parts.append(["total", f"{found.total:,}", ""])
    console.print()
    table("parameters", ["part", "parameters", "share"], parts, bold=len(parts) - 2)
    console.print()
    console.print(
        f"estimated memory of a training step: {found.memory / 2**20:,.0f} MiB ({count(trainable)} trainable parameters; "
        "excludes memory used by the libraries themselves)"
    )


def _limits(preprocess: dict[str, Any]) -> str:
    """What an encoder sees of a sample; longer texts are cut."""
    if "max_tokens" in preprocess:
        return f"{preprocess['modality']}, truncated to {preprocess['max_tokens']} tokens"
    if "size" in preprocess:
        return f"{preprocess['modality']}, {' x '.join(map(str, preprocess['size']))}"
    return ", ".join([preprocess["modality"], *(f"{name} {value}" for name, value in preprocess.items() if name != "modality")])
