"""`mopefuse.testing`: everything built in satisfies its contract, and for each claim of a contract there is a plugin that
breaks it."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mopefuse.core import registry
from mopefuse.data.base import Batch
from mopefuse.errors import DataError
from mopefuse.fusion import Fusion, Output
from mopefuse.modalities import base as modalities
from mopefuse.modalities.base import Modality
from mopefuse.modalities.files import Files
from mopefuse.tasks.regression import Regression
from mopefuse.tasks.single_label import SingleLabel
from mopefuse.testing import check_fusion, check_modality, check_task

INSTALLED = registry.available(registry.FUSION)
METHODS = [name for name, (point, *_) in INSTALLED.items() if registry.distribution(point) == "mopefuse"]


# -- built-in implementations


@pytest.mark.parametrize("method", METHODS)
def test_every_built_in_method_satisfies_the_contract(method: str) -> None:
    sides = {"main": "tiny:text", "comp": "tiny:vision"} if "mmbt" in method else {}
    assert isinstance(check_fusion(method, **sides), Fusion)


@pytest.mark.parametrize(
    "settings",
    [
        {"either": True},
        {"comp_tuning": {"mode": "prompts"}},
        {"comp_tuning": {"mode": "lora"}},
        {"prompts": {"gate": "none"}, "router": {"kind": "joint", "top_m": 2}},
        {"comp": ["tiny:text", "tiny:text-b"]},
        {"prompts": {"layers": "last:1", "film": True}},
    ],
    ids=str,
)
def test_conditional_satisfies_the_contract_in_every_configuration(settings: dict[str, Any]) -> None:
    settings = {**settings}
    check_fusion("conditional", comp=settings.pop("comp", "tiny:text"), settings=settings)


def test_text_and_image_satisfy_the_contract(tmp_path: Path) -> None:
    check_modality("text", values=["A photo of two cats.", "no", "Straße"])
    random = np.random.default_rng(0)
    for name, size in (("a.png", (40, 30)), ("b.jpg", (20, 90))):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / name)
    check_modality("image", values=["a.png", "b.jpg"], root=tmp_path)


# -- methods that break the contract


class Sum(Fusion):
    """A method that satisfies the contract; those below break one claim each."""

    supports_multiple_comps = True

    def __init__(self, config: Any, encoders: Any, num_labels: int) -> None:
        super().__init__(config, encoders)
        self.frozen = self.uses
        self.add_missing_embeddings(self.optional_sides)
        self.head = self.make_head(sum(self.encoder(side).feature_width for side in self.uses), num_labels)

    def features(self, batch: Batch) -> list[Tensor]:
        return [self.pooled_feature(side, batch) for side in self.uses]

    def forward(self, batch: Batch) -> Output:
        return Output(self.classify(*self.features(batch), batch=batch))


class ReturnsATensor(Sum):
    def forward(self, batch: Batch) -> Any:
        return super().forward(batch).logits_BN


class TooFewLogits(Sum):
    def forward(self, batch: Batch) -> Output:
        return Output(super().forward(batch).logits_BN[:, 1:])


class RoutingWithoutSum(Sum):
    def forward(self, batch: Batch) -> Output:
        logits_BN = super().forward(batch).logits_BN
        return Output(logits_BN, torch.ones(len(logits_BN), 1, 4))


class AlwaysDropout(Sum):
    def forward(self, batch: Batch) -> Output:
        return Output(nn.functional.dropout(super().forward(batch).logits_BN, 0.5, training=True))


class KeepsTheBatch(Sum):
    def forward(self, batch: Batch) -> Output:
        self.last = super().forward(batch)
        return self.last


class CentresTheBatch(Sum):
    def forward(self, batch: Batch) -> Output:
        logits_BN = super().forward(batch).logits_BN
        return Output(logits_BN - logits_BN.mean(dim=0))


class UnusedLayer(Sum):
    def __init__(self, config: Any, encoders: Any, num_labels: int) -> None:
        super().__init__(config, encoders, num_labels)
        self.spare = nn.Linear(2, 2)


class ThawsAnEncoder(Sum):
    def __init__(self, config: Any, encoders: Any, num_labels: int) -> None:
        super().__init__(config, encoders, num_labels)
        self.encoder("comp").requires_grad_(True)


class IgnoresComputedFeatures(Sum):
    def features(self, batch: Batch) -> list[Tensor]:
        return [self.encoder(side).encode(batch.inputs[side]).pooled_BC for side in self.uses]


class LearnsOutsideItsState(Sum):
    def __init__(self, config: Any, encoders: Any, num_labels: int) -> None:
        super().__init__(config, encoders, num_labels)
        self.seen = [0.0]

    def forward(self, batch: Batch) -> Output:
        if self.training:
            self.seen[0] += len(batch.index)
        return Output(super().forward(batch).logits_BN + self.seen[0])


class HoldsALock(Sum):
    def __init__(self, config: Any, encoders: Any, num_labels: int) -> None:
        super().__init__(config, encoders, num_labels)
        self.lock = threading.Lock()


class Lenient:
    """Accepts any sample; defined at module level so that it can be pickled."""

    def check(self, lacking: Any, *, where: str) -> None:
        pass


class TakesAnything(Sum):
    supports_multiple_comps = False

    @property
    def requirements(self) -> Any:
        return Lenient()


class ForgetsTheAbsent(Sum):
    def forward(self, batch: Batch) -> Output:
        return Output(self.classify(*self.features(batch)))


class NeedsAll(Sum):
    def forward(self, batch: Batch) -> Output:
        lost = sum(float(mask_B.sum()) for mask_B in batch.missing.values())
        return Output(super().forward(batch).logits_BN + lost)


class IgnoresItsPrefix(Sum):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.prefix_layers = {"main": 3}


BROKEN_METHODS: list[tuple[type[Fusion], str, str]] = [
    (ReturnsATensor, "forward() returns a Tensor, expected an Output", "return Output(logits_BN)"),
    (TooFewLogits, "logits have the shape (3, 2), expected (3, 3)", "one column for each of num_labels"),
    (RoutingWithoutSum, "routing weights of a layer do not add up to 1", "return Output"),
    (AlwaysDropout, "gives different logits the second time", "in training mode only"),
    (KeepsTheBatch, "forward() sets last of the model", "keep nothing on self"),
    (CentresTheBatch, "logits of sample 0 depend on the rest of its batch", "no mean, norm or attention over the batch"),
    (UnusedLayer, "the trainable parameter spare.weight gets no gradient", "use every parameter"),
    (ThawsAnEncoder, "requires_grad of comp.", "read frozen encoders with"),
    (IgnoresComputedFeatures, "KeyError: 'main'", "with self.pooled_feature(side, batch)"),
    (IgnoresItsPrefix, "computed earlier for prefix_layers gives different logits", "pass start=self.prefix(side, batch)"),
    (LearnsOutsideItsState, "a fresh model with the saved state gives different logits", "parameters"),
    (HoldsALock, "cannot pickle", "no open files, locks or lambdas"),
    (TakesAnything, "accepts a sample without", "set supports_multiple_comps = True"),
    (ForgetsTheAbsent, "learns what stands in for a missing comp value", "pass batch=batch to self.classify()"),
    (NeedsAll, "a sample without text changes the logits of others", "self.replace_missing"),
]


def test_the_toy_method_satisfies_the_contract() -> None:
    assert isinstance(check_fusion(Sum), Sum)


@pytest.mark.parametrize(("method", "what", "fix"), BROKEN_METHODS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_method_fails_with_what_where_and_a_fix(method: type[Fusion], what: str, fix: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_fusion(method)
    message, _, advice = str(caught.value).partition(" · fix: ")
    assert method.__name__ in message or "unexpected error while checking" in message
    assert what in message and fix in advice


def test_a_method_that_is_not_a_subclass_or_cannot_be_built_fails_the_contract() -> None:
    with pytest.raises(AssertionError, match="is not a subclass of Fusion · fix: derive"):
        check_fusion(nn.Linear)  # type: ignore[arg-type]

    with pytest.raises(AssertionError, match=r"^Sum: needs at least two samples"):
        check_fusion(Sum, samples={"image": [Image.new("RGB", (8, 8))], "text": ["a"]})

    class NoArguments(Sum):
        def __init__(self) -> None:
            pass

    with pytest.raises(AssertionError, match=r"cannot be built: TypeError.*fix: take .config, encoders, num_labels"):
        check_fusion(NoArguments)


# -- modalities that break the contract


class Numbers(Modality):
    """A modality that satisfies the contract: numbers in a cell."""

    plural = "readings"
    value_description = "a list of numbers"
    type_fix = "give lists of numbers"

    def read(self, value: str, files: Any, *, where: str, config: Any) -> Any:
        try:
            return [float(number) for number in value.split()]
        except ValueError:
            raise DataError(1000, "it is no list of numbers", where=where, fix="write numbers with spaces between") from None

    def blank_value(self) -> Any:
        return []

    def examples(self) -> list[Any]:
        return [[0.5, 1.0], [3.0]]

    def accepts(self, value: Any) -> bool:
        return isinstance(value, list)


class NoWords(Numbers):
    plural = ""


class OneExample(Numbers):
    def examples(self) -> list[Any]:
        return [[1.0]]


class RefusesNothing(Numbers):
    def accepts(self, value: Any) -> bool:
        return isinstance(value, list) and bool(value)


class AllSingle(Numbers):
    def is_single(self, value: Any) -> bool:
        return isinstance(value, list)


class AcceptsAll(Numbers):
    def accepts(self, value: Any) -> bool:
        return True


class RawErrors(Numbers):
    def read(self, value: str, files: Any, *, where: str, config: Any) -> Any:
        return [float(number) for number in value.split()]


class Counts(Numbers):
    count = 0

    def read(self, value: str, files: Any, *, where: str, config: Any) -> Any:
        self.count += 1
        return [float(self.count)]


class Doubles(Numbers):
    def prepare(self, value: Any, *, where: str) -> Any:
        return [2 * number for number in value] if isinstance(value, list) else value


class HasALambda(Numbers):
    def __init__(self) -> None:
        self.split = lambda text: text.split()


class Blocks(Files):
    """A modality of files that satisfies the contract: ``DATA`` and a number of bytes."""

    plural = "blocks"
    value_description = "bytes"
    type_fix = "give bytes"

    def decode(self, content: bytes, name: str, *, where: str, config: Any) -> bytes:
        if content[:4] != b"DATA" or content[4:5] != bytes([len(content)]):
            raise DataError(1001, f"{name} is no block", where=where, fix="write DATA, its size, and its bytes")
        return content

    def blank_value(self) -> bytes:
        return b""

    def examples(self) -> list[Any]:
        return [b"one", b"two"]

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bytes | str | Path)

    def is_single(self, value: Any) -> bool:
        return isinstance(value, bytes | str | Path)

    def prepare(self, value: Any, *, where: str) -> Any:
        return Path(value).read_bytes() if isinstance(value, str | Path) else value


class Unprepared(Blocks):
    def prepare(self, value: Any, *, where: str) -> Any:
        return value


class TakesHalves(Blocks):
    def decode(self, content: bytes, name: str, *, where: str, config: Any) -> bytes:
        return content if content[:4] == b"DATA" else super().decode(content, name, where=where, config=config)


class Unpickles(Blocks):
    def decode(self, content: bytes, name: str, *, where: str, config: Any) -> Any:
        try:
            return super().decode(content, name, where=where, config=config)
        except DataError:
            if content[:1] == b"\x80":
                return pickle.loads(content)  # noqa: S301 (what the contract must find)
            raise


class OpensAnything(Blocks):
    def read(self, value: str, files: Any, *, where: str, config: Any) -> Any:
        try:
            return self.decode((files[0] / value).read_bytes(), value, where=where, config=config)
        except (OSError, ValueError):
            raise DataError(1002, "there is no such file", where=where, fix="name one") from None


class RefusesWhole(Blocks):
    def inspect(self, content: bytes, name: str, config: Any) -> Any:
        raise DataError(1003, "no", fix="none")


class Blob:
    """Not a modality."""

    is_file = False


BROKEN_MODALITIES: list[tuple[type[Modality], str, str]] = [
    (NoWords, "plural is '', expected words", "set plural, value_description and type_fix"),
    (OneExample, "examples() gives 1 values, expected at least 2", "at least two values"),
    (RefusesNothing, "accepts() refuses a list of its own examples() or blank_value()", "from blank_value()"),
    (AllSingle, "is_single() takes a list of values for one value", "override is_single()"),
    (AcceptsAll, "accepts() and prepare() accept a object as a value", "override accepts()"),
    (RawErrors, "read() of 'no value' raises a ValueError, expected a MopefuseError", "raise mopefuse.errors.DataError"),
    (Counts, "reading '0.5 1.0' twice gives two results", "keep nothing on self"),
    (Doubles, "prepare() changes what read() gives for '0.5 1.0'", "return from prepare() what read() returns"),
    (HasALambda, "the modality cannot be handed to a data worker", "lambdas"),
    (Unprepared, "prepare() of the path of a.bin is not what read() gives", "return from prepare()"),
    (TakesHalves, "inspect() accepts half a file as a value", "raise mopefuse.errors.DataError"),
    (Unpickles, "a file with a pickle in it ran code of its own", "allow_pickle=False"),
    (OpensAnything, "read() takes the path '/", "let Files.read() find the file"),
    (RefusesWhole, "inspect() refuses a.bin, which decode() reads", "raise in inspect() where decode() would"),
]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Modality]], Modality]:
    """Check a modality as if a plugin had registered it under the name `toy`."""
    (tmp_path / "a.bin").write_bytes(b"DATA\x08abc")
    load, names = registry.load, modalities.modality_names()

    def check(kind: type[Modality]) -> Modality:
        modalities._create.cache_clear()
        monkeypatch.setattr(registry, "load", lambda group, name: kind if name == "toy" else load(group, name))
        monkeypatch.setattr(modalities, "modality_names", lambda: (*names, "toy"))
        return check_modality("toy", values=["a.bin"] if kind.is_file else ["0.5 1.0"], root=tmp_path)

    return check


@pytest.mark.parametrize("kind", [Numbers, Blocks])
def test_the_toy_modalities_satisfy_the_contract(kind: type[Modality], check: Callable[[type[Modality]], Modality]) -> None:
    assert isinstance(check(kind), kind)


@pytest.mark.parametrize(("kind", "what", "fix"), BROKEN_MODALITIES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_modality_fails_with_what_and_a_fix(
    kind: type[Modality], what: str, fix: str, check: Callable[[type[Modality]], Modality]
) -> None:
    with pytest.raises(AssertionError) as caught:
        check(kind)
    message, _, advice = str(caught.value).partition(" · fix: ")
    assert what in message and fix in advice


def test_a_class_that_is_not_a_modality_and_files_without_a_folder_fail(check: Callable[[type[Modality]], Modality]) -> None:
    with pytest.raises(AssertionError, match=r"is not a subclass of mopefuse\.modalities\.base\.Modality"):
        check(Blob)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="values are files · fix: pass values"):
        check_modality("image")


# -- tasks

LABELS = [["a"], ["b"], ["c"], ["a"]] * 5
SETS = [["a", "b"], ["b"], [], ["c", "a"]] * 5
NUMBERS = [["1.5"], ["2.5"], ["-3"], ["12.25"], ["0.125"]] * 4
PAIRS = [["1.5", "2"], ["2.5", "2"], ["-3", "0.5"], ["12.25", "7"]] * 5


@pytest.mark.parametrize(
    ("task", "rows", "known"),
    [
        ("single-label", LABELS, "abc"),
        ("multi-label", SETS, "abc"),
        ("regression", NUMBERS, ["price"]),
        (Regression([2.0], [5.0]), NUMBERS, ["price"]),
        (Regression([2.0, 3.0], [5.0, 2.0], loss="huber"), PAIRS, ["price", "weight"]),
        (Regression([2.0], [5.0], loss="quantile", quantiles=(0.1, 0.5, 0.9)), NUMBERS, ["price"]),
    ],
    ids=["single-label", "multi-label", "regression", "fitted", "several", "quantiles"],
)
def test_every_built_in_task_satisfies_the_contract(task: Any, rows: list[list[str]], known: Any) -> None:
    assert check_task(task, rows=rows, known=[*known]) == (task if isinstance(task, str) else task.name)


class Broken(SingleLabel):
    """Each test breaks one method of it."""


def batch_mean(self: Any, outputs_BN: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    return SingleLabel.loss(self, outputs_BN, targets).mean().expand(len(targets))


@pytest.mark.parametrize(
    ("method", "broken", "message"),
    [
        ("metrics", ("f1_macro",), "is not the first of its metrics"),
        ("stack_labels", lambda self, labels, count: torch.zeros(len(labels)), "differs from targets"),
        ("loss", batch_mean, "the loss of a sample depends on its batch"),
        ("average", lambda self, each: torch.stack([*each]).sum(0), "of equal outputs"),
        ("table_header", lambda self, labels: ["label"], "have different lengths"),
        ("as_written", lambda self, labels: "a", "stack_labels|the label is|differs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_task_that_breaks_its_contract_is_told_how(
    method: str, broken: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broken, method, broken)
    with pytest.raises(AssertionError, match=message):
        check_task(Broken(), rows=LABELS, known="abc")
