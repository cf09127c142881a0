"""Settings of single fusion methods, each a section of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mopefuse.config.section import MANY, MAX_TOKENS, WIDEST, Section


class QMF(Section):
    """Late fusion weighted by the confidence of each side (method qmf); `head_hidden` is the width of its heads."""

    scale: float = Field(0.1, gt=0, description="factor that turns an encoder's energy score into its weight")
    rank_weight: float = Field(
        1.0, ge=0, description="weight of the loss that makes a side less confident about samples that it predicts badly"
    )
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout on the hidden layer of each head, in training")


class Flamingo(Section):
    """Gated cross-attention between the layers of the main encoder (method flamingo); `prompts.layers` are its layers."""

    width: int = Field(128, ge=1, le=WIDEST, description="width of queries, keys and values; a multiple of heads")
    heads: int = Field(4, ge=1, le=256, description="attention heads")
    hidden: int = Field(256, ge=1, le=WIDEST, description="hidden width of the feed-forward networks")
    resampled: int = Field(
        16,
        ge=0,
        le=MAX_TOKENS,
        description="number of learned queries of the resampler, for each complementary encoder; 0: no resampling",
    )
    resampler_layers: int = Field(1, ge=1, le=64, description="number of layers of the resampler")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="dropout on attention and in the feed-forward networks, in training"
    )

    @model_validator(mode="after")
    def _whole_heads(self) -> Flamingo:
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, which is not a multiple of heads, {self.heads}")
        return self


class Regression(Section):
    """The loss of regression, whose targets are standardised."""

    loss: Literal["mse", "mae", "huber", "quantile"] = Field(
        "mse",
        description="loss of predicted numbers: squared error (mse), absolute error (mae), squared up to delta and absolute "
        "from there (huber), or that of quantiles (quantile), which also predicts intervals",
    )
    delta: float = Field(1.0, gt=0, description="error from which the loss huber is linear, in standard deviations")
    quantiles: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = Field(
        (0.05, 0.5, 0.95), description="quantiles that are predicted with the loss quantile; 0.5 must be among them"
    )

    @model_validator(mode="after")
    def _with_median(self) -> Regression:
        if 0.5 not in self.quantiles or list(self.quantiles) != sorted({*self.quantiles}):
            raise ValueError("quantiles must be ascending and include 0.5, the predicted value")
        return self


class Segmentation(Section):
    """The decoder of segmentation, from the tokens of several layers of main to a map for each class, and its loss."""

    decoder: Literal["linear", "fpn"] = Field(
        "linear",
        description="a network on the tokens of each place (linear), or a light feature pyramid that mixes neighbours (fpn)",
    )
    width: int = Field(128, ge=1, le=WIDEST, description="hidden width of the decoder")
    upsample: int = Field(4, ge=1, le=32, description="with decoder=linear: values per token and side in the predicted map")
    layers: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None = Field(
        None, description="layers of main whose input the decoder takes, besides its output; default: 1/4, 1/2 and 3/4 of all"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout in the decoder, in training")
    dice: float = Field(1.0, ge=0, description="weight of the Dice loss, which is added to the cross-entropy")
    size: Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="height and width in pixels at which masks are compared; default: that of most masks, at most 224 for the "
        "longer side",
    )


class Retrieval(Section):
    """The embeddings of retrieval, and the projections that compute them."""

    width: int = Field(256, ge=1, le=WIDEST, description="numbers in an embedding")
    dropout: float = Field(0.3, ge=0, lt=1, description="dropout on the input of the projections, in training")
    landmarks: int = Field(
        1024, ge=1, le=WIDEST, description="training rows to which conditional compares each feature, at most"
    )


class Lora(Section):
    """Low-rank adaptation (LoRA) of an encoder."""

    rank: int = Field(8, ge=1, le=WIDEST, description="rank r of the two matrices")
    alpha: float = Field(16.0, ge=0, description="the update is scaled by alpha / r; 0 disables LoRA")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the two matrices, in training")
    targets: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = Field(
        None, description="names of the linear layers to adapt; default: the query and value projections"
    )


class CompTuning(Section):
    """What is trained in the complementary encoder."""

    mode: Literal["frozen", "prompts", "lora", "full"] = Field(
        "frozen",
        description="how conditional trains the complementary encoder: not at all (frozen), with static prompts (prompts), "
        "with LoRA (lora) or fully (full)",
    )
    length: int = Field(4, ge=1, le=MAX_TOKENS, description="tokens of each static prompt, if mode is prompts")


class Inserted(Section):
    """Tokens that some methods insert in front of the main encoder's own."""

    prompts: int = Field(20, ge=0, le=MAX_TOKENS, description="number of learned tokens of promptfuse and blindprompt")
    images: int = Field(4, ge=1, le=MAX_TOKENS, description="number of tokens that mmbt and p-mmbt make from an image")


class Interactive(Section):
    """Interactive prompting (method pmf): both encoders exchange prompts in their last layers."""

    layers: int = Field(2, ge=0, le=MANY, description="the encoders exchange prompts in their last N layers")
    queries: int = Field(
        4, ge=0, le=MAX_TOKENS, description="query prompts: a layer's output for them is passed to the other encoder"
    )
    query_context: int = Field(4, ge=0, le=MAX_TOKENS, description="query context prompts: read by the query prompts only")
    fusion_context: int = Field(
        4, ge=0, le=MAX_TOKENS, description="fusion context prompts: used together with the prompts from the other encoder"
    )
    bottleneck: int | None = Field(
        None,
        ge=1,
        le=WIDEST,
        description="hidden width of the mapping to the other encoder; default: half the larger encoder width",
    )


class Linear(Section):
    """Logistic regression on standardised frozen features (method linear, or a warm start)."""

    features: Literal["concat", "main", "comp", "average"] = Field(
        "concat",
        description="concat: all features together; main or comp: one encoder's features; average: mean prediction of one "
        "regression per encoder",
    )
    strengths: tuple[Annotated[float, Field(ge=1e-10, le=1e10)], ...] = Field(
        (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
        min_length=1,
        max_length=100,
        description="values of C to try, the inverse of the regularisation strength",
    )
    max_iter: int = Field(300, ge=1, le=100_000, description="maximum iterations for each C")


class MLP(Section):
    """A network with one hidden layer on standardised frozen features (method mlp); `head_hidden` is its width."""

    dropout: float = Field(0.2, ge=0, lt=1, description="dropout on the hidden layer, in training")


class CrossAttention(Section):
    """Attention of comp's features to the main encoder's output tokens (method cross-attention)."""

    queries: int = Field(
        4,
        ge=1,
        le=MAX_TOKENS,
        description="number of queries; each is a shared projection of comp's feature plus its own learned vector",
    )
    width: int = Field(128, ge=1, le=WIDEST, description="width of queries, keys and values; a multiple of heads")
    heads: int = Field(4, ge=1, le=256, description="attention heads")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="dropout on attention, on its output, and on the hidden layer of the head, in training"
    )

    @model_validator(mode="after")
    def _whole_heads(self) -> CrossAttention:
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}, which is not a multiple of heads, {self.heads}")
        return self
