"""Options of an encoder spec, ``?key=value&key=value``, parsed and checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mopefuse.core.error_codes import EncoderCode
from mopefuse.core.registry import Spec
from mopefuse.errors import EncoderError, did_you_mean

QUANTIZE = "quantize"  # an option of every encoder, see `_quantize`
_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None}


def parse_value(text: str) -> Any:
    """Parse ``true``, ``false``, ``none``, an int, a float, or a tuple of such at commas; other text is returned unchanged."""
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
    """Parse the options that are not `ours`, which are passed to the library's constructor."""
    return {key: parse_value(value) for key, value in spec.options.items() if key not in set(ours)}


def unknown_option(spec: Spec, key: str, accepted: Iterable[str]) -> EncoderError:
    """Build the error for an unknown option."""
    names = sorted({*accepted, QUANTIZE})
    return EncoderError(
        EncoderCode.UNKNOWN_OPTION,
        f"{spec.scheme}:{spec.name} has no option {key!r}",
        where=str(spec),
        fix=did_you_mean(key, names) or f"remove {key}= from the spec",
    )


def one_of(spec: Spec, key: str, default: str, allowed: Iterable[str]) -> str:
    """Value of an option with a fixed set of values.

    Raises:
        EncoderError: another value; the message lists the allowed ones.
    """
    names = list(allowed)
    value = spec.options.get(key, default)
    if value not in names:
        raise EncoderError(
            EncoderCode.BAD_OPTION, f"{key}={value} is not supported", where=str(spec), fix=f"use {' or '.join(names)}"
        )
    return value


def max_tokens(spec: Spec, default: int, limit: int) -> int:
    """Value of the option ``max_tokens``: from 2 (the special tokens) to `limit` (the encoder's positions).

    Raises:
        EncoderError: anything else.
    """
    value = parse_value(spec.options.get("max_tokens", str(default)))
    if type(value) is not int or not 2 <= value <= limit:
        raise EncoderError(
            EncoderCode.BAD_OPTION,
            f"max_tokens={spec.options.get('max_tokens', default)} is not an integer from 2 to {limit}",
            where=str(spec),
            fix=f"use max_tokens={min(default, limit)}",
        )
    return value


def per_channel(spec: Spec, key: str, default: Iterable[float]) -> tuple[float, float, float]:
    """Value of an option with one number per colour channel, or a single number for all three.

    Raises:
        EncoderError: not one or three numbers.
    """
    value = parse_value(spec.options[key]) if key in spec.options else tuple(default)
    numbers = value if isinstance(value, tuple) else (value,) * 3
    if len(numbers) != 3 or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise EncoderError(
            EncoderCode.BAD_OPTION,
            f"{key}={spec.options.get(key)} is neither one number nor three",
            where=str(spec),
            fix=f"write {key}=0.5 or {key}=0.485,0.456,0.406",
        )
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


def image_size(spec: Spec) -> tuple[int, int] | None:
    """Value of the option ``size`` as (height, width) in pixels, from one number or two; None if it is unset.

    Raises:
        EncoderError: not one or two positive integers.
    """
    if "size" not in spec.options:
        return None
    value = parse_value(spec.options["size"])
    sides = value if isinstance(value, tuple) else (value, value)
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        what = f"size={spec.options['size']} is not a number of pixels"
        raise EncoderError(EncoderCode.BAD_OPTION, what, where=str(spec), fix="write size=224, or size=224,448")
    return sides[0], sides[1]


def require_patches(spec: Spec, size: tuple[int, int], patch: int) -> None:
    """Check that both sides are multiples of `patch` pixels.

    Raises:
        EncoderError: a side is not; the message gives the nearest size.
    """
    if any(side % patch for side in size):
        near = ",".join(str(max(patch, round(side / patch) * patch)) for side in dict.fromkeys(size))
        what = f"size={spec.options['size']} is not a multiple of the patch size, {patch} pixels"
        raise EncoderError(EncoderCode.BAD_OPTION, what, where=str(spec), fix=f"use size={near}")


def cannot_resize(spec: Spec, reason: object) -> EncoderError:
    """Build the error for a model that does not support another image size."""
    what = f"{spec.scheme}:{spec.name} does not support size={spec.options['size']}: {reason}"
    return EncoderError(EncoderCode.BAD_OPTION, what, where=str(spec), fix="remove size= from the spec")


def option_flag(spec: Spec, key: str, default: bool) -> bool:
    """Value of a boolean option of a spec.

    Raises:
        EncoderError: neither ``true`` nor ``false``.
    """
    value = spec.options.get(key, str(default)).lower()
    if value not in ("true", "false"):
        raise EncoderError(
            EncoderCode.BAD_OPTION_VALUE, f"{key}={value} is neither true nor false", where=str(spec), fix=f"write {key}=true"
        )
    return value == "true"
