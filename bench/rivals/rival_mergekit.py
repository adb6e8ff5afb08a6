"""Runs mergekit on YAML files: rival_mergekit.py CONFIG OUTPUT [CONFIG OUTPUT ...]. Prints a line of JSON with the versions, then one for each: seconds on
the clock and of the processor, the peak memory of the process so far, or the error."""

import json
import os
import resource
import sys
import time
from importlib.metadata import version

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge


def main() -> None:
    pairs = sys.argv[1:]
    print(json.dumps({"versions": f"mergekit {version('mergekit')}, torch {version('torch')}"}), flush=True)
    for config, output in zip(pairs[::2], pairs[1::2]):
        started, cpu = time.monotonic(), time.process_time()
        try:
            with open(config, encoding="utf-8") as file:
                configuration = MergeConfiguration.model_validate(yaml.safe_load(file))
            options = MergeOptions(lazy_unpickle=True, copy_tokenizer=False, quiet=True, write_model_card=False)
            run_merge(configuration, output, options)
            result = {
                "seconds": time.monotonic() - started,
                "cpuSeconds": time.process_time() - cpu,
                "peakBytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        except Exception as error:  # reported in the table, like a result
            result = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(result), flush=True)


main()
