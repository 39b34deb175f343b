"""What to tell the caller of a request that cannot go on."""

from __future__ import annotations

from typing import Any

from pyengine.engine.generation import Sample
from pyengine.engine.request import Request
from pyengine.errors import CheckpointError, InternalError, PyEngineError, RequestError


def why_no_token(sampler: Any, seq: Sample, token: int) -> Exception:
    """What the sampler's negative numbers say (csrc/sampling/sampler.h)."""
    position, request = len(seq.token_ids), seq.request
    if token == -2:
        return RequestError(
            f"request {request.id}: nothing may follow its token {position - 1}: allowed_token_ids, "
            "bad_words, no_repeat_ngram_size, min_tokens, a constraint and the logits processors "
            "together forbid every token that the model could say"
        )
    if token == -3:
        error = sampler.take_error(seq.slot)
        named = RequestError(f"request {request.id}: its logits processor failed: {error!r}")
        named.__cause__ = error
        return named
    return not_finite(request, "logits", position - 1)


def named(request: Request, error: Exception) -> PyEngineError:
    """``error`` as that of one request, by the class it has."""
    kind = type(error) if isinstance(error, PyEngineError) else InternalError
    named = kind(f"request {request.id}: {error if isinstance(error, PyEngineError) else repr(error)}")
    named.__cause__ = error
    return named


def not_finite(request: Request, what: str, position: int) -> CheckpointError:
    return CheckpointError(
        f"request {request.id}: the {what} after its token {position} are NaN or infinite: "
        "the weights are damaged, or too large for their dtype (pyengine-cli inspect --check reads them all)"
    )
