"""What the model sees of a conversation, beside transformers' templates and DialoGPT's recipe."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pyengine.chat.formats import EosFormat, TemplateFormat, TranscriptFormat, Turn, chat_format
from pyengine.errors import ConfigError, RequestError, TokenizerError
from pyengine.model.checkpoint import resolve
from pyengine.model.tokenizer import Tokenizer, load_tokenizer

BUNDLED = resolve(None)
TURNS = [Turn("user", "Hello, é!"), Turn("assistant", "Well?\nYes."), Turn("user", " A <b> & 犬 ")]
TEMPLATES = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "dialogpt": "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}",
    "blocks": """
{%- if messages[0].role == "system" %}
    {{ bos_token + messages[0].content }}
{% endif %}
{% for message in messages %}
    {%- if message.role == "system" %}{% continue %}{% endif %}
    {% set name = {"user": "Q", "assistant": "A"}[message.role] %}
    {{ name }}: {{ message.content | trim | tojson }}
    {% generation %}
    {%- if loop.last and tools is none %} end{% endif %}
{% endfor %}
A:""".replace("    {% generation %}\n", ""),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = load_tokenizer(BUNDLED)
    assert found is not None
    return found


def directory(tmp_path: Path, config: dict[str, Any] | None = None, **tokenizer_config: Any) -> Path:
    """The bundled model's tokenizer with other configuration files."""
    for name in ("tokenizer.json", "special_tokens_map.json"):
        shutil.copy(BUNDLED / name, tmp_path)
    for name, more in (("config.json", config or {}), ("tokenizer_config.json", tokenizer_config)):
        values = json.loads((BUNDLED / name).read_text()) | more
        (tmp_path / name).write_text(json.dumps(values))
    return tmp_path


def messages(turns: Sequence[Turn], system: str = "") -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": turn.role, "content": turn.text} for turn in turns]


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_rendered_as_by_transformers(
    tokenizer: Tokenizer, tmp_path: Path, name: str, system: str
) -> None:
    pytest.importorskip("jinja2")
    transformers = pytest.importorskip("transformers")
    path = directory(tmp_path, chat_template=TEMPLATES[name])
    found = chat_format(path, tokenizer, [0])
    assert isinstance(found, TemplateFormat)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    expected = theirs.apply_chat_template(messages(TURNS, system), add_generation_prompt=True)
    assert found.prompt_ids(system, TURNS) == expected
    assert len(expected) > 10


def test_a_template_in_its_own_file_goes_first(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    path = directory(tmp_path, chat_template="wrong")
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert chat_format(path, tokenizer, [0]).prompt_ids("", TURNS[:1]) == tokenizer.encode("Hello, é!")


def test_of_several_templates_the_default(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    path = directory(tmp_path, chat_template=named)
    assert chat_format(path, tokenizer, [0]).prompt_ids("", TURNS) == tokenizer.encode("yes")


@pytest.mark.parametrize(
    ("template", "error", "hint"),
    [
        ("{% if %}", TokenizerError, "no Jinja template"),
        ("{{ raise_exception('no roles') }}", RequestError, "refuses this conversation: no roles"),
        ("{{ messages.append(1) }}", RequestError, "chat_template failed"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", RequestError, "chat_template failed"),
        ("{{ 1 // 0 }}", RequestError, "chat_template failed"),
        (17, TokenizerError, "chat_template must be a text"),
        ([{"name": "rag", "template": "x"}], TokenizerError, "chat_template must be a text"),
    ],
)
def test_templates_that_cannot_be_used(
    tokenizer: Tokenizer, tmp_path: Path, template: Any, error: type[Exception], hint: str
) -> None:
    pytest.importorskip("jinja2")
    path = directory(tmp_path, chat_template=template)
    with pytest.raises(error, match=hint) as caught:
        chat_format(path, tokenizer, [0]).prompt_ids("", TURNS)
    assert str(path) in str(caught.value)


def test_a_template_without_jinja(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory(tmp_path, chat_template="x")
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("jinja2"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install \"pyengine\[chat\]\""):
        chat_format(path, tokenizer, [0])
    assert chat_format(path, tokenizer, [0], "transcript").name == "transcript"


def test_the_format_that_fits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert isinstance(chat_format(BUNDLED, tokenizer, [0]), TranscriptFormat)
    dialogpt = directory(tmp_path, {"task_specific_params": {"conversational": {"max_length": 1000}}})
    assert isinstance(chat_format(dialogpt, tokenizer, [0]), EosFormat)
    assert isinstance(chat_format(dialogpt, tokenizer, [0], "transcript"), TranscriptFormat)
    for arguments, hint in (
        ((BUNDLED, tokenizer, [0], "template"), "has no chat template"),
        ((BUNDLED, tokenizer, [], "eos"), "needs an EOS token"),
        ((BUNDLED, tokenizer, [0], "poem"), "must be one of auto, template, eos, transcript"),
        ((BUNDLED, None, [0]), "no tokenizer files"),
    ):
        with pytest.raises(ConfigError, match=hint):
            chat_format(*arguments)
    with pytest.raises(ConfigError, match="bot=' ': must be a name on one line"):
        chat_format(BUNDLED, tokenizer, [0], bot=" ")


def test_transcript(tokenizer: Tokenizer) -> None:
    form = TranscriptFormat(tokenizer, "Alice", "Bob")
    text = "In Paris.\n\nAlice: Hello, é!\nBob: Well?\nYes.\nAlice:  A <b> & 犬 \nBob:"
    assert form.prompt_ids("In Paris.", TURNS) == tokenizer.encode(text)
    assert form.stop == ("\nAlice:", "\nBob:")


def test_eos_after_each_turn_and_replies_as_they_were_said(tokenizer: Tokenizer) -> None:
    form = EosFormat(tokenizer, [0])
    said = (*tokenizer.encode("We"), *tokenizer.encode("ll"))  # not the ids that "Well" is encoded to
    assert tokenizer.encode("Well") != list(said)
    hello, again = tokenizer.encode("Hello"), tokenizer.encode("Again")
    for ids in (said, (*said, 0)):  # cut, or ended by the model
        turns = [Turn("user", "Hello"), Turn("assistant", "Well", ids), Turn("user", "Again")]
        assert form.prompt_ids("", turns) == [*hello, 0, *said, 0, *again, 0]
    loaded = [Turn("user", "Hello"), Turn("assistant", "", None), Turn("user", "Again")]
    assert form.prompt_ids("", loaded) == [*hello, 0, 0, *again, 0]


def test_dialogpt_recipe(tokenizer: Tokenizer) -> None:
    """Its model card: encode each input + EOS, append to the history of ids, generate greedily."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from pyengine import LLM, SamplingParams
    from pyengine.chat.conversation import Conversation

    model = transformers.GPT2LMHeadModel.from_pretrained(BUNDLED, dtype=torch.float32)
    theirs = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    history: list[int] = []
    llm = LLM()
    conversation = Conversation(EosFormat(tokenizer, [0]), llm.max_model_len)
    params = SamplingParams(temperature=0, max_tokens=24)
    for line in ("Hello, who are you?", "And the king?", "Where is he?"):
        history += theirs.encode(line + theirs.eos_token)
        ids = conversation.ask(line, 24)
        assert ids == history
        with torch.no_grad():
            out = model.generate(torch.tensor([history]), do_sample=False, max_new_tokens=24, pad_token_id=0)
        output = llm.generate(ids, params)[0]
        assert output.outputs[0].token_ids == out[0, len(history) :].tolist()
        conversation.answer(output.outputs[0].text, output.outputs[0].token_ids)
        history = out[0].tolist()
        if history[-1] != 0:  # a reply that max_new_tokens cut
            history.append(0)
    assert output.metrics.cached_tokens >= 16 * ((len(ids) - 40) // 16) > 0  # the turns before were there
