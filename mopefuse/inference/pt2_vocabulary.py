"""The vocabulary of a pt2 archive as `pydantic` types: names, paths of tensors, operators, sizes and types.

Each becomes part of Python source, of an attribute's path or of an evaluated expression once torch loads the archive. Operators
are those of the graphs of encoders and fusion methods. Left out on purpose is what reads files (``from_file``), Python's
``attrgetter`` and ``methodcaller``, attributes of ``torch`` that are not operators, and operators of other packages.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from functools import cache, lru_cache
from math import prod
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, StringConstraints

DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
"""Tensor types by their number in the archive; others are not exported."""

PYTHON = frozenset(f"_operator.{name}" for name in "add sub mul floordiv mod neg eq ne ge gt le lt".split())
"""Operators on sizes."""

HIGHER_ORDER = frozenset({"torch.ops.higher_order.wrap_with_autocast", "torch.ops.higher_order.wrap_with_set_grad_enabled"})

ATEN = frozenset(
    """
    __and__ __lshift__ __or__ __rshift__ __xor__ _adaptive_avg_pool2d _assert_scalar _assert_tensor_metadata _log_softmax
    _softmax _to_copy _unsafe_view abs abs_ acos adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d add add_ addbmm addcdiv addcdiv_ addcmul addcmul_ addmm addmm_
    affine_grid_generator alias all amax amin any arange argmax argmin argsort as_strided asin atan atan2 avg_pool1d
    avg_pool2d avg_pool3d baddbmm baddbmm_ batch_norm bilinear bitwise_and bitwise_left_shift bitwise_not bitwise_or
    bitwise_right_shift bitwise_xor bmm broadcast_to bucketize cat ceil celu channel_shuffle chunk clamp clamp_ clamp_max
    clamp_max_ clamp_min clamp_min_ clone col2im concat constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d convolution copy copy_ cos cosh cosine_similarity count_nonzero cummax cumprod
    cumsum cumsum_ detach detach_ diagonal diff div div_ divide dot dropout dropout_ einsum elu elu_ embedding eq erf erfc
    exp exp_ expand expand_as expand_copy expm1 eye fill fill_ flatten flip floor floor_ floor_divide fmod full full_like
    gather ge gelu gelu_ glu grid_sampler grid_sampler_2d group_norm gt gt_ hardshrink hardsigmoid hardsigmoid_ hardswish
    hardswish_ hardtanh hardtanh_ hstack hypot im2col index index_add index_add_ index_copy index_fill index_put
    index_put_ index_select instance_norm isfinite isin isinf isnan kron kthvalue layer_norm le leaky_relu leaky_relu_
    lerp lerp_ lift_fresh_copy linalg_norm linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid log_softmax
    logaddexp logcumsumexp logical_and logical_not logical_or logical_xor logit logsumexp lt masked_fill masked_fill_
    masked_scatter masked_scatter_ matmul max max_pool1d max_pool2d max_pool3d maximum mean median meshgrid min minimum
    mish mish_ mm moveaxis movedim mul mul_ multiply mv nan_to_num narrow native_batch_norm native_dropout
    native_group_norm native_layer_norm ne neg neg_ new_full new_ones new_zeros nonzero norm numpy_T one_hot ones
    ones_like outer pad permute pixel_shuffle pixel_unshuffle pow pow_ prelu prod ravel reciprocal reciprocal_ relu relu6
    relu6_ relu_ remainder repeat repeat_interleave reshape reshape_as rms_norm roll round round_ rsqrt rsqrt_ rsub
    scalar_tensor scaled_dot_product_attention scatter scatter_ scatter_add scatter_add_ scatter_reduce select
    select_backward select_scatter selu selu_ sigmoid sigmoid_ sign silu silu_ sin sinh slice slice_scatter softmax
    softplus softshrink sort split split_with_sizes sqrt sqrt_ square squeeze squeeze_ stack std std_mean sub sub_
    subtract sum swapaxes sym_constrain_range sym_constrain_range_for_size sym_numel sym_size sym_storage_offset
    sym_stride t take_along_dim tan tanh tanh_ tensor_split threshold tile to topk transpose tril tril_ triu triu_
    true_divide trunc type_as unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze unsqueeze_ upsample_bicubic2d
    upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_trilinear3d var var_mean view
    view_as vstack where zero_ zeros zeros_like
    """.split()
)
"""Operators on tensors, in all their overloads."""

_MAX_ELEMENTS = 2**48  # elements, and bytes, of anything
_RESERVED = {*keyword.kwlist, *keyword.softkwlist, *dir(builtins), "self", "torch", "math", "device", "inf", "nan"}
_SYMBOL = re.compile(r"[su]\d{1,6}", re.ASCII)
_CALLS = {"Add", "Mul", "Max", "Min", "FloorDiv", "CeilDiv", "Mod", "PythonMod"}
_RELATIONS = {"Equality", "Unequality", "LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan", "And", "Or", "Not"}
_ASSUMPTIONS = {"positive", "integer", "nonnegative"}
_MAX_POWER = 8
_MAX_DEPTH = 12
_MAX_TERMS = 300  # terms of a size that is multiplied out, as sympy does to compare sizes


def _name(text: str) -> str:
    """A string that becomes the name of a variable in generated source."""
    if text in _RESERVED or text.startswith("__"):
        raise ValueError(f"{text!r} cannot be a name")
    return text


def _path(text: str) -> str:
    """The dotted path of a tensor in the model."""
    if any(part.startswith("__") for part in text.split(".")):
        raise ValueError(f"{text!r} cannot be the place of a tensor")
    return text


@cache
def _operator(text: str) -> str:
    """An operator that exported graphs use, with an overload that this torch has."""
    if text in PYTHON or text in HIGHER_ORDER:
        return text
    module, _, operator = text.rpartition("torch.ops.aten.")
    name, _, overload = operator.partition(".")
    packet = getattr(torch.ops.aten, name, None) if not module and name in ATEN else None
    if packet is not None and overload in packet.overloads():
        return text
    raise ValueError(f"{text[:80]!r} is not an operator of exported graphs")


@lru_cache(maxsize=1000)
def _expression(text: str) -> str:
    """A size such as ``Mul(Integer(2), Symbol('s0', integer=True))``, rebuilt from its checked parts."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("this is not an expression of a size") from None
    _check_expression(tree.body, depth=0)
    return ast.unparse(tree)


def _check_expression(node: ast.expr, depth: int) -> int:
    """The number of terms of a size once it is multiplied out; anything that is not part of a size is rejected."""
    if isinstance(node, ast.Name) and node.id in ("true", "false"):
        return 1
    if depth > _MAX_DEPTH or not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError("this is not an expression of a size")
    name, values, terms = node.func.id, [_constant(value) for value in node.args], 1
    words = {word.arg for word in node.keywords if _constant(word.value) is True}
    if name == "Symbol":
        fits = len(values) == 1 and isinstance(values[0], str) and _SYMBOL.fullmatch(values[0]) is not None
        fits = fits and words <= _ASSUMPTIONS
    elif name == "Integer":
        fits = len(values) == 1 and type(values[0]) is int and abs(values[0]) < _MAX_ELEMENTS
    elif name == "Pow" and len(values) == 2:
        power = _small_power(node.args[1])
        fits, terms = power is not None, _check_base(node.args[0], depth + 1) ** (power or 1)
    else:
        fits = name in _CALLS | _RELATIONS
        of_each = [_check_expression(value, depth + 1) for value in node.args]
        terms = sum(of_each) if name == "Add" else prod(of_each) if name == "Mul" else 1
    if not fits or len(node.keywords) != (len(words) if name == "Symbol" else 0):
        raise ValueError(f"{name}(...) is not part of a size")
    if terms > _MAX_TERMS:
        raise ValueError("a size of too many terms")
    return terms


def _check_base(node: ast.expr, depth: int) -> int:
    """Check that the base of a power has no other power, so that a short text is a small number; returns its terms."""
    if any(isinstance(inner, ast.Name) and inner.id == "Pow" for inner in ast.walk(node)):
        raise ValueError("a power of a power is not part of a size")
    return _check_expression(node, depth)


def _small_power(node: ast.expr) -> int | None:
    power = _constant(node.args[0]) if isinstance(node, ast.Call) and len(node.args) == 1 else None
    _check_expression(node, _MAX_DEPTH)
    return power if isinstance(power, int) and 2 <= power <= _MAX_POWER else None


def _constant(node: ast.expr) -> object:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _constant(node.operand)
        return -value if type(value) is int else None
    return node.value if isinstance(node, ast.Constant) else None


def _dtype(code: int) -> int:
    if code not in DTYPES:
        raise ValueError(f"{code} is not a type of tensors that is exported")
    return code


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=500), AfterValidator(_name)]
Path = Annotated[str, StringConstraints(pattern=r"^\w+(\.\w+)*$", max_length=500), AfterValidator(_path)]
ArgumentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_0-9]*$", max_length=100)]
Text = Annotated[str, StringConstraints(pattern=r"^[ -~]*$", max_length=500)]
Symbol = Annotated[str, StringConstraints(pattern=r"^[su][0-9]{1,6}$")]
Target = Annotated[str, StringConstraints(max_length=200), AfterValidator(_operator)]
Expr = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_(),=' -]*$", max_length=4000), AfterValidator(_expression)]
Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=_MAX_ELEMENTS)]
Float = float | Literal["Infinity", "-Infinity", "NaN"]
Dtype = Annotated[int, AfterValidator(_dtype)]
