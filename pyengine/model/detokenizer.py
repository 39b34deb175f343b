"""Token ids of a running request to text, as they come."""

from __future__ import annotations

from collections.abc import Sequence

from pyengine import _C
from pyengine.model.tokenizer import Tokenizer


class StreamingDetokenizer(_C.StreamingDetokenizer):
    """Text of the ids generated after a prompt, without half characters and without taking anything back.

    Without a prompt, the results of `append` and the one of `finish`, joined, are exactly
    ``tokenizer.decode(ids, skip_special_tokens)``. After a prompt they are what
    ``decode(prompt_ids + ids)`` has beyond its longest common beginning with ``decode(prompt_ids)``: a
    WordPiece or SentencePiece token that continues the prompt keeps its space, a character that the prompt
    began and the output completes belongs to the output, and a space that the next token could still remove
    (clean-up, stripping) is held back. Time per token is constant.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        super().__init__(tokenizer.decoder(skip_special_tokens), prompt_ids)
