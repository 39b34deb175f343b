"""What the engine asks of a tokenizer. Texts grow in ``_C.TextStream``, which finds stop strings."""

from __future__ import annotations

from collections import abc
from typing import Protocol


class Detokenizer(Protocol):
    """``pyengine.model.detokenizer.StreamingDetokenizer``, as far as the engine knows it."""

    def append(self, ids: abc.Sequence[int], /) -> str: ...
    def finish(self) -> str: ...
    def copy(self) -> Detokenizer: ...


class Codec(Protocol):
    """Makes text of token ids; a request has none where its checkpoint has no tokenizer."""

    def detokenizer(self, prompt_ids: abc.Sequence[int], skip_special_tokens: bool) -> Detokenizer: ...
    def decode_token(self, token_id: int) -> str: ...
