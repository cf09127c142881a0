"""Settings of the optimizer and its schedule, and of how training is divided."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mopefuse.config.section import MANY, Section


class Train(Section):
    """The optimizer and its schedule."""

    epochs: int = Field(10, ge=0, le=MANY, description="passes over the training data")
    max_steps: int | None = Field(
        None, ge=1, le=MANY, description="stop after this many optimizer steps, even if the epochs would allow more"
    )
    batch_size: int = Field(32, ge=1, le=MANY, description="samples per optimizer step, summed over all processes")
    accumulate: int = Field(
        1, ge=1, le=65_536, description="split a batch into this many parts and accumulate gradients, to save memory"
    )
    lr: float | None = Field(
        None,
        gt=0,
        description="learning rate; mlp, qmf and flamingo: 1e-3; cross-attention: 3e-4; other methods, and conditional with "
        "compat: 4e-4 if main takes images, else 5e-4",
    )
    lr_comp: float | None = Field(
        None, gt=0, description="learning rate of a trained complementary encoder; default: lr, or lr_tuned if fully tuned"
    )
    lr_tuned: float = Field(2e-5, gt=0, description="learning rate of a fully tuned main encoder")
    lr_head: float | None = Field(
        None,
        gt=0,
        description="learning rate of the head; with other methods, the value of lr; with compat, the value of lr, or lr/50 "
        "after a warm start",
    )
    weight_decay: float = Field(1e-3, ge=0, description="weight decay of AdamW")
    clip: float = Field(1.0, gt=0, description="maximum norm of the gradient")
    schedule: Literal["paper", "cosine", "one-cycle", "constant"] = Field(
        "paper", description="learning-rate schedule; paper: multiplied by 0.4 after 30 % and again after 60 % of training"
    )
    warmup: float = Field(0.0, ge=0, lt=1, description="fraction of training used for a linear warm-up")
    evals_per_epoch: int = Field(1, ge=1, le=1000, description="evaluations on validation per epoch")
    patience: int | None = Field(
        None, ge=1, le=MANY, description="stop after this many evaluations in which neither score nor loss improved"
    )
    modality_dropout: float = Field(
        0.0, ge=0, lt=1, description="fraction of training samples from which each optional modality is removed"
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="weights of classes in the loss; balanced: rare classes count as much as frequent ones"
    )
    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["tuned"] = Field(
        0.5, description="multi-label data: probability from which a label is predicted; tuned: chosen on validation"
    )
    select: Literal["best", "last"] = Field("best", description="checkpoint to test: the best on validation, or the last")
    select_by: str | None = Field(
        None, min_length=1, description="metric on validation that selects the best checkpoint; default: that of the task"
    )
    checkpoint_every: int | None = Field(500, ge=1, le=MANY, description="also write a checkpoint every N steps")
    log_every: int = Field(20, ge=1, le=MANY, description="write a line to metrics.jsonl every N steps")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="number format; auto: bf16 if the GPU has it")
    compile: bool = Field(False, description="compile the model with torch.compile")
    checkpoint_activations: bool = Field(
        False, description="recompute activations in the backward pass instead of keeping them, to save memory"
    )
    shard: Literal["none", "main", "comp", "both"] = Field(
        "none",
        description="frozen encoders of which each process keeps only a part, if they are too large for one GPU; comp: all "
        "complementary encoders",
    )
