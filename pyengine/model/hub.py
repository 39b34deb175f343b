"""Checkpoints on the Hugging Face Hub, through ``huggingface_hub`` (imported when first needed)."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from pathlib import Path

from pyengine.errors import CheckpointError

# Configuration and tokenizer files, wherever a repository has them.
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "*.model",  # SentencePiece
)
# Weights in order of preference; the first set of which a repository has any file is downloaded.
_WEIGHT_FILES = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*.bin"),
)
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form of a Hub id: ``gpt2`` or ``owner/name``."""
    parts = name.split("/")
    return len(parts) <= 2 and all(
        part and set(part) <= _ID_CHARACTERS and part[0] not in "-." and part[-1] not in "-."
        for part in parts
    )


def needed_files(files: Iterable[str]) -> list[str]:
    """The files of a repository that pyengine reads: configuration, tokenizer, one set of weights."""
    files = [f for f in files if "/" not in f]
    wanted = list(_SMALL_FILES)
    for patterns in _WEIGHT_FILES:
        if patterns[0] in files:
            wanted += patterns
            break
    return [f for f in files if any(fnmatch.fnmatchcase(f, pattern) for pattern in wanted)]


def download(repo_id: str, revision: str | None = None, *, local_files_only: bool = False) -> Path:
    """Directory of the files of ``repo_id`` in the Hub's cache, after downloading what is missing.

    ``revision``: branch, tag or commit, by default ``main``. Without a connection, with
    ``local_files_only`` or with HF_HUB_OFFLINE=1 the cached files are used.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise CheckpointError(
            f"{repo_id!r} is neither a directory nor a file here, and to load it from the Hugging Face Hub "
            "huggingface_hub must be installed: pip install 'pyengine[hub]'"
        ) from None
    at = f"{repo_id!r}" + (f" at revision {revision!r}" if revision else "")
    failure: Exception | None = None
    if not local_files_only:
        try:
            info = huggingface_hub.HfApi().model_info(repo_id, revision=revision)
            files = needed_files(f.rfilename for f in info.siblings or [])
            # With the patterns of this revision; siblings that vanish meanwhile are reported by the reader.
            return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=files))
        except Exception as e:  # no connection, no such repository, no permission: the cache may still do
            failure = e
    try:
        path = Path(huggingface_hub.snapshot_download(repo_id, revision=revision, local_files_only=True))
    except Exception as e:
        failure = failure or e
    else:
        if (path / "config.json").exists():
            return path
        failure = failure or FileNotFoundError(f"{path} has no config.json")
    if isinstance(failure, errors.GatedRepoError):
        raise CheckpointError(
            f"{at} is gated on the Hugging Face Hub: accept its terms there and log in "
            "(huggingface-cli login)"
        ) from failure
    if isinstance(failure, errors.RevisionNotFoundError):
        raise CheckpointError(
            f"{repo_id!r} has no revision {revision!r} on the Hugging Face Hub"
        ) from failure
    if isinstance(failure, errors.RepositoryNotFoundError):
        raise CheckpointError(
            f"{at} is neither a directory nor a file here, nor a repository on the Hugging Face Hub "
            "(a private one needs huggingface-cli login)"
        ) from failure
    if local_files_only or isinstance(failure, errors.OfflineModeIsEnabled):
        raise CheckpointError(
            f"{at} is neither a directory nor a file here, nor in the cache of the Hugging Face Hub, and "
            "offline mode (HF_HUB_OFFLINE or local_files_only) forbids downloading it"
        ) from failure
    if any(word in kind.__name__ for kind in type(failure).__mro__ for word in ("Connect", "Timeout")):
        raise CheckpointError(
            f"{at} is neither a directory nor a file here, and there is no connection to the Hugging Face "
            "Hub to fetch it from: download it elsewhere and give its directory"
        ) from failure
    reason = (str(failure).strip().splitlines() or [""])[0]
    raise CheckpointError(
        f"{at} is neither a directory nor a file here, and could not be fetched from the Hugging Face Hub: "
        f"{type(failure).__name__}: {reason[:200]}"
    ) from failure
