"""Run by the Python of an environment with onnxruntime-genai (``make test-clients``): time generation, and print it as JSON.

python generation_genai.py DIRECTORY TOKENS REPETITIONS BYTE…       # the bytes of the prompt
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import onnxruntime_genai as og

directory, count, repetitions, *prompt = sys.argv[1:]
model = og.Model(directory)
seconds, tokens = [], []
for number in range(int(repetitions) + 1):
    start = time.process_time()
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + int(count), do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([[int(byte) for byte in prompt]], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    tokens = [int(token) for token in generator.get_sequence(0)][len(prompt) :]
    seconds += [time.process_time() - start] if number else []
print(json.dumps({"seconds": seconds, "tokens": tokens}))
