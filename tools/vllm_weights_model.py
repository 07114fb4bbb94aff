"""Models of well-known shapes for vllm_weights_gpu.py: a folder that vLLM serves with made-up weights, and their names and shapes."""

import json
import os

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 512,
             "num_key_value_heads": 2, "head_dim": 64},
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
                   "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128},
    "qwen3-8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
                 "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128},
}


def write_model(folder, shape):
    """A model's configuration and a byte-level tokenizer; vLLM makes the weights up."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    os.makedirs(folder, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    for name, held in (
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
                                   "pad_token": "<|endoftext|>", "model_max_length": 4096}),
        ("config.json", {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
                         "attention_dropout": 0.0, "bos_token_id": 256, "eos_token_id": 258, "hidden_act": "silu",
                         "initializer_range": 0.02, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
                         "rope_theta": 1000000, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
                         **SHAPES[shape]}),
    ):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(held, file)
    return folder


def checkpoint_shapes(shape):
    """Names and shapes of the tensors of such a checkpoint."""
    s = SHAPES[shape]
    hidden, inner, head = s["hidden_size"], s["intermediate_size"], s["head_dim"]
    queries, keys = s["num_attention_heads"] * head, s["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": (s["vocab_size"], hidden), "model.norm.weight": (hidden,),
              "lm_head.weight": (s["vocab_size"], hidden)}
    for layer in range(s["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "self_attn.q_proj.weight": (queries, hidden), at + "self_attn.k_proj.weight": (keys, hidden),
            at + "self_attn.v_proj.weight": (keys, hidden), at + "self_attn.o_proj.weight": (hidden, queries),
            at + "self_attn.q_norm.weight": (head,), at + "self_attn.k_norm.weight": (head,),
            at + "mlp.gate_proj.weight": (inner, hidden), at + "mlp.up_proj.weight": (inner, hidden),
            at + "mlp.down_proj.weight": (hidden, inner),
            at + "input_layernorm.weight": (hidden,), at + "post_attention_layernorm.weight": (hidden,),
        }
    return shapes
