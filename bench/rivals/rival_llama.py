"""
llama.cpp's types: llama-quantize on a GGUF made here, with an importance matrix (mean square of each input) of the calibration windows.
Needs LLAMA_QUANTIZE, the path of the program; the gguf package that comes with its source knows the newest types.
"""

import os
import struct
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from checkpoint import Checkpoint, Result

PACKAGES = ("gguf", "torch", "transformers")
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(module: str) -> str:
    _, _, block, site = module.split(".", 3)
    return f"blk.{block}.{NAMES[site]}.weight"


def write_float(checkpoint: Checkpoint, path: Path) -> None:
    """
    The model as llama-quantize reads it. Rows of q and k keep the order of the checkpoint (llama.cpp's own converter permutes them for its
    rotary layout): every type quantizes along rows, so their order changes nothing.
    """
    config = checkpoint.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, tensor in checkpoint.tensors.items():
        value = tensor.astype(np.float32)
        if name == "model.embed_tokens.weight":
            writer.add_tensor("token_embd.weight", value)
        elif name == "model.norm.weight":
            writer.add_tensor("output_norm.weight", value)
        elif name == "lm_head.weight":
            writer.add_tensor("output.weight", value)
        elif name.endswith("input_layernorm.weight"):
            writer.add_tensor(f"blk.{name.split('.')[2]}.attn_norm.weight", value)
        elif name.endswith("post_attention_layernorm.weight"):
            writer.add_tensor(f"blk.{name.split('.')[2]}.ffn_norm.weight", value)
        else:
            writer.add_tensor(gguf_name(name.removesuffix(".weight")), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_importance(checkpoint: Checkpoint, options: dict, path: Path) -> None:
    """llama-imatrix's first file format: per tensor the mean square of every input column, over all tokens."""
    model, linears = checkpoint.torch_model(), checkpoint.linears
    windows = torch.from_numpy(checkpoint.windows(options["calibration"], options["samples"], options["sequence"]))
    sums = {name: np.zeros(weight.shape[1]) for name, weight in linears.items()}

    def watch(name):
        def hook(_module, args):
            sums[name] += args[0].detach().double().square().sum(dim=tuple(range(args[0].dim() - 1))).numpy()

        return hook

    for name, module in model.named_modules():
        if name in linears:
            module.register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for batch in windows.split(16):
            model(batch)
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(sums)))
        for name, total in sums.items():
            key = gguf_name(name).encode()
            file.write(struct.pack("<i", len(key)) + key + struct.pack("<ii", 1, len(total)))
            file.write((total / windows.numel()).astype("<f4").tobytes())


def quantize(checkpoint: Checkpoint, options: dict) -> Result:
    program = os.environ.get("LLAMA_QUANTIZE")
    if not program:
        raise ValueError("LLAMA_QUANTIZE does not name the llama-quantize program")
    for name, weight in checkpoint.linears.items():
        if weight.shape[1] % 256:
            raise ValueError(f"{name} has {weight.shape[1]} columns, no multiple of the super-block of 256")
    with tempfile.TemporaryDirectory() as scratch:
        source, importance, target = (Path(scratch) / name for name in ("float.gguf", "importance.dat", "out.gguf"))
        write_float(checkpoint, source)
        command = [program, "--token-embedding-type", "f32", "--output-tensor-type", "f32"]
        if options.get("importance", True):
            write_importance(checkpoint, options, importance)
            command += ["--imatrix", str(importance)]
        if options.get("pure"):
            command.append("--pure")
        done = subprocess.run([*command, str(source), str(target), options["type"]], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"llama-quantize: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
        weights, stored = {}, 0
        for name, weight in checkpoint.linears.items():
            tensor = tensors[gguf_name(name)]
            weights[name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape).astype(np.float32)
            stored += 8 * tensor.data.nbytes
    # These types mix codes and tables; what is stored is the only width there is.
    return Result(weights, stored, stored)
