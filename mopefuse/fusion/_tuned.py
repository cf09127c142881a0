"""What fusion methods other than the conditional one share: encoders that learn in one of four ways.

Shapes: B batch, C width of a pooled feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from mopefuse.config.schema import RunConfig
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoded, Encoder, PromptAt, run_frozen
from mopefuse.fusion._static import static_stack
from mopefuse.fusion.base import Fusion
from mopefuse.prompts.stack import PromptStack


class TunedFusion(Fusion):
    """A fusion whose encoders are frozen (``probe``), have deep static prompts (``prompt``) or LoRA, or are tuned (``full``).

    Prompts have the length, layers, gate, dropout and start of the section `prompts`. Limits: ``prompt`` of length 0 is
    ``probe``, and so are ``prompt`` with gates of 0 and ``lora`` with an alpha of 0, to the bit.

    Raises:
        EncoderError: an encoder that cannot be prompted or adapted, and is to be.
    """

    prompts_always: ClassVar[bool] = False  # whether settings of `prompts` count however encoders learn
    own_tune: ClassVar[str] = "probe"  # where the setting `tune` says nothing
    parts: ClassVar[dict[str, str]] = {
        r"^stacks\..*static_SD$": "static prompts",
        r"^stacks\..*gate_H$": "gates",
        **Fusion.parts,
    }
    sections: ClassVar[tuple[str, ...]] = ("tune", "prompts")
    bonds: ClassVar[dict[str, str]] = {**Fusion.bonds, r"^stacks\.(\w+)\.": r"\1"}

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder]) -> None:
        super().__init__(config, encoders)
        self.tune = config.tune or self.own_tune
        self.stacks = nn.ModuleDict()
        for side in self.uses:
            encoder = self.encoder(side)
            if self.tune == "full":
                encoder.tune()
            elif self.tune == "lora":
                encoder.adapt(config.lora)
            elif self.tune == "prompt":
                encoder.require_promptable(fix="use --tune probe, lora or full")
                stack = static_stack(config.prompts, encoder)
                if len(stack.layers):
                    self.stacks[side] = stack
        self.frozen = tuple(side for side in self.uses if side not in self.stacks and not self.encoder(side).learns)

    def resolve(self, config: RunConfig) -> RunConfig:
        """`config` with the way that encoders are tuned in."""
        return config.model_copy(update={"tune": self.tune})

    def unused_sections(self) -> list[str]:
        """Also the prompts, where there are none."""
        unused = super().unused_sections()
        count = self.tune == "prompt" or self.prompts_always or self.config.prompts == RunConfig(main="", comp="").prompts
        return unused if count else [*unused, "prompts"]

    def prompts(self, side: str) -> PromptAt | None:
        """The static prompts of a side; None if it has none."""
        if side not in self.stacks:
            return None
        stack = self.stacks[side]
        assert isinstance(stack, PromptStack)
        return stack.condition({})

    def encode(self, side: str, batch: Batch) -> Encoded:
        """A side with its static prompts, if it has any; without a graph where nothing of it learns."""
        if side not in self.stacks and not self.encoder(side).learns:
            return run_frozen(self.encoder(side), batch.inputs[side])
        return self.encoder(side).encode(batch.inputs[side], self.prompts(side))

    def pooled(self, side: str, batch: Batch) -> Tensor:
        """Pooled feature of a side (B, C), computed earlier where nothing of it learns."""
        return self.feature(side, batch) if side in self.frozen else self.encode(side, batch).pooled_BC
