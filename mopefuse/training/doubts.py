"""What is probably not meant about a run, said before it trains: a modality that is not used, thresholds left to chance."""

from __future__ import annotations

from collections.abc import Iterator

from mopefuse.config.schema import RunConfig
from mopefuse.config.sides import is_comp
from mopefuse.data.base import DataSet
from mopefuse.fusion.base import Fusion
from mopefuse.training.trainer import Listener

_FEWEST_ROWS, _FEWEST_OF_A_LABEL = 100, 10  # of validation, for thresholds to be tuned on


def notice_doubts(config: RunConfig, data: DataSet, model: Fusion, listener: Listener) -> None:
    """Tell a listener what is probably not meant."""
    for text in (*_unread(data, model), *_few_to_tune_on(config, data)):
        listener.notice(text)


def _unread(data: DataSet, model: Fusion) -> Iterator[str]:
    """Modalities that rows have and no encoder reads, where there is more than one encoder to read them."""
    specs = {side: str(model.encoder(side).spec) for side in model.uses}
    read = sorted({model.encoder(side).modality for side in model.uses})
    unread = [name for name in data.modalities if name not in read]
    if unread and len(specs) > 1:
        named = ", ".join(f"--{'comp' if is_comp(side) else side} {spec}" for side, spec in specs.items())
        fix = "to use it, name an encoder that does with --main or --comp"
        yield f"no encoder reads {' or '.join(unread)}: {named} read {' and '.join(read)}; {fix}"


def _few_to_tune_on(config: RunConfig, data: DataSet) -> Iterator[str]:
    """Thresholds that are tuned on few rows, or on few of some label, or for nothing."""
    if config.train.threshold != "tuned":
        return
    if not data.multi_label:
        yield "--threshold tuned has no effect: each row has one label, and the likeliest is predicted"
        return
    labels = data.splits["val"].labels
    counts = labels.counts()
    rare = sum(counts.get(label, 0) < _FEWEST_OF_A_LABEL for label in data.labels)
    if len(labels) < _FEWEST_ROWS or rare:
        which = f"{rare:,} of {len(data.labels):,} labels have fewer than {_FEWEST_OF_A_LABEL} of them"
        what = f"--threshold tuned chooses each label's threshold on {len(labels):,} validation rows, and {which}"
        yield f"{what}: it may be chance; hold out more rows, or use --threshold 0.5"
