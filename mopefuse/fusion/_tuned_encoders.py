"""Base class of fusion methods whose encoders are tuned in one of four ways.

Shapes: B batch, C width of a pooled feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from mopefuse.config.schema import RunConfig
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder, EncoderOutput, PromptAt, run_frozen
from mopefuse.fusion._static_prompts import build_static_stack
from mopefuse.fusion.base import Fusion
from mopefuse.prompts.stack import PromptStack


class TunedFusion(Fusion):
    """Encoders are frozen (``probe``), prompted (``prompt``), adapted by LoRA (``lora``) or fine-tuned (``full``).

    Length, layers, gate, dropout and initial bound of the static prompts come from the section `prompts`. Limits: prompts
    of length 0, gates of 0 and ``lora`` with alpha 0 all equal ``probe``, bit for bit.

    Raises:
        EncoderError: an encoder that does not support the chosen tuning.
    """

    always_uses_prompts: ClassVar[bool] = False  # whether the section `prompts` has an effect for every `tune`
    default_tune: ClassVar[str] = "probe"  # used if the setting `tune` is unset
    parts: ClassVar[dict[str, str]] = {
        r"^stacks\..*static_SD$": "static prompts",
        r"^stacks\..*gate_H$": "gates",
        **Fusion.parts,
    }
    sections: ClassVar[tuple[str, ...]] = ("tune", "prompts")
    dependencies: ClassVar[dict[str, str]] = {**Fusion.dependencies, r"^stacks\.(\w+)\.": r"\1"}

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder]) -> None:
        super().__init__(config, encoders)
        assert self.config.tune is not None
        self.tune = self.config.tune
        self.stacks = nn.ModuleDict()
        for side in self.uses:
            encoder = self.encoder(side)
            if self.tune == "full":
                encoder.tune()
            elif self.tune == "lora":
                encoder.adapt(config.lora)
            elif self.tune == "prompt":
                encoder.require_promptable(fix="use --tune probe, lora or full")
                stack = build_static_stack(config.prompts, encoder)
                if len(stack.layers):
                    self.stacks[side] = stack
        self.frozen = tuple(side for side in self.uses if side not in self.stacks and not self.encoder(side).trainable)

    @classmethod
    def resolve(cls, config: RunConfig, encoders: Mapping[str, Encoder]) -> RunConfig:
        """Return `config` with `tune` set."""
        return config.model_copy(update={"tune": config.tune or cls.default_tune})

    def unused_sections(self) -> list[str]:
        """List changed sections without effect, including `prompts` if no encoder is prompted."""
        unused = super().unused_sections()
        unchanged = self.config.prompts == RunConfig(main="", comp="").prompts
        return unused if unchanged or self.always_uses_prompts or self.tune == "prompt" else [*unused, "prompts"]

    def prompts(self, side: str) -> PromptAt | None:
        """Static prompts of a side; None if it has none."""
        if side not in self.stacks:
            return None
        stack = self.stacks[side]
        assert isinstance(stack, PromptStack)
        return stack.condition({})

    def encode(self, side: str, batch: Batch) -> EncoderOutput:
        """Encode a side with its static prompts; no autograd graph is built if nothing in it is trainable."""
        if side not in self.stacks and not self.encoder(side).trainable:
            return run_frozen(self.encoder(side), batch.inputs[side])
        return self.encoder(side).encode(batch.inputs[side], self.prompts(side))

    def pooled(self, side: str, batch: Batch) -> Tensor:
        """Pooled feature (B, C) of a side; taken from the batch if it is frozen and was computed earlier."""
        return self.pooled_feature(side, batch) if side in self.frozen else self.encode(side, batch).pooled_BC
