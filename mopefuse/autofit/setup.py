"""The settings that all candidates share: columns, splits and encoders, found where they are not given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mopefuse.config.encoder_sides import Comp
from mopefuse.config.recipe import data_settings
from mopefuse.config.schema import Data
from mopefuse.core import registry
from mopefuse.core.error_codes import ConfigCode, EncoderCode
from mopefuse.data.columns import EXPECTED
from mopefuse.data.guess_columns import guess_columns
from mopefuse.data.load import load_data
from mopefuse.data.tables import SUFFIXES, find_tables
from mopefuse.encoders.base import create_encoder
from mopefuse.errors import ConfigError, EncoderError
from mopefuse.modalities.base import get_modality
from mopefuse.tasks.base import get_task

DEFAULT_ENCODERS = dict(zip(EXPECTED, ("hf:minilm", "hf:facebook/dinov2-small"), strict=True))
"""Small encoders by modality, used where none is named."""
_VAL_FRACTION, _TEST_FRACTION = 0.1, 0.2
_LOCAL_ENCODERS = "use encoders that are on this machine, such as --main hf:/models/dinov2-small --comp hf:/models/minilm"


def choose_data(path: Path, settings: Mapping[str, Any]) -> tuple[Data, list[str]]:
    """Find the columns and splits of the data; returns their settings, and a line for each choice.

    Args:
        settings: settings of the section `data` by dotted path, which are kept.

    Raises:
        DataError: the data cannot be read, or a column is not clear. ConfigError: there are no candidates for the task.
    """
    task = settings.get("data.task")
    if task is not None and get_task(task).methods != registry.FUSION:
        what, fix = f"mopefuse fit has no candidates for {task}", f"use mopefuse train --task {task}"
        raise ConfigError(ConfigCode.FIT_OF_OTHER_TASK, what, where="--task", fix=fix)
    table = _only_table(path)
    config = data_settings({**settings, "data.path": str(table)})
    guess = guess_columns(config)
    config = config.model_copy(update=guess.settings)
    present = load_data(config.model_copy(update={"val_fraction": None, "test_fraction": None}), require=("train",)).splits
    held = {
        split: fraction
        for split, fraction in (("val", _VAL_FRACTION), ("test", _TEST_FRACTION))
        if split not in present and getattr(config, f"{split}_fraction") is None
    }
    lines = [f"{split}: {100 * fraction:g} % of the rows, held out" for split, fraction in held.items()]
    changes = {f"{split}_fraction": fraction for split, fraction in held.items()}
    return config.model_copy(update=changes), [*guess.reasons, *lines]


def _only_table(path: Path) -> Path:
    """The only table in a folder that has none of a split's name; else `path`."""
    if not path.is_dir() or find_tables(path, Data()):
        return path
    tables = [item for item in path.iterdir() if item.suffix.lower() in SUFFIXES and item.is_file()]
    return tables[0] if len(tables) == 1 else path


def choose_encoders(main: str | None, comp: Comp) -> tuple[dict[str, Any], list[str]]:
    """The specs of main and comp, by default of a small pair; returns these settings, and a line for each encoder.

    By default the encoder of a modality in files, such as images, is main.

    Raises:
        EncoderError: a default encoder cannot be loaded, or there is none for the other modality.
    """
    given = {"main": [main] if main else [], "comp": [comp] if isinstance(comp, str) else [*(comp or ())]}
    lines = {side: [_describe(spec) for spec in specs] for side, specs in given.items()}
    read = {create_encoder(spec).modality for specs in given.values() for spec in specs}
    free = sorted((name for name in EXPECTED if name not in read), key=lambda name: not get_modality(name).is_file)
    for side in [side for side, specs in given.items() if not specs]:
        if read and len(free) == len(EXPECTED):
            what = f"there is no default encoder to pair with {' and '.join(sorted(read))}"
            raise EncoderError(EncoderCode.NO_DEFAULT_ENCODER, what, where=f"--{side}", fix="add both --main and --comp")
        spec = DEFAULT_ENCODERS[free.pop(0)]
        with _explained(spec):
            lines[side] = [_describe(spec, "default")]
        given[side] = [spec]
    specs = {"main": given["main"][0], "comp": given["comp"][0] if len(given["comp"]) == 1 else given["comp"]}
    return specs, [f"{side}: {line}" for side in ("main", "comp") for line in lines[side]]


def _describe(spec: str, *notes: str) -> str:
    return f"{spec} ({', '.join([create_encoder(spec).modality, *notes])})"


@contextmanager
def _explained(spec: str) -> Iterator[None]:
    """A context whose errors say that the user need not use this default encoder."""
    try:
        yield
    except EncoderError as error:
        what = f"the default encoder {spec} cannot be loaded: {error.what}"
        fix = f"{_LOCAL_ENCODERS}; tiny:vision and tiny:text come with the package, but were trained on digits only"
        raise EncoderError(EncoderCode.DEFAULT_ENCODER_UNAVAILABLE, what, where=spec, fix=fix) from error


def data_values(config: Data) -> dict[str, Any]:
    """The settings of the section `data` that differ from their defaults, nested."""
    values, default = config.model_dump(mode="json"), Data().model_dump(mode="json")
    return {name: value for name, value in values.items() if value != default[name]}
