"""Runs with the same frozen encoders predict together: one forward pass serves rows of all of them.

Adapters enter as keys, values, scales and shifts of the frozen layers, so that rows of one batch may belong to different runs.
psi of the complementary encoders, and the tokens that enter the first prompted layer of an image encoder, are kept by the
content of the value.

Shapes: B rows, C width of a psi.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopefuse.core import device as devices
from mopefuse.core.precision import normalize_feature, to_float32
from mopefuse.encoders.base import Encoder, Inputs, Prefix
from mopefuse.encoders.frozen import encode_pooled
from mopefuse.modalities import base as modality
from mopefuse.serving.engine.adapter_weights import AdapterWeights, PromptWeights
from mopefuse.serving.engine.content_cache import ContentCache
from mopefuse.serving.engine.mixed_head import classify
from mopefuse.serving.engine.mixed_prompts import FamilyPrompts, MixedPrompts, in_families
from mopefuse.serving.engine.resident import Outcome, Resident, Values
from mopefuse.tasks.base import Array


class SharedPair:
    """The frozen encoders of several runs, one of which has the side "main".

    Args:
        encoders: by side, in evaluation mode on `device`. name: tells its entries in `cache` from those of other pairs.
    """

    def __init__(self, encoders: Mapping[str, Encoder], device: torch.device, cache: ContentCache, name: str) -> None:
        self.encoders, self.device, self.cache, self.name = dict(encoders), device, cache, name
        for encoder in encoders.values():
            encoder.is_shared = True

    @torch.inference_mode()
    def run(self, samples: Sequence[tuple[Resident, Values]]) -> list[Outcome]:
        """See `mopefuse.serving.engine.resident.Executor.run`."""
        devices.flush_denormals(self.device)
        kinds: dict[tuple[bool, str], list[int]] = {}
        for number, (resident, _) in enumerate(samples):
            weights = resident.weights
            assert isinstance(weights, AdapterWeights)
            kinds.setdefault((weights.joint_softmax, weights.precision), []).append(number)
        found: dict[int, Outcome] = {}
        for (joint, precision), numbers in kinds.items():
            rows = [samples[number] for number in numbers]
            with devices.autocast(precision, self.device):
                logits, families = self._forward(rows, joint=joint, precision=precision)
            found |= zip(numbers, _outcomes(rows, logits, _routing(families, rows)), strict=True)
        return [found[number] for number in range(len(samples))]

    def _forward(
        self, samples: Sequence[tuple[Resident, Values]], *, joint: bool, precision: str
    ) -> tuple[list[tuple[list[int], Tensor]], list[FamilyPrompts]]:
        """Logits, see `classify`, and prompts of a batch."""
        weights: list[AdapterWeights] = [resident.weights for resident, _ in samples]
        values = [sample for _, sample in samples]
        needed = [side for side in self.encoders if side != "main" and self._reads(weights, side)]
        psi_BC = {side: self._psi(side, values, precision) for side in needed}
        missing = {side: lacking for side in needed if (lacking := self._missing(side, values)) is not None}
        absent = {side: (missing_B, _absent(weights, side, psi_BC[side])) for side, missing_B in missing.items()}
        conditions_BC = {side: normalize_feature(psi) for side, psi in psi_BC.items()}
        for side, (missing_B, value_BC) in absent.items():
            conditions_BC[side] = torch.where(missing_B[:, None], value_BC, conditions_BC[side])
        with torch.autocast(self.device.type, enabled=False):  # a rounding error would change the routing
            families = in_families([one.prompts for one in weights], conditions_BC, self.device)
        prompts = MixedPrompts(families, len(samples), joint=joint)
        main = self.encoders["main"]
        start, inputs = self._start(values, prompts.first_layer, precision)
        encoded = main.encode(inputs, prompts if families else None, start=start)
        pooled = {"main": encoded.pooled_BC, **psi_BC}
        with torch.autocast(self.device.type, enabled=False):
            heads = [one.head for one in weights]
            logits = classify(heads, pooled, absent, encoded.tokens_BLD, encoded.mask_BL)
        return logits, families

    def _reads(self, weights: Sequence[AdapterWeights], side: str) -> bool:
        """Whether the prompts or the head of some row depend on a complementary side."""
        return any(
            side in one.head.shape.sides or (one.prompts is not None and side in one.prompts.shape.conditions)
            for one in weights
        )

    def _inputs(self, side: str, values: Sequence[Any]) -> Inputs:
        """Prepare decoded values for an encoder, as `mopefuse.fusion.collator.Collator` does."""
        encoder = self.encoders[side]
        filled = modality.fill_missing(encoder.modality, values)
        batch = encoder.preprocess.batch([encoder.preprocess.item(value) for value in filled])
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _missing(self, side: str, values: Sequence[Values]) -> Tensor | None:
        lacking = [sample.get(self.encoders[side].modality) is None for sample in values]
        return torch.tensor(lacking, device=self.device) if any(lacking) else None

    def _psi(self, side: str, values: Sequence[Values], precision: str) -> Tensor:
        """Pooled features of a complementary side (B, C), in float32."""
        own = [sample.get(self.encoders[side].modality) for sample in values]
        keys = [(self.name, precision, side, b"" if value is None else value.key) for value in own]

        def compute(positions: list[int]) -> Tensor:
            given = [own[at] for at in positions]
            inputs = self._inputs(side, [None if value is None else value.decoded for value in given])
            return to_float32(encode_pooled(self.encoders[side], inputs))

        return torch.stack(self.cache.get_all(keys, compute))

    def _start(self, values: Sequence[Values], layer: int | None, precision: str) -> tuple[Prefix | None, Inputs]:
        """Where the main encoder starts, and its inputs: at the first prompted layer, if what enters it can be kept."""
        main = self.encoders["main"]
        own = [value for sample in values if (value := sample[main.modality]) is not None]
        assert len(own) == len(values), "requests without the main modality are refused"
        if not layer or not self.cache.limit or not modality.get_modality(main.modality).is_picture:
            return None, self._inputs("main", [value.decoded for value in own])

        def compute(positions: list[int]) -> Tensor:
            inputs = self._inputs("main", [own[at].decoded for at in positions])
            return main.compute_prefix(inputs, layer).tokens_BLD

        tokens = self.cache.get_all([(self.name, precision, layer, value.key) for value in own], compute)
        blank = {name: tensor.to(self.device) for name, tensor in main.blank_inputs(len(own)).items()}
        return Prefix(layer, torch.stack(tokens)), blank


def _absent(weights: Sequence[AdapterWeights], side: str, psi_BC: Tensor) -> Tensor:
    """What replaces the normalised feature of a missing side in each row, (B, C)."""
    zero_C = psi_BC.new_zeros(psi_BC.shape[1])
    return torch.stack([one.absent.get(side, zero_C) for one in weights])


def _routing(families: Sequence[FamilyPrompts], samples: Sequence[tuple[Resident, Values]]) -> list[Array | None]:
    """Weights of the experts of each row (N, K); None without dynamic prompts."""
    found: list[Array | None] = [None] * len(samples)
    for family in families:
        each = None if family.routing_BNK is None else family.routing_BNK.float().cpu().numpy()
        for at, row in enumerate(family.numbers):
            prompts: PromptWeights = samples[row][0].weights.prompts
            if each is not None:
                found[row] = each[at, :, : prompts.router[0].bias_O.shape[1]]
            elif prompts.weighs_one:
                found[row] = np.ones((len(prompts.shape.layers), 1), dtype=np.float32)
    return found


def _outcomes(
    samples: Sequence[tuple[Resident, Values]], logits: Sequence[tuple[list[int], Tensor]], routing: Sequence[Array | None]
) -> list[Outcome]:
    """Decode logits, the rows of each run at once."""
    logits_N = {row: own_N for rows, of_rows in logits for row, own_N in zip(rows, of_rows.float().cpu().numpy(), strict=True)}
    rows_of: dict[Resident, list[int]] = {}
    for row, (resident, _) in enumerate(samples):
        rows_of.setdefault(resident, []).append(row)
    found: dict[int, Outcome] = {}
    for resident, rows in rows_of.items():
        count = resident.weights.head.linear.bias_O.shape[0]
        decoded_BN = resident.model.task.decode(np.stack([logits_N[row][:count] for row in rows]))
        found |= {row: Outcome(decoded, routing[row]) for row, decoded in zip(rows, decoded_BN, strict=True)}
    return [found[row] for row in range(len(samples))]
