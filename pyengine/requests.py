"""From what callers ask for to requests of the engine, checked before anything runs."""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Sequence
from typing import Any

from pyengine.codec import Codec
from pyengine.decoding.params import SamplingParams, derived_seed, params_of_each
from pyengine.decoding.resolve import GenerationDefaults
from pyengine.engine.beams import BeamSearch
from pyengine.engine.engine import Engine
from pyengine.engine.generation import Generation
from pyengine.engine.request import Request
from pyengine.engine.scheduler import BLOCK_TOKENS
from pyengine.engine.scoring import Scoring
from pyengine.errors import PyEngineError, RequestError
from pyengine.prompts import Prompt, Prompts, as_list, as_prompt, is_one, items_of
from pyengine.targets import Target, check_scoring

_AUTOMATIC_ID = "auto-"  # what the ids of requests without a request_id begin with
_MAX_PRIORITY = 2**31 - 1


class Refused(Request):
    """A prompt, or parameters, that cannot be served: it never enters the engine."""

    num_new_tokens = 0

    def __init__(self, prompt: Any, error: PyEngineError) -> None:
        super().__init__("", -1, 0, None)
        self.sequences = ()
        self.prompt = prompt if isinstance(prompt, str) else None
        self.prompt_ids = array("i")
        self.error = error
        self.ended = True


class RequestMaker:
    """Makes the requests of one LLM, from any thread: numbers them, and gives seeds to those without one."""

    def __init__(
        self, engine: Engine, codec: Codec, defaults: GenerationDefaults, vocab_size: int, seed: int | None
    ) -> None:
        self._engine = engine
        self._codec = codec
        self._defaults = defaults
        self._vocab_size = vocab_size
        self._seed = seed
        self._numbers = itertools.count()
        self._seeds = itertools.count()

    def generations(self, prompts: Prompts, params: Any, priority: Any) -> list[Generation | Refused]:
        """One per prompt; those that cannot be served have ended already. RequestError where it is not one
        prompt that is at fault."""
        listed = items_of(prompts)
        each = zip(
            listed, params_of_each(params, len(listed)), _one_for_each(priority, len(listed)), strict=True
        )
        requests: list[Generation | Refused] = []
        for prompt, one, its_priority in each:
            seed = self._next_seed()  # taken by refused prompts, too: the others keep theirs
            try:
                requests.append(self._generation(as_prompt(prompt), one, its_priority, seed))
            except PyEngineError as error:
                requests.append(Refused(prompt, error))
        return requests

    def streamed(
        self, prompt: Prompt, params: SamplingParams | None, request_id: str | None, priority: int
    ) -> Generation:
        if not is_one(prompt):
            raise RequestError("a stream continues one prompt; give a list of prompts to generate")
        if request_id is not None and (
            not isinstance(request_id, str) or request_id.startswith(_AUTOMATIC_ID)
        ):
            raise RequestError(
                f'request_id={request_id!r}: must be a string that does not begin with "{_AUTOMATIC_ID}"'
            )
        (one,), (its_params,) = as_list(prompt), params_of_each(params, 1)
        (its_priority,) = _one_for_each(priority, 1)
        return self._generation(one, its_params, its_priority, self._next_seed(), request_id, stream=True)

    def scorings(self, targets: Sequence[Target], stride: Any, top_n: Any, priority: Any) -> list[Scoring]:
        """One per target; texts longer than the context in windows ``stride`` apart."""
        size = min(self._engine.max_model_len, self._engine.core.manager.num_blocks * BLOCK_TOKENS)
        stride = check_scoring(size, stride, top_n)
        best = min(top_n, self._vocab_size)
        priorities = _one_for_each(priority, len(targets))
        requests = []
        for target, its_priority in zip(targets, priorities, strict=True):
            number, windows = next(self._numbers), target.windows(size, stride)
            requests.append(Scoring(f"{_AUTOMATIC_ID}{number}", number, windows, best, priority=its_priority))
        return requests

    def _generation(
        self,
        prompt: Prompt,
        params: SamplingParams,
        priority: int,
        seed: int,
        request_id: str | None = None,
        stream: bool = False,
    ) -> Generation:
        """A request that is known to fit. ``seed``: where its parameters have none."""
        codec = self._codec
        ids = codec.encode_prompt(prompt)
        text = prompt if isinstance(prompt, str) else None
        if params.truncate_prompt_tokens is not None and params.truncate_prompt_tokens < len(ids):
            ids, text = ids[-params.truncate_prompt_tokens :], None
        if params.echo and text is None:
            text = codec.decode(ids)
        number = next(self._numbers)
        resolved = self._defaults.resolve(
            params,
            prompt_tokens=len(ids),
            max_model_len=self._engine.max_model_len,
            seed=seed,
            vocabulary=codec,
        )
        if stream and resolved.beams is not None:
            raise RequestError(
                f"num_beams={params.num_beams}: which beam is the best is known at the end only, so they "
                "cannot be streamed; use generate"
            )
        if stream and resolved.num_returned is not None:
            raise RequestError(
                f"best_of={params.best_of} with n={params.n}: which samples are the best is known at their "
                "end only, so they cannot be streamed; use generate, or best_of equal to n"
            )
        request = (Generation if resolved.beams is None else BeamSearch)(
            f"{_AUTOMATIC_ID}{number}" if request_id is None else request_id,
            number,
            prompt if isinstance(prompt, str) else None,
            ids,
            resolved,
            None if codec.tokenizer is None else codec,
            echo=(text or "") if params.echo else "",
            priority=priority,
            stream=stream,
        )
        self._engine.check(request)
        return request

    def _next_seed(self) -> int:
        number = next(self._seeds)
        if self._seed is None:
            return int.from_bytes(os.urandom(8), "little") >> 1
        return derived_seed(self._seed, number)


def _one_for_each(priority: Any, count: int) -> list[int]:
    listed = list(priority) if isinstance(priority, (list, tuple)) else [priority] * count
    for one in listed:
        if isinstance(one, bool) or not isinstance(one, int) or abs(one) > _MAX_PRIORITY:
            raise RequestError(
                f"priority={one!r}: must be an integer from {-_MAX_PRIORITY} to {_MAX_PRIORITY}"
            )
    if len(listed) != count:
        raise RequestError(
            f"{len(listed)} priorities for {count} prompts: give one for all, or one for each"
        )
    return listed
