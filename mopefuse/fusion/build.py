"""Build a model from a configuration: encoders from their specs, the fusion method by name, new weights from the seed."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

import torch

from mopefuse.config.encoder_sides import is_comp, specs, with_specs
from mopefuse.config.schema import Prompts, RunConfig, build_config
from mopefuse.config.setting_paths import flatten, merge, nest
from mopefuse.core import device as devices
from mopefuse.core import registry
from mopefuse.core.argument_names import python_names
from mopefuse.core.dependencies import out_of_memory
from mopefuse.core.error_codes import ConfigCode, PluginCode, ResourceCode
from mopefuse.core.formatting import size
from mopefuse.data.columns import require_column
from mopefuse.encoders.base import Encoder, check_name, create_encoder, full_spec
from mopefuse.encoders.preprocess import ImagePreprocess
from mopefuse.errors import ConfigError, EncoderError, PluginError, ResourceError, did_you_mean
from mopefuse.fusion.base import Fusion
from mopefuse.modalities import base as modality
from mopefuse.tasks.base import Task, as_task, get_task

if TYPE_CHECKING:
    from typing_extensions import Unpack

SIZES = (
    "prompts.experts prompts.static prompts.dynamic prompts.mapped prompts.condition_tokens prompts.bottleneck head_hidden "
    "comp_tuning.length lora.rank inserted.prompts inserted.images pmf.queries pmf.query_context pmf.fusion_context "
    "pmf.bottleneck cross_attention.queries cross_attention.width flamingo.width flamingo.hidden flamingo.resampled "
    "flamingo.resampler_layers retrieval.width retrieval.landmarks"
).split()
"""Settings that determine the number of parameters of a model."""

_BUILDING = threading.Lock()  # new weights come from the process-wide random generator
MMBT_MEAN, MMBT_STD = (0.46777044, 0.44531429, 0.40661017), (0.12221994, 0.12145835, 0.14380469)


class OtherSettings(TypedDict, total=False):
    """More arguments of `build_fusion`: settings of a recipe by their own name, whole sections as dictionaries."""

    dropout: float  # probability with which prompt values are dropped in training mode, from 0 to below 1
    init: float  # prompts start in U(-init, init)
    condition: Literal["pooled", "tokens"]  # whether mapped prompts come from comp's pooled feature, or its output tokens
    condition_tokens: int  # tokens that comp's output tokens are reduced to; 0: all of them
    bottleneck: int  # width of the mapper's trunk
    mapper_norm: Literal["layer", "batch-frozen"]
    route_stage_starts: bool  # whether the first block of each stage has a dynamic prompt too
    tune: Literal["probe", "prompt", "lora", "full"]  # how encoders are trained with methods except "conditional"
    head_hidden: int  # width of a hidden layer in the head; 0 for a linear head
    head_norm: Literal["layer", "none"]  # whether pooled features are normalised before the head
    head_dropout: float  # probability with which hidden units of the head of "conditional" are dropped in training mode
    head_features: Literal["main", "all", "tokens"]  # what the head takes; "tokens" adds cross-attention to "all" features
    warm_start: Literal["none", "linear", "auto"]  # other than "none": `mopefuse.train` fits the head first
    either: bool  # whether to add a head for samples without the main modality
    compat: Literal["none", "paper", "official"]  # defaults of the papers, or of their released code
    prompts: Mapping[str, Any]
    router: Mapping[str, Any]
    comp_tuning: Mapping[str, Any]
    lora: Mapping[str, Any]
    inserted: Mapping[str, Any]
    pmf: Mapping[str, Any]
    linear: Mapping[str, Any]
    mlp: Mapping[str, Any]
    cross_attention: Mapping[str, Any]
    qmf: Mapping[str, Any]
    flamingo: Mapping[str, Any]
    retrieval: Mapping[str, Any]
    data: Mapping[str, Any]
    train: Mapping[str, Any]


def build_fusion(
    main: str,
    comp: str | Sequence[str] | None = None,
    num_labels: int | None = None,
    *,
    labels: Sequence[str] | None = None,
    task: str | Task = "single-label",
    method: str = "conditional",
    seed: int = 0,
    experts: int | None = None,
    static: int | None = None,
    dynamic: int | None = None,
    mapped: int | None = None,
    film: bool | None = None,
    layers: str | Sequence[int] | None = None,
    gate: Literal["none", "zero"] | None = None,
    **other: Unpack[OtherSettings],
) -> Fusion:
    """Build a fusion model with frozen pretrained encoders: an ordinary `nn.Module`, in evaluation mode, on the CPU.

    ``model.collate`` makes a `Batch` on the CPU; ``model(batch.to(device)).logits`` has shape (B, N), N the number of labels;
    ``model.trainable_parameters()`` are the parameters to optimise. An argument that is None has the default of
    ``mopefuse train``, except that the head starts from random weights instead of fitted ones.

    Args:
        main: spec of the prompted and classified encoder, such as ``timm:vit_base_patch16_224``; see ``mopefuse encoders``.
        comp: spec of the complementary encoder, which conditions the prompts, or a list of several; None or "" for a method
            that reads the main modality alone.
        num_labels: N, the number of logits; may be left out if `labels` are given.
        labels: names of the labels in the order of the logits; saved with the model by `mopefuse.save_adapter`.
        task: what a label is: "single-label" (softmax over the logits), "multi-label" (a sigmoid of each), "regression"
            (numbers), or the task of a `mopefuse.PairDataset`, such as retrieval, whose logits are two embeddings.
        method: name of the fusion method, an entry point of ``mopefuse.fusion``.
        seed: seed of all weights that are not pretrained, 0 to 2**63 - 1; the random state of the caller is not changed.
        experts: prompt experts in each prompted layer, K.
        static, dynamic, mapped: tokens of the static, dynamic and mapped prompt in each prompted layer, P; 0 for none.
        film: also scale and shift the input of the attention in each prompted layer (FiLM).
        layers: the layers of the main encoder to prompt: "all", "last:N", "first:N", "last:1/N", or indices from 0.
        gate: "zero" (prompts have a separate softmax and a gate that starts at 0) or "none" (they share the softmax of
            the tokens).
        other: see `OtherSettings`.

    Raises:
        ConfigError: an argument that does not exist, or a value that is invalid or does not fit the others.
        EncoderError: an encoder that cannot be loaded, or does not suit its side. ResourceError: not enough memory.
    """
    given = {name: value for name, value in locals().items() if name != "other"} | other
    names, count = _label_names(num_labels, labels, as_task(task))
    with python_names():
        model = build_model(_config_of(given), count, as_task(task))
    model.labels = names
    return model


_NO_SETTINGS = {"num_labels", "labels", "task"}


def _label_names(num_labels: int | None, labels: Sequence[str] | None, task: Task) -> tuple[tuple[str, ...], int]:
    """The names of labels, if given, and the number of outputs.

    Raises:
        ConfigError: neither is given, they contradict each other, or they are not names and a number of labels.
    """
    if labels is not None:
        names = () if isinstance(labels, str) else tuple(labels)
        if not names or not all(isinstance(name, str) and name for name in names) or len({*names}) < len(names):
            fix = 'pass labels=["cat", "dog"]'
            raise ConfigError(
                ConfigCode.LABEL_NAMES_NOT_UNIQUE, "labels must be a non-empty list of distinct names", where="labels", fix=fix
            )
        count = task.outputs(names)
        if num_labels not in (None, count):
            what = f"num_labels is {num_labels}, and labels has {len(names)} names"
            raise ConfigError(ConfigCode.NUM_LABELS_CONTRADICTS_LABELS, what, where="num_labels", fix="remove num_labels")
        return names, count
    if not isinstance(num_labels, int) or isinstance(num_labels, bool) or num_labels < 1:
        what = f"num_labels must be a positive integer, got {num_labels!r}"
        raise ConfigError(
            ConfigCode.NUM_LABELS_MISSING, what, where="num_labels", fix="pass num_labels=N, or the names as labels=[...]"
        )
    return (), num_labels


def _config_of(given: Mapping[str, Any]) -> RunConfig:
    """The configuration that the arguments of `build_fusion` describe."""
    known = {*inspect.signature(build_fusion).parameters, *OtherSettings.__annotations__} - {"other"}
    # it is `mopefuse.train` that fits the initial weights; and torch.compile cannot drop patches
    values: dict[str, Any] = {"warm_start": "none", "prompts": {"token_dropout": 0.0}}
    names: dict[str, str] = {}
    for name, value in given.items():
        if name not in known:
            fix = did_you_mean(name, known)
            raise ConfigError(ConfigCode.UNKNOWN_ARGUMENT, f"build_fusion has no argument {name!r}", where=name, fix=fix)
        if name in _NO_SETTINGS or value is None:
            continue
        path = f"prompts.{name}" if name in Prompts.model_fields else name
        names[path] = name
        values = merge(values, nest(path, dict(value) if isinstance(value, Mapping) else value))
    return build_config(values, source="build_fusion", names=names)


def build_model(
    config: RunConfig,
    num_labels: int,
    task: Task | None = None,
    *,
    method: type[Fusion] | None = None,
    encoders: Mapping[str, Encoder] | None = None,
) -> Fusion:
    """Build the model of a run, in evaluation mode: the same seed gives the same weights, regardless of the caller's
    random generators.

    Args:
        num_labels: N, the number of logits. task: default single-label. method: default the registered one that `config`
            names. encoders: frozen encoders to share with other models, by side; None loads those that `config` names.
    """
    method = method or _method(config, task)
    with _BUILDING, torch.random.fork_rng(devices=[]):
        encoders = encoders or {side: _load_encoder(config, side) for side in method.sides(config)}
        if method.whole_images:
            _stretch_images(encoders["main"])
        torch.default_generator.manual_seed(config.seed)
        _require_memory(config, method, encoders)
        try:
            model = cast(Fusion, cast(Any, method)(config, encoders, num_labels))
        except (RuntimeError, MemoryError) as error:
            if (needed := out_of_memory(error)) is None:
                raise
            raise _too_large(config, needed) from None
    model.num_labels, model.task = num_labels, task or model.task
    return model.eval()


def _stretch_images(encoder: Encoder) -> None:
    """Let an encoder see whole images, stretched to its input size, so that each pixel of a mask has a token."""
    if isinstance(encoder.preprocess, ImagePreprocess):
        encoder.preprocess = replace(encoder.preprocess, resize=encoder.preprocess.size)


def load_encoder(config: RunConfig, side: str) -> Encoder:
    """The frozen encoder of one side, as `build_model` loads it."""
    with _BUILDING, torch.random.fork_rng(devices=[]):
        return _load_encoder(config, side)


def _load_encoder(config: RunConfig, side: str) -> Encoder:
    torch.default_generator.manual_seed(config.seed)
    with _named(side):
        encoder = create_encoder(specs(config)[side])
    if config.data.image_stats == "mmbt" and isinstance(encoder.preprocess, ImagePreprocess):
        encoder.preprocess = replace(encoder.preprocess, mean=MMBT_MEAN, std=MMBT_STD)
    encoder.recompute = config.train.checkpoint_activations
    _require_declared(side, encoder)
    return encoder


def _require_memory(config: RunConfig, method: type[Fusion], encoders: Mapping[str, Encoder]) -> None:
    """Refuse prompt experts that do not fit into free memory: the system might grant it, and kill the process on first use.

    Raises:
        ResourceError: the experts alone take more bytes than are free.
    """
    if "prompts" not in method.sections or "main" not in encoders:
        return
    dynamic = 6 if config.prompts.dynamic is None else config.prompts.dynamic
    needed = 4 * config.prompts.experts * dynamic * sum(encoders["main"].widths)
    free = devices.free_memory(torch.device("cpu"))
    if free is not None and needed > free:
        raise _too_large(config, f": {size(needed)} are needed, {size(free)} are free")


def _too_large(config: RunConfig, needed: str) -> ResourceError:
    """The error for a model that does not fit into memory, with the settings that make it large."""
    values, usual = (flatten(one.model_dump()) for one in (config, RunConfig(main="", comp="")))
    large = [f"{path}={values[path]}" for path in SIZES if (values[path] or 0) > (usual[path] or 6)]
    fix = "lower these settings" if large else "free memory, or use a different --method"
    return ResourceError(ResourceCode.MODEL_TOO_LARGE, f"no memory for the model{needed}", where=", ".join(large), fix=fix)


def check_names(config: RunConfig) -> None:
    """Refuse a method or an encoder that does not exist, before data are read, which can take minutes.

    Raises:
        ConfigError: no such method, or not the spec of an encoder. EncoderError: no such encoder, checked only locally.
        PluginError: the plugin that provides one of them cannot be used.
    """
    task = None if config.data.task is None else get_task(config.data.task)
    for side in _method(config, task).sides(config):
        with _named(side):
            check_name(specs(config)[side])


def _method(config: RunConfig, task: Task | None = None) -> Any:
    """The class of the fusion method, a subclass of `Fusion`.

    Raises:
        ConfigError: there is no such method, or it cannot learn the task.
    """
    group = registry.FUSION if task is None else task.methods
    if group != registry.FUSION and not registry.find_candidates(group, config.method):
        registry.load(registry.FUSION, config.method)  # raises if there is no such method for any task
        known = ", ".join(registry.available(group))
        what = f"{config.method} cannot be trained for {task}"
        raise ConfigError(ConfigCode.METHOD_OF_OTHER_TASK, what, where="--method", fix=f"use one of {known}")
    method = registry.load(group, config.method)
    if not (isinstance(method, type) and issubclass(method, Fusion)):
        what = f"the fusion method {config.method!r} is not a subclass of mopefuse.fusion.Fusion"
        raise PluginError(PluginCode.NOT_A_SUBCLASS, what, fix="fix the plugin, or uninstall it")
    return method


@contextmanager
def _named(side: str) -> Iterator[None]:
    """Add the flag of a side to errors about its encoder."""
    flag = "--comp" if is_comp(side) else "--main"
    try:
        yield
    except (ConfigError, EncoderError) as error:
        error.where = ", ".join(part for part in (flag, error.where) if part)
        error.fix = re.sub(r"^write (?=[a-z_]+:)", f"write {flag} ", error.fix)
        raise


def _require_declared(side: str, encoder: Encoder) -> None:
    if encoder.modality not in modality.modality_names():
        what = f"{encoder.spec} reads {encoder.modality}, a modality that is not installed"
        raise ConfigError(
            ConfigCode.ENCODER_MODALITY_NOT_INSTALLED,
            what,
            where=f"--{side}",
            fix="install the plugin that provides it, or use a different encoder",
        )


def require_rows(model: Fusion, modalities: Sequence[str]) -> None:
    """Refuse data without a modality that an encoder of the model reads.

    Args:
        modalities: the modalities of the data set.
    """
    for side in model.reads:
        require_column(str(model.encoder(side).spec), model.encoder(side).modality, modalities, where=f"--{side}")


def full_specs(config: RunConfig) -> RunConfig:
    """`config` with full names in place of aliases of encoders and short names of plugins, as a run records it."""
    config = with_specs(config, {side: str(full_spec(spec)) for side, spec in specs(config).items() if spec})
    return config.model_copy(update={"method": registry.full_name(registry.FUSION, config.method)})
