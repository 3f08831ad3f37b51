"""Makes tests/packs/fixtures/steering_vectors.json: what steering-vectors says of tiny models.

    uv venv --python 3.11 PEER
    uv pip install --python PEER/bin/python steering-vectors==0.12.2
    PEER/bin/python -P benchmarks/peer_fixtures/steering_vectors.py

(-P: or else Python would take this very file for the package.) For each model of
directions_models.py: "mean" and "pca" [layer][d], the directions of its two aggregators at the last
token; "second_last" [layer][d], the mean at the token before; "attn_out" and "mlp_out" [layer][d],
the mean of what those modules put out; "logits" and "from_third" [V], those of the last token of
the prompt while the mean direction of layer 2 is added twice over at every token and from the third
one on, and "plain" without it.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import steering_vectors as sv
import torch

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

LAYER = 2


def case(kind, arguments):
    hf, tokenizer = make_model(kind, arguments, SEED), make_tokenizer()
    pairs = list(zip(POS, NEG, strict=True))

    def vectors(**options):
        vector = sv.train_steering_vector(hf, tokenizer, pairs, batch_size=4, **options)
        return vector, [
            vector.layer_activations[i].tolist() for i in sorted(vector.layer_activations)
        ]

    mean, out = vectors()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]

    def logits():
        with torch.no_grad():
            return hf(ids).logits[0, -1].tolist()

    one = sv.SteeringVector({LAYER: mean.layer_activations[LAYER]})
    with one.apply(hf, multiplier=2.0):
        every = logits()
    with one.apply(hf, multiplier=2.0, min_token_index=2):
        third = logits()
    return {
        "mean": out,
        "pca": vectors(aggregator=sv.pca_aggregator())[1],
        "second_last": vectors(read_token_index=-2)[1],
        "attn_out": vectors(layer_type="self_attn")[1],
        "mlp_out": vectors(layer_type="mlp")[1],
        "layer": LAYER,
        "logits": every,
        "from_third": third,
        "plain": logits(),
    }


if __name__ == "__main__":
    write(
        "steering_vectors", version("steering-vectors"), {n: case(*c) for n, c in CONFIGS.items()}
    )
