"""``mopefuse train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mopefuse.cli import columns

if TYPE_CHECKING:
    from mopefuse.config.schema import RunConfig
    from mopefuse.training.train import Plan


def train(
    main: Annotated[str | None, typer.Option(help="Encoder that is prompted and classifies: timm:vit_base")] = None,
    comp: Annotated[
        list[str] | None, typer.Option(help="Encoder that conditions the prompts: hf:bert-base; more than once for several.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder with train, val and test (.jsonl, .csv, ...), or one table.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to write; default runs/<date>-<time>.")] = None,
    method: Annotated[str | None, typer.Option(help="conditional, linear, late-concat, main-only, ...: see README.")] = None,
    recipe: Annotated[str | None, typer.Option(help="YAML file with settings; flags and --set win over it.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any setting: --set train.epochs=3")] = None,
    experts: Annotated[int | None, typer.Option(help="Prompt experts per layer.")] = None,
    static: Annotated[int | None, typer.Option(help="Tokens of the static prompt.")] = None,
    dynamic: Annotated[int | None, typer.Option(help="Tokens of the dynamic prompt.")] = None,
    mapped: Annotated[int | None, typer.Option(help="Tokens of the mapped prompt.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to prompt: all, last:6, first:6, or 0,3,5.")] = None,
    router: Annotated[str | None, typer.Option(help="cross or joint.")] = None,
    top_m: Annotated[int | None, typer.Option(help="Route to the m best experts only.")] = None,
    gate: Annotated[str | None, typer.Option(help="zero, or none as in the papers.")] = None,
    comp_tuning: Annotated[str | None, typer.Option(help="Complementary encoder: frozen, prompts, lora or full.")] = None,
    tune: Annotated[str | None, typer.Option(help="Encoders of other methods: probe, prompt, lora or full.")] = None,
    warm_start: Annotated[str | None, typer.Option(help="linear: begin as the method linear, see README.")] = None,
    compat: Annotated[str | None, typer.Option(help="official: the released code's choices.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training split.")] = None,
    steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples per step, over all processes.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the main side.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that read the data.")] = None,
    text_col: columns.TextCol = None,
    image_col: columns.ImageCol = None,
    column: columns.Column = None,
    label_col: columns.LabelCol = None,
    id_col: columns.IdCol = None,
    split_col: columns.SplitCol = None,
    label_sep: columns.LabelSep = None,
    image_root: columns.ImageRoot = None,
    labels: columns.Labels = None,
    fold_labels: columns.FoldLabels = None,
    allow_odd_labels: columns.AllowOddLabels = None,
    val_fraction: Annotated[float | None, typer.Option(help="Hold this share of train out as val.")] = None,
    test_fraction: Annotated[float | None, typer.Option(help="Hold this share of train out as test.")] = None,
    shots: Annotated[int | None, typer.Option(help="Train on so many rows of each class.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Train on this share of each class.")] = None,
    on_missing: Annotated[str | None, typer.Option(help="Rows without a text, an image, ...: error, skip or absent.")] = None,
    on_bad: Annotated[str | None, typer.Option(help="Bad rows and images: error or skip.")] = None,
    strict: Annotated[bool | None, typer.Option("--strict", help="Rows of train in val or test are an error.")] = None,
    cache_images: Annotated[bool | None, typer.Option("--cache-images", help="Keep decoded images in one file.")] = None,
    modality_dropout: Annotated[float | None, typer.Option(help="Share of training samples that lose each modality.")] = None,
    either: Annotated[bool, typer.Option("--either", help="Also learn to answer without the main modality.")] = False,
    class_weights: Annotated[str | None, typer.Option(help="none, or balanced: rare classes count as much.")] = None,
    threshold: Annotated[str | None, typer.Option(help="Multi-label: a probability, or tuned on validation.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, to the bit.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be trained, and stop.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log for TensorBoard, into the run.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Train a fusion of frozen encoders, and test it once.

    The checkpoint that is best on validation is tested.
    Encoders are named scheme:name[?key=value]; mopefuse encoders lists them. Under torchrun this is data parallel.
    """
    flags: dict[str, Any] = {
        "main": main,
        "comp": comp or None,
        "method": method,
        "data.path": data,
        "prompts.experts": experts,
        "prompts.static": static,
        "prompts.dynamic": dynamic,
        "prompts.mapped": mapped,
        "prompts.layers": _layers(layers),
        "prompts.gate": gate,
        "router.kind": router,
        "router.top_m": top_m,
        "comp_tuning.mode": comp_tuning,
        "tune": tune,
        "warm_start": warm_start,
        "compat": compat,
        "train.epochs": epochs,
        "train.max_steps": steps,
        "train.batch_size": batch,
        "train.lr": lr,
        "train.precision": precision,
        "seed": seed,
        "device": device,
        "data.workers": workers,
        "data.fold_labels": fold_labels,
        "data.allow_odd_labels": allow_odd_labels,
        "data.val_fraction": val_fraction,
        "data.test_fraction": test_fraction,
        "data.shots": shots,
        "data.fraction": fraction,
        "data.on_missing": on_missing,
        "data.on_bad": on_bad,
        "data.strict": strict,
        "data.cache_images": cache_images,
        "train.class_weights": class_weights,
        "train.modality_dropout": modality_dropout,
        "either": either or None,
        "train.threshold": _number(threshold),
        **columns.settings(
            text=text_col,
            image=image_col,
            others=column,
            label=label_col,
            identity=id_col,
            split=split_col,
            separator=label_sep,
            roots=image_root,
            labels=labels,
        ),
    }
    from mopefuse.config.recipe import resolve
    from mopefuse.errors import ConfigError
    from mopefuse.runs.folder import RunFolder, default_path

    if resume and out is None:
        raise ConfigError(26, "--resume does not say which run", where="--resume", fix="add --out RUN")
    folder = RunFolder(out or default_path())
    if resume and main is None and recipe is None and not folder.exists():
        raise ConfigError(27, f"there is no run {folder.path}", where="--resume", fix="name the folder of a run")
    saved = folder.config() if resume and folder.exists() else None
    config = resolve(recipe=recipe, flags=flags, sets=set_ or (), saved=saved)
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


def _number(text: str | None) -> str | float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _layers(text: str | None) -> str | list[int] | None:
    parts = text.split(",") if text else []
    return [int(part) for part in parts] if parts and all(part.strip().isdecimal() for part in parts) else text


def _dry_run(config: RunConfig, *, json: bool) -> None:
    from mopefuse.cli._train_display import Display
    from mopefuse.training.train import plan

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
        "multi_label": found.multi_label,
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
    kind = "multi-label" if found.multi_label else "single-label"
    console.print(f"data       {rows} rows; {len(found.labels)} labels, {kind}", markup=False)
    for side, spec in found.encoders.items():
        console.print(f"{side:<10} {spec}  ({_limits(found.preprocess[side])})", markup=False)
    trainable = sum(found.trainable.values())
    parts = [[part, f"{number:,}", f"{100 * number / found.total:.3f} %"] for part, number in found.trainable.items()]
    parts.append(["trainable", f"{trainable:,}", f"{100 * found.share:.3f} %"])
    parts.append(["in all", f"{found.total:,}", ""])
    console.print()
    table("parameters", ["part", "parameters", "share"], parts, bold=len(parts) - 2)
    memory = f"{found.memory / 2**20:,.0f} MiB ({count(trainable)} trainable; libraries not counted)"
    console.print()
    console.print(f"estimated memory of a training step: {memory}")


def _limits(preprocess: dict[str, Any]) -> str:
    """What an encoder sees of a sample; longer texts are cut."""
    if "max_tokens" in preprocess:
        return f"{preprocess['modality']}, cut after {preprocess['max_tokens']} tokens"
    if "size" in preprocess:
        return f"{preprocess['modality']}, {' x '.join(map(str, preprocess['size']))}"
    return ", ".join([preprocess["modality"], *(f"{name} {value}" for name, value in preprocess.items() if name != "modality")])
