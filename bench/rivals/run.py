"""
One rival, one model:

    python bench/rivals/run.py list
    python bench/rivals/run.py quantize RIVAL MODEL OUT '{"bits": 2, "group": 64, ...}'

`list` prints which rivals run here, and why the others do not. `quantize` writes OUT, the model with the rival's decoded weights, and
prints what the rival's own format stores for them. The last line on stdout is JSON.
"""

import importlib
import importlib.util
import json
import sys
import time
from importlib import metadata

from checkpoint import Checkpoint

RIVALS = ("ort", "hqq", "autoround", "llama")


def available(rival: str) -> dict:
    needed = packages(rival)
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        return {"missing": f"not installed: {', '.join(missing)}"}
    return {"versions": {package: metadata.version(package.replace("_", "-")) for package in needed}}


def packages(rival: str) -> tuple[str, ...]:
    """The packages a rival's file names, read without importing what may be absent."""
    source = open(importlib.util.find_spec(f"rival_{rival}").origin).read()
    line = next(line for line in source.splitlines() if line.startswith("PACKAGES = "))
    return tuple(part.strip(' "') for part in line.split("(")[1].rstrip(")").split(",") if part.strip())


def main(arguments: list[str]) -> dict:
    if arguments == ["list"]:
        return {rival: available(rival) for rival in RIVALS}
    _, rival, model, out, options = arguments
    checkpoint = Checkpoint(model)
    started = time.monotonic()
    result = importlib.import_module(f"rival_{rival}").quantize(checkpoint, json.loads(options))
    seconds = time.monotonic() - started
    checkpoint.write(out, result.weights)
    weights = sum(weight.size for weight in result.weights.values())
    return {"storedBits": result.stored_bits / weights, "codeBits": result.code_bits / weights, "seconds": seconds}


if __name__ == "__main__":
    print("\n" + json.dumps(main(sys.argv[1:])))
