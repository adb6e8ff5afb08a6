"""GPTQModel: GPTQ with its own defaults, read back through its plain torch layer."""

import os
import tempfile

import numpy as np
import torch
from checkpoint import LINEAR, Checkpoint, Result

PACKAGES = ("gptqmodel", "torch", "transformers")


def quantize(checkpoint: Checkpoint, options: dict) -> Result:
    # Its loader wants two workers; by itself it takes one on a machine of two cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=options["bits"],
        group_size=options["group"],
        desc_act=options.get("act_order", True),
        sym=options.get("symmetric", False),
        device="cpu",
    )
    windows = checkpoint.windows(options["calibration"], options["samples"], options["sequence"])
    model = GPTQModel.load(str(checkpoint.folder), config, dtype=torch.float32)
    model.quantize([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows], batch_size=8)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        return read_back(folder, checkpoint, options["bits"], BACKEND, GPTQModel)


def read_back(folder: str, checkpoint: Checkpoint, bits: int, backend, loader) -> Result:
    """Decodes a saved model; counts codes, scales, zero points and group indices as the file has them."""
    from safetensors import safe_open

    linears = checkpoint.linears
    stored = 0
    with safe_open(f"{folder}/model.safetensors", "np") as file:
        for key in file.keys():
            if LINEAR.match(key.rsplit(".", 1)[0] + ".weight"):
                stored += 8 * file.get_tensor(key).nbytes
    model = loader.load(folder, backend=backend.TORCH, device="cpu", dtype=torch.float32)
    weights = {}
    for name, module in model.model.named_modules():
        if name in linears:
            weights[name] = np.ascontiguousarray(module.dequantize_weight().float().T.numpy())
    return Result(weights, stored, sum(w.size * bits for w in linears.values()))
