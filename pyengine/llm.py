"""``LLM``: generate, stream, score and choose with one checkpoint."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, cast, overload

from pyengine.decoding.params import MAX_LOGPROBS, MAX_SEED, SamplingParams, derived_seed, params_of_each
from pyengine.engine.request import Request
from pyengine.engine.scheduler import BLOCK_TOKENS
from pyengine.engine.scoring import score_windows
from pyengine.errors import InternalError, RequestError, TokenizerError
from pyengine.loading import check_count, load
from pyengine.outputs import Choice, RequestOutput, ScoreOutput, StreamDelta
from pyengine.prompts import Prompt, Prompts, as_list, is_one
from pyengine.targets import LENGTH_NORMALIZATIONS, Target, continuation_targets, rank_choices, score_targets

if TYPE_CHECKING:
    from pyengine.model.tokenizer import Tokenizer

Progress = Callable[[int, int, int], object]
OnOutput = Callable[[int, RequestOutput], object]
_PROGRESS_INTERVAL = 0.1  # seconds
_AUTOMATIC_ID = "auto-"  # what the ids of requests without a request_id begin with


class LLM:
    """A GPT-2 checkpoint, ready to run.

    model: checkpoint directory, Hub id, or None for the bundled model.
    device: "cpu".
    dtype: what to compute in; "auto" is bfloat16 for bfloat16 files, otherwise float32 (float16 files
        included: a CPU has no float16 arithmetic worth using, so "float16" is refused).
    quantization: None.
    kv_cache_dtype: how keys and values are kept: "auto" (as ``dtype``), "float32", "bfloat16", or "int8"
        with a float32 scale per token and head, about a quarter of float32's memory.
    num_threads: worker threads [the processors this process may use].
    max_model_len: tokens of a sequence at most, prompt and new ones together [``n_positions``].
    max_num_seqs: sequences that run at once, each sample counting as one.
    max_num_batched_tokens: tokens of one step at most; longer prompts run in chunks.
    kv_cache_memory: bytes, or text like "512MiB". The default holds ``max_num_seqs`` sequences of
        ``max_model_len`` tokens, but takes no more than 25 % of the memory available to the process
        (MemAvailable, or what its cgroup leaves if that is less), and holds at least one such sequence.
        It is address space: memory is used as sequences grow into it, and then kept.
    enable_prefix_caching: keep the keys and values of finished prompts for prompts that begin alike.
    seed: makes requests without a seed of their own reproducible, in the order in which they come.

    Methods may be called from any thread; the requests of several threads run together. A process that
    forks keeps its LLM; in the child, every call of it is an InternalError. Raises
    CheckpointError, ConfigError or OutOfMemory. A damaged tokenizer raises TokenizerError when a text is
    first needed.
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
    ) -> None:
        if seed is not None:
            check_count("seed", seed, MAX_SEED, low=0)
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
        )
        self.path = loaded.checkpoint.path
        self.config = loaded.checkpoint.config
        self.dtype = loaded.dtype
        self.kv_cache_dtype = loaded.kv_cache_dtype
        self.num_threads = loaded.num_threads
        self.max_model_len = loaded.engine.max_model_len
        self._codec = loaded.codec
        self._engine = loaded.engine
        self._defaults = loaded.defaults
        self._seed = seed
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # held by the thread that runs a step or scores
        self._process = os.getpid()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None where the checkpoint has no tokenizer files: prompts are then token ids."""
        return self._codec.tokenizer

    @property
    def num_kv_blocks(self) -> int:
        """Blocks of 16 tokens in the KV cache."""
        return self._engine.core.manager.num_blocks

    def generate(
        self,
        prompts: Prompts = None,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | Progress = False,
        on_output: OnOutput | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts: texts, lists of token ids, or None (from BOS). One output per prompt, in order.

        ``params``: for all prompts, or one per prompt. ``progress``: True for a line on standard error, or a
        function that is called with (finished prompts, all prompts, new tokens) now and then, and at the end.
        ``on_output`` is called with (index, output) for each prompt in order, as soon as it and those before
        it are finished; after Ctrl-C also for the others, whose finish_reason is "abort".
        Every prompt is checked before the first one runs: RequestError names the one at fault, by its index
        in a list, and nothing has run then. If one fails later (InternalError where the model yields NaN),
        its error is raised and the others of the call end.
        """
        many = not is_one(prompts)
        listed = as_list(prompts)
        requests = []
        for index, (prompt, one) in enumerate(zip(listed, params_of_each(params, len(listed)), strict=True)):
            try:
                requests.append(self._request(prompt, one))
            except (RequestError, TokenizerError) as error:
                if not many:
                    raise
                raise type(error)(f"prompt {index}: {error}") from error
        outputs: list[RequestOutput] = []
        try:
            report = _print_progress if progress is True else progress or None
            with closing(self._run(requests, report)) as finished:
                for request in finished:
                    outputs.append(request.output())
                    if on_output is not None:
                        on_output(len(outputs) - 1, outputs[-1])
        except KeyboardInterrupt:
            if on_output is not None:
                for index in range(len(outputs), len(requests)):
                    on_output(index, requests[index].output())
            raise
        return outputs

    def stream(
        self, prompt: Prompt = None, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> Generator[StreamDelta, None, None]:
        """Continue one prompt, a delta per new token as it comes; closing the generator ends the request.

        ``request_id`` is for ``abort``, and free again once the request has ended. Raises RequestError at the
        call, before anything runs. Other threads' requests go on while this one's deltas are waited for;
        without such threads, it runs only as its deltas are asked for.
        """
        if not is_one(prompt):
            raise RequestError("stream continues one prompt; give a list of prompts to generate")
        if request_id is not None and (
            not isinstance(request_id, str) or request_id.startswith(_AUTOMATIC_ID)
        ):
            raise RequestError(
                f'request_id={request_id!r}: must be a string that does not begin with "{_AUTOMATIC_ID}"'
            )
        (one,) = as_list(prompt)
        deltas = self._deltas(self._request(one, params_of_each(params, 1)[0], request_id, stream=True))
        next(deltas)  # queued: from here on, closing it ends the request
        return cast("Generator[StreamDelta, None, None]", deltas)

    def abort(self, request_id: str) -> None:
        """End a running request: what it has so far is its output ("abort"). Unknown ids are left alone."""
        request = self._engine.requests.get(request_id)
        if request is not None:
            self._engine.abort(request)
            self._settle()

    @overload
    def score(
        self,
        text: str | list[int],
        continuation: Prompt = None,
        *,
        add_bos: bool = False,
        stride: int | None = None,
        top_logprobs: int = 0,
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
    ) -> list[ScoreOutput]: ...

    def score(
        self,
        text: Any,
        continuation: Any = None,
        *,
        add_bos: bool = False,
        stride: int | None = None,
        top_logprobs: int = 0,
    ) -> ScoreOutput | list[ScoreOutput]:
        """Log-probability of each token of a text, or of a continuation given a text; lists give lists.

        The first token of a text follows nothing: its log-probability is None, unless ``add_bos`` puts BOS
        in front. Text and continuation are encoded together; where joining them changes tokens of the text,
        the changed ones are scored with the continuation. After an empty text it follows BOS.
        Texts longer than ``max_model_len`` are scored in windows of that many tokens, ``stride`` apart
        [half of it]: every token has at least ``max_model_len - stride`` tokens of context, or all there are.
        ``top_logprobs``: also report that many best tokens at each place, 0 to 64.
        """
        self._check_process()
        outputs = self._score(score_targets(self._codec, text, continuation, add_bos), stride, top_logprobs)
        return outputs[0] if is_one(text) else outputs

    def choose(
        self,
        text: Prompt,
        choices: Sequence[str | list[int]],
        *,
        length_normalization: str | None = None,
        add_bos: bool = False,
    ) -> list[Choice]:
        """Rank continuations of a text, the likeliest first.

        ``probability`` is the softmax over the choices' log-probabilities; with ``length_normalization``
        "tokens" or "characters", over their means per token or character, by which they are then ranked.
        """
        self._check_process()
        if length_normalization not in LENGTH_NORMALIZATIONS:
            raise RequestError(
                f'length_normalization={length_normalization!r}: must be None, "tokens" or "characters"'
            )
        if isinstance(choices, str) or not choices:
            raise RequestError(f"choices={choices!r}: must be a list of one choice or more")
        targets = continuation_targets(self._codec, text, as_list(cast(Prompts, list(choices))), add_bos)
        scores = self._score(targets, None, 0)
        return rank_choices(scores, length_normalization)

    def _request(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None = None, stream: bool = False
    ) -> Request:
        """A request that is known to fit."""
        self._check_process()
        ids = self._codec.encode_prompt(prompt)
        if params.truncate_prompt_tokens is not None:
            ids = ids[-params.truncate_prompt_tokens :]
        number = next(self._numbers)
        resolved = self._defaults.resolve(
            params, prompt_tokens=len(ids), max_model_len=self.max_model_len, seed=self._seed_of(number)
        )
        request = Request(
            f"{_AUTOMATIC_ID}{number}" if request_id is None else request_id,
            number,
            prompt if isinstance(prompt, str) else None,
            ids,
            resolved,
            None if self._codec.tokenizer is None else self._codec,
            stream,
        )
        self._engine.check(request)
        return request

    def _seed_of(self, number: int) -> int:
        """The seed of a request that names none."""
        if self._seed is None:
            return int.from_bytes(os.urandom(8), "little") >> 1
        return derived_seed(self._seed, number)

    def _run(self, requests: list[Request], progress: Progress | None) -> Generator[Request, None, None]:
        """Run requests together and yield each, in order, once it is finished."""
        try:
            with self._exclusive():
                for request in requests:
                    self._engine.add(request)
            next_report = time.perf_counter() + _PROGRESS_INTERVAL
            for request in requests:
                while True:
                    with self._exclusive():
                        if request.finished:
                            break
                        self._engine.step()
                    if progress is not None and time.perf_counter() >= next_report:
                        _report(progress, requests)
                        next_report = time.perf_counter() + _PROGRESS_INTERVAL
                if request.error is not None:
                    raise request.error
                yield request
            if progress is not None:
                _report(progress, requests)
        finally:
            self._end(requests)

    def _deltas(self, request: Request) -> Generator[StreamDelta | None, None, None]:
        """None once the request is queued, then its deltas."""
        outbox = request.outbox
        assert outbox is not None
        try:
            with self._exclusive():
                self._engine.add(request)
            yield None
            while True:
                while outbox:
                    yield outbox.popleft()
                with self._exclusive():
                    if not outbox:
                        if request.finished:
                            break
                        self._engine.step()
            if request.error is not None:
                raise request.error
        finally:
            self._end([request])

    def _end(self, requests: list[Request]) -> None:
        """Abort what is not finished: the caller was interrupted, or wants no more."""
        for request in requests:
            if not request.finished:
                self._engine.abort(request)
        self._settle()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise InternalError(
                "this process was forked from the one that the LLM belongs to: make an LLM in each process, "
                'or start processes with multiprocessing.set_start_method("spawn")'
            )

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        self._check_process()
        try:
            with self._lock:
                yield
        finally:
            self._settle()

    def _settle(self) -> None:
        """Carry out aborts now if nobody is in a step; whoever is does it afterwards.

        An abort never waits for the lock, because the garbage collector may close a forgotten stream in
        the very thread that holds it.
        """
        while self._engine.has_aborts and self._lock.acquire(blocking=False):
            try:
                self._engine.process_aborts()
            finally:
                self._lock.release()

    def _score(self, targets: list[Target], stride: int | None, top_n: int) -> list[ScoreOutput]:
        size = min(self.max_model_len, self.num_kv_blocks * BLOCK_TOKENS)
        if stride is None:
            stride = max(1, size // 2)
        if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride < size:
            raise RequestError(f"stride={stride!r}: must be an integer from 1 to {size - 1}")
        if isinstance(top_n, bool) or not isinstance(top_n, int) or not 0 <= top_n <= MAX_LOGPROBS:
            raise RequestError(f"top_logprobs={top_n!r}: must be an integer from 0 to {MAX_LOGPROBS}")
        top_n = min(top_n, self.config.vocab_size)
        windows = [target.windows(size, stride) for target in targets]
        with self._exclusive():
            score_windows(self._engine, [window for group in windows for window in group], top_n)
        return [
            target.output(self._codec, group, top_n > 0)
            for target, group in zip(targets, windows, strict=True)
        ]


def _report(progress: Progress, requests: list[Request]) -> None:
    done = sum(request.finished for request in requests)
    new = sum(
        len(seq.token_ids) - len(request.prompt_ids) for request in requests for seq in request.sequences
    )
    progress(done, len(requests), new)


def _print_progress(done: int, total: int, new_tokens: int) -> None:
    end = "\n" if done == total else ""
    print(f"\r{done}/{total} prompts, {new_tokens} new tokens", end=end, file=sys.stderr, flush=True)
