"""Requests for the fake core, and a tokenizer small enough to read."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from pyengine.decoding.resolve import BeamParams, ResolvedParams
from pyengine.engine.beams import BeamSearch
from pyengine.engine.engine import Engine
from pyengine.engine.generation import Generation
from pyengine.engine.request import Request
from pyengine.outputs import StreamDelta

from .fake_core import fake_core

MAX_MODEL_LEN = 120


def engine(
    num_blocks: int = 64, *, budget: int = 64, max_num_seqs: int = 8, prefix_caching: bool = True
) -> Engine:
    core = fake_core(num_blocks, prefix_caching=prefix_caching)
    return Engine(core, max_model_len=MAX_MODEL_LEN, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)


def params(
    prompt: Sequence[int],
    max_tokens: int = 10,
    *,
    n: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    stop_ids: frozenset[int] = frozenset(),
    logprobs: int = -1,
    beams: BeamParams | None = None,
) -> ResolvedParams:
    return ResolvedParams(
        n=n,
        max_length=min(len(prompt) + max_tokens, MAX_MODEL_LEN),
        temperature=temperature,
        seed=seed,
        stop=stop,
        stop_ids=stop_ids,
        logprobs=logprobs,
        beams=beams,
    )


class Letters:
    """Token i is the i-th of the letters a, b, c, ..., A, B, ..."""

    def detokenizer(self, prompt_ids: Sequence[int], skip_special_tokens: bool) -> Letters:
        return self

    def append(self, ids: Sequence[int]) -> str:
        return "".join(map(self.decode_token, ids))

    def finish(self) -> str:
        return ""

    def copy(self) -> Letters:
        return self

    def decode_token(self, token_id: int) -> str:
        return chr(ord("a") + token_id) if token_id < 26 else chr(ord("A") + token_id - 26)


class Box:
    """A mailbox that keeps what it gets."""

    def __init__(self) -> None:
        self.items: list[StreamDelta] = []

    def put(self, item: StreamDelta) -> None:
        self.items.append(item)


def request(
    number: int,
    prompt: Sequence[int],
    resolved: ResolvedParams,
    *,
    priority: int = 0,
    stream: bool = False,
    codec: Letters | None = None,
) -> Generation:
    return (Generation if resolved.beams is None else BeamSearch)(
        str(number),
        number,
        None,
        array("i", prompt),
        resolved,
        codec,
        priority=priority,
        stream=stream,
        mailbox=Box() if stream else None,
    )


def deltas_of(request: Generation) -> list[StreamDelta]:
    assert isinstance(request.mailbox, Box)
    return request.mailbox.items


def run(engine: Engine, *requests: Request) -> None:
    for one in requests:
        engine.add(one)
    while engine.requests:
        engine.step()
    for one in requests:
        if one.error is not None:
            raise one.error


def generate(engine: Engine, *requests: Generation) -> list[list[list[int]]]:
    """New tokens of each sequence of each request."""
    run(engine, *requests)
    return [tokens_of(one) for one in requests]


def tokens_of(request: Generation) -> list[list[int]]:
    return [completion.token_ids for completion in request.output().outputs]
