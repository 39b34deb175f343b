"""``pyengine-cli chat``: a conversation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from pyengine.cli import _options, _sampling, _text

_EPILOG = """\b
Examples:
  pyengine-cli chat
  pyengine-cli chat --model ./DialoGPT-medium --temperature 0.7 --top-p 0.9
  pyengine-cli chat --model ./gpt2 --user-name Alice --bot-name Bob --system "Alice meets Bob in Paris."
  pyengine-cli chat --load yesterday.json --speculative-method suffix
  printf 'Hello!\\nHow are you?\\n' | pyengine-cli chat --seed 1

\b
A line is a message; one that ends in \\ goes on in the next. Lines that begin with / are commands: /help
lists them. Ctrl-C ends a reply, Ctrl-D the conversation. Without a terminal, each line of standard input is a
message, and standard output holds the replies.
When the context does not hold the conversation any more, its oldest turns are dropped, with a notice.
docs/chat.md has the formats.
"""
_chat_option = _options.in_section("Conversation")


@click.command(cls=_options.SectionedCommand, context_settings=_options.CONTEXT_SETTINGS, epilog=_EPILOG)
@_chat_option(
    "--format",
    "wanted",
    type=click.Choice(["auto", "template", "eos", "transcript"]),
    default="auto",
    help="The checkpoint's chat template; EOS after each turn, like DialoGPT; a transcript with names, for "
    "base models; auto: the first of them that fits the checkpoint.",
)
@_chat_option(
    "--system", default="", show_default=False, metavar="TEXT", help="What comes before the conversation."
)
@_chat_option("--user-name", default="User", metavar="NAME", help="Your name in a transcript.")
@_chat_option("--bot-name", default="Bot", metavar="NAME", help="The model's name in a transcript.")
@_chat_option("--load", metavar="FILE", help="Go on with a conversation that /save wrote.")
@_chat_option(
    "--history-file",
    metavar="FILE",
    help="Keep the lines that were typed here.  [default: ~/.local/state/pyengine/chat_history]",
)
@_chat_option("--no-history", is_flag=True, help="Keep no lines.")
@_sampling.one_text
@_options.quiet
@_options.speculation
@_options.engine
def command(
    wanted: str,
    system: str,
    user_name: str,
    bot_name: str,
    load: str | None,
    history_file: str | None,
    no_history: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Talk to a model.

    Chat models see the conversation as their template says, DialoGPT with EOS after each turn; base models
    continue a transcript, in which they play the other part.
    """
    from pyengine.chat.conversation import Conversation
    from pyengine.chat.formats import chat_format
    from pyengine.cli._chat_input import Pipe, Terminal, default_history_file
    from pyengine.cli._chat_session import Session, completions

    fields = _sampling.take_fields(options)
    _sampling.checked(fields)
    texts = {"--system": system, "--user-name": user_name, "--bot-name": bot_name}
    system, user, bot = (_text.argument(text, name) for name, text in texts.items())
    _text.prepare_output()
    llm = _options.open_llm(**options)
    eos = [*llm.config.eos_token_ids]
    if not eos and llm.tokenizer is not None and llm.tokenizer.eos_token_id is not None:
        eos = [llm.tokenizer.eos_token_id]
    form = chat_format(Path(llm.path), llm.tokenizer, eos, wanted, user=user, bot=bot)
    conversation = Conversation(form, llm.max_model_len, system)
    if load is not None:
        conversation.load(Path(load).expanduser())
    lines: Pipe | Terminal = Pipe()
    if sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        kept = Path(history_file).expanduser() if history_file else default_history_file()
        lines = Terminal("you> ", None if no_history else kept, completions)
        if not quiet:
            _text.note(f"{Path(llm.path).name}, format {form.name}; /help lists commands, Ctrl-D ends")
    session = Session(llm, conversation, form, fields, lines, quiet)
    try:
        session.run()
    finally:
        lines.close()
