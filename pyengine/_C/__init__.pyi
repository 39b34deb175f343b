"""The extension module: kernels, model, KV cache and sampler.

Buffers are C-contiguous objects of the buffer protocol; "int32 buffer" takes ``array.array("i")`` and
NumPy int32 arrays alike. Only ``forward`` and ``ops`` need NumPy (they return arrays).
bfloat16 and float16 arrays travel as ``uint16`` with the dtype named beside them.
Errors are the classes of ``pyengine.errors``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from . import ops as ops

# NumPy's stubs call an array a Buffer from Python 3.12 on only.
_Int32Buffer: TypeAlias = Buffer | npt.NDArray[np.int32]

BLOCK_TOKENS: int
"""Tokens of one KV block (16)."""

MAX_HEAD_DIM: int
"""Largest ``n_embd / n_head`` (256); ``ConfigError`` above it."""

def available_isas() -> list[str]:
    """Instruction sets this processor can run, slowest first, e.g. ``["baseline", "avx2", "avx512"]``."""

def default_num_threads() -> int:
    """Processors this process may use: affinity mask and cgroup quota."""

class ExecContext:
    """Worker threads (the caller is worker 0), an instruction set and scratch memory."""

    def __init__(self, num_threads: int = 0, isa: str | None = None) -> None:
        """0 threads: ``default_num_threads()``. No isa: ``PYENGINE_ISA`` or the best available."""
    @property
    def num_threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    def start_profile(self) -> None:
        """From now on note where the time of steps goes; what was noted before is forgotten."""
    def stop_profile(self) -> dict[str, tuple[int, float, int, int]]:
        """Part of a step ("qkv", "attention", "head", ...) -> calls, seconds, bytes and operations since
        ``start_profile``; a part that never ran is absent. Bytes are the least possible: every input read
        once, every output written once. A multiply-add is two operations. "prepare" is called once a step,
        and the seconds of all parts are those of the steps."""
    def read_bandwidth(self, bytes: int) -> float:
        """Bytes per second that the threads read from a buffer of that size, the best of a few passes."""
    def arithmetic_peaks(self) -> dict[str, float]:
        """Operations per second of the threads together, on registers only, by type and instructions:
        {"float32 avx512": ..., "bfloat16 amx": ..., "int8 avx512_vnni": ...}, as far as the processor has
        them. A multiply-add is two operations."""

class FileView(Buffer):
    """Read-only bytes of a mapping of a file that is watched: where the file is truncated, zeros are read
    instead of ending the process with SIGBUS. A ``Model`` with weights in it checks it after each step."""

    def __init__(self, mapping: Buffer | npt.NDArray[Any], fd: int, path: str) -> None:
        """``mapping``: of the file open as ``fd`` (which is duplicated); kept. ``path``: for errors."""
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def check(self) -> None:
        """``CheckpointError`` naming the file if it was truncated or written to since."""

class BlockManager:
    """Host-side bookkeeping of KV blocks: reference counts, copy-on-write, prefix index with LRU eviction.

    A block is free, in use (reference count > 0) or cached (count 0, still in the prefix index,
    evicted in LRU order when blocks run out). Full blocks are indexed by what precedes them and by their
    tokens, compared in full: a collision of hashes cannot yield another text's keys and values.
    """

    def __init__(self, num_blocks: int, enable_prefix_caching: bool = True) -> None: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_available(self) -> int:
        """Free blocks plus cached blocks that could be evicted."""
    @property
    def num_in_use(self) -> int: ...
    def match(self, token_ids: _Int32Buffer) -> list[int]:
        """Blocks of the longest cached prefix of ``token_ids`` (int32), each with one reference more.

        At least one token is left to compute, so at most ``(len - 1) // 16`` blocks.
        """
    def allocate(self, count: int) -> list[int]:
        """``count`` private blocks with one reference each; ``OutOfMemory`` and no change if too few."""
    def fork(self, blocks: Sequence[int]) -> None:
        """One more reference to each block."""
    def free(self, blocks: Sequence[int]) -> None:
        """One reference less to each block; last blocks of a sequence are evicted before its first.

        ``InternalError`` for a block that nobody holds.
        """
    def make_writable(self, block: int) -> int:
        """``block`` itself if its only reference is the caller's and it is not indexed; else a new
        block, for which the caller's reference is exchanged and whose content the caller must copy
        (``block_copies``) before the next step writes to it."""
    def publish(self, token_ids: _Int32Buffer, blocks: Sequence[int]) -> None:
        """Enter the full blocks of a sequence (tokens whose keys are computed) in the prefix index."""
    def reference_count(self, block: int) -> int: ...
    def reset_prefix_cache(self) -> None: ...
    def check_invariants(self) -> None:
        """Raise ``InternalError`` with what is wrong if the books do not balance. For tests."""

class KVCache:
    """Storage of keys and values, (n_layer, num_blocks) blocks of 16 tokens; pages count once touched."""

    def __init__(self, n_layer: int, n_head: int, head_dim: int, num_blocks: int, dtype: str) -> None: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
    @staticmethod
    def bytes_per_block(n_layer: int, n_head: int, head_dim: int, dtype: str) -> int: ...

class Batch:
    """One ragged batch (contract 1 of docs/architecture.md), checked for consistency on construction."""

    def __init__(
        self,
        token_ids: _Int32Buffer,  # (T,) int32
        positions: _Int32Buffer,  # (T,) int32
        query_start: _Int32Buffer,  # (B+1,) int32
        context_len: _Int32Buffer,  # (B,) int32
        block_table: _Int32Buffer,  # (B * max_blocks,) int32, padded with 0
        block_copies: _Int32Buffer | None = None,  # (2n,) int32: source, destination, source, ...
    ) -> None: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_seqs(self) -> int: ...

class Sampler:
    """Parameters and state of each request, by slot."""

    def __init__(self, num_slots: int) -> None: ...
    def set(
        self,
        slot: int,
        *,
        token_ids: _Int32Buffer | None = None,  # (n,) the sequence so far: what penalties and bans look at
        num_prompt: int = 0,  # how many of them are the prompt's
        # Edits of the logits, in this order
        logit_bias: Sequence[tuple[Sequence[int], float]] = (),  # added to the last id after the ones before
        allowed_token_ids: Sequence[int] = (),  # none: all
        repetition_penalty: float = 1.0,  # prompt and new tokens: x / penalty above 0, x * penalty below
        presence_penalty: float = 0.0,  # new tokens: x - penalty
        frequency_penalty: float = 0.0,  # new tokens: x - penalty * count
        no_repeat_ngram_size: int = 0,
        bad_words: Sequence[Sequence[int]] = (),  # sequences that must not be completed
        min_tokens: int = 0,  # new tokens before one of stop_ids may come
        stop_ids: Sequence[int] = (),
        processor: Callable[[npt.NDArray[np.int32], npt.NDArray[np.float32]], object] | None = None,
        temperature: float = 1.0,  # 0: greedy; refused if float32 makes it infinite or 0
        # Cuts, in this order, each on the distribution that the one before left
        top_k: int = 0,  # 0: all
        top_p: float = 1.0,
        min_p: float = 0.0,
        typical_p: float = 1.0,
        epsilon_cutoff: float = 0.0,
        eta_cutoff: float = 0.0,
        mirostat_tau: float = 0.0,  # above 0: Mirostat 2 in place of all cuts
        mirostat_eta: float = 0.1,
        mirostat_mu: float | None = None,  # as the last step reported it
        seed: int = 0,  # 64 bits
        sample_index: int = 0,  # which of the n samples of the request
        logprobs: int = -1,  # -1: none; n: the chosen token's and the n best ones'
        num_candidates: int = 0,  # above 0: list the best ones of the edited log-probabilities, draw nothing
        replay: Sequence[int] = (),  # taken in place of the tokens drawn from position num_prompt on
    ) -> None:
        """Begin a request in a slot, or go on with one that was preempted.

        ``processor`` is called with the token ids (n,) and the logits (V,) after the mask and before the
        temperature; it edits the logits in place, or returns others. What it raises waits in `take_error`.
        """
    def set_mask(self, slot: int, mask: _Int32Buffer, num_masks: int = 1) -> None:
        """Tokens that the next one may be: bit id % 32 of word id // 32. Holds for one draw; ids beyond the
        end of the mask may not come. Further masks follow for the rows of drafts."""
    def take_error(self, slot: int) -> BaseException | None:
        """What the slot's processor raised, once."""
    def sample(
        self,
        ctx: ExecContext,
        logits: npt.NDArray[np.float32],
        slots: _Int32Buffer,
        positions: _Int32Buffer,
        drafts: _Int32Buffer | None = None,
    ) -> StepResult:
        """Sample one token per row of logits (R, V), as ``Model.step`` does.

        ``slots`` (R,) int32; ``positions`` (R,) int32: the position each new token will have, which selects
        the random number. A slot that has to know its tokens may have one row, and adds the token to them.
        ``drafts`` (R,) int32: -1, or the token that row r's logits take for the one that row r - 1, of the
        same slot, draws; if it draws another, row r gives no token.
        """
    def process(
        self, ctx: ExecContext, logits: npt.NDArray[np.float32], slots: _Int32Buffer, positions: _Int32Buffer
    ) -> npt.NDArray[np.float32]:
        """The scores (R, V) that ``sample`` would draw from: edited, divided by the temperature (unless that
        is 0), -infinity where a token is banned or cut off. Changes nothing in the slots."""

class SharedFollowers:
    """What followed which tokens in all texts of an engine, of about the last ``max_tokens`` tokens."""

    def __init__(self, max_tokens: int) -> None: ...
    @property
    def num_tokens(self) -> int: ...

class NumberTokens:
    """Which tokens are digits."""

    def __init__(self, token_ids: _Int32Buffer) -> None: ...
    def __contains__(self, token_id: int) -> bool: ...

class NgramDrafter:
    """An n-gram model of one text that learns as the text grows, and guesses how it goes on."""

    def __init__(
        self,
        min_length: int,
        max_length: int,
        shared: SharedFollowers | None = None,
        numbers: NumberTokens | None = None,
    ) -> None:
        """Looks at the last ``min_length`` to ``max_length`` tokens, 1 to 64. ``shared``: learn from and for
        other texts as well. ``numbers``: learn also what follows whatever the numbers before are."""
    @property
    def num_tokens(self) -> int: ...
    def extend(self, token_ids: _Int32Buffer) -> None: ...
    def draft(self, max_tokens: int, least: float = 0.0) -> list[tuple[int, float]]:
        """(token id, probability that it and all before it come), as long as that reaches ``least``."""

class StepResult:
    """Result of one step, in the order of the sequences that sampled (request_slot >= 0): a row for each, and
    one more for each of its drafts."""

    @property
    def token_ids(self) -> list[int]:
        """-1 for a row whose logits hold NaN or +infinity, or are all -infinity: nothing can be drawn from
        them; its list of best tokens is empty. -2 where the slot's own edits forbid every token, -3 where its
        processor failed (`Sampler.take_error`), -4 after a draft that was not drawn. Such a row's
        log-probability is NaN; the other rows are not affected."""
    @property
    def logprobs(self) -> list[float]:
        """Log-probability of each token under the model's distribution (temperature 1, nothing cut off);
        NaN where the slot asked for none."""
    @property
    def top_logprobs(self) -> list[list[tuple[int, float]]]:
        """The n best (token id, log-probability), best first, per sampled sequence."""
    @property
    def mirostat_mu(self) -> list[float]:
        """The bound of each row's Mirostat after its draw, NaN where there is none; empty without any. Hand
        it to `Sampler.set` after preemption."""
    @property
    def candidates(self) -> list[list[tuple[int, float, float]]]:
        """Where a slot asks for them, the best (token id, edited log-probability, the model's), best first.
        The first is the row's token, and no token is added to what the slot knows. Empty without any."""
    @property
    def scores(self) -> list[float]:
        """Log-probability of each target (R,); NaN where the logits hold NaN or +infinity."""
    @property
    def score_tops(self) -> list[list[tuple[int, float]]]:
        """The top_n best (token id, log-probability) of each scored row, best first."""

class ByteTable:
    """What each token of a byte-level tokenizer adds to the UTF-8 of a text."""

    def __init__(self, lookup: Callable[[int], bytes]) -> None:
        """``lookup`` is asked once for each token that occurs, and raises for ids outside the vocabulary. The
        garbage collector does not see it: it must not refer to the table."""
    def __getitem__(self, token_id: int) -> bytes: ...

class ByteDecoder:
    """A decoder (pyengine/model/tokenization/decoders.py) of tokens that are bytes: an unfinished UTF-8
    character waits for its last byte, and bytes that cannot become a character are U+FFFD, one per maximal
    subpart (Unicode 3.9)."""

    def __init__(self, table: ByteTable) -> None: ...
    def push(self, ids: Iterable[int]) -> str: ...
    def finish(self) -> str: ...
    def copy(self) -> ByteDecoder: ...

class StreamingDetokenizer:
    """What a decoder, of any kind, gives after a prompt, whose text is not repeated
    (pyengine/model/detokenizer.py)."""

    def __init__(self, decoder: Any, prompt_ids: Sequence[int]) -> None: ...
    def append(self, ids: Iterable[int]) -> str:
        """Text that is certain now and was not before."""
    def finish(self) -> str:
        """The rest of the text, once no id follows."""
    def copy(self) -> StreamingDetokenizer: ...

class TextStream:
    """The text of one sequence. What could be the beginning of a stop string is held back by ``take``."""

    def __init__(
        self, detokenizer: Any, stop: Sequence[str], include_stop: bool = False, text: str = ""
    ) -> None:
        """``detokenizer``: a `StreamingDetokenizer`, or anything that has its methods. ``include_stop``: the
        text is cut after a stop string, not before it. ``text``: what it begins with, in which no stop string
        is looked for."""
    def append(self, ids: int | Iterable[int], may_stop: bool = True) -> str | None:
        """Add one token or several; the stop string that ends the text, which is cut there, or None. Text
        that comes with ``may_stop`` false is no part of a stop string."""
    def finish(self) -> str | None:
        """No more tokens: incomplete characters come out as they are. May complete a stop string."""
    def take(self) -> str:
        """Text that may be shown and was not taken before."""
    def copy(self) -> TextStream:
        """The same text, to go on with on its own."""
    @property
    def text(self) -> str: ...

def wake(fd: int) -> None:
    """Write a byte to a pipe without letting go of the GIL: whoever reads it runs when its caller has done
    what it is at."""

QUANT_PAD: int
"""Inputs that quantised weights are padded to (64)."""

TILE_COLUMNS: int
"""Columns of a tile of packed weights (16)."""

NIBBLE_GROUP: int
"""Inputs of a column that share a multiplier and a zero point in int4 (32)."""

_Tensor: TypeAlias = tuple[Buffer | npt.NDArray[Any], str, Sequence[int]]  # buffer, dtype, shape

class AlignedBuffer:
    """Bytes of the buffer protocol that begin at a cache line."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

def quantize(
    ctx: ExecContext, weight: _Tensor, layout: str, bits: int, factor: _Tensor | None = None
) -> dict[str, tuple[AlignedBuffer, str, list[int]]]:
    """A float matrix in ``bits`` (8 or 4), packed: "weight" and "group" (4 bits only) are uint8, "scale"
    (N,) float32. ``layout``: "in_out" (K, N) or "out_in" (N, K). Row k is first multiplied by ``factor[k]``
    (K,) float32. ``CheckpointError`` for NaN or infinity."""

def equalize(
    ctx: ExecContext, weight: _Tensor, gain: _Tensor, bias: _Tensor
) -> tuple[
    tuple[AlignedBuffer, str, list[int]],
    tuple[AlignedBuffer, str, list[int]],
    tuple[AlignedBuffer, str, list[int]],
]:
    """(factor, gain, bias), each (K,) float32: the factor for the rows of ``weight`` (K, N), and the layer
    norm in front of it divided by that factor (csrc/model/quantize.h)."""

def to_float32(ctx: ExecContext, tensor: _Tensor) -> tuple[AlignedBuffer, str, list[int]]:
    """A copy of a float tensor in float32."""

class Model:
    """GPT-2 weights and the forward pass over one ragged batch. Runs without the GIL; one step at a time."""

    def __init__(
        self,
        ctx: ExecContext,
        config: Mapping[str, Any],
        weights: Mapping[str, tuple[Buffer | npt.NDArray[Any], str, Sequence[int]]],
        dtype: str,
    ) -> None:
        """``config``: n_layer, n_head, n_embd, n_inner, n_positions, vocab_size, activation
        ("gelu_tanh", "gelu_erf", "relu", "silu"), layer_norm_epsilon, scale_attn_weights,
        scale_attn_by_inverse_layer_idx. ``weights``: canonical name (no ``transformer.``) ->
        (buffer, dtype name, shape); the buffers are kept, and read in place where their dtype is
        ``dtype`` ("float32" or "bfloat16"). A matrix ``x.weight`` with an ``x.scale`` beside it is
        quantised (``quantize``); ``dtype`` is "float32" then. Without ``lm_head.weight``
        the head is ``wte.weight``.
        Raises CheckpointError naming a missing or misshapen tensor."""
    @property
    def context(self) -> ExecContext: ...
    @property
    def dtype(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    def step(
        self,
        kv: KVCache,
        sampler: Sampler,
        batch: Batch,
        request_slot: _Int32Buffer,
        score_rows: _Int32Buffer | None = None,
        targets: _Int32Buffer | None = None,
        top_n: int = 0,
        num_drafts: _Int32Buffer | None = None,
    ) -> StepResult:
        """Copy blocks, run the batch, sample the last token of each sequence whose request_slot
        (B,) int32 is >= 0. The random counter of a sample is its position (context_len).

        ``score_rows`` (R,) int32: rows of the batch to score, in any order; ``targets`` (R,): the token that
        is to follow each; ``top_n`` (0 to 64, at most V): also the best tokens. Scores are, bit for bit, the
        log-probabilities reported of sampled tokens. ``num_drafts`` (B,): that many of a sequence's last
        tokens are guesses at what follows; each gets a row of the result (`Sampler.sample`)."""
    def forward(self, kv: KVCache, batch: Batch, rows: _Int32Buffer | None = None) -> npt.NDArray[np.float32]:
        """Logits (R, V) of the chosen rows of the batch, or of all T. For tests and custom processors."""

def cuda_device(library: str) -> dict[str, Any]:
    """GPU 0, as the library of the CUDA back end at that path sees it: "name", "capability" (major, minor),
    "total_memory" and "free_memory" in bytes, "architectures" that the library has code for ("75;80").
    ``ConfigError`` where the library or the GPU cannot be used."""

class DeviceModel:
    """A model on a GPU, which also keeps the KV cache. ``step`` and ``forward`` are those of `Model`, without
    a KVCache; the sampler works on the host."""

    def __init__(
        self,
        ctx: ExecContext,
        config: Mapping[str, Any],
        weights: Mapping[str, tuple[Buffer | npt.NDArray[Any], str, Sequence[int]]],
        dtype: str,
        kv_cache_dtype: str,
        num_blocks: int,
        library: str,
    ) -> None:
        """``config`` and ``weights`` as for `Model`; the weights are copied. ``dtype``: "float32", "float16"
        or "bfloat16"; ``kv_cache_dtype``: the same, or "int8". ``ctx`` is what the sampler runs on."""
    @property
    def context(self) -> ExecContext: ...
    @property
    def dtype(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def device(self) -> dict[str, Any]:
        """"name", "capability", "total_memory", "free_memory", as before anything was loaded."""
    def step(
        self,
        kv: None,
        sampler: Sampler,
        batch: Batch,
        request_slot: _Int32Buffer,
        score_rows: _Int32Buffer | None = None,
        targets: _Int32Buffer | None = None,
        top_n: int = 0,
        num_drafts: _Int32Buffer | None = None,
    ) -> StepResult: ...
    def forward(
        self, kv: None, batch: Batch, rows: _Int32Buffer | None = None
    ) -> npt.NDArray[np.float32]: ...
