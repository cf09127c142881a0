"""Text preprocessing of open_clip's text towers: CLIP's tokenizer or a hub repository's, padded to the context length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
import transformers
from open_clip.tokenizer import get_clean_fn
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from mopefuse.core import hub as _hub
from mopefuse.core.error_codes import EncoderCode
from mopefuse.core.registry import Spec
from mopefuse.encoders import _hf_text, _options
from mopefuse.encoders.preprocess import TextPreprocess
from mopefuse.errors import EncoderError


def texts(spec: Spec, name: str, config: Mapping[str, Any], length: int, *, trained: bool) -> TextPreprocess:
    """Build preprocessing for a tower with a context of `length` tokens.

    Args:
        config: `text_cfg` of the model.
        trained: whether the weights are pretrained and thus need the tokenizer of pretraining.

    Raises:
        EncoderError: the tokenizer cannot be fetched, or ``max_tokens`` is invalid.
    """
    most = _options.max_tokens(spec, length, length)
    if "hf_tokenizer_name" not in config:
        clip = _ClipTokenizer(length)
        return TextPreprocess(clip, most, f"open_clip:{name}", clip.tokenizer.vocab_size, clip.save, length)
    vocabulary = int(config["vocab_size"])
    if not trained:
        hashing = _hf_text.hashing_for({"vocab_size": vocabulary, "eos_token_id": 1})
        to_length = _PaddedTokenizer(hashing, length, hashing.hashing.pad_id)
        return TextPreprocess(to_length, most, "hashing", vocabulary, hashing.save, length)
    repo = config["hf_tokenizer_name"]
    tokenizer = _from_hub(repo, str(spec))
    pad_id = int(tokenizer.pad_token_id or 0)
    clean = get_clean_fn(config.get("tokenizer_kwargs", {}).get("clean", "whitespace"))
    tokenize = _PaddedTokenizer(_hf_text.TokenizerWrapper(tokenizer, pad_id), length, pad_id, clean)
    return TextPreprocess(tokenize, most, repo, vocabulary, None, length)  # cannot be saved: open_clip cleans the texts


def find_unsupported_setting(config: Mapping[str, Any]) -> str:
    """Reason why a tower with this `text_cfg` is not supported; empty if it is.

    Tokenizers of the hub are supported as SigLIP uses them: after cleaning the text, and without changing the ids.
    """
    more = sorted(config.get("tokenizer_kwargs", {}).keys() - {"clean"})
    if "hf_tokenizer_name" in config and (more or config.get("pool_type") != "last"):
        return f"uses the tokenizer of {config['hf_tokenizer_name']} in an unsupported way"
    return ""


class _ClipTokenizer:
    """Wraps open_clip's own tokenizer. Ids are padded to the context length; the mask ends after the end-of-text token."""

    def __init__(self, context_length: int) -> None:
        self.context_length, self.tokenizer = context_length, open_clip.SimpleTokenizer()

    def __call__(self, texts: list[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        ids = self.tokenizer(texts, context_length=max_tokens)
        ids = F.pad(ids, (0, self.context_length - max_tokens))
        end = (ids == self.tokenizer.eot_token_id).int().argmax(dim=1, keepdim=True)
        mask = torch.arange(self.context_length)[None, :] <= end
        return ids * mask, mask  # tokens after an <end_of_text> within the text are dropped

    def save(self, file: Path) -> dict[str, Any]:
        """Write the same byte pairs in the format of the library tokenizers; see `TextPreprocess.save`."""
        clip = self.tokenizer
        begin, end = ((clip.decoder[number], number) for number in (clip.sot_token_id, clip.eot_token_id))
        merges = sorted(clip.bpe_ranks, key=lambda pair: clip.bpe_ranks[pair])
        tokenizer = Tokenizer(BPE(clip.encoder, merges, unk_token=end[0], end_of_word_suffix="</w>"))
        words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
        split = pre_tokenizers.Split(words, behavior="removed", invert=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.add_special_tokens([begin[0], end[0]])
        tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A {end[0]}", special_tokens=[begin, end])
        file.write_text(tokenizer.to_str(), encoding="utf-8")
        return {"kind": "file", "pad_id": 0, "cut": "right", "end_id": end[1], "clean": "clip"}


class _PaddedTokenizer:
    """Wraps another tokenizer: cleans texts and pads rows to a fixed length. The mask ends where the text does."""

    def __init__(
        self,
        tokenize: Callable[[list[str], int], tuple[Tensor, Tensor]],
        length: int,
        pad_id: int,
        clean: Callable[[str], str] = str,
    ) -> None:
        self.tokenize, self.length, self.pad_id, self.clean = tokenize, length, pad_id, clean

    def __call__(self, texts: list[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        ids, mask = self.tokenize([self.clean(text) for text in texts], max_tokens)
        more = (0, self.length - ids.shape[1])
        return F.pad(ids, more, value=self.pad_id), F.pad(mask, more, value=False)


def _from_hub(repo: str, where: str) -> Any:
    """Load the tokenizer of a repository with transformers, without running code of the repository."""
    path = _hub.fetch(repo, "tokenizer.json", where=where)
    if path is None:
        raise EncoderError(
            EncoderCode.NO_TOKENIZER,
            f"{repo} has no tokenizer.json",
            where=where,
            fix="use a CLIP model, or a different text encoder",
        )
    _hub.fetch_all(repo, _hf_text.TOKENIZER_FILES, where=where)
    try:
        return transformers.AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        raise EncoderError(
            EncoderCode.NO_TOKENIZER, f"the tokenizer of {repo} cannot be read: {error}", where=where, fix="download it again"
        ) from error
