"""Where a transformers encoder comes from: a folder, a repository of the hub, or a built-in configuration."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopefuse.core import error_numbers as _numbers
from mopefuse.core import hub as _hub
from mopefuse.core.registry import Spec
from mopefuse.encoders._hf_families import TOWERS, BuiltIn, refuse_unsuitable
from mopefuse.encoders._hf_text import POOLING_FILES, TOKENIZER_FILES, read_json
from mopefuse.encoders.base import option_flag
from mopefuse.errors import EncoderError, did_you_mean

IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """What a spec names.

    Args:
        folder: with config.json and all that could be had beside it; None for a built-in configuration.
        part: ``text`` or ``vision`` of a two-tower model, else empty.
        random: no weights but those of ``?weights=``.
        trained: weights come from somewhere, so a tokenizer that was not trained with them would be wrong.
        revision: commit of the hub repository.
    """

    folder: Path | None
    config: Mapping[str, Any]
    part: str
    random: bool
    trained: bool
    revision: str = ""
    pool: str = ""


def find(spec: Spec, known: Mapping[str, BuiltIn], parted: Collection[str] = ()) -> Source:
    """The source that ``name[@revision][#part]`` names, fetched, and its configuration checked before any weights are.

    Args:
        known: built-in configurations, by name.
        parted: see `refuse_unsuitable`.

    Raises:
        EncoderError: no such folder or repository, or what it holds cannot be an encoder here.
        ResourceError: the hub's cache cannot be written.
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
    """Refuse what cannot be found, as far as it shows without a network; arguments as those of `find`.

    Raises:
        EncoderError: no such part, folder or built-in configuration.
    """
    name, _, part = spec.name.partition("#")
    if part and part not in ("text", "vision"):
        raise EncoderError(
            _numbers.NEEDS_TOWER, f"there is no part #{part}", where=str(spec), fix="write #text or #vision"
        )
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise _no_config(folder, spec)
        return
    if name.startswith(("/", ".", "~")):
        raise EncoderError(_numbers.NO_FOLDER, f"there is no folder {name}", where=str(spec), fix="check the path")
    if not option_flag(spec, "pretrained", True) and spec.name not in known:
        raise EncoderError(
            _numbers.NO_BUILT_IN_CONFIG,
            f"no built-in configuration of {spec.name}, and pretrained=false uses no network",
            where=str(spec),
            fix=f"use a folder with config.json; {did_you_mean(spec.name, known)}",
        )


def _no_config(folder: Path, spec: Spec) -> EncoderError:
    fix = "use a folder of save_pretrained()"
    return EncoderError(_numbers.BAD_CONFIG, f"{folder} has no config.json", where=str(spec), fix=fix)


def _in_folder(
    spec: Spec, folder: Path, part: str, random: bool, trained: bool, parted: Collection[str], revision: str = ""
) -> Source:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise _no_config(folder, spec)
    refuse_unsuitable(config, parted, str(spec))
    if config["model_type"] in TOWERS and not part:
        fix = f"write {spec.scheme}:{spec.name}#text or {spec.scheme}:{spec.name}#vision"
        raise EncoderError(_numbers.NEEDS_TOWER, f"{spec.name} has two towers", where=str(spec), fix=fix)
    if part and not any(config["model_type"] in (kind, parts[part]) for kind, parts in TOWERS.items()):
        what = f"{spec.name} is a {config['model_type']} model and has no part #{part}"
        raise EncoderError(_numbers.NEEDS_TOWER, what, where=str(spec), fix=f"leave out #{part}")
    if not random and not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise _hub.no_safetensors(str(folder), str(spec))
    return Source(folder, config, part, random, trained, revision)


def _from_hub(spec: Spec, name: str, part: str, random: bool, trained: bool, parted: Collection[str]) -> Source:
    repo, _, revision = name.partition("@")
    where = str(spec)
    path = _hub.fetch(repo, "config.json", revision or None, where=where)
    if path is None:
        raise EncoderError(
            _numbers.BAD_CONFIG, f"{repo} has no config.json", where=where, fix="use a transformers repository"
        )
    config = read_json(path)
    refuse_unsuitable(config if isinstance(config, dict) else {}, parted, where)
    if not random:
        _hub.fetch_safetensors(repo, revision or None, where=where)
    wanted = (*TOKENIZER_FILES, *POOLING_FILES, *IMAGE_FILES)
    _hub.fetch_all(repo, wanted, revision or None, where=where)
    commit = path.parent.name if _COMMIT.fullmatch(path.parent.name) else ""
    return _in_folder(spec, path.parent, part, random, trained, parted, commit)
