"""Loads an artifact in onnxruntime-genai and continues a prompt greedily: the check that genai_config.json and the graph are what it wants.

    pip install onnxruntime-genai && python bench/genai.py out/quickstart "def main("
"""

import sys

import onnxruntime_genai as og

folder, prompt = sys.argv[1], sys.argv[2]
model = og.Model(folder)
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length=64, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode(prompt))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
