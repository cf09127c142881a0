"""What a run would train, and the preparation that planning and training share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from mopefuse.config.schema import RunConfig
from mopefuse.core import device as devices
from mopefuse.core import distributed
from mopefuse.core.error_codes import DataCode
from mopefuse.core.formatting import several
from mopefuse.core.parameters import count_parameters
from mopefuse.data.base import Batch, DataSet, Split
from mopefuse.data.collate import Samples
from mopefuse.data.labels_task import describe_task
from mopefuse.data.load import load_data
from mopefuse.errors import DataError
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.build import build_model, check_names, full_specs, require_rows
from mopefuse.modalities.base import get_modality
from mopefuse.tasks.base import Task
from mopefuse.training.listener import Listener
from mopefuse.training.losses import task_loss
from mopefuse.training.notices import likely_mistakes
from mopefuse.training.optimizer import with_learning_rates
from mopefuse.training.run_facts import run_facts
from mopefuse.training.sharding import build_sharded
from mopefuse.training.start_layer import require_prefixes


@dataclass(frozen=True)
class Prepared:
    """What a run trains: the resolved configuration, the data, and the model before training."""

    config: RunConfig
    data: DataSet
    model: Fusion

    def facts(self) -> dict[str, Any]:
        """The facts for the manifest of the run."""
        return run_facts(self.config, self.data, self.model)

    def warn(self, listener: Listener) -> None:
        """Report likely mistakes in the configuration."""
        for text in likely_mistakes(self.config, self.data, self.model):
            listener.on_notice(text)


@dataclass(frozen=True)
class Plan:
    """What a run would train; nothing is trained or written.

    Args:
        rows: number of rows of each split.
        encoders, preprocess: spec, and image size or maximum number of tokens, by side.
        trainable: number of trainable parameters of each part of the model.
        total: number of all parameters.
        memory: estimated bytes of one training step.
    """

    config: RunConfig
    rows: dict[str, int]
    labels: tuple[str, ...]
    task: Task
    encoders: dict[str, str]
    preprocess: dict[str, dict[str, Any]]
    trainable: dict[str, int]
    total: int
    memory: int

    @property
    def share(self) -> float:
        """Trainable parameters over all parameters."""
        return sum(self.trainable.values()) / self.total


def plan(config: RunConfig, listener: Listener | None = None) -> Plan:
    """Prepare a run as training does, and count its rows and parameters.

    Raises:
        MopefuseError: any error that training raises before its first step.
    """
    listener = listener or Listener()
    prepared = prepare(config, listener)
    prepared.warn(listener)
    data, model = prepared.data, prepared.model
    if prepared.config.data.cache_prefix == "on":
        require_prefixes(model, data, prepared.config, torch.device("cpu"))
    return Plan(
        config=prepared.config,
        rows={name: len(split.rows) for name, split in data.splits.items()},
        labels=data.labels,
        task=data.task,
        encoders={side: str(model.encoder(side).spec) for side in model.uses},
        preprocess={side: model.encoder(side).preprocess.describe() for side in model.uses},
        trainable=model.breakdown(),
        total=count_parameters(model),
        memory=estimate_memory(model, data, prepared.config),
    )


def prepare(config: RunConfig, listener: Listener, device: torch.device | None = None) -> Prepared:
    """Read the data, build the model, and resolve the defaults that depend on them.

    Args:
        device: the device that the model is moved to.

    Raises:
        MopefuseError: an unknown method or encoder, bad data, or a model that does not suit the data.
    """
    check_names(config)  # before reading data, which can take minutes
    data = _load(config, listener)
    data = replace(data, task=data.task.fitted(data.sparse_targets("train"), config))
    data.task.selecting_metric(config.train.select_by)  # raises if there is no such metric
    config = _with_facts(config, data)
    model = build_sharded(lambda: build_model(config, data.outputs, data.task), config, device, listener)
    _require_rows(model, data)
    if device is not None:
        devices.move_to_device(model, device)
    model.config = resolve_defaults(config, model)
    return Prepared(config=model.config, data=data, model=model)


def resolve_defaults(config: RunConfig, model: Fusion) -> RunConfig:
    """`config` with every default that depends on the encoders replaced by its value."""
    modality_of = {side: model.encoder(side).modality for side in model.uses}
    tuned = [side for side in model.uses if model.encoder(side).tuned]
    config = full_specs(model.resolve(config, model.encoders))
    return with_learning_rates(config, modality_of, tuned, fitted=model.starts_fitted)


def _load(config: RunConfig, listener: Listener) -> DataSet:
    advance = partial(listener.on_data_progress, "checking files")
    if distributed.world_size() > 1:  # one process of each machine checks the files; the others then use its index
        distributed.run_on_each_node(lambda: load_data(config.data, advance=advance))
    data = load_data(config.data, advance=advance)
    listener.on_task(describe_task(data.task, data.labels, config.data))
    for text in data.notices:
        listener.on_notice(text)
    return data


def _with_facts(config: RunConfig, data: DataSet) -> RunConfig:
    """`config` with the task and the modalities of the data, so that a plugin installed later adds none to the run."""
    found = {"modalities": data.modalities, "task": data.task.name}
    return config.model_copy(update={"data": config.data.model_copy(update=found)})


def _require_rows(model: Fusion, data: DataSet) -> None:
    """Refuse data that lack a modality that the model needs, before anything is computed."""
    require_rows(model, data.modalities)
    for name, split in data.splits.items():
        missing = {side: split.is_missing(modality) for side, (modality, _) in model.readers().items()}
        model.require_modalities({side: missing_S for side, missing_S in missing.items() if missing_S.any()}, where=name)
    if data.task.label_kind == "pair":
        _require_distinct_values(model, data.splits["train"])


def _require_distinct_values(model: Fusion, train: Split) -> None:
    """Refuse pairs of which one side always has the same value, so that nothing can be searched."""
    for modality, _ in model.readers().values():
        distinct = len(np.unique(train.loose_keys[modality][~train.is_missing(modality)]))
        if distinct < 2:
            count = several(distinct, f"distinct {modality}", f"distinct {get_modality(modality).plural}")
            what = f"train has {count}, and a search needs at least two"
            raise DataError(DataCode.ONE_CLASS, what, where=train.file, fix=f"add rows with another {modality}")


def estimate_memory(model: Fusion, data: DataSet, config: RunConfig) -> int:
    """Estimated bytes of one training step on one process: weights, gradients, AdamW's state, and activations.

    Activations are those that the forward pass of the sample with the longest text saves for backward, times the samples
    of a batch that one process computes at once.
    """
    batch = _longest_sample(model, data, config)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        task_loss(model(batch), batch, data.task)
    samples = config.train.batch_size / config.train.accumulate / distributed.world_size()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trainable = sum(parameter.numel() * parameter.element_size() for parameter in model.trainable_parameters())
    return int(size + 3 * trainable + sum(saved.values()) * samples)


def _longest_sample(model: Fusion, data: DataSet, config: RunConfig) -> Batch:
    """A batch of one: the training sample with the longest text."""
    samples = Samples(data, "train", model.readers(), config.data, seed=config.seed)
    in_rows = [name for name in data.modalities if not get_modality(name).is_file]
    lengths = [sum(len(row.values[name] or "") for name in in_rows) for row in data.splits["train"].rows]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    return next(samples.batches([[(0, longest)]]))
