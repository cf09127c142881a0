"""The section `data` of a configuration: where the data are, and how they are read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mopefuse.config.section import MANY, Section

COLUMN_SETTINGS = {"text": "text_col", "image": "img_col"}
"""Modality to the setting of `data` that names its column; `data.columns` names those of all others."""


class Data(Section):
    """Location and format of the data."""

    path: str | None = Field(
        None,
        description="folder with train, val and test (tables, shards or folders of images), one table, or shards",
    )
    image_roots: tuple[str, ...] = Field((), description="additional folder that may contain images")
    text_col: str = Field("text", min_length=1, description="column with the text")
    img_col: str = Field("img", min_length=1, description="column with the image's path")
    columns: dict[str, Annotated[str, Field(min_length=1)]] = Field(
        {}, description="column of another modality, for example audio=clip"
    )
    modalities: tuple[str, ...] | None = Field(
        None, min_length=1, description="modalities to read; default: those that have a column, else text and image"
    )
    on_missing: Literal["error", "skip", "absent"] = Field(
        "error",
        description="rows that lack a modality: stop (error), leave them out (skip), or keep them (absent); with skip and "
        "absent, an empty text counts as missing",
    )
    label_col: str = Field("label", min_length=1, description="column with the label, or the list of labels")
    id_col: str = Field("id", min_length=1, description="column with the id; rows without one are numbered")
    split_col: str | None = Field(None, description="column with the split of each row, if all splits are in one table")
    label_sep: str | None = Field(
        None,
        min_length=1,
        description="separator between labels in a cell, or list if cells look like [a, b]; makes data multi-label",
    )
    task: str | None = Field(
        None, min_length=1, description="single-label, multi-label, regression, segmentation or retrieval; default: by labels"
    )
    labels: str | None = Field(
        None, description="file with all labels, one per line; default: labels.txt in the data folder, or the labels of train"
    )
    ignore_index: int = Field(255, ge=0, le=255, description="id of the pixels in masks that do not count; 255 never does")
    fold_labels: bool = Field(False, description="treat labels that differ only in case, spaces or Unicode form as one")
    allow_odd_labels: bool = Field(False, description="accept suspicious labels, such as lists in cells")
    val_fraction: float | None = Field(None, gt=0, lt=1, description="fraction of train to hold out as val, per class")
    test_fraction: float | None = Field(None, gt=0, lt=1, description="fraction of train to hold out as test, per class")
    shots: int | None = Field(None, ge=1, le=MANY, description="train on only this many rows per class")
    fraction: float | None = Field(None, gt=0, le=1, description="train on only this fraction of each class")
    seed: int = Field(0, ge=0, lt=2**63, description="random seed for held-out and sampled rows")
    on_bad: Literal["error", "skip"] = Field("error", description="rows or images that cannot be read: stop, or skip them")
    max_bad_fraction: float = Field(0.01, ge=0, lt=1, description="largest fraction of a split that on_bad=skip may leave out")
    allow_missing_text: bool = Field(False, description="treat a null text as an empty string")
    strict: bool = Field(False, description="stop with an error if images or texts of train are also in val or test")
    workers: int = Field(0, ge=0, le=256, description="processes that load the data; 0 loads in the main process")
    augment: Literal["none", "flip", "randaugment", "crop"] = Field(
        "none", description="augmentation of training images; crop: a random part of random size and shape, flipped at random"
    )
    randaugment_ops: int = Field(2, ge=1, le=100, description="operations per image, if augment is randaugment")
    randaugment_magnitude: int = Field(9, ge=0, le=30, description="strength, if augment is randaugment")
    crop_scale: float = Field(0.5, gt=0, le=1, description="smallest fraction of the image area that augment=crop keeps")
    cache_images: bool = Field(False, description="cache decoded, resized images in one file that all runs share")
    cache_features: bool = Field(True, description="cache features of frozen encoders and reuse them in all runs")
    cache_remote_limit: float = Field(
        20.0, gt=0, description="maximum GiB of files of remote data that are kept on this machine"
    )
    cache_prefix: Literal["auto", "on", "off"] = Field(
        "auto",
        description="cache the input of the first prompted layer and start training from there; auto: only if it fits within "
        "data.cache_prefix_limit",
    )
    cache_prefix_limit: float = Field(
        20.0, gt=0, description="maximum GiB of that cache, and of cached condition tokens; at most half of the free space"
    )
    prefix_precision: Literal["float16", "float32"] = Field(
        "float16",
        description="number format of the cached early-layer outputs and tokens; with float16, validation scores can differ "
        "in the last digits",
    )
    max_pixels: int = Field(
        50_000_000, ge=1, le=89_000_000, description="reject images with more pixels than this, without decoding"
    )
    image_stats: Literal["encoder", "mmbt"] = Field(
        "encoder", description="statistics for normalising images: the encoder's own (encoder), or those of MMBT (mmbt)"
    )

    @model_validator(mode="before")
    @classmethod
    def _move_built_in_columns(cls, values: Any) -> Any:
        """Move the column of a text or image from `columns` to `text_col` or `img_col`."""
        if not isinstance(values, dict) or not isinstance(values.get("columns"), dict):
            return values
        values = {**values, "columns": dict(values["columns"])}
        for name, own in COLUMN_SETTINGS.items():
            default = cls.model_fields[own].default
            column, named = values["columns"].pop(name, None), values.get(own, default)
            if column is not None and named not in (default, column):
                raise ValueError(f"{own} is {named!r} and columns has {column!r} for {name}: name one column")
            values |= {own: column} if column is not None else {}
        return values

    @model_validator(mode="after")
    def _one_subset(self) -> Data:
        if self.shots is not None and self.fraction is not None:
            raise ValueError("shots and fraction cannot be combined: set only one")
        if (self.val_fraction or 0) + (self.test_fraction or 0) >= 1:
            raise ValueError("val_fraction and test_fraction leave nothing to train on")
        return self
