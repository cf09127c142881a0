"""Change an encoder, the data or both of a trained run, and keep what was learned (`mopefuse.training.transfer_weights`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mopefuse.config.encoder_sides import Comp, specs_by_side, with_specs
from mopefuse.config.schema import RunConfig, build_config
from mopefuse.config.setting_paths import merge
from mopefuse.core import distributed
from mopefuse.core.artifact import dump_json
from mopefuse.core.atomic_files import write_atomically
from mopefuse.core.error_codes import ConfigCode
from mopefuse.data.load import load_data
from mopefuse.encoders.base import full_spec
from mopefuse.errors import ConfigError
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.build import build_model, check_names
from mopefuse.runs.folder import RunFolder
from mopefuse.runs.load import Loaded, load_model, with_data_path
from mopefuse.runs.locate import find_run
from mopefuse.tasks.base import task_from_facts
from mopefuse.training.listener import Listener
from mopefuse.training.plan import resolve_defaults
from mopefuse.training.train import train
from mopefuse.training.trainer import Start
from mopefuse.training.transfer_weights import Transferred, transfer_weights

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Swap:
    """What a swap kept, and its effect on the metrics.

    Args:
        metrics: on validation and test, "before" the swap, "after" it without training, "tuned", and trained from "scratch"
            for as many epochs; those that were measured.
        encoders: specs of the new model, by side.
    """

    transferred: tuple[Transferred, ...]
    metrics: dict[str, dict[str, dict[str, float] | None]]
    encoders: dict[str, str]

    @property
    def share_kept(self) -> float:
        """The share of the new model's trainable values that come from the trained run."""
        total = sum(math.prod(entry.shape) for entry in self.transferred)
        return sum(entry.kept for entry in self.transferred) / max(1, total)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in ``swap.json``."""
        return {
            "encoders": self.encoders,
            "share_kept": self.share_kept,
            "tensors": [{**entry._asdict(), "shape": list(entry.shape)} for entry in self.transferred],
            "metrics": self.metrics,
        }


def swap_encoder(
    run: Path,
    out: Path,
    *,
    main: str | None = None,
    comp: Comp = None,
    data: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    epochs: int = 0,
    warm_up: int = 0,
    scratch: bool = True,
    listener: Listener | None = None,
) -> Swap:
    """Make a new run in `out` from a trained one, with another encoder, other data, or both.

    Args:
        main, comp: specs of the new encoders; None keeps an encoder. With several complementary encoders, ``2=SPEC`` or
            ``text=SPEC`` selects one by position or by modality.
        data: another data set, possibly with other labels.
        settings: other settings of the new run, nested.
        epochs: number of tuning epochs; 0 leaves the swapped model untrained.
        warm_up: number of initial epochs in which only new parameters are trained.
        scratch: with `epochs`, also train a model from scratch for as many, into ``<out>-scratch``, for comparison.

    Raises:
        ConfigError: nothing is swapped, or `out` is not empty. EncoderError: an encoder that cannot be used on its side.
    """
    if main is None and not comp and data is None:
        fix = "add --main SPEC, --comp SPEC or --data DIR"
        raise ConfigError(ConfigCode.NOTHING_TO_SWAP, "no new encoder or data was given", where="swap-encoder", fix=fix)
    _require_enough_epochs(warm_up, epochs)
    listener = listener or Listener()
    with distributed.process_group():
        distributed.run_on_main(lambda: RunFolder(out).prepare(resume=False, overwrite=False, fix="choose a different --out"))
        # 1. The trained model, and the new one before training.
        source = find_run(run)
        old = load_model(source, "best", CPU)
        _require_trained_by_steps(old, run)
        modality_of = {side: old.model.encoder(side).modality for side in old.model.uses}
        new_specs = specs_by_side(main, comp, modality_of)
        config = _new_config(old, new_specs, data=data, settings=settings or {}, epochs=epochs)
        model, labels = _new_model(config)
        for side in new_specs:
            before, now = modality_of[side], model.encoder(side).modality
            if before != now:
                listener.on_notice(f"the new {side} encoder takes {now} input, but the old one takes {before}")
        # 2. The weights that the new model inherits.
        state, transferred = transfer_weights(old.model, model, old.manifest["labels"], labels)
        start = Start(state, tuple(entry.name for entry in transferred if entry.origin == "new"), warm_up)
        # 3. Training, and what it is compared with.
        known = source.result().get("metrics") if data is None else None
        metrics = {"before": known} if known else {}
        metrics |= _train_and_compare(config, out, start, epochs, scratch=scratch, listener=listener)
        encoders = {side: str(model.encoder(side).spec) for side in model.uses}
        swap = Swap(transferred=tuple(transferred), metrics=metrics, encoders=encoders)
        facts = dump_json({"from": str(run), **swap.as_dict()})
        distributed.run_on_main(lambda: write_atomically(out / "swap.json", facts))
        return swap


def _require_enough_epochs(warm_up: int, epochs: int) -> None:
    if not 0 <= warm_up <= epochs:
        what = f"--warm-up is {warm_up} epochs, but --epochs only {epochs}"
        raise ConfigError(ConfigCode.WARM_UP_TOO_LONG, what, where="--warm-up", fix="raise --epochs")


def _require_trained_by_steps(old: Loaded, run: Path) -> None:
    if old.model.closed_form:
        what = f"{old.config.method} is always refitted from scratch"
        raise ConfigError(ConfigCode.METHOD_CANNOT_SWAP, what, where=str(run), fix="use mopefuse train")
    if old.model.task.compares_samples:
        what = f"the embeddings of {old.model.task} belong to both encoders, so nothing could be kept"
        raise ConfigError(ConfigCode.METHOD_CANNOT_SWAP, what, where=str(run), fix="use mopefuse train")


def _new_model(config: RunConfig) -> tuple[Fusion, tuple[str, ...]]:
    """The new model before training, and the labels of its data."""
    check_names(config)
    labels, facts = distributed.run_on_main(lambda: _labels_and_task(config))
    task = task_from_facts(facts)
    return build_model(config, task.outputs(labels), task), labels


def _labels_and_task(config: RunConfig) -> tuple[tuple[str, ...], dict[str, Any]]:
    data = load_data(config.data)
    return data.labels, data.task.fitted(data.sparse_targets("train"), config).facts()


def _train_and_compare(
    config: RunConfig, out: Path, start: Start, epochs: int, *, scratch: bool, listener: Listener
) -> dict[str, Any]:
    """Train the new run; its metrics "after" the swap, "tuned" and from "scratch"."""
    result = train(config, out, listener=listener, start=start)
    first = next(line for line in RunFolder(out).read_log() if "val" in line)
    metrics = {"after": {"val": first["val"], "test": None if epochs else result["metrics"]["test"]}}
    if epochs:
        metrics["tuned"] = result["metrics"]
    if epochs and scratch:
        metrics["scratch"] = train(config, out.with_name(f"{out.name}-scratch"), listener=listener)["metrics"]
    return metrics


def _new_config(
    old: Loaded, new_specs: Mapping[str, str], *, data: Path | None, settings: Mapping[str, Any], epochs: int
) -> RunConfig:
    for side in new_specs:
        if side not in old.model.uses:
            what = f"{old.config.method} has no {side} encoder"
            raise ConfigError(ConfigCode.NO_SUCH_SIDE, what, where=f"--{side}", fix="swap the other encoder")
    config = with_specs(old.config, {side: str(full_spec(spec)) for side, spec in new_specs.items()})
    values = config.model_dump(mode="json")
    if new_specs:
        for section, key in _derived_settings(config, old.model):
            values[section][key] = None
    values["data"] = with_data_path(config.data, data).model_dump(mode="json")
    if values["data"]["cache_prefix"] == "on":
        values["data"]["cache_prefix"] = "auto"
    values["train"] |= {"epochs": epochs, "max_steps": None}
    return build_config(merge(values, dict(settings)))


def _derived_settings(config: RunConfig, model: Fusion) -> list[tuple[str, str]]:
    """The settings whose values were derived from the encoders, to be derived again from the new ones."""
    derived = []
    candidates = [("prompts", "init"), ("pmf", "bottleneck"), ("router", "lr_factor")]
    candidates += [("train", "lr"), ("train", "lr_comp"), ("train", "lr_head")]
    if config.prompts.token_dropout:  # 0 is valid with any encoder
        candidates.append(("prompts", "token_dropout"))
    for section, key in candidates:
        saved = getattr(config, section)
        blank = config.model_copy(update={section: saved.model_copy(update={key: None})})
        if getattr(getattr(resolve_defaults(blank, model), section), key) == getattr(saved, key):
            derived.append((section, key))
    return derived
