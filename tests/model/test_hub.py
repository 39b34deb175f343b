"""Hub ids, against a small Hub served from this process, its cache, and offline mode."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from pyengine.errors import CheckpointError
from pyengine.model.checkpoint import load_checkpoint
from pyengine.model.hub import is_hub_id, needed_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", True),
        ("openai-community/gpt2", True),
        ("cerebras/Cerebras-GPT-1.3B", True),
        ("a/b/c", False),
        ("/gpt2", False),
        ("gpt2/", False),
        ("./gpt2", False),
        ("../gpt2", False),
        ("~/gpt2", False),
        ("my model", False),
        ("", False),
        ("модель", False),
    ],
)
def test_is_hub_id(name: str, expected: bool) -> None:
    assert is_hub_id(name) == expected


SMALL = ["config.json", "merges.txt", "vocab.json", "spiece.model", "tokenizer.json"]
NOT_NEEDED = [
    "README.md",
    ".gitattributes",
    "tf_model.h5",
    "onnx/config.json",
    "onnx/model.safetensors",
    "rust_model.ot",
]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["pytorch_model.bin"], ["pytorch_model.bin"]),
        (
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
                "pytorch_model.bin",
            ],
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ],
        ),
        (
            ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "training_args.bin"],
            ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
        ),
        ([], []),
    ],
)
def test_needed_files(weights: list[str], expected: list[str]) -> None:
    assert needed_files([*SMALL, *NOT_NEEDED, *weights]) == [*SMALL, *expected]


def test_hub_id_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        CheckpointError, match=r"'owner/name' is neither a directory.*pip install 'pyengine\[hub\]'"
    ):
        load_checkpoint("owner/name")


class Hub(http.server.ThreadingHTTPServer):
    """The part of the Hub's protocol that a download needs, for one repository ``owner/tiny``."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.directory = directory
        self.downloaded: list[str] = []


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and parts[2:4] == ["owner", "gated"]:
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif parts[:2] == ["api", "models"] and parts[2:4] != ["owner", "tiny"]:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif parts[:2] == ["api", "models"] and parts[4:] not in (
            [],
            ["revision", "main"],
            ["revision", COMMIT],
        ):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif parts[:2] == ["api", "models"]:
            files = sorted(p.name for p in self.server.directory.iterdir())
            info = {"id": "owner/tiny", "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
            self.reply(200, json.dumps(info).encode())
        else:  # owner/tiny/resolve/<commit>/<file>
            content = (self.server.directory / parts[4]).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            if self.command == "GET":
                self.server.downloaded.append(parts[4])
            self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    directory = tmp_path / "repo"
    config = transformers.GPT2Config(vocab_size=11, n_positions=4, n_embd=4, n_layer=1, n_head=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    torch.save({}, directory / "pytorch_model.bin")
    (directory / "README.md").write_text("a card")
    (directory / "vocab.json").write_text("{}")
    server = Hub(directory)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


LOAD = """
import sys
from pyengine.errors import CheckpointError
from pyengine.model.checkpoint import load_checkpoint
model, revision, local_files_only = sys.argv[1:]
try:
    c = load_checkpoint(model, revision=revision or None, local_files_only=local_files_only == "yes")
    print("loaded", c.config.vocab_size, len(c.weights()), c.path)
except CheckpointError as e:
    print("refused", e)
"""


def load(
    hub: Hub,
    home: Path,
    model: str = "owner/tiny",
    revision: str = "",
    local: bool = False,
    **environment: str,
) -> str:
    """Load in a fresh process: huggingface_hub reads its environment when imported."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()},
        "HF_HOME": str(home),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        **environment,
    }
    command = [sys.executable, "-c", LOAD, model, revision, "yes" if local else "no"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_download_then_cache_then_offline(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    for settings in ({"local": True}, {"HF_HUB_OFFLINE": "1"}):
        assert "refused 'owner/tiny' is neither" in (answer := load(hub, home, **settings))
        assert "offline" in answer
    assert load(hub, home).startswith("loaded 11 16")
    assert sorted(hub.downloaded) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "vocab.json",
    ]
    hub.downloaded.clear()
    assert load(hub, home, revision="main").startswith("loaded 11 16")
    assert hub.downloaded == []  # all of it was in the cache
    for settings in ({"local": True}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert load(hub, home, **settings).startswith("loaded 11 16")
    assert COMMIT in load(hub, home, revision=COMMIT, local=True)


@pytest.mark.parametrize(
    ("model", "revision", "fragments"),
    [
        ("owner/nothing", "", ["'owner/nothing' is neither a directory nor a file here, nor a repository"]),
        ("owner/gated", "", ["'owner/gated' is gated", "log in"]),
        ("owner/tiny", "v9", ["'owner/tiny' has no revision 'v9'"]),
    ],
)
def test_refusals_of_the_hub(
    model: str, revision: str, fragments: list[str], hub: Hub, tmp_path: Path
) -> None:
    answer = load(hub, tmp_path / "home", model, revision)
    assert answer.startswith("refused")
    for fragment in fragments:
        assert fragment in answer


def test_no_connection(hub: Hub, tmp_path: Path) -> None:
    answer = load(hub, tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9")
    assert "refused 'owner/tiny'" in answer
    assert "no connection to the Hugging Face Hub" in answer
