"""Where a transformers model can be prompted: found by watching one forward pass, whatever its modules are called.

A prompt acts through its keys and values alone, so three things have to be known of a layer: the norm that it applies ahead
of its attention, and the projections that make keys and values of what that norm gives. The watch sees every module that is
at work when attention is called, tries what it saw (`_site`), and believes only what gives, computed once more from the
tokens that entered the layer, the keys and values that the attention was handed: row by row, as a set of rows where tokens
were sorted into windows, and up to a rotation where keys carry their position in one (rotations keep lengths). What it
cannot verify it refuses, with the reason.

Source of why keys and values suffice: arXiv 2312.03734 drops the outputs of prompts after every layer.

Shapes: B batch, L tokens, H heads of the queries, G heads of keys and values, E width of a head, D width of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_TOLERANCE = 1e-4  # of the largest value, in float32
_PLAIN = {"softcap", "s_aux", "position_bias", "cache"}  # changes to attention that ours does not know


@dataclass(frozen=True)
class Projection:
    """A linear module, by the name under which one of its ancestors has it, and where in its output keys or values are.

    Args:
        layout: one of `_LAYOUTS`.
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
        """Keys or values, (B, L, G, E)."""
        out_BLX: Tensor = getattr(self.parent, self.name)(normed_BLD)
        return _LAYOUTS[self.layout](out_BLX, self)


@dataclass(frozen=True)
class Site:
    """One layer that can be prompted.

    Args:
        norm: applied to tokens ahead of keys and values; None in a post-norm layer.
        key_norm: applied to keys, either to each head's or to all of a token's together.
        query: parent and name of the projection of queries, where it is one by itself.
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
        """Keys, without position, and values of normed tokens: (B, H, L, E) each, heads repeated where they are shared."""
        shared = self.heads // self.key.heads
        pair = _normed_keys(self.key(normed_BLD), self.key_norm), self.value(normed_BLD)
        key, value = (part.transpose(1, 2) for part in pair)
        return (key, value) if shared == 1 else (key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1))


@dataclass(eq=False)
class _Call:
    """A module at work, what entered it and, once it is done, what left it; of a layer, all that was done inside so far."""

    module: nn.Module
    tokens: Tensor | None
    out: Any = None
    inside: list[_Call] = field(default_factory=list)
    attended: bool = False


class _Refused(Exception):
    """Why a layer cannot be prompted."""


class Watch:
    """What the attention function tells, while a model runs once, about each attention."""

    def __init__(self, model: nn.Module) -> None:
        self.sites: list[Site] = []
        self.fault = ""
        self._open: list[_Call] = []  # the outermost first
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
        self._listed = {id(child) for listed in lists for child in listed}

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A module begins."""
        values = [*args, kwargs.get("hidden_states"), *kwargs.values()]
        tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
        self._open.append(_Call(module, tensors[0] if tensors else None))

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        """It ends."""
        call = self._open.pop()
        call.out = out
        if self._open:
            self._open[-1].inside += [*call.inside, call]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, more: Mapping[str, Any]) -> None:
        """Attention is called: (B or windows, heads, L, E) each."""
        try:
            layers = [call for call in self._open if id(call.module) in self._listed and call.tokens is not None]
            if not layers:
                raise _Refused("its attention is in no list of layers")
            layer = layers[-1]
            if layer.attended:
                raise _Refused("it attends more than once")
            layer.attended = True
            strange = sorted(name for name in _PLAIN if more.get(name) is not None)
            if strange:
                raise _Refused(f"its attention takes {', '.join(strange)}")
            inner = self._open[self._open.index(layer) + 1 :]
            done = [*layer.inside, *(call for outer in inner for call in outer.inside)]
            self.sites.append(_site(layer, done, module, query, key, value))
        except _Refused as refusal:
            self.fault = self.fault or f"layer {len(self.sites)} ({type(module).__name__}) cannot be prompted: {refusal}"


def find_sites(model: nn.Module, run: Callable[[], object]) -> tuple[list[Site], str]:
    """The layers that can be prompted, in the order in which they run; none, and the reason, if one of them cannot.

    Args:
        model: of transformers, in evaluation mode and in float32, with the attention function of `_hf_attention`.
        run: one forward pass, best of more than one sample and a few tokens.
    """
    watch = Watch(model)
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
    """What of `done`, the calls since the layer began, gives these keys and values.

    Raises:
        _Refused: nothing does.
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
        raise _Refused("no projection of its tokens, normed or not, gives the values that its attention sees")
    keys = (
        (found, key_norm)
        for found, given in _projections(layer.module, linears[::-1], normed_BLD, width=key.shape[3], **sizes)
        for key_norm in _key_norms(found, done)
        if _same(_normed_keys(given, key_norm), key, turned=True)
    )
    of_key, key_norm = next(keys, (None, None))
    if of_key is None:
        raise _Refused("no projection of its tokens gives the keys that its attention sees")
    taken = {id(getattr(found.parent, found.name)) for found in (of_key, of_value)}
    own = [call.module for call in linears if id(call.module) not in taken and _gives(call, query)]
    query_of = _parent_of(layer.module, own[0]) if len(own) == 1 else None
    return Site(layer.module, attention, norm, of_key, of_value, key_norm, query_of, tokens_BLD.shape[2], heads)


def _norms(
    tokens_BLD: Tensor, entered: Tensor, done: list[_Call]
) -> Iterator[tuple[nn.Module | None, Tensor]]:
    """Nothing, and every module that was handed the layer's own tokens and works on each by itself; with what it gives."""
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
    """Every way in which a linear module that ran could give keys or values of this many heads of this width; with them."""
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
    """No norm, and every module that ran on keys of one head, or of all heads of a token, and kept their shape."""
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
    """Whether attention saw these: of the same tokens in order, or of windows of them in any order, perhaps with padding.

    Args:
        turned: lengths suffice where the directions differ, as those of keys do after a rotary position code.
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
    """Whether every row of a sample is in one of its windows, which are adjacent."""
    batch = rows_BLX.shape[0]
    return windows.shape[0] % batch == 0 and all(map(_among, rows_BLX, windows.reshape(batch, -1, rows_BLX.shape[2])))


def _close(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).abs().max() <= _TOLERANCE * max(1e-6, float(right.abs().max())))


def _among(rows: Tensor, others: Tensor) -> bool:
    """Whether every row is one of the others. They are looked up by their products with one fixed random direction."""
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


def _gives(call: _Call, query: Tensor) -> bool:
    return isinstance(call.out, Tensor) and call.out.shape[-1] == query.shape[1] * query.shape[3]


def _parent_of(layer: nn.Module, module: nn.Module) -> tuple[nn.Module, str]:
    """By which name which module below `layer` has `module`."""
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
"""Where keys (part 0) or values (part 1) are in what a projection gives: it gives nothing else; keys, then values; queries,
keys and values, as a fused projection does; or for each head of keys its queries, key and value."""
