"""``mopefuse bench``: what conditional prompts cost; and ``loader``, ``startup``, ``scale``, ``ddp``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mopefuse.bench.timing import Advance
    from mopefuse.config.schema import RunConfig

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None, help="What conditional prompts cost, against the floor.")

PAIRS = (("timm:vit_base", "hf:bert-base"), ("timm:swin_base", "hf:bert-base"))

Main = Annotated[str, typer.Option(help="Main encoder; its weights are random.")]
Comp = Annotated[str, typer.Option(help="Complementary encoder; its weights are random.")]
BatchSize = Annotated[int, typer.Option(min=1, max=65_536, help="Samples in a step.")]
TextLength = Annotated[int, typer.Option(min=2, max=65_536, help="Tokens of each text.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Precision = Annotated[str, typer.Option(help="auto, fp32 or bf16.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.callback()
def bench(
    context: typer.Context,
    main: Annotated[str | None, typer.Option(help="Main encoder; without --main and --comp ViT-B and Swin-B.")] = None,
    comp: Annotated[str | None, typer.Option(help="Complementary encoder; default BERT-base.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="A further fusion method, as a row; repeatable.")] = None,
    batch: BatchSize = 8,
    text_length: TextLength = 32,
    experts: Annotated[str, typer.Option(help="Numbers of experts; the first is that of most rows.")] = "16,256,1024",
    train: Annotated[bool, typer.Option("--train", help="Only training steps.")] = False,
    infer: Annotated[bool, typer.Option("--infer", help="Only answers.")] = False,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Memory of a step, in processes of their own.")] = True,
    compiled: Annotated[bool, typer.Option("--compile", help="Through torch.compile.")] = False,
    recompute: Annotated[bool, typer.Option("--checkpoint-activations", help="A row with recomputed activations.")] = False,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Repetitions of every row, in turns.")] = 2,
    more: Annotated[int, typer.Option(min=0, max=10_000, help="Further ones after each, of the rows compared most.")] = 5,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
) -> None:
    """Time, memory, parameters and size of conditional prompts and of the alternatives, with random weights and inputs.

    The floor is the two frozen encoders without prompts: complementary forward, main forward and backward to its first
    layer. docs/performance.md explains the rows.
    """
    if context.invoked_subcommand is not None:
        return
    from mopefuse.bench.pair import bench_pair
    from mopefuse.cli._bench_display import pair_as_dict, show_pair
    from mopefuse.cli._render import print_json

    pairs = PAIRS if main is None and comp is None else ((main or PAIRS[0][0], comp or PAIRS[0][1]),)
    numbers, found = _numbers(experts), []
    for one, other in pairs:
        with _progress(f"{one} with {other}") as advance:
            result = bench_pair(
                _config(one, other, device, precision),
                batch=batch,
                text_length=text_length,
                experts=numbers,
                methods=tuple(dict.fromkeys(method or ())),
                recompute=recompute,
                rounds=rounds,
                more=more,
                train=train or not infer,
                infer=infer or not train,
                with_memory=memory and (train or not infer),
                compiled=compiled,
                advance=advance,
            )
        found.append(pair_as_dict(result))
        if not json:
            show_pair(result)
    if json:
        print_json({"ok": True, "pairs": found})


@app.command("loader")
def loader(
    main: Main = PAIRS[0][0],
    images: Annotated[int, typer.Option(min=1, max=1_000_000, help="JPEGs to make up.")] = 256,
    side: Annotated[int, typer.Option(min=16, max=9_000, help="Their height and width in pixels.")] = 512,
    batch: BatchSize = 32,
    workers: Annotated[int, typer.Option(min=0, max=256, help="Processes that read.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Repetitions.")] = 3,
    json: Json = False,
) -> None:
    """Images per second, decoded or from the cache.

    Decoded and resized, and from the cache of decoded ones.
    """
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
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Repetitions.")] = 5,
    json: Json = False,
) -> None:
    """Seconds of imports, and until the command line answers."""
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
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Repetitions.")] = 3,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
) -> None:
    """How a training step grows.

    With experts, prompt length, batch and text length, one at a time.
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
    batch: Annotated[int, typer.Option(min=1, max=65_536, help="Samples in a step of all processes together.")] = 8,
    text_length: TextLength = 32,
    processes: Annotated[str, typer.Option(help="Numbers of processes, with commas.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Repetitions.")] = 5,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Json = False,
) -> None:
    """A training step on one process and on several.

    Of the same batch: gloo on CPUs, NCCL on GPUs.
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
    """A spec that needs no download."""
    if spec.startswith("tiny:") or "pretrained=" in spec or "weights=" in spec:
        return spec
    return f"{spec}{'&' if '?' in spec else '?'}pretrained=false"


def _config(main: str, comp: str, device: str, precision: str) -> RunConfig:
    from mopefuse.config.schema import build_config

    values: dict[str, Any] = {"main": random_weights(main), "comp": random_weights(comp), "device": device}
    return build_config({**values, "train": {"precision": precision}})


def _numbers(text: str, where: str = "--experts") -> tuple[int, ...]:
    from mopefuse.errors import ConfigError

    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ConfigError(130, f"{text!r} is no list of numbers", where=where, fix="write 16 or 4,16,256")
    return found


@contextmanager
def _progress(what: str) -> Iterator[Advance]:
    """A line on stderr that says what is measured and how much is done; on no terminal a line for each stage."""
    from mopefuse.cli._render import err

    console, told = err(), set[str]()
    with console.status(f"{what}: building the models") as status:

        def advance(now: str, done: int, total: int) -> None:
            stage = now.partition(":")[0]
            if console.is_terminal:
                status.update(f"{what}: {now} ({done}/{total})")
            elif stage not in told:
                told.add(stage)
                console.print(f"{what}: {stage}", markup=False)

        yield advance
