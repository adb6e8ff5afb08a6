"""AutoRound (Intel): rounding and clipping learned by signed gradient descent, block by block. Counted as its own format stores it."""

import torch
from checkpoint import Checkpoint, Result, group_bits, linear_weights

PACKAGES = ("auto_round", "torch", "transformers")


def quantize(checkpoint: Checkpoint, options: dict) -> Result:
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    bits, group = options["bits"], options["group"]
    windows = torch.from_numpy(checkpoint.windows(options["calibration"], options["samples"], options["sequence"]))
    rounder = AutoRound(
        checkpoint.torch_model(),
        tokenizer=AutoTokenizer.from_pretrained(checkpoint.folder),
        bits=bits,
        group_size=group,
        sym=options.get("symmetric", False),
        iters=options.get("iters", 200),
        nsamples=options["samples"],
        seqlen=options["sequence"],
        batch_size=8,
        dataset=list(windows.split(8)),
        enable_alg_ext=options.get("extension", False),
        amp=False,
        device_map="cpu",
        enable_torch_compile=False,
    )
    model, _ = rounder.quantize()
    weights = linear_weights(model)
    # float16 scale and an integer zero point of the codes' width; symmetric files hold the zero points too.
    return Result(weights, *group_bits(weights, bits, group, 16 + bits))
