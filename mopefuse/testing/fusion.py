"""The contract that every fusion method must satisfy; see `mopefuse.fusion.Fusion`. The checks are in `fusion_checks`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mopefuse.config.schema import build_config
from mopefuse.core import registry
from mopefuse.errors import MopefuseError
from mopefuse.fusion.base import Fusion
from mopefuse.testing._contract import Part, enforce
from mopefuse.testing.fusion_checks import FusionChecks


def check_fusion(
    method: str | type[Fusion],
    *,
    main: str = "tiny:vision",
    comp: str | Sequence[str] = "tiny:text",
    samples: Mapping[str, Sequence[Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Fusion:
    """Check that a fusion method satisfies the contract of `mopefuse.fusion.Fusion`; a fresh model of it is returned.

    Args:
        method: its registered name, or its class.
        main, comp: specs of encoders that it can fuse.
        samples: values by modality, the same number of each, at least 2; default the examples of the modalities.
        settings: settings of a recipe, by section: ``{"prompts": {"experts": 2}}``.

    Raises:
        AssertionError: the first part of the contract that is broken: what, where, and how to fix it.
    """
    name = method if isinstance(method, str) else method.__name__
    found = registry.load(registry.FUSION, method) if isinstance(method, str) else method
    fix = "derive the class from mopefuse.fusion.Fusion, and name it in the entry point"
    assert isinstance(found, type) and issubclass(found, Fusion), f"{name}: is not a subclass of Fusion · fix: {fix}"
    values = {"main": main, "comp": comp if isinstance(comp, str) else tuple(comp), **(settings or {}), "method": name}
    try:
        checks = FusionChecks(found, build_config(values, source="check_fusion"), samples)
    except (AssertionError, MopefuseError):
        raise
    except Exception as error:
        fix = "take (config, encoders, num_labels) in __init__, and call super().__init__(config, encoders) first"
        raise AssertionError(f"{name}: cannot be built: {type(error).__name__}: {error} · fix: {fix}") from error
    enforce(_parts(checks))
    return checks.build()


def _parts(check: FusionChecks) -> list[Part]:
    keep = "keep nothing on self in forward(); pass it through arguments and return values"
    parts = [
        Part(
            "gives finite logits for each sample",
            check.output,
            "return Output(logits_BN) with one row for each sample and one column for each of num_labels",
        ),
        Part(
            "gives the same logits each time in evaluation mode",
            check.deterministic,
            "use dropout and noise in training mode only",
        ),
        Part("keeps no state between calls", check.keeps_no_state, keep),
        Part(
            "computes each sample independently of its batch",
            check.samples_are_independent,
            "compute each row from its own sample: no mean, norm or attention over the batch",
        ),
        Part(
            "sends gradients to its trainable parameters, and to no others",
            check.gradients,
            "use every parameter in forward(); read frozen encoders with self.pooled_feature() or run_frozen()",
        ),
        Part(
            "uses features that were computed earlier",
            check.cached_features,
            "get features of the sides in self.frozen, and of no others, with self.pooled_feature(side, batch)",
        ),
        Part(
            "continues from layers that were computed earlier",
            check.cached_prefixes,
            "leave prefix_layers empty, or pass start=self.prefix(side, batch) to the encoder, and prompt no earlier layer",
        ),
        Part(
            "saves everything that it trains",
            check.state_round_trip,
            "keep what is learned in parameters, and constants that belong to it in buffers",
        ),
        Part("can be copied and sent to data workers", check.copies, "keep no open files, locks or lambdas on self"),
        Part(
            "rejects samples that lack a required modality",
            check.missing_is_refused,
            "leave collate and requirements as they are, or set supports_multiple_comps = True "
            "if it handles missing modalities",
        ),
        Part(
            "handles samples that lack an optional modality",
            check.missing_is_handled,
            "pass batch=batch to self.classify(), or use self.replace_missing(side, feature_BC, batch)",
        ),
    ]
    return parts
