"""A byte-level BPE tokenizer for source code, trained by the `tokenizers` package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clsa.config import check_int
from clsa.errors import TrainError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS = "<|bos|>", "<|eos|>"
SPECIAL_TOKENS = (BOS, EOS, "<|user|>", "<|assistant|>", "<|end|>")
MIN_VOCAB = len(SPECIAL_TOKENS) + 256  # every byte is a token, so any text can be encoded
MAX_VOCAB = 1 << 16  # token ids are stored as uint16

# A newline, an indentation and a mark such as "." or "(" are never merged with the word or line that follows:
# a prompt may end after any of the three, and then has to be tokenised as it was in training.
_PIECES = r"\n+| {2,}|[ _]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"

# The model continues text, it does not converse: a turn is text and nothing else. So the rendering of a turn
# starts with the rendering of the turn before and its answer, and the state can be kept between them.
_CHAT_TEMPLATE = BOS + "{% for message in messages %}{{ message['content'] }}{% endfor %}"

_ENCODE_AT_ONCE = 64  # documents; an encoding takes about a hundred times the memory of its ids


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A tokenizer with exactly `vocab_size` tokens; the same texts give the same tokenizer.

    The specials have ids 0 to 4. Encoding with special tokens puts `<|bos|>` first. Raises TrainError if the
    texts hold too few different words for so many tokens.
    """
    check_int("vocab", vocab_size, MIN_VOCAB, MAX_VOCAB, TrainError)
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (got := tokenizer.get_vocab_size()) != vocab_size:
        raise TrainError(
            f"the corpus is too small for a vocabulary of {vocab_size}: it gives {got} tokens; "
            f"use a smaller --vocab or more text"
        )
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Each text between `<|bos|>` and `<|eos|>`, one after the other.

    Returns tokens uint16 [n] and offsets int64 [len(texts) + 1]; document i is
    `tokens[offsets[i]:offsets[i + 1]]`. A text that spells a special token is encoded as plain characters.
    """
    from tokenizers import Tokenizer

    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    bos, eos = plain.token_to_id(BOS), plain.token_to_id(EOS)
    documents: list[NDArray[np.uint16]] = []
    for i in range(0, len(texts), _ENCODE_AT_ONCE):
        encodings = plain.encode_batch(list(texts[i : i + _ENCODE_AT_ONCE]), add_special_tokens=False)
        documents += [np.array([bos, *encoding.ids, eos], np.uint16) for encoding in encodings]
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return np.concatenate([np.empty(0, np.uint16), *documents]), offsets


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` into an existing folder."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(tokenizer.to_str() + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
