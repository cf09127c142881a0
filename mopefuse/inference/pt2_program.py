"""The grammar of the JSON in a pt2 archive, checked before torch reads any of it.

`torch.export` trusts its files: it resolves operators by attribute access on ``torch``, evaluates sizes with sympy's ``eval``,
writes names into Python source that it executes, and imports modules that a tree of arguments names. Therefore only
what is listed here reaches it; parts that a graph does not need to run (stack traces, guards, the tree of modules) are omitted.

The types have the names and fields of ``torch._export.serde.schema``.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, StringConstraints, TypeAdapter, with_config
from typing_extensions import NotRequired, TypedDict

from mopefuse.inference.pt2_vocabulary import ArgumentName, Count, Dtype, Expr, Float, Integer, Name, Path, Symbol, Target, Text

T = TypeVar("T")
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # applies to nested types too


def _only_value(value: T) -> T:
    if len(value) != 1:  # type: ignore[arg-type]
        raise ValueError("needs exactly one kind of value")
    return value


def _drop_submodule_signatures(value: object) -> object:
    """Keep the first entry only, the signature of the graph; the others belong to submodules that no longer exist."""
    return value[:1] if isinstance(value, list) else value


OneOf = Annotated[T, AfterValidator(_only_value)]
"""An object with exactly one of the fields."""

_Left_out = AfterValidator(lambda value: type(value)())
_Nothing = Annotated[dict[str, Any], Field(max_length=0)]


# -- values


class _Hint(TypedDict, total=False):
    as_int: Integer
    as_bool: bool
    as_float: float


class _Expression(TypedDict):
    expr_str: Expr
    hint: NotRequired[OneOf[_Hint] | None]


class _SymInt(TypedDict, total=False):
    as_expr: _Expression
    as_int: Integer


class _SymBool(TypedDict, total=False):
    as_expr: _Expression
    as_bool: bool


class _Device(TypedDict):
    type: Literal["cpu"]
    index: None


class _TensorMeta(TypedDict):
    dtype: Dtype
    sizes: list[OneOf[_SymInt]]
    requires_grad: bool
    device: _Device
    strides: list[OneOf[_SymInt]]
    storage_offset: OneOf[_SymInt]
    layout: Literal[7]


class _Tensor(TypedDict):
    name: Name


class _IntArgument(TypedDict, total=False):
    as_name: Name
    as_int: Integer


class _BoolArgument(TypedDict, total=False):
    as_name: Name
    as_bool: bool


class _OptionalTensor(TypedDict, total=False):
    as_tensor: _Tensor
    as_none: bool


class _Subgraph(TypedDict):
    name: Name
    graph: _Graph


class _Argument(TypedDict, total=False):
    as_none: bool
    as_tensor: _Tensor
    as_tensors: list[_Tensor]
    as_optional_tensors: list[OneOf[_OptionalTensor]]
    as_int: Integer
    as_ints: list[Integer]
    as_float: Float
    as_floats: list[Float]
    as_bool: bool
    as_bools: list[bool]
    as_string: Text
    as_sym_int: OneOf[_IntArgument]
    as_sym_ints: list[OneOf[_IntArgument]]
    as_sym_bool: OneOf[_BoolArgument]
    as_scalar_type: Dtype
    as_memory_format: Annotated[int, Field(ge=1, le=4)]
    as_layout: Literal[7]
    as_device: _Device
    as_graph: _Subgraph


class _NamedArgument(TypedDict):
    name: ArgumentName
    arg: OneOf[_Argument]
    kind: Literal[1, 2] | None


class _Node(TypedDict):
    target: Target
    inputs: list[_NamedArgument]
    outputs: list[OneOf[_Argument]]
    metadata: Annotated[dict[str, str], _Left_out]
    is_hop_single_tensor_return: NotRequired[bool | None]
    name: NotRequired[Name | None]


class _Graph(TypedDict):
    inputs: list[OneOf[_Argument]]
    outputs: list[OneOf[_Argument]]
    nodes: list[_Node]
    tensor_values: dict[Name, _TensorMeta]
    sym_int_values: dict[Name, OneOf[_SymInt]]
    sym_bool_values: dict[Name, OneOf[_SymBool]]
    sym_float_values: NotRequired[_Nothing]
    custom_obj_values: _Nothing
    is_single_tensor_return: bool


# -- the program


class _Parameter(TypedDict):
    arg: _Tensor
    parameter_name: Path


class _Buffer(TypedDict):
    arg: _Tensor
    buffer_name: Path
    persistent: bool


class _Constant(TypedDict):
    arg: _Tensor
    tensor_constant_name: Path


class _UserValue(TypedDict):
    arg: OneOf[_Argument]


class _Input(TypedDict, total=False):
    user_input: _UserValue
    parameter: _Parameter
    buffer: _Buffer
    tensor_constant: _Constant


class _Output(TypedDict):
    user_output: _UserValue


class _Signature(TypedDict):
    input_specs: list[OneOf[_Input]]
    output_specs: list[_Output]


@with_config(_STRICT)
class _Tree(TypedDict):
    type: Literal["builtins.tuple", "builtins.list", "builtins.dict"] | None
    context: str | None
    children_spec: list[_Tree]


def _plain(tree: _Tree) -> None:
    """Refuse nested arguments other than tuples, lists and dictionaries with string keys."""
    if tree["type"] == "builtins.dict":
        keys = json.loads(tree["context"] or "null")
        if not isinstance(keys, list) or not all(isinstance(key, str) and key.isidentifier() for key in keys):
            raise ValueError("keys of arguments must be names")
    elif tree["context"] != (None if tree["type"] is None else "null"):
        raise ValueError("a tuple has no context")
    for child in tree["children_spec"]:
        _plain(child)


def _tree(text: str) -> str:
    form = json.loads(text)
    if not isinstance(form, list) or len(form) != 2 or form[0] != 1:
        raise ValueError("unknown form of nested arguments")
    checked = _TREE.validate_python(form[1])
    _plain(checked)
    return json.dumps([1, checked])


_TreeText = Annotated[str, StringConstraints(max_length=20_000), AfterValidator(_tree)]


class _CallSignature(TypedDict):
    inputs: list[OneOf[_Argument]]
    outputs: list[OneOf[_Argument]]
    in_spec: _TreeText
    out_spec: _TreeText
    forward_arg_names: NotRequired[list[Name] | None]


class _Call(TypedDict):
    fqn: Literal[""]
    signature: _CallSignature


class _GraphModule(TypedDict):
    graph: _Graph
    signature: _Signature
    module_call_graph: Annotated[list[_Call], BeforeValidator(_drop_submodule_signatures), Field(min_length=1)]
    metadata: _Nothing
    treespec_namedtuple_fields: NotRequired[_Nothing]


class _Range(TypedDict):
    min_val: Integer | None
    max_val: Integer | None


class _Version(TypedDict):
    major: Integer
    minor: Integer


@with_config(_STRICT)
class Program(TypedDict):
    """``models/model.json``."""

    graph_module: _GraphModule
    opset_version: dict[Literal["aten"], Integer]
    range_constraints: dict[Symbol, _Range]
    schema_version: _Version
    verifiers: Annotated[list[Literal["TRAINING", "ATEN"]], Field(min_length=1)]
    torch_version: Text
    guards_code: NotRequired[Annotated[list[str], _Left_out]]


# -- its tensors


class _Whole(TypedDict):
    as_int: Count


class _StoredMeta(TypedDict):
    dtype: Dtype
    sizes: list[_Whole]
    requires_grad: bool
    device: _Device
    strides: list[_Whole]
    storage_offset: _Whole
    layout: Literal[7]


class Payload(TypedDict):
    """The record that holds the bytes of a tensor, and the part of it."""

    path_name: Annotated[str, StringConstraints(pattern=r"^(weight|tensor)_[0-9]{1,6}$")]
    is_param: bool
    use_pickle: Literal[False]
    tensor_meta: _StoredMeta


@with_config(_STRICT)
class Payloads(TypedDict):
    """``model_weights_config.json`` and ``model_constants_config.json``."""

    config: dict[Path, Payload]


_TREE = TypeAdapter(_Tree)
PROGRAM = TypeAdapter(Program)
PAYLOADS = TypeAdapter(Payloads)
