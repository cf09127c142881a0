"""The flags of the command line that set a setting, one line each.

`mopefuse.cli.settings` makes the options of the commands from this table: their help, default and bounds are those of the
setting in `mopefuse.config.schema`. Importing this module imports no schema.
"""

from __future__ import annotations

from typing import NamedTuple

MODEL, DATA, TRAINING, PROMPTS = "Model", "Data", "Training", "Prompts (method conditional)"
COLUMNS = "Columns of the table"
TRAIN = "train"
TRAIN_AND_FIT = "train, fit"
TRAIN_AND_CHECK = "train, fit, data check"
EVERY_TABLE = "train, fit, data check, data preview, data pack, eval, predict"
LABELLED = "train, fit, data check, data preview, data pack, eval"


class Flag(NamedTuple):
    """A flag and the setting that it sets.

    panel: heading in the help. commands: those that have the flag, separated by ``, ``. metavar: placeholder for the value
    in the help; empty for the usual one of its type. off: the flag that sets it to false, for what is on by default.
    """

    name: str
    path: str
    panel: str
    commands: str = TRAIN
    metavar: str = ""
    off: str = ""


FLAGS = (
    Flag("--main", "main", MODEL, TRAIN_AND_FIT, metavar="SPEC"),
    Flag("--comp", "comp", MODEL, TRAIN_AND_FIT, metavar="SPEC"),
    Flag("--method", "method", MODEL, metavar="NAME"),
    Flag("--comp-tuning", "comp_tuning.mode", MODEL),
    Flag("--tune", "tune", MODEL),
    Flag("--warm-start", "warm_start", MODEL),
    Flag("--head-features", "head_features", MODEL),
    Flag("--head-hidden", "head_hidden", MODEL),
    Flag("--either", "either", MODEL),
    Flag("--compat", "compat", MODEL),
    Flag("--data", "data.path", DATA, metavar="PATH"),
    Flag("--val-fraction", "data.val_fraction", DATA, TRAIN_AND_CHECK),
    Flag("--test-fraction", "data.test_fraction", DATA, TRAIN_AND_CHECK),
    Flag("--shots", "data.shots", DATA),
    Flag("--fraction", "data.fraction", DATA, TRAIN_AND_FIT),
    Flag("--on-missing", "data.on_missing", DATA, "train, fit, data check, data pack, eval"),
    Flag("--on-bad", "data.on_bad", DATA, "train, fit, data check, data pack"),
    Flag("--strict", "data.strict", DATA),
    Flag("--max-pixels", "data.max_pixels", DATA, "train, fit, data check, data preview, data pack"),
    Flag("--cache-images", "data.cache_images", DATA),
    Flag("--cache-prefix", "data.cache_prefix", DATA),
    Flag("--workers", "data.workers", DATA, TRAIN_AND_FIT),
    Flag("--text-col", "data.text_col", COLUMNS, EVERY_TABLE, metavar="NAME"),
    Flag("--image-col", "data.img_col", COLUMNS, EVERY_TABLE, metavar="NAME"),
    Flag("--column", "data.columns", COLUMNS, EVERY_TABLE, metavar="MODALITY=NAME"),
    Flag("--label-col", "data.label_col", COLUMNS, LABELLED, metavar="NAME"),
    Flag("--id-col", "data.id_col", COLUMNS, EVERY_TABLE, metavar="NAME"),
    Flag("--split-col", "data.split_col", COLUMNS, LABELLED, metavar="NAME"),
    Flag("--label-sep", "data.label_sep", COLUMNS, LABELLED, metavar="TEXT"),
    Flag("--image-root", "data.image_roots", COLUMNS, EVERY_TABLE, metavar="DIR"),
    Flag("--task", "data.task", COLUMNS, LABELLED, metavar="TASK"),
    Flag("--labels", "data.labels", COLUMNS, TRAIN_AND_CHECK, metavar="FILE"),
    Flag("--fold-labels", "data.fold_labels", COLUMNS, TRAIN_AND_CHECK),
    Flag("--allow-odd-labels", "data.allow_odd_labels", COLUMNS, TRAIN_AND_CHECK),
    Flag("--epochs", "train.epochs", TRAINING),
    Flag("--steps", "train.max_steps", TRAINING),
    Flag("--batch", "train.batch_size", TRAINING),
    Flag("--lr", "train.lr", TRAINING),
    Flag("--class-weights", "train.class_weights", TRAINING, TRAIN_AND_FIT),
    Flag("--modality-dropout", "train.modality_dropout", TRAINING),
    Flag("--threshold", "train.threshold", TRAINING, metavar="NUMBER|tuned"),
    Flag("--select", "train.select_by", TRAINING, metavar="METRIC"),
    Flag("--seed", "seed", TRAINING, TRAIN_AND_FIT),
    Flag("--device", "device", TRAINING, TRAIN_AND_FIT, metavar="DEVICE"),
    Flag("--precision", "train.precision", TRAINING, TRAIN_AND_FIT),
    Flag("--shard-encoders", "train.shard", TRAINING),
    Flag("--experts", "prompts.experts", PROMPTS),
    Flag("--static", "prompts.static", PROMPTS),
    Flag("--dynamic", "prompts.dynamic", PROMPTS),
    Flag("--mapped", "prompts.mapped", PROMPTS),
    Flag("--condition", "prompts.condition", PROMPTS),
    Flag("--film", "prompts.film", PROMPTS, off="--no-film"),
    Flag("--layers", "prompts.layers", PROMPTS, metavar="LAYERS"),
    Flag("--gate", "prompts.gate", PROMPTS),
    Flag("--router", "router.kind", PROMPTS),
    Flag("--top-m", "router.top_m", PROMPTS),
)

_BY_PATH = {flag.path: flag.name for flag in FLAGS}


def flags_for(command: str) -> tuple[Flag, ...]:
    """The flags of a command, such as ``train`` or ``data check``."""
    return tuple(flag for flag in FLAGS if command in flag.commands.split(", "))


def flag_of(path: str) -> str:
    """The flag that sets the setting at `path`; the path itself if there is none."""
    return _BY_PATH.get(path, path)
