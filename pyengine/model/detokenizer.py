"""Token ids of a running request to text, as they come."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from pyengine.model.tokenizer import Tokenizer


class StreamingDetokenizer:
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
        self._decoder = tokenizer.decoder(skip_special_tokens)
        self._echo = ""  # text of the prompt's end that is not certain yet, but not to be repeated
        if prompt_ids:
            self._decoder.push(prompt_ids)
            self._echo = self._decoder.copy().finish()

    def copy(self) -> StreamingDetokenizer:
        made = copy(self)
        made._decoder = self._decoder.copy()
        return made

    def append(self, ids: Sequence[int]) -> str:
        """Text that is certain now and was not before; TokenizerError for an id outside the vocabulary."""
        text = self._decoder.push(ids)
        return self._without_echo(text) if self._echo and text else text

    def finish(self) -> str:
        """The rest of the text, once no id follows."""
        text = self._decoder.finish()
        return self._without_echo(text) if self._echo else text

    def _without_echo(self, text: str) -> str:
        common = 0
        for ours, echoed in zip(text, self._echo, strict=False):
            if ours != echoed:
                self._echo = ""
                return text[common:]
            common += 1
        self._echo = self._echo[common:]
        return text[common:]
