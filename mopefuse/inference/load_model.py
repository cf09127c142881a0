"""Load a trained run or an adapter as an ordinary `nn.Module`."""

from __future__ import annotations

from pathlib import Path

from mopefuse.config.encoder_sides import Comp
from mopefuse.core import device as devices
from mopefuse.fusion.base import Fusion
from mopefuse.runs import load as runs
from mopefuse.runs.locate import find_run


def load_model(
    path: str | Path, *, checkpoint: str = "best", device: str = "auto", main: str | None = None, comp: Comp = None
) -> Fusion:
    """Load a trained run or an adapter as an `nn.Module` in evaluation mode, with its `labels` and `task`.

    ``model(model.collate(images, texts).to(device)).logits`` has shape (B, N) for B samples and N labels. To predict from
    several threads, or with a bundle, use `mopefuse.load`.

    Args:
        path: folder of a run or an adapter, or ``hf-hub:repo/name``.
        checkpoint: for a run: "best", "last" or "step-N".
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:N" or "mps".
        main, comp: specs of the encoders, if the same weights have other names on this machine; see `mopefuse.load`.

    Raises:
        CheckpointError: there is no such run, it is a bundle, or its encoders are not those that it was trained with.
    """
    loaded = runs.load_model(find_run(path), checkpoint, devices.resolve(device), main=main, comp=comp)
    model = loaded.model
    model.labels = tuple(loaded.manifest["labels"])
    return model
