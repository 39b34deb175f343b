"""``pyengine-cli tokenize``: text to token ids and pieces, and back."""

from __future__ import annotations

import click

from pyengine.cli import _options, _text

_EPILOG = """\b
Examples:
  pyengine-cli tokenize "Hello, my dog is cute"
  pyengine-cli tokenize --model ./gpt2 --json - < book.txt | jq .count
  pyengine-cli tokenize --model ./gpt2 --ids 15496,11,616,3290

\b
Standard output: id and piece of each token, a line each; with --ids the text. Bytes that are no whole
character are shown as <0xE7>. A prompt of generate is
tokenized in the same way, special tokens in front included.
"""


@click.command(context_settings=_options.CONTEXT_SETTINGS, epilog=_EPILOG)
@click.argument("texts", nargs=-1, metavar="[TEXTS]...")
@click.option(
    "--file", "-f", metavar="PATH", help="Texts from a file, one per line or JSON lines; - is standard input."
)
@click.option(
    "--ids", is_flag=True, help="TEXTS are token ids, e.g. 15496,11: print the text they stand for."
)
@click.option("--raw", is_flag=True, help="Pieces as the vocabulary spells them (Ġhouse), as in --json.")
@click.option("--skip-special-tokens", is_flag=True, help="With --ids: leave special tokens out of the text.")
@_options.model
@_options.json_lines
def command(
    texts: tuple[str, ...],
    file: str | None,
    ids: bool,
    raw: bool,
    skip_special_tokens: bool,
    model: str | None,
    as_json: bool,
) -> None:
    """Token ids and pieces of TEXTS; - is all of standard input."""
    from pyengine.errors import TokenizerError
    from pyengine.model.checkpoint import resolve
    from pyengine.model.config import GPT2Config
    from pyengine.model.tokenizer import load_tokenizer

    prompts = _text.collect_prompts(texts, file, ids)
    if not prompts:
        raise click.UsageError("Nothing to tokenize: give TEXTS, --file, or - for standard input.")
    _text.prepare_output()
    path = resolve(model)
    directory = path if path.is_dir() else path.parent
    tokenizer = load_tokenizer(directory, GPT2Config.from_file(directory).vocab_size)
    if tokenizer is None:
        raise TokenizerError(f"{directory} has no tokenizer files: its prompts are token ids")
    for number, prompt in enumerate(prompts, 1):
        decoding = isinstance(prompt, list)
        with _text.naming("text", number, len(prompts)):
            token_ids = prompt if isinstance(prompt, list) else tokenizer.encode(prompt)
            text = tokenizer.decode(token_ids, skip_special_tokens) if isinstance(prompt, list) else prompt
        spell = tokenizer.id_to_piece if raw or as_json else tokenizer.readable_piece
        pieces = [spell(token) for token in token_ids]
        if as_json:
            _text.print_json(
                {"text": text, "token_ids": token_ids, "pieces": pieces, "count": len(token_ids)}
            )
            continue
        if len(prompts) > 1:
            click.echo(_text.heading(number, prompt))
        if decoding:
            click.echo(text)
        else:
            for token, piece in zip(token_ids, pieces, strict=True):
                click.echo(f"{token:6d}  {_text.quote(piece)}")
