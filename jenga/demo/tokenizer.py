"""The demo models' tokenizer: byte-level BPE, so every text survives a round trip, with merges for
the words of the recall task (`jenga.demo.recall`), so that a key or a value is one token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jenga.demo.recall import KEYS, VALUES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL: tuple[str, ...] = ("<pad>", "<end>", "<bos>", "<user>", "<model>", "<system>")
PAD, END, BOS, USER, MODEL, SYSTEM = range(len(SPECIAL))
MARKS: tuple[str, ...] = ("; ", "? ", "! ")

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{- '<user>' -}}
{%- elif message['role'] == 'assistant' -%}{{- '<model>' -}}
{%- elif message['role'] == 'system' -%}{{- '<system>' -}}
{%- else -%}{{- raise_exception('role ' + message['role'] + ': only system, user and assistant exist') -}}
{%- endif -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<end>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<model>' -}}{%- endif -%}
"""


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's table)."""
    keep = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    return [chr(b) if b in keep else chr(next(spare)) for b in range(256)]


_SYMBOLS = byte_symbols()
WORDS: tuple[str, ...] = (*KEYS, *VALUES, *MARKS)


def _spell(text: str) -> str:
    return "".join(_SYMBOLS[b] for b in text.encode())


def vocabulary() -> dict[str, int]:
    """Token to id: special tokens, the 256 bytes, keys, values, marks, in this order."""
    tokens = [*SPECIAL, *_SYMBOLS, *map(_spell, WORDS)]
    return {token: i for i, token in enumerate(tokens)}


def token_id(text: str) -> int:
    """The id of a special token, a single ASCII character or a word of the recall task.

    Raises KeyError for anything that is not one token.
    """
    ids = vocabulary()
    return ids[text] if text in SPECIAL else ids[_spell(text)]


def build(context: int) -> PreTrainedTokenizerFast:
    """The tokenizer for a model of `context` tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    merges = [(_spell(word[0]), _spell(word[1])) for word in WORDS]
    core = Tokenizer(models.BPE(vocab=vocabulary(), merges=merges))
    # Words are cut out first, so that no merge depends on what stands beside it.
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[A-Za-z][0-9]|[0-9]{2}|[;?!] |[\s\S]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<end>",
        bos_token="<bos>",
        additional_special_tokens=["<user>", "<model>", "<system>"],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save(folder: Path, context: int) -> None:
    """Write the tokenizer's files into `folder`."""
    build(context).save_pretrained(folder)
