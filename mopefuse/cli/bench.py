"""``mopefuse bench``: time and memory of conditional prompts; and ``loader``, ``startup``, ``scale``, ``ddp``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mopefuse.cli.shared_options import Device, Json
from mopefuse.core.error_codes import ConfigCode

if TYPE_CHECKING:
    from mopefuse.bench.timing import Advance
    from mopefuse.config.schema import RunConfig

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None, help="Measure time and memory on this machine.")

PAIRS = (("timm:vit_base", "hf:bert-base"), ("timm:swin_base", "hf:bert-base"))

Main = Annotated[str, typer.Option(metavar="SPEC", help="Main encoder, with random weights.")]
Comp = Annotated[str, typer.Option(metavar="SPEC", help="Complementary encoder, with random weights.")]
BatchSize = Annotated[int, typer.Option(min=1, max=65_536, help="Samples per step.")]
TextLength = Annotated[int, typer.Option(min=2, max=65_536, help="Tokens per text.")]
Precision = Annotated[str, typer.Option(metavar="auto|fp32|bf16", help="Number format; auto: bf16 if the GPU has it.")]
Formats = Annotated[
    list[str] | None, typer.Option(metavar="int8|nf4|fp8", help="Also measure with encoders in this format. Repeatable.")
]
Rounds = Annotated[int, typer.Option(min=1, max=10_000, help="Repetitions of each measurement.")]


@app.callback()
def bench(
    context: typer.Context,
    main: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Main encoder. Default: ViT-B, and Swin-B in a second table.")
    ] = None,
    comp: Annotated[str | None, typer.Option(metavar="SPEC", help="Complementary encoder. Default: BERT-base.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Also measure this fusion method. Repeatable.")
    ] = None,
    batch: BatchSize = 8,
    text_length: TextLength = 32,
    experts: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of experts to measure; the first is used in most rows.")
    ] = "16,256,1024",
    train: Annotated[bool, typer.Option("--train", help="Measure only training steps.")] = False,
    infer: Annotated[bool, typer.Option("--infer", help="Measure only predictions.")] = False,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure the memory of a step, in separate processes.")
    ] = True,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the models with torch.compile.")] = False,
    recompute: Annotated[bool, typer.Option("--checkpoint-activations", help="Also measure recomputed activations.")] = False,
    quantize: Formats = None,
    rounds: Rounds = 2,
    more: Annotated[
        int, typer.Option(min=0, max=10_000, help="Extra repetitions of the most important rows in each round.")
    ] = 5,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
) -> None:
    """Measure time and memory on this machine.

    Without a command: time, memory, parameters and size of conditional prompts and of the alternatives, with random weights
    and inputs. All are compared with a lower bound, the floor: the two frozen encoders without prompts (a forward pass of the
    complementary encoder, a forward and a backward pass of the main encoder).

    \b
    Example:
      mopefuse bench --main timm:vit_base --comp hf:bert-base --batch 8
    """
    if context.invoked_subcommand is not None:
        return
    pairs = PAIRS if main is None and comp is None else ((main or PAIRS[0][0], comp or PAIRS[0][1]),)
    options = {
        "batch": batch,
        "text_length": text_length,
        "experts": _numbers(experts),
        "methods": tuple(dict.fromkeys(method or ())),
        "quantize": tuple(dict.fromkeys(quantize or ())),
        "recompute": recompute,
        "rounds": rounds,
        "more": more,
        "train": train or not infer,
        "infer": infer or not train,
        "with_memory": memory and (train or not infer),
        "compiled": compiled,
    }
    _bench_pairs([(pair, _config(*pair, device, precision)) for pair in pairs], options, json=json)


def _bench_pairs(pairs: list[tuple[tuple[str, str], RunConfig]], options: dict[str, Any], *, json: bool) -> None:
    """Measure pairs of encoders, and print a table for each or one JSON object."""
    from mopefuse.bench.pair import bench_pair
    from mopefuse.cli._bench_display import pair_as_dict, show_pair
    from mopefuse.cli._render import print_json

    found = []
    for (main, comp), config in pairs:
        with _progress(f"{main} with {comp}") as advance:
            result = bench_pair(config, **options, advance=advance)
        found.append(pair_as_dict(result))
        if not json:
            show_pair(result)
    if json:
        print_json({"ok": True, "pairs": found})


@app.command("loader")
def loader(
    main: Main = PAIRS[0][0],
    images: Annotated[int, typer.Option(min=1, max=1_000_000, help="Number of JPEG files to generate.")] = 256,
    side: Annotated[int, typer.Option(min=16, max=9_000, help="Their height and width in pixels.")] = 512,
    batch: BatchSize = 32,
    workers: Annotated[int, typer.Option(min=0, max=256, help="Processes that load the data.")] = 0,
    rounds: Rounds = 3,
    json: Json = False,
) -> None:
    """Measure images per second, decoded or cached."""
    from mopefuse.bench.loader import bench_loader
    from mopefuse.cli._bench_display import show_times
    from mopefuse.cli._render import print_json

    with _progress("reading") as advance:
        found = bench_loader(
            random_weights(main), images=images, side=side, batch=batch, workers=workers, rounds=rounds, advance=advance
        )
    if json:
        values = {name: {"images_per_second": images / times.median, "spread": times.spread} for name, times in found.items()}
        print_json({"ok": True, "images": images, "side": side, "workers": workers, **values})
        return
    speed = {name: f"{images / times.median:.3g}" for name, times in found.items()}
    show_times(f"{images} images of {side} x {side} pixels", found, speed)


@app.command("startup")
def startup(
    rounds: Rounds = 5,
    json: Json = False,
) -> None:
    """Measure how long imports and --help take."""
    from mopefuse.bench.startup import bench_startup
    from mopefuse.cli._bench_display import show_times, times_as_dict
    from mopefuse.cli._render import print_json

    with _progress("starting") as advance:
        found = bench_startup(rounds=rounds, advance=advance)
    if json:
        print_json({"ok": True, "seconds": {name: times_as_dict(times) for name, times in found.items()}})
    else:
        show_times("start", found)


@app.command("scale")
def scale(
    main: Main = PAIRS[0][0],
    comp: Comp = PAIRS[0][1],
    batch: BatchSize = 8,
    text_length: TextLength = 32,
    rounds: Rounds = 3,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
) -> None:
    """Measure how a training step scales.

    Varies the number of experts, the prompt length, the batch size and the text length, one at a time.
    """
    from mopefuse.bench.scale import bench_scale
    from mopefuse.cli._bench_display import point_as_dict, show_scale
    from mopefuse.cli._render import print_json

    with _progress("scale") as advance:
        config = _config(main, comp, device, precision)
        found = bench_scale(config, batch=batch, text_length=text_length, rounds=rounds, advance=advance)
    if json:
        print_json({"ok": True, "main": main, "comp": comp, "points": [point_as_dict(point) for point in found]})
    else:
        show_scale(f"{main} with {comp}", found)


@app.command("ddp")
def ddp(
    main: Main = PAIRS[0][0],
    comp: Comp = PAIRS[0][1],
    batch: Annotated[int, typer.Option(min=1, max=65_536, help="Samples per step, summed over all processes.")] = 8,
    text_length: TextLength = 32,
    processes: Annotated[str, typer.Option(metavar="N,N,...", help="Process counts to measure.")] = "1,2",
    rounds: Rounds = 5,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
) -> None:
    """Measure a training step with one process and with several.

    One global batch is divided among the processes, which communicate through gloo (CPUs) or NCCL (GPUs).
    """
    from mopefuse.bench.parallel import bench_parallel
    from mopefuse.cli._bench_display import show_times, times_as_dict
    from mopefuse.cli._render import print_json

    numbers = _numbers(processes, "--processes")
    with _progress("processes") as advance:
        config = _config(main, comp, device, precision)
        found = bench_parallel(config, batch=batch, text_length=text_length, processes=numbers, rounds=rounds, advance=advance)
    if json:
        print_json({"ok": True, "batch": batch, "processes": {count: times_as_dict(times) for count, times in found.items()}})
        return
    named = {f"{count} process{'es' if count > 1 else ''}": times for count, times in found.items()}
    speed = {name: f"{batch / times.median:.3g}" for name, times in named.items()}
    show_times(f"{main} with {comp}, batch {batch}", named, speed)


def random_weights(spec: str) -> str:
    """The spec with random weights, which need no download."""
    if spec.startswith("tiny:") or "pretrained=" in spec or "weights=" in spec:
        return spec
    return f"{spec}{'&' if '?' in spec else '?'}pretrained=false"


def _config(main: str, comp: str, device: str, precision: str) -> RunConfig:
    from mopefuse.config.schema import build_config

    values: dict[str, Any] = {"main": random_weights(main), "comp": random_weights(comp), "device": device}
    plain: dict[str, Any] = {"compat": "paper", "prompts": {"gate": "zero"}, "head_norm": "layer"}  # rows add to this
    return build_config({**values, **plain, "train": {"precision": precision}})


def _numbers(text: str, where: str = "--experts") -> tuple[int, ...]:
    from mopefuse.errors import ConfigError

    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ConfigError(
            ConfigCode.NOT_A_NUMBER_LIST,
            f"{text!r} is not a list of positive integers",
            where=where,
            fix="write 16, or 4,16,256",
        )
    return found


@contextmanager
def _progress(what: str) -> Iterator[Advance]:
    """Show progress on stderr: a live line on a terminal, otherwise one line per stage."""
    from mopefuse.cli._render import err

    console, printed = err(), set[str]()
    with console.status(f"{what}: building the models") as status:

        def advance(now: str, done: int, total: int) -> None:
            stage = now.partition(":")[0]
            if console.is_terminal:
                status.update(f"{what}: {now} ({done}/{total})")
            elif stage not in printed:
                printed.add(stage)
                console.print(f"{what}: {stage}", markup=False)

        yield advance
