"""Sample texts during training, by the engine that will run the checkpoint."""

from __future__ import annotations

from pathlib import Path

from pyengine import LLM, SamplingParams
from pyengine.train.options import TrainOptions


def sample_text(checkpoint: Path, options: TrainOptions) -> str:
    """Prompt and continuation at temperature 0.8; the same random numbers at every evaluation."""
    llm = LLM(checkpoint, num_threads=options.threads, max_num_seqs=1)
    tokenizer = llm.tokenizer
    prompt = options.sample_prompt
    used = len(tokenizer.encode(prompt)) if tokenizer is not None and prompt else 1
    tokens = max(1, min(options.sample_tokens, llm.max_model_len - used))
    params = SamplingParams(max_tokens=tokens, temperature=0.8, seed=options.seed)
    return prompt + llm.generate(prompt or None, params)[0].outputs[0].text
