"""What a fusion method is, and what of it is "ours": one predicate decides what is trained, saved and exported.

To add a method, write one module with a subclass of `Fusion` and name it in the entry-point group ``mopefuse.fusion``.
Shapes: B batch, N labels, C width of a pooled feature.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import reduce
from operator import and_
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mopefuse.config.schema import RunConfig
from mopefuse.config.sides import is_comp, specs
from mopefuse.core.precision import apply_exactly, exact
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder, Inputs, Preprocess, run_frozen
from mopefuse.errors import CheckpointError, ConfigError, DataError
from mopefuse.fusion.regression import Advance, Fold, How, Standard, fit_heads
from mopefuse.modalities import base as modality


class Output(NamedTuple):
    """What a method says of a batch."""

    logits_BN: Tensor
    routing_BLK: Tensor | None = None  # noise-free expert weights of each routed layer
    alone_BN: Tensor | None = None  # logits of the complementary side alone, which learns them beside the others (`either`)

    @property
    def logits(self) -> Tensor:
        """(B, N)."""
        return self.logits_BN

    @property
    def load_LK(self) -> Tensor | None:
        """Routing summed over the batch: what the importance loss balances."""
        return None if self.routing_BLK is None else self.routing_BLK.sum(dim=0)


class Fusion(nn.Module):
    """Encoders, what fuses them, and a head.

    A subclass is built from ``(config, encoders, num_labels)``, sets `head` by `make_head` and gives `forward`. `uses`
    names the sides that it needs; `frozen` those whose encoder gets no prompts and never learns, so that its features
    can be computed once; `reads` those whose samples its forward pass looks at.
    """

    uses: tuple[str, ...] = ("main", "comp")
    parts: ClassVar[dict[str, str]] = {
        r"^head\.": "head",
        r"^absent\.": "absent conditions",
        r"^comp\d*\..*\.lora_[AB]\.": "LoRA of the complementary encoder",
        r"^main\..*\.lora_[AB]\.": "LoRA of the main encoder",
        r"^comp\d*\.": "complementary encoder",
        r"^main\.": "main encoder",
    }

    sections: ClassVar[tuple[str, ...]] = ()  # of the optional ones, those that the method uses
    bonds: ClassVar[dict[str, str]] = {r"^(?:standard|absent)\.(\w+)": r"\1 features"}
    """Pattern of a tensor's name to what its meaning hangs on: "main" or "comp" for the geometry of that encoder's layers,
    "main features" or "comp features" for the values that this very encoder gives; ``\1`` is the pattern's first group.
    Others mean the same with any encoder."""
    several: ClassVar[bool] = False
    """Whether it takes any number of complementary encoders, and does without those that a sample has nothing for."""
    closed_form: ClassVar[bool] = False  # whether nothing is left to train after `fit`: no step is made
    head: nn.Module

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder]) -> None:
        super().__init__()
        self.config = config
        self.uses = self.sides(config)
        for side in self.uses:
            self.add_module(side, encoders[side])
        self.frozen: tuple[str, ...] = ()
        self.reads: tuple[str, ...] = self.uses
        self.standard: nn.ModuleDict | None = None  # by side, where the head takes standardised features
        self.absent = nn.ParameterDict()
        if config.either and "main" not in self.may_lack:
            what = f"{config.method} cannot do without the main modality"
            raise ConfigError(143, what, where="--either", fix="use --method conditional or late-concat")
        if config.either and len({self.encoder(side).modality for side in self.uses}) == 1:
            what = f"all encoders read {self.encoder('main').modality}: where the main one has none, no other has"
            raise ConfigError(143, what, where="--either", fix="leave it out")
        if config.train.modality_dropout and not self.may_lack:
            what = f"{config.method} needs all that it reads: there is nothing to drop"
            raise ConfigError(144, what, where="--modality-dropout", fix="leave it out")

    def learn_absence(self, sides: Sequence[str]) -> None:
        """Learn what stands in for `sides` where a sample has nothing for them; see `or_absent`."""
        widths = {side: self.encoder(side).feature_width for side in sides}
        self.absent.update({side: nn.Parameter(torch.zeros(width)) for side, width in widths.items()})

    @classmethod
    def sides(cls, config: RunConfig) -> tuple[str, ...]:
        """The sides that a model of this configuration needs encoders of: `uses`, with all complementary ones for "comp".

        Raises:
            ConfigError: several complementary encoders, and a method of two modalities.
        """
        there = [side for side in specs(config) if is_comp(side)]
        if "comp" in cls.uses and len(there) > 1 and not cls.several:
            what = f"{config.method} fuses two encoders, and {len(there)} are complementary"
            raise ConfigError(142, what, where="--comp", fix="name one, or use --method conditional, late-concat or linear")
        return tuple(one for side in cls.uses for one in (there if side == "comp" else [side]))

    @abstractmethod
    def forward(self, batch: Batch) -> Output:
        """Logits of a batch."""

    def resolve(self, config: RunConfig) -> RunConfig:
        """`config` with the defaults written out that depend on the encoders."""
        return config

    @property
    def prompt_kinds(self) -> tuple[str, ...]:
        """The kinds of prompts that `without` can leave out."""
        return ()

    def without(self, kind: str) -> AbstractContextManager[None]:
        """Answer without the prompts of a kind, for as long as the context lasts."""
        raise NotImplementedError(f"{type(self).__name__} has no prompts {kind}")

    def unused_sections(self) -> list[str]:
        """Sections of settings that were changed from their defaults and that this method does not look at, and settings."""
        default = RunConfig(main="", comp="")
        settings = ["train.modality_dropout"] if self.config.train.modality_dropout and self.closed_form else []
        optional = ("warm_start", "tune", "prompts", "router", "comp_tuning", "lora", "inserted", "pmf", "linear")
        used = (*self.sections, "lora") if any(self.encoder(side).adapted for side in self.uses) else self.sections
        return [s for s in optional if s not in used and getattr(self.config, s) != getattr(default, s)] + settings

    @property
    def head_sides(self) -> tuple[str, ...]:
        """The sides whose pooled features the head takes, side by side."""
        return self.uses

    @property
    def heads(self) -> dict[str, tuple[str, ...]]:
        """The sides that each head takes, by the name of the module."""
        return {"head": self.head_sides}

    def bond(self, name: str) -> str:
        """What the meaning of a tensor of ours hangs on, see `bonds`; of a tuned encoder on that encoder."""
        side = name.partition(".")[0]
        if side in self.uses:
            return f"{side} features"
        found = (match.expand(bond) for pattern, bond in self.bonds.items() if (match := re.search(pattern, name)))
        return next(found, "")

    @property
    def may_lack(self) -> tuple[str, ...]:
        """The sides that a sample may have nothing for; what the main one reads only where that was asked for (`either`)."""
        if not self.several or len(self.uses) == 1:
            return ()
        needed = () if self.config.either or "main" not in self.uses else (self.encoder("main").modality,)
        return tuple(side for side in self.uses if self.encoder(side).modality not in needed)

    @property
    def does_without(self) -> tuple[str, ...]:
        """Of `may_lack`, the sides that training takes from samples, or that rows may be without (`data.on_missing`)."""
        dropped = self.config.train.modality_dropout > 0 and not self.closed_form
        return self.may_lack if dropped or self.config.data.on_missing == "absent" else ()

    def require_all_but(self, lacking: Mapping[str, NDArray[np.bool_] | Tensor], *, where: str) -> None:
        """Refuse samples that lack what this model cannot do without, or all that it reads.

        Args:
            lacking: sides that some sample has nothing for, to which ones (S,).

        Raises:
            DataError: one of them is not in `may_lack`, or a sample has nothing.
        """
        for side in lacking:
            if side in self.may_lack:
                continue
            modality = self.encoder(side).modality
            fix = "leave them out with --on-missing skip"
            if self.several and side == "main" and len(self.uses) > 1:
                fix = f"train with --either, or {fix}"
            what = f"samples lack {modality}, and {self.config.method} cannot do without what its {side} encoder reads"
            raise DataError(100, what, where=where, fix=fix)
        empty = int(reduce(and_, lacking.values()).sum()) if lacking.keys() >= {*self.reads} else 0
        if empty:
            what = f"{empty} of the samples have nothing that the encoders read"
            raise DataError(110, what, where=where, fix="leave them out, as --on-missing skip does")

    def or_absent(self, side: str, normed_BC: Tensor, batch: Batch) -> Tensor:
        """A side's features without their scale, and the absent condition for samples that have nothing for it.

        It is learned, from 0, which is what an average sample has; where it was not learned it is 0.
        """
        missing_B = batch.missing.get(side)
        if missing_B is None:
            return normed_BC
        absent_C = self.absent[side] if side in self.absent else normed_BC.new_zeros(normed_BC.shape[-1])
        return torch.where(missing_B[:, None], absent_C.to(normed_BC.dtype), normed_BC)

    def encoder(self, side: str) -> Encoder:
        """The encoder of a side."""
        encoder = getattr(self, side)
        assert isinstance(encoder, Encoder)
        return encoder

    def feature(self, side: str, batch: Batch) -> Tensor:
        """Pooled feature (B, C) of a frozen side: from the batch if it was computed earlier, else computed now."""
        if side in batch.features:
            return batch.features[side]
        return exact(run_frozen(self.encoder(side), batch.inputs[side]).pooled_BC)

    def make_head(self, width: int, num_labels: int) -> nn.Module:
        """From pooled features of `width` to logits: linear, or with one hidden layer (`head_hidden`)."""
        hidden = self.config.head_hidden
        if not hidden:
            return nn.Linear(width, num_labels)
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, num_labels))

    def classify(self, *pooled_BC: Tensor, batch: Batch | None = None) -> Tensor:
        """Logits (B, N) of the head on pooled features side by side, each without its scale (`head_norm`, `standard`).

        In float32 also under autocast.

        Args:
            pooled_BC: of each of `head_sides`. batch: says which samples lack which, where the method does without.
        """
        if self.standard is not None:
            pooled_BC = self.standardised(*pooled_BC)
        elif self.config.head_norm == "layer":
            pooled_BC = tuple(F.layer_norm(exact(pooled), pooled.shape[-1:]) for pooled in pooled_BC)
        if batch is not None:
            both = zip(self.head_sides, pooled_BC, strict=True)
            pooled_BC = tuple(self.or_absent(side, pooled, batch) for side, pooled in both)
        return apply_exactly(self.head, torch.cat(pooled_BC, dim=-1))

    def begin_as_regression(self, num_labels: int) -> None:
        """Make the head one that `fit` fills: linear, on standardised features of all sides."""
        widths = {side: self.encoder(side).feature_width for side in self.uses}
        self.standard = nn.ModuleDict({side: Standard(width) for side, width in widths.items()})
        self.head = nn.Linear(sum(widths.values()), num_labels)

    def standardised(self, *pooled_BC: Tensor) -> tuple[Tensor, ...]:
        """The pooled features of the sides in `standard`, in its order, by the statistics of the training split."""
        assert self.standard is not None
        return tuple(one(pooled) for one, pooled in zip(self.standard.values(), pooled_BC, strict=True))

    def readers(self) -> dict[str, tuple[str, Preprocess]]:
        """Side to modality and preprocessing."""
        return {side: (self.encoder(side).modality, self.encoder(side).preprocess) for side in self.reads}

    def collate(self, images: Any = None, texts: Any = None, **more: Any) -> Batch:
        """Raw values to a batch on the model's device: each encoder's own preprocessing, no augmentation.

        Args:
            images, texts, more: by modality (``audio=[...]``), one for each sample; None for a sample that has none. What no
                encoder reads may be left out. Images are PIL images, paths or arrays of uint8 (height, width, 3), and are
                prepared as the files of a data set are. One value alone is a list of one.

        Raises:
            DataError: not as many of one as of another, none, or something that is no image or no text.
        """
        values = modality.named((images, texts), more)
        count = modality.count_of(values)
        if not count:
            said = " and ".join(f"0 {modality.of(name).plural}" for name in values) or "nothing"
            raise DataError(17, f"{said} are no pairs", fix="give one value for each sample")
        modality.require_kinds(values)
        read = {name for name, _ in self.readers().values()}
        values |= {name: modality.prepared(name, values[name]) for name in read if name in values}
        inputs: dict[str, Inputs] = {}
        missing: dict[str, Tensor] = {}
        for side, (name, preprocess) in self.readers().items():
            own = modality.require_given(name, values, f"the {side} encoder")
            inputs[side] = preprocess.batch([preprocess.item(value) for value in modality.or_nothing(name, own)])
            if any(value is None for value in own):
                missing[side] = torch.tensor([value is None for value in own])
        self.require_all_but(missing, where="collate")
        return Batch(inputs, {}, None, torch.arange(count), missing).to(next(self.parameters()).device)

    def is_ours(self, name: str) -> bool:
        """Whether a parameter or buffer is ours: not part of a frozen encoder. Ours is trained, saved and exported."""
        side, _, own = name.partition(".")
        return side not in self.uses or self.encoder(side).learned(own)

    def ours(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if self.is_ours(name)}

    def own_state(self) -> dict[str, Tensor]:
        """What a run saves: `ours` and the constants that belong to them."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items() if self.is_ours(name)}

    def load_own_state(self, state: Mapping[str, Tensor], *, where: str) -> None:
        """The inverse of `own_state`.

        Raises:
            CheckpointError: other names or shapes than this model has, or values that are not finite.
        """
        expected = self.own_state()
        problems = [f"{name} is missing" for name in sorted(expected.keys() - state.keys())]
        problems += [f"{name} is not expected" for name in sorted(state.keys() - expected.keys())]
        for name in sorted(expected.keys() & state.keys()):
            if state[name].shape != expected[name].shape:
                problems.append(f"{name} is {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}")
            elif state[name].is_floating_point() and not state[name].isfinite().all():
                problems.append(f"{name} has values that are not finite")
        if problems:
            raise CheckpointError(
                5, f"the weights do not fit the model: {'; '.join(problems[:8])}", where=where, fix="use another checkpoint"
            )
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(state[name])

    def fit(self, train: Fold, val: Fold, how: How, advance: Advance) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What to begin with where `standard` is set: the head as a regression on the features of the encoders unprompted.

        Args:
            train, val: pooled features of the sides in `standard`.
            advance: called now and then with what is being fitted and the share of the work that is done.

        Returns:
            Tensors of ours by name, and the C that validation chose.
        """
        assert self.standard is not None
        return fit_heads({"head": tuple(self.standard)}, train, val, how, advance)

    def pace(self, name: str) -> str:
        """Whose learning rate a parameter of ours has: "main", "comp", "head", or "tuned" for those of the main encoder."""
        part = re.split(r"[._\d]", name.removeprefix("stacks."))[0]
        if name.startswith("main.") and self.encoder("main").tuned:
            return "tuned"
        return part if part in ("comp", "head") else "main"

    def breakdown(self) -> dict[str, int]:
        """Trainable parameters by part, largest first."""
        count: Counter[str] = Counter()
        for name, parameter in self.ours().items():
            part = next((part for pattern, part in self.parts.items() if re.search(pattern, name)), "other")
            count[part] += parameter.numel()
        return dict(count.most_common())


def fresh_encoders(model: Fusion) -> dict[str, str]:
    """Side to fingerprint, of encoders whose weights come from outside the run (those tuned come from it)."""
    return {side: model.encoder(side).fingerprint() for side in model.uses if not model.encoder(side).tuned}
