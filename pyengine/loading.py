"""From the arguments of ``LLM`` to an engine: checkpoint, tokenizer, weights, KV cache."""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import dataclass

from pyengine.backends import BackEnd, back_end
from pyengine.codec import Codec
from pyengine.decoding.resolve import GenerationDefaults
from pyengine.decoding.speculative import SpeculativeConfig
from pyengine.engine.engine import Core, Engine
from pyengine.engine.memory import kv_blocks
from pyengine.engine.scheduler import blocks_for
from pyengine.engine.speculation import Drafter, NgramDrafting, Speculator
from pyengine.errors import ConfigError
from pyengine.model.checkpoint import Checkpoint, load_checkpoint


@dataclass(frozen=True)
class Loaded:
    checkpoint: Checkpoint
    codec: Codec
    engine: Engine
    defaults: GenerationDefaults
    device: str
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    num_threads: int


def load(
    model: str | os.PathLike[str] | None,
    *,
    device: str,
    dtype: str,
    quantization: str | None,
    kv_cache_dtype: str,
    num_threads: int | None,
    max_model_len: int | None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    kv_cache_memory: int | str | None,
    enable_prefix_caching: bool,
    speculative_config: object = None,
) -> Loaded:
    """See ``LLM`` for the arguments and the errors."""
    target = back_end(device)
    target.check(dtype, quantization, kv_cache_dtype)
    if num_threads is not None:
        check_count("num_threads", num_threads, 1024)
    check_count("max_num_seqs", max_num_seqs, 2**20)
    check_count("max_num_batched_tokens", max_num_batched_tokens, 2**24)
    if not isinstance(enable_prefix_caching, bool):
        raise ConfigError(f"enable_prefix_caching={enable_prefix_caching!r}: must be True or False")
    speculative = None if speculative_config is None else SpeculativeConfig.from_mapping(speculative_config)

    from pyengine import _C

    checkpoint = load_checkpoint(model)
    config, generation_config = checkpoint.config, checkpoint.generation_config
    bos = generation_config.get("bos_token_id")
    if not isinstance(bos, int) or not 0 <= bos < config.vocab_size:
        bos = config.bos_token_id
    codec = Codec(checkpoint.path, config.vocab_size, bos)  # its thread reads while we map the weights
    source = str(checkpoint.path / "generation_config.json")
    defaults = GenerationDefaults.from_config(generation_config, config.eos_token_id, source)
    if defaults.unsupported:
        settings = ", ".join(defaults.unsupported)
        warnings.warn(
            f"{checkpoint.path}: pyengine does not apply {settings} of generation_config.json", stacklevel=3
        )
    if max_model_len is None:
        max_model_len = config.n_positions
    check_count("max_model_len", max_model_len, config.n_positions)
    quantization = _check_quantization(checkpoint, quantization)
    dtype, kv_cache_dtype = target.dtypes(checkpoint, dtype, quantization, kv_cache_dtype)
    num_blocks = kv_blocks(
        target.block_bytes(checkpoint, kv_cache_dtype),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_memory=kv_cache_memory,
        budget=target.kv_budget(checkpoint, dtype, quantization, max_num_seqs, max_num_batched_tokens),
    )
    context = _C.ExecContext(num_threads or 0)
    model_in_memory, kv = target.model(
        context,
        checkpoint,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        num_blocks=num_blocks,
    )
    core = Core(
        model=model_in_memory,
        kv=kv,
        sampler=_C.Sampler(max_num_seqs),
        manager=_C.BlockManager(num_blocks, enable_prefix_caching),
        batch=_C.Batch,
    )
    engine = Engine(
        core,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    if speculative is not None:
        drafter = _drafter(speculative, core, target, codec, dtype, engine, max_num_seqs)
        engine.speculator = Speculator(drafter, speculative.num_tokens)
    return Loaded(
        checkpoint,
        codec,
        engine,
        defaults,
        target.device,
        dtype,
        quantization,
        kv_cache_dtype,
        context.num_threads,
    )


def _drafter(
    wanted: SpeculativeConfig,
    core: Core,
    target: BackEnd,
    codec: Codec,
    dtype: str,
    engine: Engine,
    max_num_seqs: int,
) -> Drafter:
    from pyengine import _C

    if wanted.method != "draft_model":
        make_shared = None
        if wanted.method == "suffix":
            make_shared = functools.partial(_C.SharedFollowers, wanted.max_cached_tokens)
        return NgramDrafting(
            _C.NgramDrafter,
            wanted.min_context,
            wanted.max_context,
            make_shared,
            lambda: _C.NumberTokens(codec.number_ids()),
        )
    from pyengine.engine.draft_model import DraftModel

    checkpoint = load_checkpoint(wanted.model)
    config = checkpoint.config
    if config.vocab_size != codec.vocab_size:
        raise ConfigError(
            f"speculative_config: model={wanted.model!r} has a vocabulary of {config.vocab_size}, and the "
            f"model that it is to draft for one of {codec.vocab_size}: both must belong to the same tokenizer"
        )
    if wanted.quantization is not None:
        target.check("auto", wanted.quantization, "auto")
    quantization = _check_quantization(checkpoint, wanted.quantization)
    dtype, kv_dtype = target.dtypes(checkpoint, "auto" if quantization else dtype, quantization, "auto")
    max_model_len = min(engine.max_model_len, config.n_positions)
    # As many tokens as the model itself keeps; a sequence that finds no room goes without drafts.
    num_blocks = min(core.manager.num_blocks, max_num_seqs * blocks_for(max_model_len))
    model, kv = target.model(
        core.model.context,
        checkpoint,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_dtype,
        num_blocks=num_blocks,
    )
    small = Core(
        model=model,
        kv=kv,
        sampler=_C.Sampler(max_num_seqs),
        manager=_C.BlockManager(num_blocks, False),
        batch=_C.Batch,
    )
    return DraftModel(small, max_model_len, max_num_seqs, engine.max_num_batched_tokens)


def _check_quantization(checkpoint: Checkpoint, quantization: str | None) -> str | None:
    """How the weights are quantised in memory: as stored, or as asked for."""
    stored = checkpoint.quantization
    if quantization is not None and stored is not None and stored != quantization:
        raise ConfigError(
            f"quantization={quantization!r}: {checkpoint.path} holds {stored} weights; quantise the "
            "checkpoint that it was made from"
        )
    return quantization or stored


def check_count(field: str, value: object, high: int, *, low: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{field}={value!r}: must be an integer from {low} to {high}")
