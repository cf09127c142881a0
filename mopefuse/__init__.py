"""Classify multimodal samples with frozen pretrained encoders and a small trained fusion part.

To find the best model for a table: `fit`. For your own training loop: `build_fusion`, `PairDataset`, `save_adapter`. To do
what the command line does: `RunConfig` or `build_config`, `train`, `evaluate`. To use a trained model: `load` to predict,
`load_model` for an `nn.Module`, `Client` to predict with `mopefuse serve`.
Importing this package imports neither torch nor pydantic; each name imports what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mopefuse.autofit.fit import FitResult
    from mopefuse.config.schema import RunConfig, build_config
    from mopefuse.data.pair_dataset import PairDataset
    from mopefuse.evaluation.scoring import Evaluation
    from mopefuse.export.adapter_export import save_adapter
    from mopefuse.fusion.build import build_fusion
    from mopefuse.inference.load_model import load_model
    from mopefuse.inference.predict import load
    from mopefuse.serving.client import Client

__version__ = "0.1.0"
__all__ = [
    "Client",
    "PairDataset",
    "RunConfig",
    "__version__",
    "build_config",
    "build_fusion",
    "evaluate",
    "fit",
    "load",
    "load_model",
    "save_adapter",
    "train",
]
_MODULES = {
    "Client": "mopefuse.serving.client",
    "PairDataset": "mopefuse.data.pair_dataset",
    "RunConfig": "mopefuse.config.schema",
    "build_config": "mopefuse.config.schema",
    "build_fusion": "mopefuse.fusion.build",
    "load": "mopefuse.inference.predict",
    "load_model": "mopefuse.inference.load_model",
    "save_adapter": "mopefuse.export.adapter_export",
}


def fit(
    data: str | Path,
    out: str | Path | None = None,
    *,
    budget: str | float = "10m",
    main: str | None = None,
    comp: str | Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> FitResult:
    """Find the best model for a table, as ``mopefuse fit`` does; ``.run`` is a run folder, ``.headline`` one line of scores.

    Args:
        data: folder or table; columns, splits and encoders are found if they are not named.
        out: the run folder; default: runs/<date>-<time>. budget: wall time, such as "10m", or seconds.
        main, comp: specs of encoders; default: a small pair. settings: others by dotted path: ``{"data.text_col": "review"}``.
        resume: continue the fit in `out`. overwrite: replace the fit in it.

    Raises:
        MopefuseError: data, an encoder, a setting or the folder cannot be used; see docs/errors.md.
    """
    from mopefuse.autofit.budget import parse_budget
    from mopefuse.autofit.fit import fit as run_fit
    from mopefuse.core.argument_names import python_names
    from mopefuse.runs.folder import default_path

    encoders = {side: spec for side, spec in (("main", main), ("comp", comp)) if spec is not None}
    with python_names():
        return run_fit(
            Path(data),
            default_path() if out is None else Path(out),
            budget=parse_budget(budget),
            settings={**(settings or {}), **encoders},
            resume=resume,
            overwrite=overwrite,
        )


def train(config: RunConfig, out: str | Path, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train as ``mopefuse train`` does: write a run folder, and test the checkpoint that is best on validation once.

    Args:
        config: all settings; ``build_config({"main": SPEC, "comp": SPEC, "data": {"path": DIR}})`` makes one.
        out: the run folder. resume: continue the run in it. overwrite: replace the run in it.

    Returns:
        The content of ``metrics.json``: "metrics" by split, "parameters", "seconds" and more.

    Raises:
        MopefuseError: an invalid setting, data, encoder or folder; see docs/errors.md.
    """
    from mopefuse.config.schema import check_is_config
    from mopefuse.core.argument_names import python_names
    from mopefuse.training.train import train as train_run

    check_is_config(config)
    with python_names():
        return train_run(config, Path(out), resume=resume, overwrite=overwrite)


def evaluate(
    run: str | Path,
    *,
    split: str = "test",
    data: str | Path | None = None,
    layout: Mapping[str, Any] | None = None,
    checkpoint: str = "best",
    device: str = "auto",
) -> Evaluation:
    """Evaluate a run, an adapter or a bundle on a split, as ``mopefuse eval`` does; ``.metrics`` has the metrics by name.

    Args:
        run: a folder, or ``hf-hub:repo/name``. split: "train", "val" or "test".
        data: folder or table to evaluate on; default: the run's own. Required for adapters and bundles.
        layout: settings of the section `data` that differ for these data, by name: ``{"text_col": "caption"}``.
        checkpoint: for a run: "best", "last" or "step-N". device: "auto", "cpu", "cuda", "cuda:N" or "mps".

    Raises:
        CheckpointError: there is no such run, or its encoders are not those that it was trained with.
        DataError: labels that the model does not know, or invalid rows.
    """
    from mopefuse.core.argument_names import python_names
    from mopefuse.evaluation.evaluate import evaluate as evaluate_run

    place = None if data is None else Path(data)
    with python_names():
        return evaluate_run(Path(run), split=split, data=place, layout=layout, checkpoint=checkpoint, device=device)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
