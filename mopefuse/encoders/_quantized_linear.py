"""A frozen linear layer whose weights are stored in 8 or 4 bits and multiplied in the type of its input.

torchao quantises the weights; the layer keeps the result in plain tensors, so that copying, saving, compiling, exporting and
sharding need no support for tensors of torchao. The weights are restored in each forward and backward pass and not kept
between the two: the backward pass of `torch.nn.functional.linear` would keep a floating-point copy of every layer.

Formats, all symmetric: ``int8`` with one scale for 32 weights; ``fp8`` (E4M3) with one scale per output; ``nf4``, 4 bits at the
quantiles of a normal distribution with one scale for 64 weights, itself stored in 8 bits (Dettmers et al.,
https://arxiv.org/abs/2305.14314).

Shapes: N outputs, K inputs, B any leading dimensions, G = K / 32 blocks of an output,
T = N * K / 64 blocks, S groups of blocks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mopefuse.core.error_codes import EncoderCode
from mopefuse.errors import EncoderError

BLOCK = 64  # weights that share a scale in nf4
_INT8_BLOCK = 32  # and in int8
_GROUP = 256  # largest number of nf4 scales that share a factor
_WITHOUT_FP8 = ("mps",)  # types of devices


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with quantised weights. ``forward`` takes (B, K) and returns (B, N).

    It is a `torch.nn.Linear` because libraries ask for one before they call a layer.

    Attributes:
        stored: names of the parameters that hold the weights.
        extra_parameters: parameters of the original layer minus those of this one.
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super(nn.Linear, self).__init__()  # without its weights
        self.kind, self.out_features, self.in_features = kind, linear.out_features, linear.in_features
        tensors = _QUANTIZE[kind](linear)
        self.stored = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().contiguous(), requires_grad=False))
        self.bias = linear.bias
        self.extra_parameters = linear.weight.numel() - sum(tensor.numel() for tensor in tensors.values())

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The restored weights (N, K) in float32, for code that reads them instead of calling the layer."""
        return self._restore(torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply with the restored weights, under autocast in its type."""
        x_BK = input
        device = x_BK.device.type
        if torch.is_autocast_enabled(device) and x_BK.dtype != torch.float64:
            x_BK = x_BK.to(torch.get_autocast_dtype(device))
        if torch.is_grad_enabled() and x_BK.requires_grad:
            stored = [getattr(self, name) for name in self.stored]
            out_BN: Tensor = _FrozenLinear.apply(x_BK, self.bias, self.kind, self.out_features, *stored)
            return out_BN
        bias_N = None if self.bias is None else self.bias.to(x_BK.dtype)
        return F.linear(x_BK, self._restore(x_BK.dtype), bias_N)

    def _restore(self, dtype: torch.dtype) -> Tensor:
        return _RESTORE[self.kind](dtype, self.out_features, *(getattr(self, name) for name in self.stored))

    def extra_repr(self) -> str:
        """Sizes and format."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.kind}"


class _FrozenLinear(torch.autograd.Function):
    """A linear layer of which the backward pass restores the weights again."""

    @staticmethod
    def forward(context: Any, x_BK: Tensor, bias_N: Tensor | None, kind: str, outputs: int, *stored: Tensor) -> Tensor:
        context.save_for_backward(*stored)
        context.kind, context.outputs = kind, outputs
        weight_NK = _RESTORE[kind](x_BK.dtype, outputs, *stored)
        return F.linear(x_BK, weight_NK, None if bias_N is None else bias_N.to(x_BK.dtype))

    @staticmethod
    @once_differentiable
    def backward(context: Any, grad_BN: Tensor) -> tuple[Tensor | None, ...]:
        stored = context.saved_tensors
        weight_NK = _RESTORE[context.kind](grad_BN.dtype, context.outputs, *stored)
        return grad_BN @ weight_NK, None, None, None, *(None for _ in stored)


def _int8(linear: nn.Linear) -> dict[str, Tensor]:
    """Codes (N, K) and scales (N, K / 32), or (N, 1) if K is not a multiple of 32."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup, PerRow

    copy = _with_float32_weights(linear)
    shared = PerRow() if linear.in_features % _INT8_BLOCK else PerGroup(_INT8_BLOCK)
    quantize_(copy, Int8WeightOnlyConfig(granularity=shared, set_inductor_config=False))  # keeps the settings of torch.compile
    return {"codes": copy.weight.qdata, "scales": copy.weight.scale}


def _restore_int8(dtype: torch.dtype, outputs: int, codes_NK: Tensor, scales_NG: Tensor) -> Tensor:
    blocks = codes_NK.to(dtype).view(*scales_NG.shape, -1)
    return blocks.mul_(scales_NG[..., None]).view(codes_NK.shape)


def _fp8(linear: nn.Linear) -> dict[str, Tensor]:
    """Codes (N, K), as bytes because the type of a model must not follow from them, and scales (N, 1)."""
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    copy = _with_float32_weights(linear)
    quantize_(copy, Float8WeightOnlyConfig(set_inductor_config=False))
    return {"codes": copy.weight.qdata.view(torch.uint8), "scales": copy.weight.scale.float()}


def _restore_fp8(dtype: torch.dtype, outputs: int, codes_NK: Tensor, scales_N1: Tensor) -> Tensor:
    device = codes_NK.device.type
    if device in _WITHOUT_FP8:
        fix = "use ?quantize=int8, or --device cpu"
        raise EncoderError(EncoderCode.BAD_OPTION, f"PyTorch has no fp8 on {device}", where="quantize=fp8", fix=fix)
    return codes_NK.view(torch.float8_e4m3fn).to(dtype).mul_(scales_N1)


def _nf4(linear: nn.Linear) -> dict[str, Tensor]:
    """Codes (N * K / 2,), two in a byte; scales (S, T / S) as codes, their factors (S, 1) and mean (1,); values (16,)."""
    from torchao.quantization import NF4Tensor

    group = math.gcd(linear.weight.numel() // BLOCK, _GROUP)
    packed = NF4Tensor.from_tensor(linear.weight.detach().float(), BLOCK, group)
    return {
        "codes": packed.quantized_data,
        "scales": packed.quantized_scalers.view(-1, group),
        "factors": packed.quantization_factor[:, None],
        "mean": packed.scaler_mean.view(1),
        "values": packed.nf4,
    }


def _restore_nf4(
    dtype: torch.dtype, outputs: int, codes: Tensor, scales: Tensor, factors_S1: Tensor, mean_1: Tensor, values_16: Tensor
) -> Tensor:
    byte = torch.arange(256, device=codes.device)
    pairs = torch.stack([values_16[byte >> 4], values_16[byte & 15]], dim=1)
    scales_T1 = (scales / factors_S1 + mean_1).view(-1, 1)
    blocks = pairs.index_select(0, codes.int()).view(-1, BLOCK) * scales_T1
    return blocks.view(outputs, -1).to(dtype)


def _with_float32_weights(linear: nn.Linear) -> Any:
    """A linear layer without bias that torchao may change."""
    copy = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    copy.weight = nn.Parameter(linear.weight.detach().float(), requires_grad=False)
    return copy


_QUANTIZE: dict[str, Callable[[nn.Linear], dict[str, Tensor]]] = {"int8": _int8, "nf4": _nf4, "fp8": _fp8}
_RESTORE: dict[str, Callable[..., Tensor]] = {"int8": _restore_int8, "nf4": _restore_nf4, "fp8": _restore_fp8}
KINDS = tuple(_QUANTIZE)

# torchao 0.18 registers enumerations with PyTorch, which warns from version 2.14 on; transformers imports torchao, too.
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "is an Enum subclass" not in record.getMessage())
