"""Text to token ids and back: the contract, and the choice of a tokenizer by what a checkpoint holds."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyengine.errors import TokenizerError
from pyengine.model.json_file import show

if TYPE_CHECKING:
    from pyengine.model.tokenization.decoders import TextDecoder


class Tokenizer(ABC):
    """What the engine asks of a tokenizer. Instances are immutable; threads may share them.

    ``kind`` says what it is, for people. ``vocab_size`` counts the tokenizer's ids, added tokens included;
    ``model_vocab_size`` those of the model, where known. Ids of the model that have no piece (vocabularies
    padded to a round size) decode to no text; any other id outside raises TokenizerError. The ids of
    special tokens are None where there is no such token.
    """

    kind: str
    vocab_size: int
    model_vocab_size: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    unk_token_id: int | None = None
    pad_token_id: int | None = None

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of a text without lone surrogates, the special tokens in front included."""

    @abstractmethod
    def decoder(self, skip_special_tokens: bool = True) -> TextDecoder:
        """An incremental decoder for one sequence."""

    @abstractmethod
    def _piece(self, token_id: int) -> str | None:
        """The piece of an id >= 0 as the vocabulary spells it; None if it has none."""

    @abstractmethod
    def is_special(self, token_id: int) -> bool:
        """Whether decoding with ``skip_special_tokens`` leaves this id out."""

    def token_bytes(self) -> list[bytes]:
        """What each id adds to the UTF-8 of a text, wherever it stands; TokenizerError where that depends on
        its neighbours, so that the pieces of a text do not simply concatenate to it."""
        raise TokenizerError(
            f"the pieces of this tokenizer ({self.kind}) do not concatenate to the text: spaces are put in "
            "or taken out between them. A byte-level BPE tokenizer, like GPT-2's, is needed"
        )

    def number_ids(self) -> list[int]:
        """Ids whose pieces are digits, with or without a space, or WordPiece's "##", in front."""
        pieces = map(self.readable_piece, range(self.vocab_size))
        return [token for token, piece in enumerate(pieces) if piece.lstrip(" #").isdecimal()]

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``: special tokens in it are recognised, and exactly those that the tokenizer's
        configuration puts in front are added ([CLS], BOS), never one at the end (EOS, [SEP]).

        TokenizerError for a text that is not valid Unicode or needs a token the model does not have.
        """
        check_text(text)
        return self._check_ids(self._encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``, as transformers' default tokenizer class for the checkpoint decodes them."""
        decoder = self.decoder(skip_special_tokens)
        try:
            return decoder.push(ids) + decoder.finish()
        except TypeError:
            raise TokenizerError(f"token ids to decode must be a list of integers, not {show(ids)}") from None

    def id_to_piece(self, token_id: int) -> str:
        """The piece as the vocabulary spells it ("Ġhello", "##ing", "▁word"); "" for an id without one."""
        return self.find_piece(token_id) or ""

    def readable_piece(self, token_id: int) -> str:
        """The piece for people: with its spaces and characters instead of the vocabulary's spelling of them
        ("Ġé" is " é"), and "<0xE7>" for each byte of a piece that is no whole character."""
        return self.id_to_piece(token_id)

    def find_piece(self, token_id: int) -> str | None:
        """The piece of an id, None for an id of the model that has none; TokenizerError outside of both."""
        if token_id >= 0:
            piece = self._piece(token_id)
            if piece is not None or token_id < (self.model_vocab_size or self.vocab_size):
                return piece
        limit = self.model_vocab_size or self.vocab_size
        raise TokenizerError(f"token id {token_id} is outside the vocabulary: ids run from 0 to {limit - 1}")

    def _check_ids(self, ids: list[int]) -> list[int]:
        limit = self.model_vocab_size
        if limit is not None and ids and max(ids) >= limit:
            token_id = next(i for i in ids if i >= limit)
            raise TokenizerError(
                f"the text contains the token {self._piece(token_id)!r} with id {token_id}, but the model "
                f"has only {limit} embeddings (vocab_size in config.json): leave that token out of the text, "
                "or use the tokenizer files this model was trained with"
            )
        return ids


def check_text(text: str) -> None:
    """TokenizerError unless ``text`` is a str that UTF-8 can hold."""
    if not isinstance(text, str):
        raise TokenizerError(f"a text to encode must be str, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise TokenizerError(
            f"the text is not valid Unicode: character {e.start} is the lone surrogate "
            f"U+{ord(text[e.start]):04X}; decode its bytes again with errors='replace'"
        ) from None


def load_tokenizer(directory: str | os.PathLike[str], vocab_size: int | None = None) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, None if it holds no tokenizer files (ids only).

    In this order: ``tokenizer.json``; ``vocab.json`` + ``merges.txt`` (byte-level BPE); a SentencePiece
    model; ``vocab.txt`` (WordPiece). Where there is no ``tokenizer.json``, ``tokenizer_class`` of
    ``tokenizer_config.json`` or ``config.json`` says which it has to be. ``vocab_size`` is that of the model.
    Damaged, missing or unknown files raise TokenizerError and nothing else.
    """
    from pyengine.model.tokenization.config import read_tokenizer_config

    path = Path(directory)
    config = read_tokenizer_config(path)
    family = config.family
    if family is None:
        return None
    if family == "sentencepiece":
        from pyengine.model.tokenization.sentencepiece import load_sentencepiece

        return load_sentencepiece(config, vocab_size)
    from pyengine.model.tokenization.huggingface import load_huggingface

    return load_huggingface(config, vocab_size)
