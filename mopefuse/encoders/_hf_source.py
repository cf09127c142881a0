"""Sources of transformers encoders: a folder, a repository of the hub, or a built-in configuration."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopefuse.core import hub as _hub
from mopefuse.core.error_codes import EncoderCode
from mopefuse.core.registry import Spec
from mopefuse.encoders._hf_architectures import TOWERS, BuiltIn, check_config
from mopefuse.encoders._hf_text import POOLING_FILES, TOKENIZER_FILES, read_json
from mopefuse.encoders._options import option_flag
from mopefuse.errors import EncoderError, did_you_mean

IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """The source of an encoder.

    Attributes:
        folder: with config.json and the other available files; None for a built-in configuration.
        config: content of config.json.
        part: ``text`` or ``vision`` of a two-tower model, else empty.
        random: weights are random unless ``?weights=`` is set.
        trained: weights are pretrained or from ``?weights=``, so the tokenizer must be the one of pretraining.
        revision: commit of the hub repository.
        pool: default pooling of a built-in configuration.
    """

    folder: Path | None
    config: Mapping[str, Any]
    part: str
    random: bool
    trained: bool
    revision: str = ""
    pool: str = ""


def find(spec: Spec, known: Mapping[str, BuiltIn], parted: Collection[str] = ()) -> Source:
    """Locate and fetch the source ``name[@revision][#part]``; its configuration is checked before weights are fetched.

    Args:
        known: built-in configurations, by name.
        parted: see `check_config`.

    Raises:
        EncoderError: no such folder or repository, or no usable encoder there.
        ResourceError: the hub's cache is not writable.
    """
    check_name(spec, known)
    name, _, part = spec.name.partition("#")
    pretrained = option_flag(spec, "pretrained", True)
    random = not pretrained or "weights" in spec.options
    trained = pretrained or "weights" in spec.options
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return _in_folder(spec, folder, part, random, trained, parted)
    if pretrained:
        return _from_hub(spec, name, part, random, trained, parted)
    built_in = known[spec.name]
    config = {"model_type": built_in.model_type, **built_in.config}
    return Source(None, config, part, random, trained, pool=built_in.pool)


def check_name(spec: Spec, known: Mapping[str, BuiltIn]) -> None:
    """Check a name as far as possible without a network; arguments as in `find`.

    Raises:
        EncoderError: no such part, folder or built-in configuration.
    """
    name, _, part = spec.name.partition("#")
    if part and part not in ("text", "vision"):
        raise EncoderError(
            EncoderCode.TOWER_NOT_NAMED, f"unknown part #{part}", where=str(spec), fix="write #text or #vision"
        )
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise _no_config(folder, spec)
        return
    if name.startswith(("/", ".", "~")):
        raise EncoderError(EncoderCode.NO_FOLDER, f"folder not found: {name}", where=str(spec), fix="check the path")
    if not option_flag(spec, "pretrained", True) and spec.name not in known:
        raise EncoderError(
            EncoderCode.NO_BUILT_IN_CONFIG,
            f"{spec.name} has no built-in configuration, and pretrained=false does not use the network",
            where=str(spec),
            fix=f"use a folder with config.json; {did_you_mean(spec.name, known)}",
        )


def _no_config(folder: Path, spec: Spec) -> EncoderError:
    fix = "use a folder written by save_pretrained()"
    return EncoderError(EncoderCode.BAD_CONFIG, f"{folder} has no config.json", where=str(spec), fix=fix)


def _in_folder(
    spec: Spec, folder: Path, part: str, random: bool, trained: bool, parted: Collection[str], revision: str = ""
) -> Source:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise _no_config(folder, spec)
    check_config(config, parted, str(spec))
    if config["model_type"] in TOWERS and not part:
        fix = f"write {spec.scheme}:{spec.name}#text or {spec.scheme}:{spec.name}#vision"
        raise EncoderError(EncoderCode.TOWER_NOT_NAMED, f"{spec.name} has a text and a vision tower", where=str(spec), fix=fix)
    if part and not any(config["model_type"] in (kind, parts[part]) for kind, parts in TOWERS.items()):
        what = f"{spec.name} is a {config['model_type']} model and has no part #{part}"
        raise EncoderError(EncoderCode.TOWER_NOT_NAMED, what, where=str(spec), fix=f"remove #{part}")
    if not random and not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise _hub.no_safetensors_error(str(folder), str(spec))
    return Source(folder, config, part, random, trained, revision)


def _from_hub(spec: Spec, name: str, part: str, random: bool, trained: bool, parted: Collection[str]) -> Source:
    repo, _, revision = name.partition("@")
    where = str(spec)
    path = _hub.fetch(repo, "config.json", revision or None, where=where)
    if path is None:
        raise EncoderError(
            EncoderCode.BAD_CONFIG, f"{repo} has no config.json", where=where, fix="use a transformers repository"
        )
    config = read_json(path)
    check_config(config if isinstance(config, dict) else {}, parted, where)
    if not random:
        _hub.fetch_safetensors(repo, revision or None, where=where)
    wanted = (*TOKENIZER_FILES, *POOLING_FILES, *IMAGE_FILES)
    _hub.fetch_all(repo, wanted, revision or None, where=where)
    commit = path.parent.name if _COMMIT.fullmatch(path.parent.name) else ""
    return _in_folder(spec, path.parent, part, random, trained, parted, commit)
