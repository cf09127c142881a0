"""The variants that `mopefuse bench` compares: the frozen encoders alone, conditional prompts, and alternatives.

Shapes: B batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mopefuse.bench.inserted_tokens import as_tokens, why_not_insertable
from mopefuse.config.encoder_sides import specs
from mopefuse.config.method_defaults import CONDITIONAL, defaults_of
from mopefuse.config.schema import RunConfig
from mopefuse.config.setting_paths import merge
from mopefuse.core import device as devices
from mopefuse.core import distributed, registry
from mopefuse.data.base import Batch
from mopefuse.encoders._prompted import PromptedEncoder
from mopefuse.encoders._quantize import with_quantize
from mopefuse.encoders.base import Encoder, create_encoder, run_frozen
from mopefuse.encoders.tiny import TinyEncoder
from mopefuse.fusion.base import Fusion
from mopefuse.modalities.base import get_modality
from mopefuse.prompts.experts import importance_loss
from mopefuse.training.losses import task_loss
from mopefuse.training.optimizer import make_optimizer, with_learning_rates

LABELS = 10
FLOOR, UNGATED, TOKENS = "floor", "conditional, ungated", "conditional, as tokens"
DEFAULTS = "conditional, defaults of train, all cached"
HALF, QUARTER = (f"conditional, last {part} of the layers, all cached" for part in ("half", "quarter"))


@dataclass(frozen=True)
class Variant:
    """One row of the benchmark.

    Attributes:
        settings: override those of the pair.
        tokens: whether prompts are inserted as tokens instead of keys and values.
        cached: whether psi and the input of the first prompted layer are precomputed.
        part: prompts are in the last 1/part of the layers.
        bare: whether there is no fusion model, only the encoders.
        time_inference: whether inference is timed as well as training.
        quantize: format of the encoders' linear layers, see `encoders._quantize`; empty for that of their specs.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokens: bool = False
    cached: bool = False
    part: int = 1
    bare: bool = False
    time_inference: bool = False
    quantize: str = ""

    @property
    def own_encoders(self) -> bool:
        """Whether the variant may modify encoders and thus cannot share them with others."""
        return not self.bare and (self.settings.get("tune") == "full" or self.name == self.settings.get("method"))


def variants(
    experts: Sequence[int], methods: Sequence[str] = (), *, quantize: Sequence[str] = (), recompute: bool = False
) -> list[Variant]:
    """List the rows, of which the first two are the floor and conditional prompts with the first number of experts.

    Args:
        methods: further fusion methods, each with its defaults.
        quantize: formats; for each, a row of the floor and one of conditional prompts with quantised encoders.
        recompute: add a row of conditional prompts with activation checkpointing.
    """
    k, *more = experts
    usual: dict[str, Any] = {"prompts": {"experts": k}}
    ungated = {"prompts": {"experts": k, "gate": "none"}}
    recomputed = {**usual, "train": {"checkpoint_activations": True}}
    return [
        Variant(FLOOR, bare=True, time_inference=True),
        Variant(conditional(k), usual, time_inference=True),
        *(Variant(conditional(other), {"prompts": {"experts": other}}) for other in more),
        Variant(UNGATED, ungated),
        Variant(TOKENS, ungated, tokens=True),
        Variant("conditional, psi cached", usual, cached=True),
        Variant(HALF, usual, cached=True, part=2),
        Variant(QUARTER, usual, cached=True, part=4),
        Variant(DEFAULTS, merge(CONDITIONAL, {**usual, "warm_start": "none"}), cached=True),
        *([Variant("conditional, activations recomputed", recomputed)] if recompute else []),
        Variant("static prompts only", {"prompts": {"dynamic": 0, "mapped": 0}}),
        Variant("frozen features, linear probe", {"method": "late-concat"}),
        Variant("late-concat, fine-tuned", {"method": "late-concat", "tune": "full"}),
        *(Variant(name, {"method": name}, time_inference=True) for name in methods),
        *(
            Variant(f"{name}, {kind} encoders", settings, bare=not settings, time_inference=True, quantize=kind)
            for kind in quantize
            for name, settings in ((FLOOR, {}), (conditional(k), usual))
        ),
    ]


def conditional(experts: int) -> str:
    """Name of the row of conditional prompts with a number of experts."""
    return f"conditional, k = {experts}"


def missing(variant: Variant, encoders: Mapping[str, Encoder]) -> str:
    """Reason why a row is not available with these encoders; empty if it is."""
    return why_not_insertable(encoders["main"]) if variant.tokens else ""


def random_inputs(encoder: Encoder, batch: int, text_length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random images, or random ids as texts of `text_length` tokens (fewer if that exceeds the encoder's maximum)."""
    preprocess: Any = encoder.preprocess
    if get_modality(encoder.modality).is_picture:
        return {"pixels": torch.randint(256, (batch, *preprocess.size, 3), dtype=torch.uint8, generator=generator)}
    length = preprocess.length or min(text_length, preprocess.max_tokens)
    ids = torch.randint(preprocess.vocabulary or 1000, (batch, length), generator=generator)
    mask = torch.arange(length)[None] < min(text_length, length)
    return {"ids": ids, "mask": mask.expand(batch, -1).clone()}


class Subject:
    """A variant ready to be timed: `step` is a training step on one batch, `infer` a forward pass.

    For the floor, both run the complementary and the main encoder, and `step` also the main backward pass.
    """

    def __init__(
        self,
        variant: Variant,
        config: RunConfig,
        encoders: Mapping[str, Encoder],
        batch: Batch,
        device: torch.device,
        *,
        compiled: bool = False,
    ) -> None:
        self.variant, self.encoders, self.device = variant, encoders, device
        settings = dict(variant.settings)
        own = defaults_of(settings) if "method" in settings else {}
        values = merge(config.model_dump(), merge(own, settings))
        if variant.part > 1:
            last = max(1, len(encoders["main"].widths) // variant.part)
            values = merge(values, {"prompts": {"layers": f"last:{last}"}})
        self.config = RunConfig.model_validate(values)
        method = registry.load(registry.FUSION, self.config.method)
        torch.manual_seed(0)
        self.model: Fusion = method(self.config, encoders, LABELS)
        devices.move_to_device(self.model, device)
        self.recompute = self.config.train.checkpoint_activations
        if variant.bare:
            self.model = self.model.requires_grad_(False)
        tuned = [side for side in self.model.uses if self.model.encoder(side).tuned]
        modality = {side: self.model.encoder(side).modality for side in self.model.uses}
        self.config = with_learning_rates(self.config, modality, tuned)
        self.batch = self._with_features(batch) if variant.cached else batch
        self.optimizer = None if variant.bare or self.model.closed_form else make_optimizer(self.model, self.config.train)
        self._bare: Any = devices.compile_as_one_graph(self._both_encoders) if compiled else self._both_encoders
        self._forward: Any = devices.compile_as_one_graph(self.model) if compiled else self.model

    def _with_features(self, batch: Batch) -> Batch:
        with torch.no_grad():
            psi_BC = self.model.pooled_feature("comp", batch)
        prefixes = {
            side: self.model.encoder(side).compute_prefix(batch.inputs[side], layer).tokens_BLD.half()
            for side, layer in self.model.prefix_layers.items()
        }
        return Batch({"main": batch.inputs["main"]}, {"comp": psi_BC}, batch.targets, batch.index, prefixes=prefixes)

    @property
    def trains(self) -> bool:
        """Whether there is a training step."""
        return self.variant.bare or self.optimizer is not None

    @property
    def encoder_bytes(self) -> int:
        """Size of the weights of both encoders in bytes."""
        return sum(p.numel() * p.element_size() for encoder in self.encoders.values() for p in encoder.parameters())

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return 0 if self.variant.bare else sum(self.model.breakdown().values())

    @property
    def artefact(self) -> int:
        """Size of the saved tensors in bytes."""
        return 0 if self.variant.bare else sum(t.numel() * t.element_size() for t in self.model.trainable_state_dict().values())

    def _configured(self) -> AbstractContextManager[None]:
        for encoder in self.encoders.values():  # shared between rows
            encoder.recompute = self.recompute
        return as_tokens(self.encoders["main"]) if self.variant.tokens else nullcontext()

    def warm_up(self) -> None:
        """Run once on one sample, so that lazy initialisation is not timed."""
        whole, self.batch = self.batch, self.batch.part(0, len(self.batch.index))
        (self.step if self.trains else self.infer)()
        self.batch = whole

    def step(self) -> None:
        """Run one training step."""
        with self._configured(), devices.autocast(self.config.train.precision, self.device):
            if self.variant.bare:
                handle = first_block(self.encoders["main"]).register_forward_pre_hook(_require_gradient, with_kwargs=True)
                try:
                    loss = self._bare(self.batch).float().square().mean()
                finally:
                    handle.remove()
            else:
                self.model.train()
                output = self._forward(self.batch)
                loss = task_loss(output, self.batch, self.model.task) / len(self.batch.index)
                if output.load_LK is not None:
                    loss = loss + self.config.router.importance_weight * importance_loss(output.load_LK)
        if self.optimizer is None:
            loss.backward()
            return
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        distributed.sum_gradients(self.model.trainable_parameters())
        torch.nn.utils.clip_grad_norm_(self.model.trainable_parameters(), self.config.train.clip)
        self.optimizer.step()

    @torch.no_grad()
    def infer(self) -> None:
        """Run one forward pass in evaluation mode."""
        with self._configured(), devices.autocast(self.config.train.precision, self.device):
            self.model.eval()
            (self._bare if self.variant.bare else self._forward)(self.batch)

    def _both_encoders(self, batch: Batch) -> Tensor:
        run_frozen(self.encoders["comp"], batch.inputs["comp"])
        return self.encoders["main"].encode(batch.inputs["main"]).pooled_BC


def first_block(encoder: Encoder) -> nn.Module:
    """First promptable layer of an encoder."""
    if isinstance(encoder, PromptedEncoder):
        return encoder._slots[0].block
    assert isinstance(encoder, TinyEncoder)
    return encoder.blocks[0]


def _require_gradient(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    hidden.requires_grad_()


def build_encoders(config: RunConfig, device: torch.device, quantize: str = "") -> dict[str, Encoder]:
    """Create the pair's encoders, quantised to a format if one is given, with seed 0 for random weights."""
    encoders = {}
    for side, spec in specs(config).items():
        torch.manual_seed(0)
        encoders[side] = create_encoder(with_quantize(spec, quantize) if quantize else spec).to(device)
    return encoders
