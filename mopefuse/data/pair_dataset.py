"""The rows of a data set for your own training loop: `PairDataset` with torch's `DataLoader`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from mopefuse.config.recipe import changed_data
from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.argument_names import python_names
from mopefuse.core.error_codes import ConfigCode, DataCode
from mopefuse.data.load import load_data
from mopefuse.data.mask_targets import MaskTargets
from mopefuse.errors import ConfigError, DataError


class PairDataset(Dataset[dict[str, Any]]):
    """One split of a data set, validated: a map-style dataset of raw rows.

    A row is ``{"id": str, "image": PIL.Image in RGB, "text": str, "label": int}``, with a key for each modality of the data;
    None for a modality that the row lacks. For multi-label data "label" is a list of indices, for regression a number or a
    list of numbers, for segmentation a mask: the class of each pixel, uint8 (H, W), 255 where it does not count; for
    retrieval a list of integers that are equal for equal values. ``model.collate`` makes a batch of rows, also in data
    workers: ``DataLoader(dataset, batch_size=32, collate_fn=model.collate)``.

    Attributes:
        labels: their names; a row's label is an index into it. task: what a label is, for `build_fusion`.
        modalities: the modalities of the data, such as ("text", "image").
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        *,
        labels: Sequence[str] | None = None,
        text_col: str | None = None,
        img_col: str | None = None,
        columns: Mapping[str, str] | None = None,
        label_col: str | None = None,
        id_col: str | None = None,
        split_col: str | None = None,
        label_sep: str | None = None,
        task: str | None = None,
        image_roots: Sequence[str | Path] = (),
        val_fraction: float | None = None,
        test_fraction: float | None = None,
        seed: int = 0,
        on_missing: Literal["error", "skip", "absent"] = "error",
        on_bad: Literal["error", "skip"] = "error",
    ) -> None:
        """Read the table and check every file once; the result is cached. None selects the default.

        Args:
            path: a folder with a table (.jsonl, .csv, .tsv, .parquet) for each split, or one table.
            split: "train", "val" or "test".
            labels: names of the labels in order; default those of the training split, sorted, or of ``labels.txt``.
            text_col, img_col: columns of the text and of the image's path; default "text" and "img".
            columns: columns of other modalities, by modality. label_col, id_col: default "label" and "id".
            split_col: the column that names the split of each row, if all splits are in one table.
            label_sep: the separator of labels in a cell, or "list" for cells as ``[a, b]``; makes the data multi-label.
            task: what a label is: "single-label", "multi-label", "regression" or "retrieval"; default: one of the first three,
                inferred from the labels.
            image_roots: other folders that files may be in.
            val_fraction, test_fraction: share of the training rows, from 0 to 1, held out as that split, drawn with `seed`.
            on_missing: for rows that lack a modality: raise an error, leave them out, or use None.
            on_bad: whether an invalid row raises an error or is left out (at most 1 % of the rows).

        Raises:
            ConfigError: an invalid argument. DataError: no such split, invalid rows, or labels that are not in `labels`.
        """
        settings: dict[str, Any] = {
            "path": str(path), "text_col": text_col, "img_col": img_col, "columns": columns and dict(columns),
            "label_col": label_col, "id_col": id_col, "split_col": split_col, "label_sep": label_sep, "task": task,
            "image_roots": [*map(str, image_roots)], "val_fraction": val_fraction, "test_fraction": test_fraction,
            "seed": seed, "on_missing": on_missing, "on_bad": on_bad,
        }  # fmt: skip
        with python_names():
            self.config = changed_data(DataConfig(), settings)
            self.data = load_data(self.config, require=(split,))
        self.split = self.data.splits[split]
        self.labels = _labels(labels, self.data.labels)
        self.task = self.data.task
        if self.task.label_kind != "class" and "train" in self.data.splits:
            self.task = self.task.with_statistics(self.data.sparse_targets("train").numbers())
        self._masks = MaskTargets(self.split, self.data.files, self.labels, self.task) if self.split.masks else None
        self._number = self._encode_labels()

    def _encode_labels(self) -> dict[str, Any]:
        """Map each label of the rows to the number that stands for it."""
        names = [*self.split.labels.counts()]
        unknown = self.task.unknown_labels(names, self.labels)
        if unknown:
            what = f"labels that are not in `labels`: {', '.join(sorted(unknown)[:20])}"
            raise DataError(
                DataCode.LABEL_NOT_IN_LABELS, what, where=self.split.file, fix="add them to labels, or remove the rows"
            )
        return dict(zip(names, self.task.encode(names, self.labels).tolist(), strict=True))

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities of the data."""
        return self.data.modalities

    def __len__(self) -> int:
        return len(self.split.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The row at a place in the split, its files read and decoded.

        Raises:
            DataError: a file that cannot be read any more. IndexError: there is no such row.
        """
        row = self.split.rows[index]
        values = {
            name: None if row.values[name] is None else self.data.read(self.split, row, name, self.config)
            for name in self.modalities
        }
        if self._masks is not None:
            return {"id": row.id, **values, "label": self._masks.classes(index)}
        return {"id": row.id, **values, "label": self.task.as_written([self._number[label] for label in row.labels])}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


def _labels(given: Sequence[str] | None, found: tuple[str, ...]) -> tuple[str, ...]:
    """The labels to number.

    Raises:
        ConfigError: none are given and the data define none, or they are not distinct names.
    """
    labels = found if given is None else () if isinstance(given, str) else tuple(given)
    if not labels or len({*labels}) < len(labels):
        what = "there is no training split to take the labels from" if given is None else "labels must be distinct names"
        raise ConfigError(
            ConfigCode.DATA_SET_LABELS_UNKNOWN, what, where="labels", fix="pass labels=[...], such as model.labels"
        )
    return labels
