"""Makes tests/packs/fixtures/repeng.json: what repeng says of tiny models.

    uv venv --python 3.11 PEER
    uv pip install --python PEER/bin/python repeng==0.4.0
    PEER/bin/python -P benchmarks/peer_fixtures/repeng.py

(-P: or else Python would take this very file for the package.) For each model of
directions_models.py: "pca_diff" and "pca_center" {layer: [d]}, for its default layers, all but the
first; its directions have norm 1. At the last layer it reads `hidden_states[-1]`, which is after
the final norm. "logits" [V], those of the last token of the prompt while twice the pca_center
direction is added at every token after layers 1 and 3, and "plain" without it.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from repeng import ControlModel, ControlVector, DatasetEntry

sys.path.append(str(Path(__file__).parent))
from directions_models import (
    CONFIGS,
    NEG,
    POS,
    PROMPT,
    SEED,
    make_model,
    make_tokenizer,
    write,
)

LAYERS = [1, 3]


def case(kind, arguments):
    tokenizer = make_tokenizer()
    data = [DatasetEntry(positive=p, negative=n) for p, n in zip(POS, NEG, strict=True)]
    plain = make_model(kind, arguments, SEED)
    found = {
        method: ControlVector.train(plain, tokenizer, data, method=method)
        for method in ("pca_diff", "pca_center")
    }
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    controlled = ControlModel(make_model(kind, arguments, SEED), LAYERS)
    controlled.set_control(found["pca_center"], 2.0)
    with torch.no_grad():
        logits = controlled(ids).logits[0, -1].tolist()
        without = plain(ids).logits[0, -1].tolist()
    return {
        **{
            method: {str(i): d.tolist() for i, d in sorted(vector.directions.items())}
            for method, vector in found.items()
        },
        "layers": LAYERS,
        "logits": logits,
        "plain": without,
    }


if __name__ == "__main__":
    write("repeng", version("repeng"), {n: case(*c) for n, c in CONFIGS.items()})
