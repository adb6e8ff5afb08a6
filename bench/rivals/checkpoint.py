"""A Hugging Face folder as numpy: its linear layers in, and a folder with other values for them out."""

import json
import re
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

LINEAR = re.compile(r"^(model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj)\.weight$")
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclass
class Result:
    """What a rival made of a model."""

    # Decoded weights (out, in) of the linear layers, float32, under their module names.
    weights: dict[str, np.ndarray]
    # Everything its format stores for these layers, in bits, and the codes alone.
    stored_bits: float
    code_bits: float


class Checkpoint:
    """One model.safetensors with its config and tokenizer."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.config = json.loads((self.folder / "config.json").read_text())
        raw = (self.folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        header.pop("__metadata__", None)
        data = raw[8 + length :]
        self.tensors: dict[str, np.ndarray] = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            self.tensors[name] = np.frombuffer(data[start:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])

    @property
    def linears(self) -> dict[str, np.ndarray]:
        """The linear layers of all blocks as float32 (out, in), in file order."""
        return {
            match.group(1): self.tensors[name].astype(np.float32)
            for name in self.tensors
            if (match := LINEAR.match(name))
        }

    def tokens(self, text: str) -> list[int]:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / "tokenizer.json")).encode(Path(text).read_text()).ids

    def windows(self, text: str, samples: int, length: int) -> np.ndarray:
        """Random crops of the calibration text, (samples, length): the amount and the kind that pcomp calibrates on."""
        tokens = np.array(self.tokens(text), dtype=np.int64)
        starts = np.random.default_rng(0).integers(0, len(tokens) - length + 1, samples)
        return np.stack([tokens[start : start + length] for start in starts])

    def write(self, folder: str, weights: dict[str, np.ndarray]) -> None:
        """Writes the model with these values for its linear layers, as float32; the other tensors keep their bytes."""
        out = Path(folder)
        out.mkdir(parents=True)
        for file in self.folder.iterdir():
            if file.suffix == ".json":
                shutil.copyfile(file, out / file.name)
        missing = self.linears.keys() - weights.keys()
        if missing:
            raise ValueError(f"no weights for {sorted(missing)[0]}")
        header, blobs, offset = {}, [], 0
        names = {value: key for key, value in DTYPES.items()}
        for name, tensor in self.tensors.items():
            match = LINEAR.match(name)
            value = weights[match.group(1)].astype("<f4") if match else tensor
            if value.shape != tensor.shape or not np.isfinite(value.astype(np.float32)).all():
                raise ValueError(f"{name}: shape {value.shape} for {tensor.shape}, or a value that is no number")
            blob = np.ascontiguousarray(value).tobytes()
            header[name] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": [offset, offset + len(blob)]}
            offset += len(blob)
            blobs.append(blob)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (out / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))

    def torch_model(self):
        """The model in transformers, float32, on the CPU."""
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()


def linear_weights(model) -> dict[str, np.ndarray]:
    """Weights of a transformers model's linear layers under their module names."""
    return {
        name: module.weight.detach().float().cpu().numpy()
        for name, module in model.named_modules()
        if LINEAR.match(name + ".weight")
    }


def group_bits(weights: dict[str, np.ndarray], bits: int, group: int, per_group: float) -> tuple[float, float]:
    """(stored, code) bits of codes of `bits` bits and `per_group` bits of scale and zero for each started group of columns."""
    code = sum(w.size * bits for w in weights.values())
    return code + sum(w.shape[0] * -(-w.shape[1] // group) * per_group for w in weights.values()), code
