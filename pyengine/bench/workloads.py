"""The workloads: fixed token ids and numbers of new tokens, the same for every engine that is compared.

The ids come from a linear congruential stream, so that a script of another engine makes the same ones
without any file; for vocabularies of 50,000 and more they do not depend on the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pyengine.errors import ConfigError

_SEED = 1234
_IDS = 50_000  # ids below this: GPT-2's vocabulary without its last pieces

# name: (sequences, prompt tokens, new tokens) of each
_FIXED = {"decode": (1, 16, 128), "prefill": (1, 512, 1), "batch": (32, 64, 64)}
_MIXED_SEQUENCES = 64
_MIXED_PROMPT, _MIXED_NEW = (8, 512), (8, 256)  # least and most tokens of a request of "mixed"

NAMES = (*_FIXED, "mixed")

RATES = {  # what is counted per second
    "decode": "new tokens after the first",
    "prefill": "prompt tokens",
    "total": "new tokens, whole call",
}


@dataclass(frozen=True)
class Workload:
    """Prompts that are submitted together, the tokens to generate for each, and which rate is reported."""

    name: str
    prompts: list[list[int]]
    new_tokens: list[int]
    rate: str  # of RATES
    own_ttft: bool = False  # time the first token in the same call, not in one of its own as the peers do

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    def tokens_per_second(self, ttft: float, total: float) -> float:
        """``ttft``: seconds until the first new token; ``total``: of the whole workload."""
        if self.rate == "prefill":
            return self.num_prompt_tokens / ttft
        if self.rate == "decode":
            return sum(new - 1 for new in self.new_tokens) / max(total - ttft, 1e-9)
        return sum(self.new_tokens) / total


def named(name: str, vocab_size: int) -> Workload:
    """One of NAMES: ``decode``, ``prefill``, ``batch`` or ``mixed``."""
    if name in _FIXED:
        sequences, prompt, new = _FIXED[name]
        rate = "total" if name == "batch" else name
        return Workload(name, token_ids(sequences, prompt, vocab_size), [new] * sequences, rate)
    if name != "mixed":
        raise ConfigError(f"workload {name!r} does not exist; there are {', '.join(NAMES)}")
    lengths = mixed_lengths()
    rows = token_ids(_MIXED_SEQUENCES, _MIXED_PROMPT[1], vocab_size)
    prompts = [row[:prompt] for row, (prompt, _) in zip(rows, lengths, strict=True)]
    return Workload(name, prompts, [new for _, new in lengths], "total")


def of_size(sequences: int, prompt_tokens: int, new_tokens: int, vocab_size: int) -> Workload:
    """A workload of equal requests; its name is e.g. ``32x(64+64)``."""
    name = f"{prompt_tokens}+{new_tokens}"
    if sequences > 1:
        name = f"{sequences}x({name})"
    rate = "prefill" if new_tokens == 1 else "decode" if sequences == 1 else "total"
    return Workload(
        name, token_ids(sequences, prompt_tokens, vocab_size), [new_tokens] * sequences, rate, own_ttft=True
    )


def _stream() -> Iterator[int]:
    state = _SEED
    while True:
        state = (1103515245 * state + 12345) % (1 << 31)
        yield state


def token_ids(sequences: int, length: int, vocab_size: int) -> list[list[int]]:
    """Token ids (sequences, length)."""
    stream, ids = _stream(), min(_IDS, vocab_size)
    return [[next(stream) % ids for _ in range(length)] for _ in range(sequences)]


def mixed_lengths() -> list[tuple[int, int]]:
    """(prompt tokens, new tokens) of each request of ``mixed``."""
    stream = _stream()

    def draw(low: int, high: int) -> int:
        return low + (next(stream) >> 8) % (high - low + 1)

    return [(draw(*_MIXED_PROMPT), draw(*_MIXED_NEW)) for _ in range(_MIXED_SEQUENCES)]
