"""What a swap keeps is useful: on digit questions, a swapped run needs fewer steps than one from scratch."""

from __future__ import annotations

from pathlib import Path

import pytest

from mopefuse.config.recipe import resolve
from mopefuse.data.sets.digit_questions import make
from mopefuse.runs.folder import RunFolder
from mopefuse.training.swap import swap_encoder
from mopefuse.training.train import train

CHANCE = 0.1


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to read digits."""
    root = tmp_path_factory.mktemp("swap-learning")
    make(root / "data", train=6000, val=400, test=100)
    flags = {"main": "tiny:vision", "comp": "tiny:text", "data.path": str(root / "data"), "train.epochs": 3}
    train(resolve(recipe="digit-questions/short", flags=flags), root / "base")
    assert accuracies(root / "base")[-1] > 5 * CHANCE
    return root / "base"


def accuracies(run: Path) -> list[float]:
    """Validation accuracies during training, in order."""
    return [line["val"]["accuracy"] for line in RunFolder(run).read_log() if "val" in line and line["step"]]


@pytest.mark.soak
def test_after_swapping_the_text_encoder_a_run_reaches_the_final_accuracy_of_scratch_sooner(
    base: Path, tmp_path: Path
) -> None:
    swap_encoder(base, tmp_path / "new", comp="tiny:text-b", epochs=1, settings={"train": {"evals_per_epoch": 5}})
    tuned, scratch = accuracies(tmp_path / "new"), accuracies(tmp_path / "new-scratch")
    assert len(tuned) == len(scratch) == 5 and max(scratch) > CHANCE
    assert next(number for number, accuracy in enumerate(tuned) if accuracy >= max(scratch)) < 2
    assert tuned[-1] > max(scratch) + 0.1
