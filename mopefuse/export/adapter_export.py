"""Write an adapter: the trained weights of a model, a few MB, without its frozen encoders.

`mopefuse export --format adapter` takes the model from a run, `save_adapter` from your own training loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mopefuse.config.recipe import to_yaml
from mopefuse.config.schema import RunConfig
from mopefuse.core.argument_names import python_names
from mopefuse.core.artifact import dump_json, publish
from mopefuse.core.atomic_files import check_parent, remove_leftovers
from mopefuse.core.error_codes import ConfigCode, EncoderCode, NumericCode
from mopefuse.core.parameters import count_parameters
from mopefuse.core.tensor_files import write_tensors
from mopefuse.data.columns import sort_modalities
from mopefuse.errors import ConfigError, EncoderError, NumericError
from mopefuse.export.model_card import model_card
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.build import full_specs, load_encoder
from mopefuse.fusion.model_facts import model_facts, unsaved_fingerprints
from mopefuse.inference.bundle import KIND as BUNDLE
from mopefuse.metrics.thresholds import THRESHOLD
from mopefuse.runs import adapter_folder
from mopefuse.runs.locate import get_kind


def save_adapter(
    model: Fusion,
    out: str | Path,
    *,
    labels: Sequence[str] | None = None,
    thresholds: float | Sequence[float] = THRESHOLD,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Save a model that you trained as an adapter, which works wherever a run does: `mopefuse.load`, `mopefuse.load_model`,
    ``mopefuse predict``, ``eval``, ``export``, ``push`` and ``swap-encoder``.

    Args:
        model: from `mopefuse.build_fusion` or `mopefuse.load_model`; it is not changed, even if it is in training mode.
        out: the folder to write, whole or not at all.
        labels: names in the order of the logits; default those that the model was built with.
        thresholds: for "multi-label": the probability from which a label is predicted, one for all labels or one per label.
        metrics: by split, for the model card: ``{"val": {"accuracy": 0.9}}``.
        overwrite: whether to replace an earlier export in `out`.

    Returns:
        The folder.

    Raises:
        ConfigError: `model` is not such a model, no labels or not as many as logits, thresholds that do not fit, or `out` is
            taken.
        EncoderError: the weights of a frozen encoder were changed or converted. NumericError: weights that are not finite.
    """
    if not isinstance(model, Fusion):
        what = f"save_adapter needs a model from build_fusion or load_model, got {type(model).__name__}"
        fix = "pass the result of mopefuse.load_model, or run mopefuse export RUN --format adapter"
        raise ConfigError(ConfigCode.NOT_A_TRAINED_MODEL, what, where="model", fix=fix)
    folder = Path(out)
    remove_leftovers(folder.absolute().parent, folder.name)
    with python_names():
        require_free(folder, overwrite)
    names = _names_of(model, labels)
    each = _thresholds_for(names, thresholds)
    _require_finite(model)
    _require_unchanged_encoders(model)
    config = _saved_config(model, thresholds)
    facts = {
        **model_facts(model, config.method),
        "labels": list(names),
        "task": model.task.facts(),
        "data": {},
        "progress": {"thresholds": each},
        "seed": config.seed,
        "metrics": {split: dict(values) for split, values in (metrics or {}).items()},
        "parameters": {
            "trainable": sum(parameter.numel() for parameter in model.trainable_parameters()),
            "total": count_parameters(model),
        },
    }
    publish(folder, lambda target: write_adapter(target, model, config, facts, name=folder.name), {"kind": adapter_folder.KIND})
    return folder


def write_adapter(
    folder: Path,
    model: Fusion,
    config: RunConfig,
    facts: Mapping[str, Any],
    *,
    name: str,
    half: bool = False,
    command: str = "",
) -> None:
    """Write the files of an adapter.

    Args:
        config: the configuration, without the location of the data. facts: see `mopefuse.runs.check_facts`.
        name: title of the model card. half: whether to store 16-bit floats.
        command: the command that made the adapter, for the model card.

    Raises:
        ConfigError: with `half`, a weight that 16 bits cannot hold.
    """
    state = model.trainable_state_dict()
    if half:
        state = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in state.items()}
        large = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
        if large:
            what = f"{large[0]} has values outside the range of 16-bit floats"
            raise ConfigError(ConfigCode.VALUES_EXCEED_HALF_PRECISION, what, where="--half", fix="remove --half")
    write_tensors(folder / "weights.safetensors", state)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / adapter_folder.FACTS).write_text(dump_json(facts), encoding="utf-8")
    card = model_card(facts, title=name, form="adapter", command=command)
    (folder / "README.md").write_text(card, encoding="utf-8")


def require_free(out: Path, overwrite: bool) -> None:
    """Refuse a folder that is not empty, unless it is an earlier export and may be replaced.

    Raises:
        ConfigError: the folder is not empty, or its parent cannot be written to.
    """
    check_parent(out)
    taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    replaceable = out.is_dir() and get_kind(out) in (BUNDLE, adapter_folder.KIND)
    if taken and not (overwrite and replaceable):
        fix = "choose a different --out" + (", or add --overwrite" if replaceable else "")
        raise ConfigError(ConfigCode.RUN_FOLDER_NOT_EMPTY, f"{out} is not empty", where="--out", fix=fix)


def _names_of(model: Fusion, labels: Sequence[str] | None) -> tuple[str, ...]:
    names = model.labels if labels is None else () if isinstance(labels, str) else tuple(labels)
    if not names:
        fix = "pass labels=[...] to save_adapter or to build_fusion"
        raise ConfigError(
            ConfigCode.MODEL_WITHOUT_LABEL_NAMES, "the model has no names for its labels", where="labels", fix=fix
        )
    if len({*names}) < len(names) or (model.num_labels and model.task.outputs(names) != model.num_labels):
        what = f"{len(names)} label names ({len({*names})} distinct) were given for {model.num_labels} logits"
        raise ConfigError(ConfigCode.LABEL_NAMES_DO_NOT_FIT_MODEL, what, where="labels", fix="pass one name for each logit")
    return names


def _thresholds_for(labels: Sequence[str], thresholds: float | Sequence[float]) -> list[float]:
    """One threshold for each label.

    Raises:
        ConfigError: not one for each, or none between 0 and 1.
    """
    each = [float(thresholds)] * len(labels) if isinstance(thresholds, int | float) else list(map(float, thresholds))
    if len(each) != len(labels) or not all(0 < threshold < 1 for threshold in each):
        what = f"thresholds must be one probability, or one per label ({len(labels)}), got {thresholds!s:.60}"
        raise ConfigError(
            ConfigCode.INVALID_THRESHOLDS,
            what,
            where="thresholds",
            fix="pass values between 0 and 1, or omit thresholds to use 0.5",
        )
    return each


def _saved_config(model: Fusion, thresholds: float | Sequence[float]) -> RunConfig:
    """The configuration that rebuilds the model, with its defaults written out and no location of data."""
    config = full_specs(model.config)
    modalities = sort_modalities({model.encoder(side).modality for side in model.reads})
    data = config.data.model_copy(update={"path": None, "image_roots": (), "modalities": modalities})
    threshold = float(thresholds) if isinstance(thresholds, int | float) else "tuned"
    return config.model_copy(update={"data": data, "train": config.train.model_copy(update={"threshold": threshold})})


def _require_finite(model: Fusion) -> None:
    for name, tensor in model.trainable_state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NumericError(
                NumericCode.SAVED_WEIGHTS_NOT_FINITE,
                f"the weights {name} are not finite",
                where="save_adapter",
                fix="save an earlier state",
            )


def _require_unchanged_encoders(model: Fusion) -> None:
    """Refuse frozen encoders whose weights differ from those that their specs load: such weights would not be saved.

    Each encoder is loaded again for the comparison, one at a time.
    """
    for side, fingerprint in unsaved_fingerprints(model).items():
        spec = str(model.encoder(side).spec)
        if fingerprint != load_encoder(model.config, side).fingerprint():
            what = f"the weights of the {side} encoder are no longer those of {spec}, and an adapter does not contain them"
            fix = "train with tune or comp_tuning to change an encoder, and use autocast in place of model.to(dtype)"
            raise EncoderError(EncoderCode.FROZEN_ENCODER_CHANGED, what, where="save_adapter", fix=fix)
