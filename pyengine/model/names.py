"""Which tensors of a file are the model's: canonical names, checks of shape and dtype."""

from __future__ import annotations

from collections.abc import Mapping

from pyengine.errors import CheckpointError
from pyengine.model.config import DTYPE_BYTES, GPT2Config
from pyengine.model.json_file import show
from pyengine.model.quantization import quantized_tensors
from pyengine.model.safetensors import Tensor

_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_CROSS_ATTENTION = (".crossattention.", ".ln_cross_attn.")
_SIZE_FIELDS = {  # fields that decide the shape, for the message of a mismatch
    "wte.weight": "vocab_size, n_embd",
    "lm_head.weight": "vocab_size, n_embd",
    "wpe.weight": "n_positions, n_embd",
    "mlp.c_fc.weight": "n_embd, n_inner",
    "mlp.c_fc.bias": "n_inner",
    "mlp.c_proj.weight": "n_inner, n_embd",
}


def canonical_name(name: str) -> str:
    """``name`` without wrappers and without the ``transformer.`` of models with a head."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name.removeprefix("transformer.")


def select_weights(
    tensors: Mapping[str, Tensor], config: GPT2Config, where: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors the model needs, by canonical name, and the names of those it does not use.

    Left out of both: masks that old versions saved as buffers, and the head where it is tied (as in
    transformers, the embedding wins). CheckpointError if a tensor is missing or does not fit.
    """
    dtypes: dict[str, str] = {}  # of each tensor; without one, any float
    if config.quantization is None:
        expected = config.weight_shapes()
    else:
        packed = quantized_tensors(config, config.quantization)
        expected = {name: shape for name, (_, shape) in packed.items()}
        dtypes = {name: dtype for name, (dtype, _) in packed.items()}
    found: dict[str, Tensor] = {}
    ignored: list[str] = []
    for name, tensor in tensors.items():
        short = canonical_name(name)
        if short in expected:
            if short in found:
                raise CheckpointError(
                    f"{where}: tensors {show(found[short].name)} and {show(name)} are both {short!r}; "
                    "remove one"
                )
            found[short] = tensor
        elif any(part in short for part in _CROSS_ATTENTION):
            raise CheckpointError(
                f"{tensor.file}: tensor {show(name)} belongs to cross-attention; "
                "pyengine runs GPT-2 decoders without an encoder"
            )
        elif not (short.startswith("h.") and short.endswith((".attn.bias", ".attn.masked_bias"))) and (
            short != "lm_head.weight"
        ):
            ignored.append(name)
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(_missing_message(missing, expected, list(tensors), where))
    for short, shape in expected.items():  # the embedding first: its message says most about a wrong config
        _check_tensor(short, found[short], shape, dtypes.get(short))
    return {short: found[short] for short in expected}, tuple(ignored)


def _check_tensor(short: str, tensor: Tensor, expected: tuple[int, ...], dtype: str | None) -> None:
    where = f"{tensor.file}: tensor {show(tensor.name)}"
    if tensor.shape != expected:
        suffix = short.split(".", 2)[2] if short.startswith("h.") else short
        hint = f"config.json ({_SIZE_FIELDS.get(suffix, 'n_embd')}) does not belong to these weights"
        if len(expected) == 2 and tensor.shape == expected[::-1]:
            hint = (
                "it is transposed: GPT-2 checkpoints store dense weights as (in, out); "
                "nn.Linear's (out, in), as nanoGPT saves it, must be transposed first"
            )
        raise CheckpointError(f"{where} has shape {show(tensor.shape)}, expected {expected}; {hint}")
    if dtype is not None and tensor.dtype != dtype:
        raise CheckpointError(
            f"{where} has dtype {tensor.dtype}; in a quantised checkpoint it must be {dtype}: "
            "quantise the checkpoint again"
        )
    if dtype is None and tensor.dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{where} has dtype {tensor.dtype}; weights must be {', '.join(DTYPE_BYTES)}: "
            "save the checkpoint in one of these"
        )


def _missing_message(
    missing: list[str], expected: Mapping[str, tuple[int, ...]], found: list[str], where: str
) -> str:
    if missing == ["lm_head.weight"]:
        return (
            f"{where} has no tensor 'lm_head.weight', though config.json says that the head is not tied to "
            "the embedding (tie_word_embeddings false); if it is, set tie_word_embeddings to true"
        )
    listed = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
    sample = ", ".join(show(name) for name in found[:3]) + (", ..." if len(found) > 3 else "")
    holds = f"it holds {sample}" if found else "it holds none at all"
    return f"{where} lacks {len(missing)} of the {len(expected)} tensors of config.json: {listed}; {holds}"
