"""``LLM``: generate, stream, score and choose with one checkpoint."""

from __future__ import annotations

import os
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, cast, overload

from pyengine.calls import (
    Progress,
    async_deltas,
    check_callback,
    deltas,
    finished_in_order,
    progress_line,
    raise_first_error,
    wait_for_end,
)
from pyengine.decoding.params import MAX_SEED, SamplingParams
from pyengine.engine.generation import Generation
from pyengine.engine.thread import EngineThread
from pyengine.errors import RequestError
from pyengine.loading import check_count, load
from pyengine.outputs import Choice, EngineStats, RequestOutput, ScoreOutput, StreamDelta
from pyengine.prompts import Prompt, Prompts, as_choices, is_one
from pyengine.requests import RequestMaker
from pyengine.targets import LENGTH_NORMALIZATIONS, Target, continuation_targets, rank_choices, score_targets

if TYPE_CHECKING:
    from pyengine.model.tokenizer import Tokenizer

OnOutput = Callable[[int, RequestOutput], object]
OnScore = Callable[[int, ScoreOutput], object]


class LLM:
    """A GPT-2 checkpoint, ready to run.

    model: checkpoint directory, Hub id, or None for the bundled model.
    device: "cpu", "cuda" (GPU 0, where pyengine was built with CUDA: docs/cuda.md), or "auto": CUDA where it
        can be used, else the CPU.
    dtype: what to compute in; "auto" is bfloat16 for bfloat16 files, otherwise float32 (float16 files
        included: a CPU has no float16 arithmetic worth using, so "float16" is refused). On CUDA "auto" is the
        dtype of the file, float16 with quantised weights, and "float16" is allowed.
    quantization: "int8" or "int4": quantise the weights while loading, or None: as the checkpoint stores them
        (``pyengine-cli quantize`` writes quantised checkpoints). What is not an integer product is float32;
        on CUDA integers are multiplied in ``dtype``, and nothing else is rounded.
    kv_cache_dtype: how keys and values are kept: "auto" (as ``dtype``; bfloat16 with quantised weights),
        "float32", "bfloat16", or "int8"
        with a float32 scale per token and head, about a quarter of float32's memory. On CUDA: as ``dtype``,
        or "int8".
    num_threads: worker threads [the processors this process may use].
    max_model_len: tokens of a sequence at most, prompt and new ones together [``n_positions``].
    max_num_seqs: sequences that run at once, each sample counting as one.
    max_num_batched_tokens: tokens of one step at most; longer prompts run in chunks.
    kv_cache_memory: bytes, or text like "512MiB". The default holds ``max_num_seqs`` sequences of
        ``max_model_len`` tokens, but takes no more than 25 % of the memory available to the process
        (MemAvailable, or what its cgroup leaves if that is less), and holds at least one such sequence.
        It is address space: memory is used as sequences grow into it, and then kept. On CUDA it is taken at
        once, by default at most 90 % of what the weights and a step's buffers leave of the GPU's free memory.
    enable_prefix_caching: keep the keys and values of prompts for prompts that begin alike.
    max_queue_size: requests that wait in the engine's queue at most; others wait outside. ``stream`` returns,
        and ``astream`` goes on, when its request has entered.
    speculative_config: guess tokens ahead of the model and let one step check several, without any effect on
        the text: {"method": "ngram"} (what has followed the same tokens in this text), {"method": "suffix"}
        (also in all others), or {"model": PATH} (what a smaller model says); see docs/decoding.md.
    seed: makes requests without a seed of their own reproducible, in the order in which they come.

    A thread of its own runs the requests of all callers, in any number of threads and event loops. It starts
    with the first request; ``close``, the end of a ``with`` block and the end of the interpreter end it, and
    what still runs. A process that forks keeps its LLM; in the child, every call of it is an InternalError.
    Raises CheckpointError, ConfigError or OutOfMemory. A damaged tokenizer raises TokenizerError when a text
    is first needed.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        num_threads: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        kv_cache_memory: int | str | None = None,
        enable_prefix_caching: bool = True,
        seed: int | None = None,
        max_queue_size: int = 1024,
        speculative_config: Mapping[str, Any] | None = None,
    ) -> None:
        if seed is not None:
            check_count("seed", seed, MAX_SEED, low=0)
        check_count("max_queue_size", max_queue_size, 2**31 - 1)
        loaded = load(
            model,
            device=device,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            num_threads=num_threads,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory=kv_cache_memory,
            enable_prefix_caching=enable_prefix_caching,
            speculative_config=speculative_config,
        )
        self.path = loaded.checkpoint.path
        self.config = loaded.checkpoint.config
        self.device = loaded.device
        self.dtype = loaded.dtype
        self.quantization = loaded.quantization
        self.kv_cache_dtype = loaded.kv_cache_dtype
        self.num_threads = loaded.num_threads
        self.max_model_len = loaded.engine.max_model_len
        self._codec = loaded.codec
        self._engine = loaded.engine
        self._requests = RequestMaker(
            loaded.engine, loaded.codec, loaded.defaults, self.config.vocab_size, seed
        )
        self._thread = EngineThread(loaded.engine, max_queue_size)
        weakref.finalize(self, self._thread.stop).atexit = False  # thread.py has an exit handler of its own

    def __repr__(self) -> str:
        state = ", closed" if self._thread.is_over else ""
        return (
            f"LLM({str(self.path)!r}, device={self.device!r}, dtype={self.dtype!r}, "
            f"quantization={self.quantization!r}, kv_cache_dtype={self.kv_cache_dtype!r}, "
            f"num_threads={self.num_threads}, max_model_len={self.max_model_len}, "
            f"num_kv_blocks={self.num_kv_blocks}{state})"
        )

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine's thread. Requests that still run, whoever's they are, end with a ClosedError, and
        so does every later one. May be called again."""
        self._thread.close()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None where the checkpoint has no tokenizer files: prompts are then token ids."""
        return self._codec.tokenizer

    @property
    def num_kv_blocks(self) -> int:
        """Blocks of 16 tokens in the KV cache."""
        return self._engine.core.manager.num_blocks

    def stats(self) -> EngineStats:
        """What the engine does now, and what it has done so far."""
        return self._thread.stats()

    def generate(
        self,
        prompts: Prompts = None,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        progress: bool | Progress = False,
        on_output: OnOutput | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts: texts, lists of token ids, or None (from BOS). One output per prompt, in order.

        ``params`` and ``priority``: for all prompts, or one per prompt. Requests of a lower priority number
        go before those of a higher one, and take their place where there is no other; first come, first
        served among equals. Nobody waits for ever: when 16 later ones have gone before a request, into the
        queue or from there to the model, it is next. ``progress``: True for a line on standard error, or a
        function that is called with (finished prompts, all prompts, new tokens) now and then, and at the end.
        ``on_output`` is called with (index, output) for each prompt in order, as soon as it and those before
        it are finished; after Ctrl-C also for the others, whose finish_reason is "abort". Both are called in
        the thread that calls ``generate``.
        If a prompt or its parameters cannot be served (RequestError), or fail later (CheckpointError where
        the model yields NaN), the others run to their ends and ``on_output`` gets theirs. Then the error is
        raised, that of the first one if several fail: it names the prompt ("prompt 2 of 3"), and its
        ``outputs`` has one RequestOutput per prompt, with an ``error`` for those that failed. What concerns
        the whole call (two parameters for three prompts) is refused before anything runs. Callbacks that
        raise end the call and its requests.
        """
        check_callback("progress", progress)
        check_callback("on_output", on_output)
        self._thread.check_process()
        requests = self._requests.generations(prompts, params, priority)
        outputs: list[RequestOutput] = []
        report = progress_line("prompts, {} new tokens") if progress is True else progress or None
        ended = finished_in_order(self._thread, requests, report, lambda request: request.num_new_tokens)
        reported = 0
        try:
            with closing(ended):
                for request in ended:
                    reported += 1
                    if request.error is None and isinstance(request, Generation):
                        outputs.append(request.output())
                        if on_output is not None:
                            on_output(reported - 1, outputs[-1])
                    else:
                        ids = request.prompt_ids.tolist()
                        outputs.append(RequestOutput(request.id, request.prompt, ids, [], finished=False))
        except KeyboardInterrupt:
            if on_output is not None:
                wait_for_end(self._thread, requests)
                for index, request in enumerate(requests[reported:], reported):
                    if isinstance(request, Generation):
                        on_output(index, request.output())
            raise
        raise_first_error(requests, "prompt", outputs)
        return outputs

    def stream(
        self,
        prompt: Prompt = None,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> Generator[StreamDelta, None, None]:
        """Continue one prompt, a delta per step that adds to it: one new token, or several with
        ``speculative_config``; closing the generator ends the request.

        ``request_id`` is for ``abort``, and free again once the request has ended; ``priority`` as in
        ``generate``. Raises RequestError at the call, before anything runs. Returns when the request is in
        the engine's queue, which holds ``max_queue_size``; from there on it runs, whether its deltas are
        asked for or not.
        """
        self._thread.check_process()
        found = deltas(self._thread, self._requests.streamed(prompt, params, request_id, priority), self)
        next(found, None)  # queued: from here on, closing it ends the request
        return cast("Generator[StreamDelta, None, None]", found)

    def astream(
        self,
        prompt: Prompt = None,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[StreamDelta, None]:
        """``stream`` for coroutines: ``async for delta in llm.astream(...)``, in any asyncio event loop.

        Raises RequestError at the call. The request is queued when the first delta is awaited. Closing the
        generator (``aclose``), or cancelling the task that waits for it, ends the request.
        """
        self._thread.check_process()
        return async_deltas(self._thread, self._requests.streamed(prompt, params, request_id, priority), self)

    def abort(self, request_id: str) -> None:
        """End a request before the next step: what it has is its output ("abort"). Others are left alone."""
        self._thread.check_process()
        request = self._thread.names.get(request_id) if isinstance(request_id, str) else None
        if request is not None:
            self._thread.abort(request)

    @overload
    def score(
        self,
        text: str | list[int],
        continuation: Prompt = None,
        *,
        add_bos: bool = False,
        stride: int | None = None,
        top_logprobs: int = 0,
        priority: int | Sequence[int] = 0,
        progress: bool | Progress = False,
        on_output: OnScore | None = None,
    ) -> ScoreOutput: ...

    @overload
    def score(
        self,
        text: list[str] | list[list[int]],
        continuation: list[str] | list[list[int]] | None = None,
        *,
        add_bos: bool = False,
        stride: int | None = None,
        top_logprobs: int = 0,
        priority: int | Sequence[int] = 0,
        progress: bool | Progress = False,
        on_output: OnScore | None = None,
    ) -> list[ScoreOutput]: ...

    def score(
        self,
        text: Any,
        continuation: Any = None,
        *,
        add_bos: bool = False,
        stride: int | None = None,
        top_logprobs: int = 0,
        priority: int | Sequence[int] = 0,
        progress: bool | Progress = False,
        on_output: OnScore | None = None,
    ) -> ScoreOutput | list[ScoreOutput]:
        """Log-probability of each token of a text, or of a continuation given a text; lists give lists.

        The first token of a text follows nothing: its log-probability is None, unless ``add_bos`` puts BOS
        in front. Text and continuation are encoded together; where joining them changes tokens of the text,
        the changed ones are scored with the continuation. After an empty text it follows BOS.
        Texts longer than ``max_model_len`` are scored in windows of that many tokens, ``stride`` apart
        [half of it]: every token has at least ``max_model_len - stride`` tokens of context, or all there are.
        ``top_logprobs``: also report that many best tokens at each place, 0 to 64. ``priority``, ``progress``
        and ``on_output`` are as in ``generate``; the tokens of the progress are those scored.
        """
        self._thread.check_process()
        check_callback("progress", progress)
        check_callback("on_output", on_output)
        targets = score_targets(self._codec, text, continuation, add_bos)
        report = progress_line("texts, {} tokens") if progress is True else progress or None
        outputs = self._score(targets, stride, top_logprobs, priority, report, on_output)
        return outputs[0] if is_one(text) else outputs

    def choose(
        self,
        text: Prompt,
        choices: Sequence[str | list[int]],
        *,
        length_normalization: str | None = None,
        add_bos: bool = False,
        priority: int = 0,
    ) -> list[Choice]:
        """Rank continuations of a text, the likeliest first.

        ``probability`` is the softmax over the choices' log-probabilities; with ``length_normalization``
        "tokens" or "characters", over their means per token or character, by which they are then ranked.
        What the choices have in common is computed once.
        """
        self._thread.check_process()
        if length_normalization not in LENGTH_NORMALIZATIONS:
            raise RequestError(
                f'length_normalization={length_normalization!r}: must be None, "tokens" or "characters"'
            )
        targets = continuation_targets(self._codec, text, as_choices(choices), add_bos)
        scores = self._score(targets, None, 0, priority)
        return rank_choices(scores, length_normalization)

    def _score(
        self,
        targets: list[Target],
        stride: int | None,
        top_n: int,
        priority: int | Sequence[int],
        progress: Progress | None = None,
        on_output: OnScore | None = None,
    ) -> list[ScoreOutput]:
        requests = self._requests.scorings(targets, stride, top_n, priority)
        outputs: list[ScoreOutput] = []
        ended = finished_in_order(self._thread, requests, progress, lambda request: request.num_scored)
        with closing(ended):
            for index, request in enumerate(ended):
                if request.error is None:
                    outputs.append(targets[index].output(self._codec, request.sequences, top_n > 0))
                    if on_output is not None:
                        on_output(index, outputs[-1])
        raise_first_error(requests, "text")
        return outputs
