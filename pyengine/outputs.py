"""What generating and scoring return: plain data, complete and independent of the engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyengine.errors import PyEngineError

__all__ = [
    "Choice",
    "CompletionOutput",
    "EngineStats",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "ScoreOutput",
    "StreamDelta",
]


@dataclass
class Logprob:
    """Log-probability of one token under the model (temperature 1, nothing cut off)."""

    logprob: float
    rank: int | None  # 1: the likeliest; None: not among the best ones asked for
    decoded_token: str


@dataclass
class CompletionOutput:
    """One of the ``n`` continuations of a prompt."""

    index: int
    text: str
    token_ids: list[int]  # the new ones; a token that stopped the text is the last of them
    logprobs: list[dict[int, Logprob]] | None  # per token: the chosen one and the n best, best first
    cumulative_logprob: float | None
    finish_reason: str | None  # "stop", "length", "abort"; None while running
    stop_reason: str | int | None  # the stop string or token id that ended the text
    seed: int  # give it as SamplingParams.seed to get the same tokens again
    # Of beam search: the sum of its edited log-probabilities / number of tokens ** length_penalty.
    score: float | None = None


@dataclass
class RequestMetrics:
    """Times in seconds from the arrival of the request, and token counts."""

    queue_time: float = 0.0  # until its first step began
    ttft: float | None = None  # until its first new token
    total_time: float | None = None  # until its last continuation finished
    prompt_tokens: int = 0
    new_tokens: int = 0  # of all continuations
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    preemptions: int = 0  # times that one of its continuations lost its place and was computed again
    arrival_time: float = 0.0  # seconds since the epoch
    inter_token_latency: float | None = None  # mean from one new token of a continuation to the next
    max_inter_token_latency: float | None = None
    draft_tokens: int = 0  # guessed ahead of the model (speculative_config) ...
    accepted_tokens: int = 0  # ... and right


@dataclass
class RequestOutput:
    """A prompt and its continuations."""

    request_id: str
    prompt: str | None  # None: the prompt was token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    # Per token of the prompt, as of new ones, if asked for; the first follows nothing: None.
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    # Why there is no text; found in ``PyEngineError.outputs`` only, because ``generate`` raises it.
    error: PyEngineError | None = None


@dataclass(slots=True)
class StreamDelta:
    """What one step added to one continuation.

    The texts (and token ids) of the deltas of one ``index`` add up to what ``generate`` returns.
    """

    request_id: str
    index: int
    text: str  # may be empty: half a character, or the possible beginning of a stop string
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: str | int | None
    output: RequestOutput | None = None  # the whole request, with its last delta only


@dataclass(frozen=True)
class EngineStats:
    """What an ``LLM`` does now, and what it has done since it was made."""

    running: int  # requests of which something has run and that are not finished
    waiting: int  # requests of which nothing has run yet
    kv_blocks: int  # blocks of 16 tokens
    kv_blocks_used: int  # by running requests; the others may hold prefixes that are kept
    prefix_hit_tokens: int  # found in the prefix cache instead of being computed
    prefix_lookup_tokens: int  # looked for there
    prompt_tokens: int  # computed, those of scored texts included
    new_tokens: int
    scored_tokens: int
    prompt_tokens_per_second: float  # over the last ten seconds
    new_tokens_per_second: float
    steps: int
    failed_steps: int  # of which the requests at fault were found and given up, and the others went on
    busy_time: float  # seconds in steps
    preemptions: int
    finished: int  # requests that ended by themselves
    aborted: int
    failed: int
    draft_tokens: int  # guessed ahead of the model (speculative_config) ...
    accepted_tokens: int  # ... and right

    @property
    def prefix_hit_rate(self) -> float:
        return self.prefix_hit_tokens / self.prefix_lookup_tokens if self.prefix_lookup_tokens else 0.0

    @property
    def acceptance_rate(self) -> float:
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else 0.0


@dataclass
class ScoreOutput:
    """Log-probabilities of the tokens of a text, or of a continuation given a text."""

    text: str | None  # what was scored; None: token ids without a tokenizer
    token_ids: list[int]  # of the scored text; with a continuation, of the continuation only
    tokens: list[str]  # their pieces; empty without a tokenizer
    logprobs: list[float | None]  # natural logarithm; None: the very first token, which follows nothing
    num_context_tokens: int  # tokens of the given text (and BOS) before token_ids
    num_characters: int | None  # of the tokens that have a log-probability
    top_logprobs: list[list[Logprob] | None] | None = None  # per token, best first, if asked for

    @property
    def total_logprob(self) -> float:
        return math.fsum(value for value in self.logprobs if value is not None)

    @property
    def num_scored(self) -> int:
        """Tokens that have a log-probability."""
        return sum(value is not None for value in self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability per token; NaN if nothing could be scored."""
        return math.exp(-self.total_logprob / self.num_scored) if self.num_scored else math.nan

    @property
    def bits_per_character(self) -> float | None:
        """Comparable between tokenizers; None without characters."""
        return -self.total_logprob / math.log(2) / self.num_characters if self.num_characters else None


@dataclass
class Choice:
    """One of the answers given to ``LLM.choose``."""

    text: str | None
    index: int  # position in the list of choices
    logprob: float  # of the whole choice, given the text
    probability: float  # among the choices: they sum to 1
    score: ScoreOutput
