"""A trained run behind the `mopefuse.inference.predict.Model` protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mopefuse.config.encoder_sides import Comp
from mopefuse.core import device as devices
from mopefuse.modalities.base import to_arguments
from mopefuse.runs.load import load_model
from mopefuse.runs.locate import find_run
from mopefuse.tasks.base import Array


class RunModel:
    """The model of a run or an adapter, on one device.

    Raises:
        CheckpointError: there is no such run or checkpoint, or the encoders are not those that it was trained with.
    """

    def __init__(self, run: Path, checkpoint: str, device: str, *, main: str | None = None, comp: Comp = None) -> None:
        self.device = devices.resolve(device)
        loaded = load_model(find_run(run), checkpoint, self.device, main=main, comp=comp)
        self.fusion, self.precision = loaded.model, loaded.config.train.precision
        self.labels: tuple[str, ...] = tuple(loaded.manifest["labels"])
        self.modalities = tuple(dict.fromkeys(self.fusion.encoder(side).modality for side in self.fusion.reads))
        needed = {self.fusion.encoder(side).modality for side in set(self.fusion.reads) - set(self.fusion.optional_sides)}
        self.optional_modalities = tuple(name for name in self.modalities if name not in needed)
        self.empty_is_missing = loaded.config.data.on_missing != "error"
        self.task = self.fusion.task
        thresholds = loaded.thresholds
        self.thresholds: Sequence[float] = [thresholds] * len(self.labels) if isinstance(thresholds, float) else thresholds

    @torch.no_grad()
    def predict_decoded(self, values: Mapping[str, Sequence[Any]]) -> tuple[Array, list[Any] | None]:
        """Decoded outputs (B, N) and routing; see `mopefuse.inference.predict.Model`."""
        devices.flush_denormals(self.device)
        batch = self.fusion.collate(**to_arguments(values)).to(self.device)
        with devices.autocast(self.precision, self.device):
            output = self.fusion(batch)
        decoded_BN = self.task.decode(output.logits_BN.float().cpu().numpy())
        routing = None if output.routing_BLK is None else output.routing_BLK.float().cpu().tolist()
        return decoded_BN, routing
