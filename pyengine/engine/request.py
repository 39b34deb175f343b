"""What the engine runs: a request and its sequences, whatever they are for.

``Generation`` (generation.py) continues a prompt, ``Scoring`` (scoring.py) finds the log-probabilities of
given tokens. Both are made of sequences that compute keys and values in blocks of one pool, and the scheduler
does not tell them apart.
"""

from __future__ import annotations

import time
from array import array
from collections import abc
from typing import Any, Protocol

# The order of sequences, first come first served within a priority: (priority, number, index).
Key = tuple[float, int, int]

# What the model reports for one token: (id, log-probability, the n best of the same form, best first).
TokenLogprobs = tuple[int, float, list[tuple[int, float]]]


class Mailbox(Protocol):
    """Where a caller waits for what its requests yield. ``put`` is called by the thread that runs the engine.
    """

    def put(self, item: Any, /) -> None: ...


class Sequence:
    """Tokens that are computed in order. The first ``num_computed`` of the ``num_inputs`` tokens that are to
    run have their keys and values in ``blocks``.
    """

    __slots__ = (
        "blocks",
        "finish_reason",
        "index",
        "is_set_up",
        "key",
        "num_computed",
        "num_inputs",
        "num_prompt",
        "request",
        "shares_tail",
        "slot",
        "token_ids",
    )
    draws = False  # whether a token is drawn after the last input
    drafts: abc.Sequence[int] = ()  # what the step that is scheduled takes to follow the last input

    def __init__(self, request: Request, index: int, token_ids: array[int], num_inputs: int) -> None:
        self.request = request
        self.index = index
        self.key: Key = (request.priority, request.number, index)
        self.token_ids = token_ids
        self.num_inputs = num_inputs
        self.num_prompt = num_inputs  # those that are known when the request comes
        self.num_computed = 0
        self.blocks = array("i")
        self.shares_tail = False  # the block written next may be another sequence's too
        self.slot = -1  # of the sampler; -1: not running
        self.is_set_up = False  # the sampler knows its parameters
        self.finish_reason: str | None = None

    def matchable(self) -> array[int]:
        """Tokens of which all but the last may be found in the prefix cache instead of being computed."""
        first, last = self.targets
        return self.token_ids[:first] if first < last else self.token_ids

    @property
    def targets(self) -> tuple[int, int]:
        """[first, last): the tokens whose log-probability is still to be found. Each is scored by the row
        before it."""
        return 0, 0

    @property
    def top_n(self) -> int:
        """Also the best tokens at each of those places."""
        return 0

    @property
    def waits(self) -> bool:
        """Whether another sequence of the request has to come first."""
        return False

    def finish(self, reason: str) -> None:
        self.finish_reason = reason
        self.request.num_unfinished -= 1


class Request:
    """One thing asked of the engine. Times are those of ``time.perf_counter``."""

    # Slots: what a step touches of a request should lie together, since the model has emptied the caches.
    __slots__ = (
        "arrival",
        "arrival_time",
        "cached_tokens",
        "end",
        "ended",
        "error",
        "first_step",
        "id",
        "mailbox",
        "num_unfinished",
        "number",
        "preemptions",
        "priority",
        "sequences",
    )
    sequences: abc.Sequence[Sequence]

    def __init__(self, request_id: str, number: int, priority: int, mailbox: Mailbox | None) -> None:
        self.id = request_id
        self.number = number  # order of arrival
        self.priority = priority  # the lower, the earlier
        self.mailbox = mailbox
        self.error: Exception | None = None  # why it was given up; names it
        self.arrival_time = time.time()
        self.arrival = time.perf_counter()
        self.first_step: float | None = None
        self.end: float | None = None
        self.cached_tokens: int | None = None
        self.preemptions = 0
        self.num_unfinished = 0  # sequences
        self.ended = False  # its caller has been told: nothing of it changes any more

    @property
    def finished(self) -> bool:
        return self.num_unfinished == 0

    @property
    def length(self) -> int:
        """Tokens that the longest of its sequences may have in the KV cache."""
        return max(seq.num_inputs for seq in self.sequences)

    def why_refused(self, num_blocks: int, needed: int) -> str:
        """What to tell a caller whose request needs ``needed`` of ``num_blocks`` blocks."""
        raise NotImplementedError

    def report(self, seq: Sequence) -> None:
        """A step has added to a sequence: tell whoever wants to know at once."""
