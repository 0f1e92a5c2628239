"""Tokenizers with chat templates of well-known kinds, and what each template should write, spelled out by hand.

``KINDS[name](messages)`` gives the rendered text in pieces ``(text, learned)``, written without the template engine:
the measure that loss masks are held against.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from make_demo_data import demo_conversations
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, Any]]
Pieces = list[tuple[str, bool]]

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>",
)  # fmt: skip
NOT_SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>")
# Splits like those of today's byte-level tokenizers: runs of newlines stay together, a space joins the word behind it.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
EXTRA = ["\n\n", "\n\n\n", " \n", ".\n\n", "日本語 é ü ß", "<|im_end|>", "🙂", "INST", "model assistant user"] * 50


def learned_pieces(pieces: Pieces) -> list[str]:
    """The learned texts alone."""
    return [text for text, learned in pieces if learned]


def qwen2(messages: Messages) -> Pieces:
    """ChatML with a default system turn."""
    pieces: Pieces = []
    if messages[0]["role"] != "system":
        pieces.append(("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", False))
    for message in messages:
        pieces += _chatml(message["role"], message["content"])
    return pieces


def tagged(messages: Messages) -> Pieces:
    """ChatML, plain."""
    return [piece for message in messages for piece in _chatml(message["role"], message["content"])]


def qwen3(messages: Messages) -> Pieces:
    """ChatML; thoughts are dropped before the last question; the last answer always has a think block."""
    pieces: Pieces = []
    last_question = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for number, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "assistant":
            thoughts = message.get("reasoning_content", "")
            if "</think>" in content:
                thoughts = content.split("</think>")[0].split("<think>")[-1]
                content = content.split("</think>")[-1].lstrip("\n")
            if number > last_question and (number == len(messages) - 1 or thoughts):
                stripped = thoughts.strip("\n")
                content = f"<think>\n{stripped}\n</think>\n\n{content}"
        pieces += _chatml(message["role"], content)
    return pieces


def _chatml(role: str, content: str) -> Pieces:
    if role != "assistant":
        return [(f"<|im_start|>{role}\n{content}<|im_end|>\n", False)]
    return [("<|im_start|>assistant\n", False), (f"{content}<|im_end|>", True), ("\n", False)]


def llama3(messages: Messages) -> Pieces:
    """Headers, stripped content."""
    pieces: Pieces = [("<|begin_of_text|>", False)]
    for message in messages:
        pieces.append((f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False))
        pieces.append((f"{message['content'].strip()}<|eot_id|>", message["role"] == "assistant"))
    return pieces


def gemma(messages: Messages) -> Pieces:
    """The system text is part of the first user turn; content is stripped; the assistant is called model."""
    pieces: Pieces = [("<bos>", False)]
    system = ""
    for message in messages:
        content = message["content"].strip()
        if message["role"] == "system":
            system = content + "\n\n"
        elif message["role"] == "user":
            pieces.append((f"<start_of_turn>user\n{system}{content}<end_of_turn>\n", False))
            system = ""
        else:
            pieces += [("<start_of_turn>model\n", False), (f"{content}<end_of_turn>", True), ("\n", False)]
    return pieces


def mistral(messages: Messages) -> Pieces:
    """No header before an answer."""
    pieces: Pieces = [("<s>", False)]
    for message in messages:
        if message["role"] == "user":
            pieces.append((f"[INST] {message['content']} [/INST]", False))
        else:
            pieces.append((f" {message['content']}</s>", True))
    return pieces


KINDS: dict[str, Callable[[Messages], Pieces]] = {
    "qwen2": qwen2, "qwen3": qwen3, "llama3": llama3, "gemma": gemma, "mistral": mistral, "tagged": tagged,
}  # fmt: skip
_BOS_EOS = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"), "gemma": ("<bos>", "<end_of_turn>"), "mistral": ("<s>", "</s>"),
}  # fmt: skip


@cache
def _training_texts() -> tuple[str, ...]:
    return (*(m["content"] for conversation in demo_conversations()[:150] for m in conversation), *EXTRA)


@cache
def _backend(kind: str) -> str:
    """A trained tokenizer as JSON: byte-level (llama3: trimmed offsets, as the real one), or with byte fallback."""
    added = [AddedToken(t, special=True, normalized=False) for t in SPECIAL]
    if kind in ("gemma", "mistral"):
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[^▁\n]+|▁+|\n+"), "isolated")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(
            vocab_size=1500, special_tokens=tokens, limit_alphabet=120, show_progress=False, max_token_length=12
        )
        backend.train_from_iterator(_training_texts(), trainer)
    else:
        backend = Tokenizer(models.BPE())
        backend.normalizer = normalizers.NFC() if kind == "qwen3" else None
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=kind == "llama3")
        trainer = trainers.BpeTrainer(
            vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        backend.train_from_iterator(_training_texts(), trainer)
    backend.add_special_tokens(added)
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in NOT_SPECIAL])
    return backend.to_str()


def chat_tokenizer(kind: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A fast tokenizer with the template of this kind (or the template given, as text)."""
    path = Path(__file__).parent / "templates" / f"{kind}.jinja"
    bos, eos = _BOS_EOS.get(kind, (None, "<|im_end|>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(kind)),
        bos_token=bos,
        eos_token=eos,
        chat_template=path.read_text() if template is None else template,
        clean_up_tokenization_spaces=False,
    )
