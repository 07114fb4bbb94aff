#!/usr/bin/env python3
"""Writes a tiny chat model with random weights that `vllm serve DIR` loads without a hub.

    tiny_model.py DIR [--seed N] [--layers N] [--kv-heads N]

The same arguments give the same bytes; another seed is another checkpoint of the same shape. Weights are scaled so that the
greedy answer hangs on the whole prompt: attention is sharp, and no token's own embedding outweighs what it attends to. A
block of KV that is lost, shifted or stale then changes the answer, which makes equal tokens a real proof of a transfer.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HIDDEN, INNER, HEADS, HEAD_SIZE, VOCABULARY, LENGTH_MAX = 256, 512, 8, 64, 1024, 4096
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] if part['type'] == 'text' else '' }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "the of and to in is that for it on with as was at by this from or are be an have not which one all their there has been "
    "more when who will no if out so said what up about into than them can only other new some could time these two may then "
    "prefill decode cache block token server request transfer buffer worker proxy stream memory layer head model weight batch "
    "queue schedule lease region path claim digest report"
).split()


def write_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer in which every id of the model is some visible text."""
    rng = random.Random(0)
    text = [" ".join(rng.choices(WORDS, k=40)) + rng.choice(".!?\n") for _ in range(600)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_tokens([f" w{number:04d}" for number in range(VOCABULARY - tokenizer.get_vocab_size())])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1 << 20,
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "chat_template": CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return tokenizer.get_vocab_size()


def weights(seed: int, layers: int, kv_heads: int, vocabulary: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def normal(rows: int, columns: int, scale: float) -> np.ndarray:
        return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(scale)

    def linear(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return normal(rows, columns, gain / columns**0.5)

    def ones(size: int, value: float = 1.0) -> np.ndarray:
        return np.full((size,), value, dtype=np.float32)

    found = {"model.embed_tokens.weight": normal(vocabulary, HIDDEN, 0.5)}
    for layer in range(layers):
        parts = {
            "self_attn.q_proj": linear(HEADS * HEAD_SIZE, HIDDEN),
            "self_attn.k_proj": linear(kv_heads * HEAD_SIZE, HIDDEN),
            "self_attn.v_proj": linear(kv_heads * HEAD_SIZE, HIDDEN),
            "self_attn.o_proj": linear(HIDDEN, HEADS * HEAD_SIZE, 1.5),
            "self_attn.q_norm": ones(HEAD_SIZE, 3.0),
            "self_attn.k_norm": ones(HEAD_SIZE),
            "mlp.gate_proj": linear(INNER, HIDDEN),
            "mlp.up_proj": linear(INNER, HIDDEN),
            "mlp.down_proj": linear(HIDDEN, INNER),
            "input_layernorm": ones(HIDDEN),
            "post_attention_layernorm": ones(HIDDEN),
        }
        found.update({f"model.layers.{layer}.{name}.weight": part for name, part in parts.items()})
    head = linear(vocabulary, HIDDEN, 4.0)
    head[: len(SPECIAL)] = 0.0  # The end-of-sequence token never wins: answers have the length that was asked for.
    return {**found, "model.norm.weight": ones(HIDDEN), "lm_head.weight": head}


def settings(layers: int, kv_heads: int, vocabulary: int) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "float32",
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": LENGTH_MAX,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(args.folder)
    tensors = weights(args.seed, args.layers, args.kv_heads, vocabulary)
    config = settings(args.layers, args.kv_heads, vocabulary)
    generation = {"bos_token_id": 1, "eos_token_id": [2, 4], "pad_token_id": 0, "do_sample": False}
    (args.folder / "generation_config.json").write_text(json.dumps(generation))
    save_file(tensors, str(args.folder / "model.safetensors"), metadata={"format": "pt"})
    # Last: a folder with it is complete.
    (args.folder / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    main()
