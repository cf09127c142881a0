"""The options of an encoder spec, ``?key=value&key=value``, as values of the library that builds the backbone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mopefuse.core import error_numbers as _numbers
from mopefuse.core.registry import Spec
from mopefuse.errors import EncoderError, did_you_mean

_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None}


def parse_value(text: str) -> Any:
    """``true``/``false``/``none``, an int, a float, a tuple of such where there is a comma, else the text itself."""
    if "," in text:
        return tuple(parse_value(part) for part in text.strip("()[]").split(",") if part.strip())
    word = text.strip()
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            continue
    return word


def library_options(spec: Spec, ours: Iterable[str]) -> dict[str, Any]:
    """The options that are not `ours`, parsed: they go to the library's own constructor."""
    return {key: parse_value(value) for key, value in spec.options.items() if key not in set(ours)}


def unknown_option(spec: Spec, key: str, accepted: Iterable[str]) -> EncoderError:
    """The error for an option that nobody takes."""
    names = sorted(set(accepted))
    return EncoderError(
        _numbers.UNKNOWN_OPTION,
        f"{spec.scheme}:{spec.name} takes no option {key!r}",
        where=str(spec),
        fix=did_you_mean(key, names) or "remove it",
    )


def one_of(spec: Spec, key: str, default: str, allowed: Iterable[str]) -> str:
    """An option with a closed set of values.

    Raises:
        EncoderError: another value; the allowed ones are named.
    """
    names = list(allowed)
    value = spec.options.get(key, default)
    if value not in names:
        raise EncoderError(
            _numbers.BAD_OPTION, f"{key}={value} is not possible here", where=str(spec), fix=f"use {' or '.join(names)}"
        )
    return value


def max_tokens(spec: Spec, default: int, limit: int) -> int:
    """The option ``max_tokens``: an integer of 2 (the two special tokens) to `limit` (what the encoder has positions for).

    Raises:
        EncoderError: anything else.
    """
    value = parse_value(spec.options.get("max_tokens", str(default)))
    if type(value) is not int or not 2 <= value <= limit:
        raise EncoderError(
            _numbers.BAD_OPTION,
            f"max_tokens={spec.options.get('max_tokens', default)} is not an integer of 2 to {limit}",
            where=str(spec),
            fix=f"use max_tokens={min(default, limit)}",
        )
    return value


def three(spec: Spec, key: str, default: Iterable[float]) -> tuple[float, float, float]:
    """An option with one number per colour channel; one number stands for all three.

    Raises:
        EncoderError: not one or three numbers.
    """
    value = parse_value(spec.options[key]) if key in spec.options else tuple(default)
    numbers = value if isinstance(value, tuple) else (value,) * 3
    if len(numbers) != 3 or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise EncoderError(
            _numbers.BAD_OPTION,
            f"{key}={spec.options.get(key)} is not one number or three",
            where=str(spec),
            fix=f"write {key}=0.5 or {key}=0.485,0.456,0.406",
        )
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


def image_size(spec: Spec) -> tuple[int, int] | None:
    """The option ``size``: one number for a square, or height and width, in pixels; None where it is not given.

    Raises:
        EncoderError: not one or two positive integers.
    """
    if "size" not in spec.options:
        return None
    value = parse_value(spec.options["size"])
    sides = value if isinstance(value, tuple) else (value, value)
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        what = f"size={spec.options['size']} is not a number of pixels"
        raise EncoderError(_numbers.BAD_OPTION, what, where=str(spec), fix="write size=224, or size=224,448")
    return sides[0], sides[1]


def require_patches(spec: Spec, size: tuple[int, int], patch: int) -> None:
    """Refuse a size that patches of `patch` pixels do not fill.

    Raises:
        EncoderError: a side is no multiple of it; it names the nearest that is.
    """
    if any(side % patch for side in size):
        near = ",".join(str(max(patch, round(side / patch) * patch)) for side in dict.fromkeys(size))
        what = f"size={spec.options['size']} is not a multiple of the patch size, {patch} pixels"
        raise EncoderError(_numbers.BAD_OPTION, what, where=str(spec), fix=f"use size={near}")


def cannot_resize(spec: Spec, reason: object) -> EncoderError:
    """The error for a model that takes images of its own size only."""
    what = f"{spec.scheme}:{spec.name} cannot take images of size={spec.options['size']}: {reason}"
    return EncoderError(_numbers.BAD_OPTION, what, where=str(spec), fix="leave size out")
