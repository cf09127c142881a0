"""Does a run whose encoder was swapped learn faster than one from scratch? On digit questions, with two encoders of each kind.

    python scripts/measure_swap.py [--data DIGIT_QUESTIONS] [--work FOLDER] [--epochs 2] [--evals 10]

Trains the demo's model with tiny:vision and tiny:text, swaps one of them for tiny:vision-b or tiny:text-b, tunes, and trains
the same pair from scratch for as many steps. Prints validation accuracy by step of both, and in how many steps the swapped
run reaches what the other ends with.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from mopefuse.config.recipe import resolve
from mopefuse.data.digit_questions import make
from mopefuse.runs.folder import RunFolder
from mopefuse.training.swap import swap_encoder
from mopefuse.training.train import train


def curve(run: Path) -> dict[int, float]:
    """Validation accuracy of a run by step."""
    return {line["step"]: line["val"]["accuracy"] for line in RunFolder(run).read_log() if "val" in line}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="made if it is not given")
    parser.add_argument("--work", type=Path, help="folder of the runs; default a temporary one")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--evals", type=int, default=10, help="per epoch")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        data = arguments.data or work / "digit-questions"
        if not data.exists():
            make(data)
        base = work / "base"
        flags = {"data.path": str(data), "main": "tiny:vision", "comp": "tiny:text"}
        if not RunFolder(base).metrics_file.exists():
            train(resolve(recipe="digit-questions/demo", flags=flags), base)
        print(f"before: {RunFolder(base).result()['metrics']['test']['accuracy']:.4f}")
        for side, spec in (("comp", "tiny:text-b"), ("main", "tiny:vision-b")):
            out = work / f"{side}-swapped"
            encoders = {side: spec}
            settings = {"train": {"evals_per_epoch": arguments.evals}}
            swap = swap_encoder(base, out, epochs=arguments.epochs, settings=settings, **encoders)
            tuned, scratch = curve(out), curve(out.with_name(f"{out.name}-scratch"))
            print(f"\n{side} -> {spec}: {100 * swap.share_kept:.1f} % of the values kept")
            print("step    swapped  scratch")
            for step, accuracy in tuned.items():
                print(f"{step:5d}  {accuracy:8.4f} {scratch.get(step, float('nan')):8.4f}", flush=True)
            end = max(scratch.values())
            reached = next((step for step, accuracy in tuned.items() if accuracy >= end), None)
            print(f"from scratch {end:.4f} after {max(scratch)} steps; the swapped run reaches it after {reached}")
            print({stage: (found["test"] or {}).get("accuracy") for stage, found in swap.metrics.items()})


if __name__ == "__main__":
    main()
