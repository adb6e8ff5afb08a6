"""Logits of a base model with an adapter, as PEFT computes them: peft_logits.py BASE ADAPTER WINDOW.json OUT.bin (float32, tokens x vocabulary)."""
import json
import sys

import peft
import torch
import transformers

base, adapter, window, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
model = peft.PeftModel.from_pretrained(model, adapter).eval()
missing = [name for name, value in model.named_parameters() if value.is_meta]
assert not missing, missing
with torch.no_grad():
    logits = model(torch.tensor([json.load(open(window))])).logits[0]
logits.to(torch.float32).numpy().tofile(out)
print(f"PEFT {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
