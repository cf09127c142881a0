"""Conditional prompt tuning: the complementary modality conditions the prompts of the main one at every layer.

Jiang et al., arXiv 2312.03734, revised as MoPE, arXiv 2403.10568. Prompts enter as keys and values, which is equivalent to
the papers' inserted tokens (`gate: none`), or through a separate gated attention (`gate: zero`). Beyond the papers:

* `gate: zero`, and FiLM in addition to prompts or instead of them.
* `head_features: all`: the head takes the pooled features of all encoders, and with `head_hidden` it is a linear layer plus an
  MLP of them. `tokens`: it also takes what cross-attention reads from the output tokens of the prompted main encoder.
* `warm_start: auto`: simple models on the frozen features, and cross-attention to the frozen tokens, are compared
  (`mopefuse.fusion.baselines`), and step 0 is the best of them. A later step is selected only if it is better on validation by
  more than noise. `linear` considers logistic regression on all features only.
* Several complementary encoders, each a separate condition. A modality that a sample lacks is replaced by a learned
  condition.
* `condition: tokens`: the mapped prompt is computed from the output tokens of a complementary encoder, not from psi.

Shapes: B batch, C width of psi, N labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mopefuse.config.method_settings import MLP, CrossAttention
from mopefuse.config.schema import Prompts, RunConfig
from mopefuse.core.error_codes import ConfigCode
from mopefuse.core.precision import apply_without_autocast, normalize_feature, to_float32
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder, Prefix
from mopefuse.errors import ConfigError
from mopefuse.fusion._static_prompts import build_static_stack, initial_bound
from mopefuse.fusion.base import Fusion, Output
from mopefuse.fusion.baselines import Model, fit_baselines
from mopefuse.fusion.mlp_fit import NetworkSettings
from mopefuse.fusion.regression import Advance, FitSettings, Fitted, Fold, fit_heads
from mopefuse.fusion.token_reader import TokenReader
from mopefuse.fusion.token_reader_fit import Reading, ReadingSettings
from mopefuse.fusion.wide_head import WideHead, head_state
from mopefuse.prompts.resampler import ConditionTokens
from mopefuse.prompts.stack import ConditionedPrompts, PromptStack, fill_prompt_lengths

TOKEN_DROPOUT = 0.4
"""Default of ``prompts.token_dropout`` for a ViT; see docs/results.md."""
ROUTER_RATE = 4.0
"""Numerator of the default of ``router.lr_factor``, in units of the temperature; see docs/results.md."""


class ConditionalFusion(Fusion):
    """Complementary encoders condition the prompts of the main encoder, whose pooled feature is classified.

    Limits: without prompts it equals `main-only`, a linear probe of the main encoder; with one expert it is conditional
    prompting without routing; with static prompts alone it is deep prompt tuning, independent of the other modality.

    Raises:
        ConfigError: the complementary encoder is tuned but has no effect; `warm_start=linear` with ungated prompts or with
            `either`.
        EncoderError: the main encoder has no promptable layer; the complementary encoder has none although
            `comp_tuning.mode=prompts`, does not support LoRA although `comp_tuning.mode=lora`, or does not provide its
            tokens although `prompts.condition=tokens`.
    """

    supports_multiple_comps: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        r"^stack\.router\.": "router",
        r"^stack\..*static_SD$": "static prompts",
        r"^stack\..*experts_KPD$": "prompt experts",
        r"^stack\.(trunk|.*mapper)": "mapper",
        r"^stack\.resamplers\.": "resampler",
        r"^stack\..*\.films?\.": "FiLM",
        r"^stack\..*gate_H$": "gates",
        r"^comp\d*_stack\.": "complementary prompts",
        r"^head_comp\.": "head of the complementary side alone",
        r"^reader\.": "cross-attention",
        **Fusion.parts,
    }

    sections: ClassVar[tuple[str, ...]] = (
        "warm_start",
        "head_features",
        "head_dropout",
        "prompts",
        "router",
        "comp_tuning",
        "mlp",
        "cross_attention",
    )
    dependencies: ClassVar[dict[str, str]] = {
        **Fusion.dependencies,
        r"^stack\.layers\.": "main",
        r"^stack\.router\.of_main": "main",
        r"^stack\.router\.(weight_NKC|bias_NK|of_comp_NQC)$": "comp features",
        r"^stack\.router\.others\.(\w+)$": r"\1 features",
        r"^stack\.trunk\.0\.": "comp features",
        r"^stack\.trunks\.(\w+)\.0\.": r"\1 features",
        r"^stack\.resamplers\.(\w+)\.(?:trunk\.0\.|absent_C)": r"\1 features",
        r"^(comp\d*)_stack\.": r"\1",
        r"^reader\.query\.(\w+)\.": r"\1 features",
        r"^reader\.(norm|key|value)\.": "main",
    }

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        main = self.encoder("main")
        main.require_promptable(fix="use it as --comp instead")
        config = self.config
        _check_token_dropout(config, main)
        prompts = config.prompts
        assert prompts.init is not None
        widths = {side: self.encoder(side).feature_width for side in self.comps}
        self.stack = PromptStack(
            prompts,
            config.router,
            widths=main.widths,
            heads=main.heads,
            conditions=widths,
            bound=prompts.init,
            tokens=self._token_widths() if prompts.condition == "tokens" else None,
        )
        if config.warm_start == "linear":
            _check_warm_start(config)
        self.starts_fitted = warm_start_of(config) != "none"
        if self.starts_fitted:
            self.standardise_features()
        width = sum(self.encoder(side).feature_width for side in self.head_sides)
        self.reader: TokenReader | None = None
        if config.head_features == "tokens":
            attention, token_width = config.cross_attention, main.require_tokens(fix="use --head-features all")
            self.reader = TokenReader(attention, token_width, widths)
            width += attention.queries * attention.width
        self.head: nn.Module = nn.Linear(width, num_labels)
        if config.head_hidden:
            dropout = config.mlp.dropout if config.head_dropout is None else config.head_dropout
            self.head = WideHead(width, config.head_hidden, num_labels, dropout)
        self.tokens_to_fit = ("main",) if self.reader and config.head_hidden and warm_start_of(config) == "auto" else ()
        self.head_comp = self.make_head(sum(widths.values()), num_labels) if config.either else None
        uses_comp = self.stack.conditional or len(self.head_sides) > 1 or self.head_comp is not None
        if not uses_comp and config.comp_tuning.mode != "frozen":
            raise ConfigError(
                ConfigCode.TUNED_ENCODER_UNUSED,
                "the complementary encoder would be tuned, but neither prompts nor the head depend on it",
                where="comp_tuning",
                fix="add dynamic or mapped prompts, or --head-features all",
            )
        for side in self.comps:
            self._set_up_tuning(side, prompts.gate)
        if not uses_comp:
            self.reads = ("main",)
        elif config.comp_tuning.mode == "frozen":
            self.frozen = self.comps
            self.reads_tokens = self.comps if len(self.stack.resamplers) else ()
        first = min(map(int, self.stack.layers), default=0)
        self.prefix_layers = {"main": first} if first and not main.trainable else {}
        absent = [side for side in self.optional_sides if side in self.reads and side != "main"]
        self.stack.add_missing_tokens(absent)
        if self.stack.reads_psi or len(self.head_sides) > 1 or self.head_comp is not None:
            self.add_missing_embeddings(absent)

    def _token_widths(self) -> dict[str, int]:
        """Width of the output tokens of each complementary encoder.

        Raises:
            EncoderError: one of them does not provide its tokens.
        """
        where, fix = "--condition tokens", "use --condition pooled, or a different encoder as --comp"
        return {side: self.encoder(side).require_tokens(fix=fix, where=where) for side in self.comps}

    def _set_up_tuning(self, side: str, gate: Literal["none", "zero"]) -> None:
        """Make a complementary encoder trainable according to `comp_tuning`."""
        encoder, tuning = self.encoder(side), self.config.comp_tuning
        if tuning.mode == "prompts":
            encoder.require_promptable(fix="add --set comp_tuning.mode=frozen")
            prompts = Prompts(static=tuning.length, gate=gate, dropout=self.config.prompts.dropout)
            self.add_module(f"{side}_stack", build_static_stack(prompts, encoder))
        elif tuning.mode == "full":
            encoder.tune()
        elif tuning.mode == "lora":
            encoder.adapt(self.config.lora)

    @property
    def optional_sides(self) -> tuple[str, ...]:
        """Sides that a sample may lack; with `either` also the main side, in whose absence `head_comp` classifies."""
        found = super().optional_sides
        return found if found or not self.config.either else ("main",)

    @property
    def comps(self) -> tuple[str, ...]:
        """The complementary sides."""
        return self.uses[1:]

    @property
    def head_sides(self) -> tuple[str, ...]:
        """The main encoder alone; every side with a warm start or with `head_features` all."""
        return self.uses if self.standard is not None or self.config.head_features != "main" else ("main",)

    @property
    def heads(self) -> dict[str, tuple[str, ...]]:
        """Sides by head; with `either` there is also `head_comp`, on the complementary sides."""
        return super().heads | ({} if self.head_comp is None else {"head_comp": self.comps})

    def unused_sections(self) -> list[str]:
        """List changed sections without effect, such as `linear` without a warm start."""
        unused = [section for section in super().unused_sections() if section != "linear" or self.standard is None]
        unused += ["mlp"] if self.config.mlp != MLP() and not self.config.head_hidden else []
        return unused + (["cross_attention"] if self.config.cross_attention != CrossAttention() and not self.reader else [])

    @classmethod
    def resolve(cls, config: RunConfig, encoders: Mapping[str, Encoder]) -> RunConfig:
        """Return `config` with unset prompt lengths and initial bound replaced by the papers', and other unset settings of
        the prompts and the router by their defaults.
        """
        main, prompts = encoders["main"], config.prompts
        if prompts.token_dropout is None:
            dropped = 0.0 if main.leading_tokens is None or config.train.compile else TOKEN_DROPOUT
            prompts = prompts.model_copy(update={"token_dropout": dropped})
        if main.widths:
            prompts = fill_prompt_lengths(prompts, main.modality)
            prompts = prompts.model_copy(update={"init": prompts.init or initial_bound(main)})
        features = config.head_features or ("tokens" if main.token_width else "all")
        router = config.router
        if router.lr_factor is None:
            router = router.model_copy(update={"lr_factor": _router_lr_factor(config, encoders)})
        return config.model_copy(update={"prompts": prompts, "router": router, "head_features": features})

    def learning_rate_group(self, name: str) -> str:
        """See `Fusion.learning_rate_group`."""
        if name.startswith("reader."):
            return "head"
        return "router" if name.startswith("stack.router.") else super().learning_rate_group(name)

    @property
    def prompt_kinds(self) -> tuple[str, ...]:
        """The kinds of prompts that the main encoder has: static, dynamic, mapped."""
        return self.stack.kinds

    def without_prompts(self, kind: str) -> AbstractContextManager[None]:
        """Disable one kind of the main encoder's prompts within the context."""
        return self.stack.without_prompts(kind)

    def fit(self, train: Fold, val: Fold, how: FitSettings, advance: Advance) -> Fitted:
        """Fit the model on frozen features that training starts from; see `Fusion.fit`."""
        config = self.config
        if config.warm_start == "linear":
            fitted = Fitted.of_regressions(fit_heads({"head": tuple(train.features)}, train, val, how, advance), how.task)
            regression = (fitted.state.pop("head.weight"), fitted.state.pop("head.bias"))
            return fitted._replace(state=fitted.state | self._head_state(regression))
        network = NetworkSettings(config.head_hidden, config.mlp.dropout, config.seed) if config.head_hidden else None
        reading = None
        if self.tokens_to_fit and network is not None:
            reading = ReadingSettings(config.cross_attention, self.encoder("main").token_width, network)
        found = fit_baselines(train, val, how, network, advance, seed=config.seed, reading=reading)
        state = {**found.standard, **self._head_state(found.best.model)}
        differs = found.trained_from is not found.best
        train_from = self._head_state(found.trained_from.model) if differs else {}
        return Fitted(state, found.summary(), train_from, found.facts())

    def _head_state(self, model: Model) -> dict[str, Tensor]:
        reader: dict[str, Tensor] = {}
        if isinstance(model, Reading):
            reader, model = {f"reader.{name}": value for name, value in model.reader.items()}, model.network
        return reader | {f"head.{name}": value for name, value in head_state(self.head, model).items()}

    def psi(self, side: str, batch: Batch) -> Tensor:
        """Pooled feature of a complementary encoder, (B, C)."""
        return self.read(side, batch)[0]

    def read(self, side: str, batch: Batch) -> tuple[Tensor, ConditionTokens | None]:
        """psi of a complementary encoder, (B, C), and its output tokens if prompts are computed from them."""
        if side in self.frozen and side not in self.reads_tokens:
            return self.pooled_feature(side, batch), None
        missing_B = batch.missing.get(side)
        if side in self.frozen:
            psi_BC, values_BLC, mask_BL = self.feature_and_tokens(side, batch)
            return psi_BC, ConditionTokens(values_BLC, mask_BL, missing_B)
        stack = getattr(self, f"{side}_stack", None)
        encoded = self.encoder(side).encode(batch.inputs[side], stack and stack.condition({}))
        if side not in self.stack.resamplers:
            return encoded.pooled_BC, None
        tokens = ConditionTokens(normalize_feature(encoded.tokens_BLD), encoded.mask_BL, missing_B)
        return to_float32(encoded.pooled_BC), tokens

    def start_of_main(self, batch: Batch) -> Prefix | None:
        """The tokens from which the main encoder continues, of which some are dropped in training; None to run all layers."""
        start, fraction = self.prefix("main", batch), self.config.prompts.token_dropout
        if not (self.training and fraction):
            return start
        main, first = self.encoder("main"), self.prefix_layers.get("main", 0)
        assert main.leading_tokens is not None
        return (start or main.compute_prefix(batch.inputs["main"], first)).drop_tokens(fraction, main.leading_tokens)

    def condition(self, batch: Batch) -> tuple[ConditionedPrompts | None, dict[str, Tensor], dict[str, Tensor]]:
        """The prompts of a batch, None without any; and by side, its condition (B, C) and its pooled feature (B, C)."""
        read = {side: self.read(side, batch) for side in self.comps if side in self.reads}
        psi_BC = {side: psi for side, (psi, _) in read.items()}
        tokens = {side: found for side, (_, found) in read.items() if found is not None}
        conditions_BC = {side: self.replace_missing(side, normalize_feature(psi), batch) for side, psi in psi_BC.items()}
        conditioned = self.stack.condition(conditions_BC, tokens) if len(self.stack.layers) else None
        return conditioned, conditions_BC, psi_BC

    def forward(self, batch: Batch) -> Output:
        """Compute logits (B, N) and the routing of each routed layer."""
        conditioned, conditions_BC, psi_BC = self.condition(batch)
        start = self.start_of_main(batch)
        encoded = self.encoder("main").encode(batch.inputs["main"], conditioned, start=start)
        pooled = (encoded.pooled_BC,) if len(self.head_sides) == 1 else (encoded.pooled_BC, *psi_BC.values())
        features = self.normalise(*pooled, batch=batch)
        if self.reader is not None:
            queried = dict(zip(self.comps, features[1:], strict=True))
            read_BX = self.reader(queried, normalize_feature(encoded.tokens_BLD), encoded.mask_BL)
            features = (*features, to_float32(read_BX))
        logits_BN = apply_without_autocast(self.head, torch.cat(features, dim=-1))
        alone_BN = None
        if self.head_comp is not None:
            alone_BN = apply_without_autocast(self.head_comp, torch.cat(list(conditions_BC.values()), dim=-1))
            if "main" in batch.missing:
                logits_BN = torch.where(batch.missing["main"][:, None], alone_BN.to(logits_BN.dtype), logits_BN)
        return Output(logits_BN, conditioned.routing() if conditioned else None, alone_BN)


def warm_start_of(config: RunConfig) -> Literal["none", "linear", "auto"]:
    """The warm start of a configuration; ``auto`` is none if the untrained model could not equal a baseline."""
    possible = (config.prompts.gate == "zero") and not config.either
    return config.warm_start if possible or config.warm_start == "linear" else "none"


def _router_lr_factor(config: RunConfig, encoders: Mapping[str, Encoder]) -> float:
    """The default of `router.lr_factor`: 4 temperature / sqrt(C), where C is the width of the widest input of the router.

    AdamW changes each weight by about the learning rate, and a routing logit is a sum over C features of unit variance,
    divided by the temperature. With the learning rate of the prompts, a step therefore changes a logit by several units: the
    softmax saturates before the experts differ, and the router is hardly trained any more.
    """
    read = [side for side in encoders if side != "main" or config.router.kind == "joint"]
    return ROUTER_RATE * config.router.temperature / math.sqrt(max(encoders[side].feature_width for side in read))


def _check_token_dropout(config: RunConfig, main: Encoder) -> None:
    """Check that the main encoder runs on some of its tokens."""
    if not config.prompts.token_dropout:
        return
    fix, where = "remove prompts.token_dropout", "prompts.token_dropout"
    if main.leading_tokens is None:
        what = f"tokens of {main.spec} cannot be dropped: its layers depend on where, or how many, they are"
        raise ConfigError(ConfigCode.TOKENS_NOT_DROPPABLE, what, where=where, fix=f"use a ViT as --main, or {fix}")
    if config.train.compile:
        what = "a compiled model cannot drop tokens"
        raise ConfigError(ConfigCode.TOKENS_NOT_DROPPABLE, what, where=where, fix=f"{fix}, or train.compile")


def _check_warm_start(config: RunConfig) -> None:
    """Check that a warm-started model equals the regression before the first step."""
    if config.prompts.gate != "zero":
        raise ConfigError(
            ConfigCode.WARM_START_NEEDS_GATE,
            "warm_start=linear requires prompts.gate=zero",
            where="prompts.gate",
            fix="use --gate zero",
        )
    if config.either:
        what = "warm_start=linear needs the main modality of every sample, which --either makes optional"
        raise ConfigError(ConfigCode.WARM_START_NEEDS_MAIN, what, where="--either", fix="remove --warm-start or --either")
