"""A tiny target without a download: a Qwen3 with random weights and a tokenizer trained on the data given.

    python scripts/make_tiny_target.py --out target --data train.jsonl

It says nothing sensible, but everything about it is real: the model class, safetensors weights, a byte-level BPE
tokenizer, a chat template. The same arguments give the same files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train_tokenizer(data: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocab_size`` entries, trained on the messages in ``data``."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(data), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def _texts(data: Path) -> Iterator[str]:
    with open(data, encoding="utf-8") as file:
        for line in file:
            for message in json.loads(line)["messages"]:
                yield f"{message['role']}\n{message['content']}"


def make_tiny_target(
    out: Path,
    data: Path,
    *,
    layers: int = 6,
    hidden_size: int = 128,
    vocab_size: int = 4096,
    tie_word_embeddings: bool = True,
    seed: int = 0,
) -> None:
    """Save model and tokenizer to the folder ``out``, in float32."""
    tokenizer = train_tokenizer(data, vocab_size)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=8192,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).to(torch.float32)
    logging.disable_progress_bar()  # of one file
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a tiny random-weight target and its tokenizer.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--data", type=Path, required=True, help="a .jsonl file with messages, for the tokenizer")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--untied", action="store_true", help="an output embedding of its own")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_tiny_target(
        args.out,
        args.data,
        layers=args.layers,
        hidden_size=args.hidden_size,
        vocab_size=args.vocab_size,
        tie_word_embeddings=not args.untied,
        seed=args.seed,
    )
    print(f"wrote a {args.layers}-layer target of width {args.hidden_size} to {args.out}")


if __name__ == "__main__":
    main()
