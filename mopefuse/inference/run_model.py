"""A trained run behind the `mopefuse.inference.predict.Model` protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mopefuse.config.encoder_sides import Comp
from mopefuse.core import cache
from mopefuse.core import device as devices
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.collator import Collator, Requirements
from mopefuse.fusion.retrieval import Towers
from mopefuse.modalities.base import to_arguments
from mopefuse.runs.load import load_model
from mopefuse.runs.locate import find_run
from mopefuse.tasks.base import Array


class RunModel:
    """The model of a run or an adapter, on one device.

    Args:
        main, comp, encoders: see `mopefuse.runs.load.load_model`.

    Raises:
        CheckpointError: there is no such run or checkpoint, or the encoders are not those that it was trained with.
    """

    def __init__(
        self,
        run: Path,
        checkpoint: str = "best",
        device: str = "auto",
        *,
        main: str | None = None,
        comp: Comp = None,
        encoders: Mapping[str, Encoder] | None = None,
    ) -> None:
        self.device = devices.resolve(device)
        loaded = load_model(find_run(run), checkpoint, self.device, main=main, comp=comp, encoders=encoders)
        self.fusion, self.precision = loaded.model, loaded.config.train.precision
        self.labels: tuple[str, ...] = tuple(loaded.manifest["labels"])
        self.modalities = tuple(dict.fromkeys(self.fusion.encoder(side).modality for side in self.fusion.reads))
        needed = {self.fusion.encoder(side).modality for side in set(self.fusion.reads) - set(self.fusion.optional_sides)}
        self.optional_modalities = tuple(name for name in self.modalities if name not in needed)
        self.empty_is_missing = loaded.config.data.on_missing != "error"
        self.task = self.fusion.task
        self.method = loaded.config.method
        thresholds = loaded.thresholds
        self.thresholds: Sequence[float] = [thresholds] * len(self.labels) if isinstance(thresholds, float) else thresholds

    @property
    def collate(self) -> Collator:
        """See `mopefuse.inference.predict.Model`; it holds none of the weights."""
        return self.fusion.collate

    def predict_decoded(self, values: Mapping[str, Sequence[Any]]) -> tuple[Array, list[Any] | None]:
        """Decoded outputs (B, N) and routing; see `mopefuse.inference.predict.Model`."""
        return self.predict_batch(self.collate(**to_arguments(values)))

    @torch.no_grad()
    def predict_batch(self, batch: Batch) -> tuple[Array, list[Any] | None]:
        """See `mopefuse.inference.predict.Model`."""
        devices.flush_denormals(self.device)
        with devices.autocast(self.precision, self.device):
            output = self.fusion(batch.to(self.device))
        decoded_BN = self.task.decode(output.logits_BN.float().cpu().numpy())
        routing = None if output.routing_BLK is None else output.routing_BLK.float().cpu().tolist()
        return decoded_BN, routing

    @cached_property
    def embedding_key(self) -> str:
        """See `mopefuse.inference.predict.Embedder`."""
        return cache.make_key(self.device.type, self.digest)

    @cached_property
    def digest(self) -> str:
        """See `mopefuse.inference.predict.Model`."""
        return digest_of(self.fusion, self.method, self.precision)

    @property
    def scale(self) -> float:
        """The scale of the cosines of a model for retrieval."""
        assert isinstance(self.fusion, Towers), "methods for retrieval"
        return float(self.fusion.scale.detach())

    @torch.no_grad()
    def embed(self, name: str, values: Sequence[Any]) -> NDArray[np.float32]:
        """Embeddings (B, E); see `mopefuse.inference.predict.Embedder`."""
        assert isinstance(self.fusion, Towers), "methods for retrieval"
        side = next(side for side in self.fusion.uses if self.fusion.encoder(side).modality == name)
        devices.flush_denormals(self.device)
        batch = self._batch_of_side(side, values)
        with devices.autocast(self.precision, self.device):
            embedding_BE = self.fusion.directions(side, batch)
        found: NDArray[np.float32] = embedding_BE.float().cpu().numpy()
        return found

    @torch.no_grad()
    def outputs_of_pairs(
        self, values: Mapping[str, Sequence[Any]], places: Mapping[str, NDArray[np.int64]], size: int
    ) -> NDArray[np.float32]:
        """The outputs (P, N) for pairs of some values; a frozen encoder runs once for each value, not for each pair.

        Args:
            values: by modality. places: by modality, the place in `values` of the value of each pair (P,).
            size: pairs in one forward pass.
        """
        devices.flush_denormals(self.device)
        parts = []
        with devices.autocast(self.precision, self.device):
            sides = {side: self._encoded_side(side, values[name]) for side, (name, _) in self.fusion.readers().items()}
            for first in range(0, len(next(iter(places.values()))), size):
                chosen: list[Batch] = []
                for side, batch in sides.items():
                    index_B = torch.from_numpy(places[self.fusion.encoder(side).modality][first : first + size])
                    chosen.append(batch.select(index_B))
                parts.append(self.fusion(_join_sides(chosen)).logits_BN.float().cpu())
        found: NDArray[np.float32] = torch.cat(parts).numpy()
        return found

    def _batch_of_side(self, side: str, values: Sequence[Any]) -> Batch:
        """A batch with the values of one side only."""
        name = self.fusion.encoder(side).modality
        collate = Collator({side: self.fusion.readers()[side]}, Requirements(self.method, {side: name}, (), either_helps=False))
        return collate(**to_arguments({name: values})).to(self.device)

    def _encoded_side(self, side: str, values: Sequence[Any]) -> Batch:
        """A batch with the values of one side, or with their features if its encoder is frozen."""
        batch = self._batch_of_side(side, values)
        if side not in self.fusion.frozen:
            return batch
        if side not in self.fusion.reads_tokens:
            return replace(batch, inputs={}, features={side: self.fusion.pooled_feature(side, batch)})
        pooled_BC, tokens_BLC, mask_BL = self.fusion.feature_and_tokens(side, batch)
        mask_BL = torch.ones(tokens_BLC.shape[:2], dtype=torch.bool, device=self.device) if mask_BL is None else mask_BL
        tokens = {"values_BLC": tokens_BLC, "mask_BL": mask_BL}
        return replace(batch, inputs={}, features={side: pooled_BC}, tokens={side: tokens})


def digest_of(model: Fusion, method: str, precision: str) -> str:
    """Digest of everything that a prediction of a model depends on, except the values and the device."""
    weights = hashlib.sha256()
    for name, tensor in model.trainable_state_dict().items():
        weights.update(name.encode() + tensor.cpu().numpy().tobytes())
    encoders = [f"{encoder.fingerprint()} {encoder.digest()}" for encoder in model.encoders.values()]
    return cache.make_key(method, precision, *encoders, weights.hexdigest())


def _join_sides(batches: Sequence[Batch]) -> Batch:
    """One batch of batches with the same samples, each with other sides."""
    first, *others = batches
    inputs, features, tokens = dict(first.inputs), dict(first.features), dict(first.tokens)
    for batch in others:
        inputs |= batch.inputs
        features |= batch.features
        tokens |= batch.tokens
    return replace(first, inputs=inputs, features=features, tokens=tokens)
