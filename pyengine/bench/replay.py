"""Speed of speculation on a real text: the model does all its work, and the text decides what comes.

What the model would have said does not matter then: a draft is right if it is the text's next token. The
drafters see the text up to the present, as they see what a model has written.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from pyengine.bench.measure import SHORT_NAMES, row_of
from pyengine.errors import InternalError, RequestError

PROMPT_TOKENS = 16  # where nothing else is asked for


@dataclass
class Replay:
    """What a text yields: tokens per second after the first, by repetition, with and without speculation."""

    prompt: list[int]
    text: list[int]  # what follows
    plain: list[float] = field(default_factory=list)
    drafting: list[float] = field(default_factory=list)
    steps: int = 0  # with speculation, after the prompt's, all repetitions together ...
    draft_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def ratios(self) -> list[float]:
        """Of each repetition: with speculation, as a multiple of without."""
        return [fast / slow for fast, slow in zip(self.drafting, self.plain, strict=True)]


def of_text(llm: Any, text: str, prompt_tokens: int | None, new_tokens: int | None, source: str) -> Replay:
    """The beginning of a text: as much of it as asked for, or as fits into the context.

    Raises RequestError where there is less of it, or more than the context holds.
    """
    if llm.tokenizer is None:
        raise RequestError(f"--replay needs a tokenizer, and {llm.path} has none")
    ids = llm.tokenizer.encode(text)
    if any(not 0 <= token < llm.config.vocab_size for token in ids):
        raise RequestError(f"{source}: the tokenizer has tokens that the model's vocabulary does not have")
    prompt = PROMPT_TOKENS if prompt_tokens is None else prompt_tokens
    new = max(min(len(ids), llm.max_model_len) - prompt, 2) if new_tokens is None else new_tokens
    if new < 2:
        raise RequestError(
            f"--new-tokens {new}: --replay times what comes after the first new token, and needs 2 of them"
        )
    if prompt + new > llm.max_model_len:
        raise RequestError(
            f"--replay: {prompt} prompt tokens and {new} new ones are more than the context of "
            f"{llm.max_model_len}: choose another --prompt-tokens and --new-tokens"
        )
    if prompt + new > len(ids):
        raise RequestError(
            f"{source}: too short: it has {len(ids)} tokens, and {prompt} prompt tokens and {new} new ones "
            "are needed"
        )
    return Replay(ids[:prompt], ids[prompt : prompt + new])


def measure(
    llm: Any, replay: Replay, repeats: int, progress: Callable[[str], object] = lambda _: None
) -> None:
    """``repeats`` rates with and without the speculation of ``llm``, in turn, after one of each that does not
    count. Who goes first changes each time. No other request may run."""
    speculator = llm._engine.speculator
    if speculator is None:
        raise RequestError("a replay needs an LLM with a speculative_config")
    try:
        for turn in range(repeats + 1):
            progress("replay, " + (f"{turn} of {repeats}" if turn else "warming up"))
            for drafting in (True, False) if turn % 2 else (False, True):
                speculator.drafter.forget()  # the repetition before was the same text
                llm._engine.speculator = speculator if drafting else None
                metrics, steps = run(llm, replay)
                if turn == 0:
                    continue
                seconds = max(metrics.total_time - metrics.ttft, 1e-9)
                rate = (len(replay.text) - 1) / seconds
                (replay.drafting if drafting else replay.plain).append(rate)
                if drafting:
                    replay.steps += steps
                    replay.draft_tokens += metrics.draft_tokens
                    replay.accepted_tokens += metrics.accepted_tokens
    finally:
        llm._engine.speculator = speculator


def run(llm: Any, replay: Replay) -> tuple[Any, int]:
    """The RequestMetrics of one run, and its steps after the prompt's."""
    from pyengine import SamplingParams
    from pyengine.calls import finished_in_order

    params = SamplingParams(temperature=0, seed=0, max_tokens=len(replay.text), ignore_eos=True)
    (request,) = llm._requests.generations([replay.prompt], params, 0)
    if request.error is not None:
        raise request.error
    sampler = {**request.params.sampler, "replay": replay.text}
    request.params = dataclasses.replace(request.params, sampler=sampler)
    with closing(finished_in_order(llm._thread, [request], None, lambda one: one.num_new_tokens)) as ended:
        for one in ended:
            if one.error is not None:
                raise one.error
    output = request.output()
    if output.outputs[0].token_ids != replay.text:
        raise InternalError("a replay has yielded other tokens than those of its text")
    return output.metrics, request.num_token_steps - 1


def as_row(replay: Replay, llm: Any, method: str, source: str, load_s: float) -> dict[str, Any]:
    """What ``bench --replay --json`` prints; ``docs/benchmarks.md`` lists the keys."""
    drafted, steps, ratios = replay.draft_tokens, replay.steps, replay.ratios
    return row_of(llm, "replay", replay.drafting, load_s) | {
        "file": source,
        "method": method,
        "prompt_tokens": len(replay.prompt),
        "new_tokens": len(replay.text),
        "kv_dtype": SHORT_NAMES.get(llm.kv_cache_dtype, llm.kv_cache_dtype),
        "plain_tok_per_s_median": round(statistics.median(replay.plain), 1),
        "plain_min": round(min(replay.plain), 1),
        "plain_max": round(max(replay.plain), 1),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "acceptance_rate": round(replay.accepted_tokens / drafted, 4) if drafted else None,
        "mean_draft_length": round(drafted / steps, 3),
        "tokens_per_step": round((len(replay.text) - 1) * len(ratios) / steps, 3),
    }
