"""Cross-attention to frozen output tokens, fitted in memory: a starting point for training, like the MLP of `mlp_fit`.

The method `cross-attention` trains the same model step by step, with checkpoints and missing main modalities.

Shapes: S samples, B samples of a batch, L tokens, D their width, F pooled features of all sides, X outputs of the reader, N
labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mopefuse.config.method_settings import CrossAttention as Settings
from mopefuse.core.precision import to_float32
from mopefuse.data.collate import derive_seed
from mopefuse.fusion._design_matrix import Design
from mopefuse.fusion.mlp_fit import Network, NetworkSettings, epochs_within
from mopefuse.fusion.regression import FitSettings, Fold
from mopefuse.fusion.token_reader import TokenReader

_LEARNING_RATE, _WEIGHT_DECAY = 3e-4, 1e-2  # the defaults of the method `cross-attention`
_BATCH, _EVALUATION_BATCH = 32, 256
_EPOCHS = 20
_STEPS = (300, 10_000)  # on small data more epochs are needed, on large data fewer suffice
_MIN_EPOCHS, _MAX_EPOCHS = 2, 100


class Reading(NamedTuple):
    """Parameters of a fitted model: of its `TokenReader` by name, and of the network on [features ; what it reads]."""

    reader: Mapping[str, Tensor]
    network: Network


class ReadingSettings(NamedTuple):
    """Settings of the model.

    Attributes:
        attention: the section `cross_attention` of the configuration.
        token_width: of the main encoder's output tokens.
        network: of the network on top.
    """

    attention: Settings
    token_width: int
    network: NetworkSettings


def epochs_for(samples: int) -> int:
    """Return the number of epochs for a training split of this size."""
    return epochs_within(samples, _BATCH, _EPOCHS, steps=_STEPS, limits=(_MIN_EPOCHS, _MAX_EPOCHS))


class _Model(nn.Module):
    """A reader, and a network with one hidden layer on the features and what it reads."""

    def __init__(self, settings: ReadingSettings, widths: Mapping[str, int], labels: int) -> None:
        super().__init__()
        attention = settings.attention
        self.widths = dict(widths)
        comps = {side: width for side, width in widths.items() if side != "main"}
        self.reader = TokenReader(attention, settings.token_width, comps)
        width = sum(widths.values()) + attention.queries * attention.width
        self.hidden, self.output = nn.Linear(width, settings.network.hidden), nn.Linear(settings.network.hidden, labels)
        self.dropout = nn.Dropout(attention.dropout)

    def forward(self, feature_BF: Tensor, tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Compute logits (B, N) from standardised features and normalised tokens."""
        parts = dict(zip(self.widths, feature_BF.split(list(self.widths.values()), dim=1), strict=True))
        del parts["main"]
        read_BX = to_float32(self.reader(parts, tokens_BLD, mask_BL))
        hidden_BH = nn.functional.gelu(self.hidden(torch.cat([feature_BF, read_BX], dim=1)))
        logits_BN: Tensor = self.output(self.dropout(hidden_BH))
        return logits_BN

    def copy_parameters(self) -> Reading:
        """Copy the parameters."""
        reader = {name: _copy(tensor) for name, tensor in self.reader.state_dict().items()}
        layers = (self.hidden.weight, self.hidden.bias, self.output.weight, self.output.bias)
        return Reading(reader, Network(*map(_copy, layers)))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


class _Fit:
    """Training of a model on one fold by AdamW with a cosine schedule.

    Args:
        known: buffers of `Standard` by side, main first.
    """

    def __init__(
        self, train: Fold, known: Mapping[str, Mapping[str, Tensor]], how: FitSettings, settings: ReadingSettings
    ) -> None:
        self.train, self.known, self.how, self.seed = train, known, how, settings.network.seed
        self.design = train.design(known, how.labels)
        self.epochs = epochs_for(self.design.rows)
        widths = {side: len(buffers["mean_C"]) for side, buffers in known.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.model = _Model(settings, widths, how.labels).to(how.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, fused=True
        )

    def run_epoch(self, epoch: int) -> None:
        """Train on all samples once, in an order that depends on the epoch and the seed."""
        per_epoch = -(-self.design.rows // _BATCH)
        with torch.random.fork_rng(devices=[self.how.device] if self.how.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.seed, epoch))
            for number, index_B in enumerate(torch.randperm(self.design.rows).split(_BATCH)):
                done = (epoch + number / per_epoch) / self.epochs
                self.optimizer.param_groups[0]["lr"] = _LEARNING_RATE * (1 + math.cos(math.pi * done)) / 2
                self._step(index_B)

    def _step(self, index_B: Tensor) -> None:
        self.model.train()
        logits_BN, how = self._logits(self.train, self.design, index_B), self.how
        weights = None if how.class_weights is None else how.class_weights.to(how.device)
        targets = self.train.targets[index_B].to(how.device)
        self.optimizer.zero_grad(set_to_none=True)
        how.task.loss(logits_BN, targets, weights).mean().backward()
        self.optimizer.step()

    @torch.no_grad()
    def logits(self, fold: Fold) -> Tensor:
        """Compute the logits (S, N) of a fold."""
        self.model.eval()
        design = fold.design(self.known, self.how.labels)
        blocks = torch.arange(design.rows).split(_EVALUATION_BATCH)
        return torch.cat([self._logits(fold, design, index_B).cpu() for index_B in blocks])

    def _logits(self, fold: Fold, design: Design, index_B: Tensor) -> Tensor:
        """Compute the logits (B, N) of some samples of a fold."""
        assert fold.tokens is not None
        inputs = (design[index_B].float(), *fold.tokens[index_B].values())
        logits_BN: Tensor = self.model(*(tensor.to(self.how.device) for tensor in inputs))
        return logits_BN


def fit_reading(
    train: Fold,
    out: Fold,
    known: Mapping[str, Mapping[str, Tensor]],
    how: FitSettings,
    settings: ReadingSettings,
    advance: Callable[[float], None] = lambda share: None,
) -> Iterator[tuple[Reading, Tensor]]:
    """Train a model; yields after each epoch its parameters, and the logits (S, N) of `out`.

    Args:
        known: buffers of `Standard` by side, main first.
        advance: called with the completed fraction of the work.
    """
    fit = _Fit(train, known, how, settings)
    for epoch in range(fit.epochs):
        advance(epoch / fit.epochs)
        fit.run_epoch(epoch)
        yield fit.model.copy_parameters(), fit.logits(out)
