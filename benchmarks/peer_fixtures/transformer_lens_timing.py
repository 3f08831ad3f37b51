"""Seconds of TransformerLens's exact sweep on the model of benchmarks/subject.py, as JSON on stdout.

    uv venv --python 3.11 PEER
    uv pip install --python PEER/bin/python transformer-lens==4.3.0
    PEER/bin/python -P benchmarks/peer_fixtures/transformer_lens_timing.py

benchmarks/techniques.py runs it by itself, given `--transformer-lens PEER/bin/python`.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge

sys.path.append(str(Path(__file__).parents[1]))

from subject import ANSWERS, SMALL, SWEEP, make_model, make_tokenizer, pair

ROUNDS = 3


def metric(logits):  # [1, T, V]
    return logits[0, -1, ANSWERS[0]] - logits[0, -1, ANSWERS[1]]


torch.set_num_threads(1)
tokenizer = make_tokenizer()
clean, corrupt = (tokenizer(t, return_tensors="pt")["input_ids"] for t in pair(*SWEEP))
bridge = TransformerBridge.boot_transformers(
    "tiny", hf_model=make_model(SMALL), tokenizer=tokenizer
)
seconds = []
with torch.no_grad():
    for _ in range(ROUNDS):
        began = time.perf_counter()
        _, cache = bridge.run_with_cache(clean)
        found = patching.get_act_patch_resid_pre(bridge, corrupt, cache, metric)
        seconds.append(time.perf_counter() - began)
print(
    json.dumps(
        {
            "version": version("transformer_lens"),
            "seconds": seconds,
            "metric": torch.as_tensor(found).tolist(),
        }
    )
)
