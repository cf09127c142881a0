"""Count the tokens of a text for an encoder, including those beyond its limit."""

from __future__ import annotations

from mopefuse.core.error_codes import DataCode
from mopefuse.data.summary import Tokens
from mopefuse.encoders.base import create_encoder
from mopefuse.encoders.preprocess import TextPreprocess
from mopefuse.errors import DataError

_LONG = 32  # times the limit; longer texts are not counted to their end


def tokens_of(spec: str) -> Tokens:
    """The token counter of the text encoder given by a spec.

    Raises:
        DataError: it does not read text. EncoderError: there is no such encoder, or it cannot be loaded.
    """
    encoder = create_encoder(spec)
    preprocess = encoder.preprocess
    if not isinstance(preprocess, TextPreprocess):
        raise DataError(
            DataCode.ENCODER_READS_NO_TEXT,
            f"{spec} does not read text",
            where="--encoder",
            fix="use a text encoder, such as hf:bert-base",
        )
    return Tokens(str(encoder.spec), preprocess.max_tokens, lambda texts: measure(preprocess, texts))


def measure(preprocess: TextPreprocess, texts: list[str]) -> list[tuple[int, bool]]:
    """The tokens of each text, and whether it is truncated. A tokenizer that stops at its limit gives a lower bound."""
    kept = [preprocess.item(text) for text in texts]
    seen = preprocess.tokenize(kept, preprocess.max_tokens)[1].sum(dim=1).tolist()
    whole = preprocess.tokenize(kept, _LONG * preprocess.max_tokens)[1].sum(dim=1).tolist()
    shortened = [len(text) > len(reduced) for text, reduced in zip(texts, kept, strict=True)]
    return [(max(one, all_), one != all_ or short) for one, all_, short in zip(seen, whole, shortened, strict=True)]
