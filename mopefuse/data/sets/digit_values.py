"""Generate digit values: digit questions with a number as label, which needs both modalities.

Images and texts are those of `mopefuse.data.sets.digit_questions`. The label is the digit that the text asks for plus a tenth
of the sum of all four digits. The best prediction from the image alone, which knows the sum, explains 28 % of the variance; the
text alone explains nothing.
"""

from __future__ import annotations

from pathlib import Path

from mopefuse.data.generated import write_generated
from mopefuse.data.options import Option, with_options
from mopefuse.data.sets.digit_questions import SOURCE, Question, Split, check_counts, compose, write_split


def value_of(content: Split, question: Question) -> float:
    """The label of a question."""
    return question.label + int(content.digits_N4[question.image].sum()) / 10


@with_options(
    Option("train", 16000, "Rows of the training split.", minimum=1),
    Option("val", 1000, "Rows of the validation split.", minimum=1),
    Option("test", 2000, "Rows of the test split.", minimum=1),
)
def make(folder: Path, *, seed: int = 0, train: int = 16000, val: int = 1000, test: int = 2000) -> dict[str, int]:
    """Write the data set; arguments, files and errors are those of `mopefuse.data.sets.digit_questions.make`."""
    counts = check_counts({"train": train, "val": val, "test": test}, seed)
    about = {"dataset": "digit-values", "version": 1, "seed": seed, "rows": counts, "source": SOURCE}

    def write(building: Path) -> None:
        for split, rows in counts.items():
            write_split(building, split, compose(split, rows, seed), value_of)

    write_generated(folder, about, write)
    return counts
