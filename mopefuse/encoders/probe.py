"""Finds the promptable layers of a transformers model by observing one forward pass, independent of module names.

A prompt acts through its keys and values only (arXiv 2312.03734 drops the outputs of prompts after every layer), so three
modules of a layer must be known: the norm ahead of its attention, and the projections to keys and values. `Recorder` records
every module call; `_site` tries combinations of recorded modules and accepts only one that, recomputed from the layer's input
tokens, reproduces the keys and values passed to the attention function. They are compared row by row; as a set of rows if
tokens are partitioned into windows; and, if keys have rotary positions, only by their lengths (a rotation keeps lengths). A
layer that cannot be verified is not promptable, and the reason is reported.

Shapes: B batch, L tokens, H heads of the queries, G heads of keys and values, E width of a head, D width of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_TOLERANCE = 1e-4  # relative to the largest value, in float32
_UNSUPPORTED = {"softcap", "s_aux", "position_bias", "cache"}  # arguments of attention that `_hf_attention` does not support


@dataclass(frozen=True)
class Projection:
    """A linear module that outputs keys or values, possibly among others.

    Attributes:
        parent, name: an ancestor of the module and its attribute name there.
        layout, part: which part of the output, see `_LAYOUTS`.
        queries, heads, width: H, G and E.
    """

    parent: nn.Module
    name: str
    layout: str
    part: int
    queries: int
    heads: int
    width: int

    def __call__(self, normed_BLD: Tensor) -> Tensor:
        """Compute keys or values, (B, L, G, E)."""
        out_BLX: Tensor = getattr(self.parent, self.name)(normed_BLD)
        return _LAYOUTS[self.layout](out_BLX, self)


@dataclass(frozen=True)
class Site:
    """One promptable layer.

    Attributes:
        norm: applied to tokens ahead of the projections; None in a post-norm layer.
        key_norm: a norm of keys, and whether it is applied to each head separately.
        query: parent and name of the projection of queries, if it is separate.
        width, heads: D and H.
    """

    block: nn.Module
    attention: nn.Module
    norm: nn.Module | None
    key: Projection
    value: Projection
    key_norm: tuple[nn.Module, bool] | None
    query: tuple[nn.Module, str] | None
    width: int
    heads: int

    def project(self, normed_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Project normed tokens to keys, without position, and values: (B, H, L, E) each, with shared heads repeated."""
        shared = self.heads // self.key.heads
        pair = _normed_keys(self.key(normed_BLD), self.key_norm), self.value(normed_BLD)
        key, value = (part.transpose(1, 2) for part in pair)
        return (key, value) if shared == 1 else (key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1))


@dataclass(eq=False)
class _Call:
    """A recorded module call: its input tokens, its output once it has returned, and the calls inside it."""

    module: nn.Module
    tokens: Tensor | None
    out: Any = None
    inside: list[_Call] = field(default_factory=list)
    attended: bool = False


class _NotPromptable(Exception):
    """The reason why a layer cannot be prompted."""


class Recorder:
    """Records module calls and attention calls during one forward pass, and collects the sites or the first fault."""

    def __init__(self, model: nn.Module) -> None:
        self.sites: list[Site] = []
        self.fault = ""
        self._open: list[_Call] = []  # calls in progress, outermost first
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
        self._listed = {id(child) for listed in lists for child in listed}

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Record the start of a module's call."""
        values = [*args, kwargs.get("hidden_states"), *kwargs.values()]
        tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
        self._open.append(_Call(module, tensors[0] if tensors else None))

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        """Record the end of a module's call."""
        call = self._open.pop()
        call.out = out
        if self._open:
            self._open[-1].inside += [*call.inside, call]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, more: Mapping[str, Any]) -> None:
        """Record a call of the attention function; query, key and value are (B or windows, heads, L, E)."""
        try:
            layers = [call for call in self._open if id(call.module) in self._listed and call.tokens is not None]
            if not layers:
                raise _NotPromptable("its attention is not in a list of layers")
            layer = layers[-1]
            if layer.attended:
                raise _NotPromptable("it calls attention more than once")
            layer.attended = True
            unsupported = sorted(name for name in _UNSUPPORTED if more.get(name) is not None)
            if unsupported:
                raise _NotPromptable(f"its attention uses {', '.join(unsupported)}")
            inner = self._open[self._open.index(layer) + 1 :]
            done = [*layer.inside, *(call for outer in inner for call in outer.inside)]
            self.sites.append(_site(layer, done, module, query, key, value))
        except _NotPromptable as reason:
            self.fault = self.fault or f"layer {len(self.sites)} ({type(module).__name__}) cannot be prompted: {reason}"


def find_sites(model: nn.Module, run: Callable[[], object]) -> tuple[list[Site], str]:
    """Find the promptable layers, in the order in which they run.

    Args:
        model: transformers model, in evaluation mode and in float32, with the attention function of `_hf_attention`.
        run: one forward pass, preferably of several samples and a few tokens.

    Returns:
        All layers and an empty text; no layers and the reason if any layer cannot be prompted.
    """
    watch = Recorder(model)
    modules = list(model.modules())
    handles: list[Any] = []
    for module in modules:
        handles += [module.register_forward_pre_hook(watch.enter, with_kwargs=True), module.register_forward_hook(watch.leave)]
        module.prompt_slot = watch  # type: ignore[assignment]
    try:
        with torch.no_grad():
            run()
    finally:
        for module in modules:
            del module.prompt_slot
        for handle in handles:
            handle.remove()
    if watch.fault:
        return [], watch.fault
    return watch.sites, "" if watch.sites else "none of its layers calls transformers' attention function"


def _site(layer: _Call, done: list[_Call], attention: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Site:
    """Find the modules among the layer's calls (`done`) that reproduce these keys and values.

    Raises:
        _NotPromptable: none do.
    """
    assert layer.tokens is not None
    tokens_BLD = layer.tokens.flatten(1, -2)
    heads, sizes = query.shape[1], {"queries": query.shape[1], "heads": key.shape[1]}
    linears = [call for call in done if _is_linear(call.module)]
    values = (
        (norm, normed_BLD, found)
        for norm, normed_BLD in _norms(tokens_BLD, layer.tokens, done)
        for found, given in _projections(layer.module, linears[::-1], normed_BLD, width=value.shape[3], **sizes)
        if _same(given, value)
    )
    norm, normed_BLD, of_value = next(values, (None, None, None))
    if of_value is None or normed_BLD is None:
        raise _NotPromptable("no projection of its tokens, normed or not, gives the values of its attention")
    keys = (
        (found, key_norm)
        for found, given in _projections(layer.module, linears[::-1], normed_BLD, width=key.shape[3], **sizes)
        for key_norm in _key_norms(found, done)
        if _same(_normed_keys(given, key_norm), key, turned=True)
    )
    of_key, key_norm = next(keys, (None, None))
    if of_key is None:
        raise _NotPromptable("no projection of its tokens gives the keys of its attention")
    used = {id(getattr(found.parent, found.name)) for found in (of_key, of_value)}
    others = [call.module for call in linears if id(call.module) not in used and _has_query_size(call, query)]
    of_query = _parent_of(layer.module, others[0]) if len(others) == 1 else None
    return Site(layer.module, attention, norm, of_key, of_value, key_norm, of_query, tokens_BLD.shape[2], heads)


def _norms(
    tokens_BLD: Tensor, entered: Tensor, done: list[_Call]
) -> Iterator[tuple[nn.Module | None, Tensor]]:
    """Iterate over candidate norms and their outputs: none, and every module that maps the layer's tokens one by one."""
    yield None, tokens_BLD
    for call in done:
        given = call.tokens
        if given is None or given.shape != entered.shape or not torch.equal(given, entered):
            continue
        if _is_linear(call.module) or not isinstance(call.out, Tensor) or call.out.shape != entered.shape:
            continue
        normed_BLD: Tensor = call.module(tokens_BLD)
        if torch.allclose(call.module(tokens_BLD[:, :1]), normed_BLD[:, :1], atol=1e-6):
            yield call.module, normed_BLD


def _projections(
    layer: nn.Module, linears: list[_Call], normed_BLD: Tensor, *, queries: int, heads: int, width: int
) -> Iterator[tuple[Projection, Tensor]]:
    """Iterate over every way to read keys or values of this size from a linear module that was called, with the result."""
    sizes = {
        "alone": heads * width,
        "pair": 2 * heads * width,
        "triple": (queries + 2 * heads) * width,
        "by head": (queries + 2 * heads) * width,
    }
    for call in linears:
        if call.tokens is None or call.tokens.shape[-1] != normed_BLD.shape[-1] or not isinstance(call.out, Tensor):
            continue
        if call.tokens.shape != normed_BLD.shape and _in_windows(normed_BLD, call.tokens):
            out_BLX = call.module(normed_BLD)
        elif call.tokens.shape == normed_BLD.shape and torch.equal(call.tokens, normed_BLD):
            out_BLX = call.out
        else:
            continue
        parent, name = _parent_of(layer, call.module)
        for layout, size in sizes.items():
            for part in (0, 1) if out_BLX.shape[-1] == size else ():
                if layout != "alone" or part == 0:
                    projection = Projection(parent, name, layout, part, queries, heads, width)
                    yield projection, _LAYOUTS[layout](out_BLX, projection)


def _key_norms(key: Projection, done: list[_Call]) -> Iterator[tuple[nn.Module, bool] | None]:
    """Iterate over candidate norms of keys: none, and every module that kept the shape of keys of one head or of all."""
    yield None
    for call in done:
        if call.tokens is None or not isinstance(call.out, Tensor) or call.out.shape != call.tokens.shape:
            continue
        if not _is_linear(call.module) and call.tokens.shape[-1] in (key.width, key.heads * key.width):
            yield call.module, call.tokens.shape[-1] == key.width


def _normed_keys(key_BLGE: Tensor, key_norm: tuple[nn.Module, bool] | None) -> Tensor:
    if key_norm is None:
        return key_BLGE
    module, by_head = key_norm
    normed: Tensor = module(key_BLGE) if by_head else module(key_BLGE.flatten(2)).view_as(key_BLGE)
    return normed


def _same(ours_BLGE: Tensor, seen_NGLE: Tensor, *, turned: bool = False) -> bool:
    """Whether these are the keys or values of attention: in order, or as windows in any order and possibly padded.

    Args:
        turned: also accept vectors of equal lengths and different directions, as keys with rotary positions have.
    """
    batch, length, heads, width = ours_BLGE.shape
    seen = seen_NGLE.transpose(1, 2)
    if seen.shape[2:] != (heads, width):
        return False
    if seen.shape[0] == batch:
        if seen.shape[1] != length:
            return False
        return _close(ours_BLGE, seen) or (turned and _close(ours_BLGE.norm(dim=-1), seen.norm(dim=-1)))
    return _in_windows(ours_BLGE.flatten(2), seen.flatten(2))


def _in_windows(rows_BLX: Tensor, windows: Tensor) -> bool:
    """Whether every row of a sample occurs in one of its windows, which are adjacent."""
    batch = rows_BLX.shape[0]
    return windows.shape[0] % batch == 0 and all(map(_contains_rows, rows_BLX, windows.reshape(batch, -1, rows_BLX.shape[2])))


def _close(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).abs().max() <= _TOLERANCE * max(1e-6, float(right.abs().max())))


def _contains_rows(rows: Tensor, others: Tensor) -> bool:
    """Whether every row occurs among the others; candidates are found by projecting both on one fixed random direction."""
    if rows.shape[0] > others.shape[0]:
        return False
    direction = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
    order = (others @ direction).argsort()
    places = torch.searchsorted((others @ direction)[order], rows @ direction)
    near = [order[(places + shift).clamp(0, len(order) - 1)] for shift in (-1, 0, 1)]
    apart = torch.stack([(others[index] - rows).abs().amax(dim=1) for index in near]).amin(dim=0)
    return bool(apart.max() <= _TOLERANCE * float(others.abs().max()))


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _has_query_size(call: _Call, query: Tensor) -> bool:
    return isinstance(call.out, Tensor) and call.out.shape[-1] == query.shape[1] * query.shape[3]


def _parent_of(layer: nn.Module, module: nn.Module) -> tuple[nn.Module, str]:
    """Parent of `module` within `layer`, and its attribute name there."""
    name = next(name for name, other in layer.named_modules() if other is module)
    parent, _, last = name.rpartition(".")
    return layer.get_submodule(parent), last


_LAYOUTS: dict[str, Callable[[Tensor, Projection], Tensor]] = {
    "alone": lambda out, p: out.unflatten(-1, (p.heads, p.width)),
    "pair": lambda out, p: out.chunk(2, dim=-1)[p.part].unflatten(-1, (p.heads, p.width)),
    "triple": lambda out, p: (
        out[..., p.queries * p.width :].chunk(2, dim=-1)[p.part].unflatten(-1, (p.heads, p.width))
    ),
    "by head": lambda out, p: out.unflatten(-1, (p.heads, p.queries // p.heads + 2, p.width))[..., p.part - 2, :],
}
"""How to read keys (part 0) or values (part 1) from the output of a projection: the whole output; keys, then values; queries,
keys, then values; or, for each head of keys, its queries, key and value."""
