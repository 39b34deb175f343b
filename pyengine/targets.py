"""What to score, as token ids: texts, and continuations with the border between text and continuation."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyengine.codec import Codec
from pyengine.decoding.params import MAX_LOGPROBS
from pyengine.engine.scoring import Window, window_spans
from pyengine.errors import RequestError, TokenizerError
from pyengine.outputs import Choice, Logprob, ScoreOutput
from pyengine.prompts import Prompt, as_list, as_one, is_one

LENGTH_NORMALIZATIONS = (None, "tokens", "characters")


@dataclass
class Target:
    """``token_ids[start:]`` are to be scored, given what is before them."""

    text: str | None
    token_ids: array[int]
    start: int
    num_characters: int | None  # of the tokens that can be scored

    @property
    def first(self) -> int:
        """The first token that follows something."""
        return max(self.start, 1)

    def windows(self, size: int, stride: int) -> list[tuple[array[int], int]]:
        """Token ids of each window, and the first of them that is scored."""
        spans = window_spans(len(self.token_ids), self.first, size, stride)
        return [(self.token_ids[begin:end], first - begin) for begin, end, first in spans]

    def output(self, codec: Codec, windows: Sequence[Window], with_top: bool) -> ScoreOutput:
        ids = self.token_ids[self.start :].tolist()
        unscored = self.first - self.start
        logprobs: list[float | None] = [None] * unscored
        logprobs += [value for window in windows for value in window.logprobs]
        top: list[list[Logprob] | None] = [None] * unscored
        top += [
            [Logprob(value, rank, codec.decode_token(token)) for rank, (token, value) in enumerate(best, 1)]
            for window in windows
            for best in window.top_logprobs
        ]
        tokenizer = codec.tokenizer
        return ScoreOutput(
            text=self.text,
            token_ids=ids,
            tokens=[] if tokenizer is None else [tokenizer.id_to_piece(token) for token in ids],
            logprobs=logprobs,
            num_context_tokens=self.start,
            num_characters=self.num_characters,
            top_logprobs=top if with_top else None,
        )


def check_scoring(size: int, stride: Any, top_n: Any) -> int:
    """The stride of windows of ``size`` tokens. RequestError for a stride or a top_n that cannot be."""
    if stride is None:
        stride = max(1, size // 2)
    if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride < size:
        raise RequestError(f"stride={stride!r}: must be an integer from 1 to {size - 1}")
    if isinstance(top_n, bool) or not isinstance(top_n, int) or not 0 <= top_n <= MAX_LOGPROBS:
        raise RequestError(f"top_logprobs={top_n!r}: must be an integer from 0 to {MAX_LOGPROBS}")
    return stride


def score_targets(codec: Codec, text: Any, continuation: Any, add_bos: bool) -> list[Target]:
    """Of a text, or a list of texts, and as many continuations if any."""
    if is_one(text):
        texts, continuations = as_list(text), [continuation]
    else:
        texts = as_list(text)
        continuations = [None] * len(texts) if continuation is None else as_list(continuation)
        if is_one(continuation) and continuation is not None or len(continuations) != len(texts):
            raise RequestError(f"{len(texts)} texts need a list of {len(texts)} continuations")
    targets = []
    for number, (one, following) in enumerate(zip(texts, continuations, strict=True), 1):
        try:
            if following is None:
                targets.append(text_target(codec, one, add_bos))
            else:
                targets += continuation_targets(codec, one, [as_one(following, "a continuation")], add_bos)
        except (RequestError, TokenizerError) as error:
            if len(texts) == 1:
                raise
            raise type(error)(f"text {number} of {len(texts)}: {error}") from error
    return targets


def text_target(codec: Codec, text: Prompt, add_bos: bool) -> Target:
    """All of a text. Its first token can be scored only after BOS."""
    _check_flag("add_bos", add_bos)
    ids = codec.encode(text)
    start = 0
    if add_bos:
        bos = _bos(codec)
        if not ids or ids[0] != bos:
            ids.insert(0, bos)
            start = 1
    if len(ids) == start:
        raise RequestError("there is nothing to score: the text is empty")
    target = Target(_text_of(codec, text, ids[start:]), ids, start, None)
    unscored = ids[start : target.first]
    target.num_characters = _characters(codec, text, unscored, ids[target.first :])
    return target


def continuation_targets(
    codec: Codec, text: Prompt, continuations: Sequence[Prompt], add_bos: bool
) -> list[Target]:
    """Continuations of one text, all scored from the same border on, so that they can be compared.

    Text and continuation are encoded together: the tokens of a text may change where something is joined
    to it ("Hello " + "world" is "Hello", " world"). The border lies where the first of the continuations
    changes the tokens of the text, or adds to them; what the text has beyond it is scored with each.
    """
    text = as_one(text, "the text")
    _check_flag("add_bos", add_bos)
    context = codec.encode(text)
    joined: list[array[int]] = []
    for number, continuation in enumerate(continuations, 1):
        if isinstance(text, str) and isinstance(continuation, str):
            ids = codec.encode(text + continuation)
        else:
            ids = context + _encode_bare(codec, continuation)
        if not continuation or len(ids) == _common(context, ids):
            many = len(continuations) > 1
            what = f"choice {number} of {len(continuations)}" if many else "the continuation"
            raise RequestError(
                f"{what} ({continuation!r}) adds no token to the text: there is nothing to score"
            )
        joined.append(ids)
    border = min(_common(context, ids) for ids in joined)
    targets = []
    for continuation, ids in zip(continuations, joined, strict=True):
        if isinstance(text, str) and isinstance(continuation, str) and border < len(context):
            characters = _characters(codec, text + continuation, ids[:border], ids[border:])
        else:
            characters = _characters(codec, continuation, (), ids[border:])
        start = border
        # Something has to come before the first token, as in generating from an empty prompt.
        if border == 0 or (add_bos and ids[0] != _bos(codec)):
            ids = array("i", (_bos(codec),)) + ids
            start += 1
        targets.append(Target(_text_of(codec, continuation, ids[start:]), ids, start, characters))
    return targets


def rank_choices(scores: Sequence[ScoreOutput], length_normalization: str | None) -> list[Choice]:
    """The likeliest first; ties in the order given."""
    values = []
    for score in scores:
        lengths = {None: 1, "tokens": score.num_scored, "characters": score.num_characters}
        values.append(score.total_logprob / (lengths[length_normalization] or 1))
    best = max(values)
    weights = [math.exp(value - best) for value in values]
    total = math.fsum(weights)
    return [
        Choice(scores[index].text, index, scores[index].total_logprob, weights[index] / total, scores[index])
        for index in sorted(range(len(scores)), key=lambda index: -values[index])
    ]


def _check_flag(field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{field}={value!r}: must be True or False")


def _bos(codec: Codec) -> int:
    if codec.bos_token_id is None:
        raise RequestError(
            "neither config.json nor the tokenizer names a BOS token: "
            "score with add_bos=False, and a continuation with a text in front"
        )
    return codec.bos_token_id


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    for position, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return position
    return min(len(a), len(b))


def _encode_bare(codec: Codec, continuation: Prompt) -> array[int]:
    """Ids of a continuation of token ids, without the special tokens that a text begins with."""
    ids = codec.encode(continuation)
    if isinstance(continuation, str):
        front = codec.encode("")
        if front and ids[: len(front)] == front:
            return ids[len(front) :]
    return ids


def _text_of(codec: Codec, given: Prompt, ids: Sequence[int]) -> str | None:
    return given if isinstance(given, str) else codec.decode(ids)


def _characters(codec: Codec, given: Prompt, before: Sequence[int], scored: Sequence[int]) -> int | None:
    """Characters of the scored tokens: what ``given`` has beyond the tokens ``before`` them."""
    if isinstance(given, str):
        return max(0, len(given) - len(codec.decode(before) or ""))
    text = codec.decode(scored)
    return None if text is None else len(text)
