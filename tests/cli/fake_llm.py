"""An LLM without a model: it repeats the words of the prompt backwards, one word per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pyengine.decoding.params import SamplingParams
from pyengine.errors import RequestError
from pyengine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, StreamDelta


class FakeLLM:
    """Records what the command line asked for. ``interrupt_after`` tokens Ctrl-C arrives."""

    made: list[FakeLLM] = []
    has_tokenizer = True
    interrupt_after: int | None = None

    def __init__(self, model: str | None, **settings: Any) -> None:
        self.model, self.settings = model, settings
        self.calls: list[tuple[Any, SamplingParams]] = []
        self.tokenizer = object() if self.has_tokenizer else None
        FakeLLM.made.append(self)

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[StreamDelta]:
        self.calls.append((prompt, params))
        output = self._output(prompt, params, 0)
        sample = output.outputs[0]
        words = sample.text.split(" ")
        for i, word in enumerate(words):
            if i == self.interrupt_after:
                raise KeyboardInterrupt
            last = i == len(words) - 1
            text = "" if self.tokenizer is None else word if last else word + " "
            reason = sample.finish_reason if last else None
            ids = [sample.token_ids[i]]
            yield StreamDelta("0", 0, text, ids, None, reason, None, output if last else None)

    def generate(
        self,
        prompts: list[Any],
        params: SamplingParams,
        *,
        progress: Callable[[int, int, int], object] | bool = False,
        on_output: Callable[[int, RequestOutput], object] | None = None,
    ) -> list[RequestOutput]:
        self.calls.append((prompts, params))
        if "refuse" in prompts:
            raise RequestError(f"prompt {prompts.index('refuse')}: refused")
        outputs = [self._output(prompt, params, i) for i, prompt in enumerate(prompts)]
        for i, output in enumerate(outputs):
            if self.interrupt_after is not None and i >= self.interrupt_after:
                output.finished = False
                output.outputs[0].finish_reason = "abort"
            if on_output:
                on_output(i, output)
        if self.interrupt_after is not None:
            raise KeyboardInterrupt
        return outputs

    def _output(self, prompt: Any, params: SamplingParams, number: int) -> RequestOutput:
        words = str(prompt).split(" ")[::-1]
        ids = list(range(100, 100 + len(words)))
        logprobs = None
        if params.logprobs is not None:
            row = {7: Logprob(-0.5, 1, "seven")} if params.logprobs else {}
            logprobs = [
                {**row, token: Logprob(-1.5, None, word)} for token, word in zip(ids, words, strict=True)
            ]
        samples = [
            CompletionOutput(i, " ".join(words), ids, logprobs, -1.5, "length", None, params.seed or 99)
            for i in range(params.n)
        ]
        metrics = RequestMetrics(0.0, 0.01, 0.1, prompt_tokens=3, new_tokens=len(ids) * params.n)
        text = prompt if isinstance(prompt, str) else None
        return RequestOutput(str(number), text, [1, 2, 3], samples, True, metrics)
