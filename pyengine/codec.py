"""Between prompts and token ids, and between token ids and text, for one loaded checkpoint."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyengine.decoding.constraints import Constraint, ConstraintCompiler, StructuredOutputsParams
from pyengine.errors import RequestError
from pyengine.prompts import Prompt, check_token_ids

if TYPE_CHECKING:
    from pyengine.engine.text import Detokenizer
    from pyengine.model.tokenizer import Tokenizer


class Codec:
    """The tokenizer of a checkpoint, loaded in a thread of its own while the weights are mapped.

    A damaged tokenizer raises TokenizerError when it is first needed.
    """

    def __init__(self, directory: Path, vocab_size: int, bos_token_id: int | None) -> None:
        self.directory = directory
        self.vocab_size = vocab_size
        self._bos_token_id = bos_token_id
        self._tokenizer: Tokenizer | None = None
        self._error: BaseException | None = None
        self._constraints: ConstraintCompiler | None = None
        # Not a daemon: ending the interpreter in the middle of an import of compiled code aborts the process.
        self._loader = threading.Thread(target=self._load, name="pyengine-tokenizer")
        self._loader.start()

    def _load(self) -> None:
        try:
            from pyengine.model.tokenizer import load_tokenizer

            self._tokenizer = load_tokenizer(self.directory, self.vocab_size)
        except BaseException as error:  # raised again in the thread that asks for the tokenizer
            self._error = error

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None where the checkpoint has no tokenizer files."""
        self._loader.join()
        if self._error is not None:
            raise self._error
        return self._tokenizer

    @property
    def bos_token_id(self) -> int | None:
        """What an empty prompt begins with: as the configuration says, else the tokenizer."""
        if self._bos_token_id is not None:
            return self._bos_token_id
        bos = None if self.tokenizer is None else self.tokenizer.bos_token_id
        return bos if bos is not None and bos < self.vocab_size else None

    def encode(self, prompt: Prompt) -> array[int]:
        """Token ids; of texts with the special tokens that their tokenizer puts in front."""
        if prompt is None:
            prompt = [] if self.tokenizer is None else ""
        if not isinstance(prompt, str):
            return check_token_ids(prompt, self.vocab_size)
        if self.tokenizer is None:
            raise RequestError(
                f"{self.directory} has no tokenizer files: give a list of token ids instead of a text"
            )
        return array("i", self.tokenizer.encode(prompt))

    def encode_word(self, text: str) -> list[int]:
        """Token ids of a text inside of another: no special tokens in front of it."""
        if self.tokenizer is None:
            raise RequestError(
                f"{self.directory} has no tokenizer files: give token ids instead of the text {text!r}"
            )
        return self.tokenizer.encode(text)[len(self.tokenizer.encode("")) :]

    def number_ids(self) -> array[int]:
        """Tokens of the model that are digits; none where there is no tokenizer."""
        found = [] if self.tokenizer is None else self.tokenizer.number_ids()
        return array("i", [token for token in found if token < self.vocab_size])

    def constraint(self, params: StructuredOutputsParams, eos: Sequence[int]) -> Constraint:
        """What the text has to follow, at its start; ``eos``: tokens that may end it."""
        if self._constraints is None:
            self._constraints = ConstraintCompiler(self.vocab_size)
        return self._constraints.compile(params, self.tokenizer, eos)

    def encode_prompt(self, prompt: Prompt) -> array[int]:
        """Token ids to continue from: BOS where there is nothing else."""
        ids = self.encode(prompt)
        if ids:
            return ids
        if self.bos_token_id is None:
            raise RequestError(
                "the prompt is empty, and neither config.json nor the tokenizer names a BOS token: "
                "give at least one token"
            )
        return array("i", (self.bos_token_id,))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode(ids, skip_special_tokens)

    def detokenizer(self, prompt_ids: Sequence[int], skip_special_tokens: bool) -> Detokenizer:
        from pyengine.model.detokenizer import StreamingDetokenizer

        assert self.tokenizer is not None
        return StreamingDetokenizer(self.tokenizer, prompt_ids, skip_special_tokens)

    def decode_token(self, token_id: int) -> str:
        return self.decode((token_id,), skip_special_tokens=False) or ""
