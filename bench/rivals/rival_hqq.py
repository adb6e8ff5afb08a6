"""HQQ (half-quadratic quantization): no calibration text; float16 scales and zero points, one of each per group along the input."""

import torch
from checkpoint import Checkpoint, Result

PACKAGES = ("hqq", "torch")


def quantize(checkpoint: Checkpoint, options: dict) -> Result:
    from hqq.core.quantize import Quantizer

    weights, stored, code = {}, 0, 0
    for name, weight in checkpoint.linears.items():
        packed, meta = Quantizer.quantize(
            torch.from_numpy(weight), nbits=options["bits"], group_size=options["group"], axis=1, device="cpu", compute_dtype=torch.float16
        )
        meta = {**meta, "scale": meta["scale"].half(), "zero": meta["zero"].half()}
        stored += 8 * (packed.nbytes + meta["scale"].nbytes + meta["zero"].nbytes)
        code += weight.size * options["bits"]
        exact = {**meta, "scale": meta["scale"].float(), "zero": meta["zero"].float(), "compute_dtype": torch.float32}
        weights[name] = Quantizer.dequantize(packed, exact).reshape(weight.shape).float().numpy()
    return Result(weights, stored, code)
