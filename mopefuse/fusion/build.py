"""A configuration to a model: encoders by their specs, the fusion method by its name, all weights by the seed."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch

from mopefuse.config.schema import Prompts, RunConfig, build_config
from mopefuse.config.setting_paths import flat, merge
from mopefuse.config.sides import is_comp, specs, with_specs
from mopefuse.core import device as devices
from mopefuse.core import registry
from mopefuse.core.dependencies import out_of_memory
from mopefuse.core.formatting import size
from mopefuse.data.columns import require_column
from mopefuse.encoders.base import Encoder, check_name, create_encoder, full_spec
from mopefuse.encoders.preprocess import ImagePreprocess
from mopefuse.errors import ConfigError, EncoderError, PluginError, ResourceError
from mopefuse.fusion.base import Fusion
from mopefuse.modalities import base as modality

SIZES = (
    "prompts.experts prompts.static prompts.dynamic prompts.mapped prompts.bottleneck head_hidden comp_tuning.length lora.rank "
    "inserted.prompts inserted.images pmf.queries pmf.query_context pmf.fusion_context pmf.bottleneck"
).split()
"""Settings that decide how many parameters a model has."""

_BUILDING = threading.Lock()  # weights are drawn from the one generator of the process
MMBT_MEAN, MMBT_STD = (0.46777044, 0.44531429, 0.40661017), (0.12221994, 0.12145835, 0.14380469)


def build_fusion(
    main: str, comp: str | Sequence[str], num_labels: int, *, method: str = "conditional", seed: int = 0, **options: Any
) -> Fusion:
    """An ordinary `nn.Module` with frozen encoders, for anyone's training loop.

    ``model.collate(images, texts)`` (other modalities by name) gives a batch, ``model(batch).logits`` has shape
    (B, num_labels), and ``model.ours()`` are the parameters to train.

    Args:
        main, comp: encoder specs; of several complementary encoders a list.
        options: settings of the section `prompts` by their own name (``experts=4``), other sections as dictionaries
            (``router={"top_m": 2}``); ``mopefuse train --dry-run`` prints them all.

    Raises:
        ConfigError: an unknown or invalid setting. EncoderError: an encoder that cannot be had, or not for that side.
    """
    short = {key: options.pop(key) for key in list(options) if key in Prompts.model_fields}
    values = merge({"prompts": short}, options) | {"main": main, "comp": comp, "method": method, "seed": seed}
    return build_model(build_config(values), num_labels)


def build_model(config: RunConfig, num_labels: int) -> Fusion:
    """The model of a run, in evaluation mode; the same weights for the same seed, whatever the caller drew before."""
    method = _method(config)
    with _BUILDING, torch.random.fork_rng(devices=[]):
        encoders = {}
        for side in method.sides(config):
            torch.default_generator.manual_seed(config.seed)
            with _named(side):
                encoder = create_encoder(specs(config)[side])
            encoders[side] = _with_statistics(encoder, config)
            encoders[side].recompute = config.train.checkpoint_activations
            _require_declared(side, encoders[side])
        torch.default_generator.manual_seed(config.seed)
        _require_memory(config, method, encoders)
        try:
            model = cast(Fusion, method(config, encoders, num_labels))
        except (RuntimeError, MemoryError) as error:
            if (needed := out_of_memory(error)) is None:
                raise
            raise _too_large(config, needed) from None
    return model.eval()


def _require_memory(config: RunConfig, method: type[Fusion], encoders: Mapping[str, Encoder]) -> None:
    """Refuse prompt experts that memory has no room for: a system may grant it, and then kill whoever uses it.

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
    """The error of a model that does not fit into memory, with the settings that make it large."""
    values, usual = (flat(one.model_dump()) for one in (config, RunConfig(main="", comp="")))
    large = [f"{path}={values[path]}" for path in SIZES if (values[path] or 0) > (usual[path] or 6)]
    fix = "lower them" if large else "free memory, or use another --method"
    return ResourceError(281, f"no memory for the model{needed}", where=", ".join(large), fix=fix)


def check_names(config: RunConfig) -> None:
    """Refuse a method or an encoder that does not exist, before the minutes that reading data can take.

    Raises:
        ConfigError: no such method, or no spec of an encoder. EncoderError: no such encoder, as far as this machine knows.
        PluginError: the plugin that brings one of them cannot be used.
    """
    for side in _method(config).sides(config):
        with _named(side):
            check_name(specs(config)[side])


def _method(config: RunConfig) -> Any:
    """The class of the fusion method, a subclass of `Fusion`."""
    method = registry.load(registry.FUSION, config.method)
    if not (isinstance(method, type) and issubclass(method, Fusion)):
        what = f"the fusion method {config.method!r} is no subclass of mopefuse.fusion.Fusion"
        raise PluginError(7, what, fix="mend the plugin, or uninstall it")
    return method


@contextmanager
def _named(side: str) -> Iterator[None]:
    """An error says of which side, and its fix with which flag."""
    flag = "--comp" if is_comp(side) else "--main"
    try:
        yield
    except (ConfigError, EncoderError) as error:
        error.where = ", ".join(part for part in (flag, error.where) if part)
        error.fix = re.sub(r"^write (?=[a-z_]+:)", f"write {flag} ", error.fix)
        raise


def _require_declared(side: str, encoder: Encoder) -> None:
    if encoder.modality not in modality.names():
        what = f"{encoder.spec} reads {encoder.modality}, a modality that is not installed"
        raise ConfigError(134, what, where=f"--{side}", fix="install the plugin that brings it, or use another encoder")


def require_rows(model: Fusion, modalities: Sequence[str]) -> None:
    """Refuse a model one of whose encoders reads what rows do not have.

    Args:
        modalities: that rows of the data set have.
    """
    for side in model.reads:
        require_column(str(model.encoder(side).spec), model.encoder(side).modality, modalities, where=f"--{side}")


def full_specs(config: RunConfig) -> RunConfig:
    """The configuration with aliases of encoders and names of plugins written out, as a run records it."""
    config = with_specs(config, {side: str(full_spec(spec)) for side, spec in specs(config).items() if spec})
    return config.model_copy(update={"method": registry.full_name(registry.FUSION, config.method)})


def _with_statistics(encoder: Encoder, config: RunConfig) -> Encoder:
    if config.data.image_stats == "mmbt" and isinstance(encoder.preprocess, ImagePreprocess):
        encoder.preprocess = replace(encoder.preprocess, mean=MMBT_MEAN, std=MMBT_STD)
    return encoder
