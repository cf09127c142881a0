"""Checks that every fusion method must pass; `mopefuse.testing.fusion` lists the claims.

Shapes: B batch, N labels, L routed layers, K experts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopefuse.config.schema import RunConfig
from mopefuse.core.precision import normalize_feature
from mopefuse.data.base import Batch
from mopefuse.encoders.frozen import encode_pooled, encode_tokens
from mopefuse.errors import DataError
from mopefuse.fusion.base import Fusion, Output
from mopefuse.fusion.build import build_model
from mopefuse.modalities.base import get_modality, to_arguments
from mopefuse.testing.encoder_checks import TOLERANCE

NUM_LABELS = 3
_LARGEST = 10_000_000  # bytes of a pickled collator, tokenizers of several MB included


class FusionChecks:
    """One method, one model of it, and one batch."""

    def __init__(self, method: type[Fusion], config: RunConfig, samples: Mapping[str, Sequence[Any]] | None) -> None:
        self.method, self.config = method, config
        self.model = self.build()
        self.modalities = tuple(dict.fromkeys(modality for modality, _ in self.model.readers().values()))
        self.values = _examples(self.modalities) if samples is None else {name: [*values] for name, values in samples.items()}
        self.count = len(next(iter(self.values.values())))
        assert self.count >= 2, self.message("needs at least two samples: one alone cannot leak into another")

    def build(self, **data: Any) -> Fusion:
        """A fresh model, always with the same weights; `data` are settings of its section `data`."""
        section = self.config.data.model_copy(update=data)
        return build_model(self.config.model_copy(update={"data": section}), NUM_LABELS, method=self.method)

    def message(self, what: str) -> str:
        """Describe a fault, naming the method."""
        return f"{self.config.method}: {what}"

    def batch(self, model: Fusion, values: Mapping[str, Sequence[Any]] | None = None) -> Batch:
        """A batch of the samples, or of `values`."""
        return model.collate(**to_arguments(values or self.values))

    def output(self) -> None:
        """Types and shapes of `Output`."""
        self.run_and_check(self.model, self.batch(self.model))

    def run_and_check(self, model: Fusion, batch: Batch) -> Tensor:
        """The logits (B, N) of a batch, without gradients, after a check of the output."""
        with torch.no_grad():
            output = model(batch)
        assert isinstance(output, Output), self.message(f"forward() returns a {type(output).__name__}, expected an Output")
        shape, need = tuple(output.logits_BN.shape), (len(batch.index), NUM_LABELS)
        assert shape == need, self.message(f"logits have the shape {shape}, expected {need}")
        assert output.logits_BN.isfinite().all(), self.message("logits are not finite")
        if (routing_BLK := output.routing_BLK) is not None:
            assert routing_BLK.dim() == 3 and len(routing_BLK) == len(batch.index), self.message(
                f"routing has the shape {tuple(routing_BLK.shape)}, expected (samples, layers, experts)"
            )
            assert torch.allclose(routing_BLK.sum(dim=-1), torch.ones(()), atol=1e-3), self.message(
                "routing weights of a layer do not add up to 1"
            )
        return output.logits_BN

    def deterministic(self) -> None:
        """A second call gives the same logits, even with training mode in between."""
        batch = self.batch(self.model)
        first = self.run_and_check(self.model, batch)
        self.model.train().eval()
        assert torch.equal(first, self.run_and_check(self.model, batch)), self.message(
            "in evaluation mode, the same batch gives different logits the second time"
        )

    def keeps_no_state(self) -> None:
        """Modules that are not part of an encoder have the same attributes after a call."""
        before = {name: dict(vars(module)) for name, module in self._own_modules(self.model)}
        self.run_and_check(self.model, self.batch(self.model))
        for name, module in self._own_modules(self.model):
            changed = [key for key, value in vars(module).items() if before[name].get(key, module) is not value]
            place = name or "the model"
            assert not changed, self.message(f"forward() sets {changed[0]} of {place}, which threads would share")

    def _own_modules(self, model: Fusion) -> list[tuple[str, nn.Module]]:
        return [(name, module) for name, module in model.named_modules() if name.partition(".")[0] not in model.uses]

    def samples_are_independent(self) -> None:
        """Logits of a sample by itself and within the batch."""
        together = self.run_and_check(self.model, self.batch(self.model))
        for index in range(self.count):
            alone = {name: values[index : index + 1] for name, values in self.values.items()}
            what = f"logits of sample {index} depend on the rest of its batch"
            self.close(together[index], self.run_and_check(self.model, self.batch(self.model, alone))[0], what)

    def gradients(self) -> None:
        """In training mode, every trainable parameter gets a finite gradient, and no other parameter gets one."""
        model = self.build().train()
        trainable = model.named_trainable_parameters()
        assert trainable, self.message("has no trainable parameter")
        trainable_names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        mismatched = sorted(trainable_names ^ trainable.keys())
        assert not mismatched, self.message(
            f"requires_grad of {mismatched[0]} is {mismatched[0] in trainable_names}, but is_trainable() disagrees"
        )
        self.loss(model, self.batch(model)).backward()
        for name, parameter in model.named_parameters():
            if name not in trainable:
                assert parameter.grad is None, self.message(f"the frozen parameter {name} gets a gradient")
            elif not model.closed_form:
                assert parameter.grad is not None, self.message(f"the trainable parameter {name} gets no gradient")
                assert parameter.grad.isfinite().all(), self.message(f"the gradient of {name} is not finite")

    def loss(self, model: Fusion, batch: Batch) -> Tensor:
        """A scalar that depends on all that the method returns for training."""
        output = model(batch)
        loss: Tensor = output.logits_BN.square().sum()
        return loss if output.alone_BN is None else loss + output.alone_BN.square().sum()

    def cached_features(self) -> None:
        """Logits from features of the frozen sides, without their inputs."""
        model = self.model
        assert set(model.frozen) <= set(model.uses), self.message(f"frozen is {model.frozen}, expected sides in {model.uses}")
        batch = self.batch(model)
        features = {side: encode_pooled(model.encoder(side), batch.inputs[side]) for side in model.frozen}
        inputs = {side: own for side, own in batch.inputs.items() if side not in features}
        tokens = {side: self._tokens(side, batch) for side in model.reads_tokens}
        found = self.run_and_check(model, Batch(inputs, features, None, batch.index, batch.missing, tokens=tokens))
        self.close(found, self.run_and_check(model, batch), "features that were computed earlier give different logits")

    def _tokens(self, side: str, batch: Batch) -> dict[str, Tensor]:
        """The output tokens of a side as a batch has them, with one position of padding more."""
        each = [normalize_feature(one_LC) for one_LC in encode_tokens(self.model.encoder(side), batch.inputs[side])]
        each = [F.pad(one_LC, (0, 0, 0, 1 + max(map(len, each)) - len(one_LC))) for one_LC in each]
        values_BLC = torch.stack(each)
        return {"values_BLC": values_BLC, "mask_BL": values_BLC.any(dim=-1)}

    def cached_prefixes(self) -> None:
        """Logits from tokens that enter a later layer, with blank inputs where these have no mask."""
        model = self.model
        batch = self.batch(model)
        wanted = self.run_and_check(model, batch)
        prefixes, inputs = {}, dict(batch.inputs)
        for side, layer in model.prefix_layers.items():
            prefixes[side] = model.encoder(side).compute_prefix(batch.inputs[side], layer).tokens_BLD
            if "mask" not in inputs[side]:
                inputs[side] = model.encoder(side).blank_inputs(self.count)
        found = self.run_and_check(model, replace(batch, inputs=inputs, prefixes=prefixes))
        self.close(found, wanted, "what was computed earlier for prefix_layers gives different logits")

    def state_round_trip(self) -> None:
        """After a training step, the state can be loaded into a fresh model, which then gives the same logits."""
        model = self.build().train()
        optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
        self.loss(model, self.batch(model)).backward()
        torch.nn.utils.clip_grad_norm_(model.trainable_parameters(), 1.0)
        optimizer.step()
        other = self.build()
        other.load_trainable_state_dict(model.trainable_state_dict(), where=self.config.method)
        batch = self.batch(other)
        wanted, found = self.run_and_check(model.eval(), batch), self.run_and_check(other, batch)
        assert torch.equal(wanted, found), self.message("a fresh model with the saved state gives different logits")

    def copies(self) -> None:
        """A deep copy gives the same logits, and the collator can be sent to data workers."""
        batch = self.batch(self.model)
        copied = self.run_and_check(copy.deepcopy(self.model), batch)
        assert torch.equal(copied, self.run_and_check(self.model, batch)), self.message("a deep copy gives different logits")
        size = len(ForkingPickler.dumps(self.model.collate))
        assert size <= _LARGEST, self.message(f"the pickled collator has {size:,} bytes: it seems to hold weights")

    def missing_is_refused(self) -> None:
        """A sample without what the method needs is a DataError when a batch is made."""
        model = self.model
        needed = {modality for side, (modality, _) in model.readers().items() if side not in model.droppable_sides}
        for modality in sorted(needed):
            try:
                self.batch(model, self._without(modality))
            except DataError:
                continue
            raise AssertionError(self.message(f"accepts a sample without {modality}, which is not declared optional"))

    def missing_is_handled(self) -> None:
        """A sample without a modality that it may lack gets finite logits, and does not change the others."""
        model = self.build(on_missing="absent")
        optional = {modality for side, (modality, _) in model.readers().items() if side in model.droppable_sides}
        required = {modality for side, (modality, _) in model.readers().items() if side not in model.droppable_sides}
        for modality in sorted(optional - required) if len(self.modalities) > 1 else ():
            batch = self.batch(model, self._without(modality))
            whole, found = self.run_and_check(model, self.batch(model)), self.run_and_check(model, batch)
            self.close(found[1:], whole[1:], f"a sample without {modality} changes the logits of others")
            if not model.closed_form:
                self._absence_is_learned(model, batch, modality)

    def _absence_is_learned(self, model: Fusion, batch: Batch, modality: str) -> None:
        model.zero_grad()
        self.loss(model, batch).backward()
        for side in (side for side in model.absent if model.encoder(side).modality == modality):
            gradient = model.absent[side].grad
            assert gradient is not None, self.message(
                f"learns what stands in for a missing {side} value (absent.{side}), and does not use it"
            )

    def _without(self, modality: str) -> dict[str, list[Any]]:
        """The samples, without one modality of the first."""
        return {name: [None, *values[1:]] if name == modality else [*values] for name, values in self.values.items()}

    def close(self, left: Tensor, right: Tensor, fault: str) -> None:
        """Require values that differ by rounding alone."""
        apart, scale = float((left - right).abs().max()), max(1.0, float(right.abs().max()))
        assert apart <= TOLERANCE * scale, self.message(f"{fault}: they differ by {apart:.2e}, values up to {scale:.2g}")


def _examples(modalities: Sequence[str]) -> dict[str, list[Any]]:
    """Examples of each modality, the same number of each."""
    examples = {name: get_modality(name).examples() for name in modalities}
    count = min(map(len, examples.values()))
    return {name: [*values[:count]] for name, values in examples.items()}
