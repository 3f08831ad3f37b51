"""Writes tests/packs/fixtures/sae_lens.json: what sae-lens computes on small random SAEs.

Runs in an environment of its own, as sae-lens pins what ours does not:

    uv venv /tmp/sae-lens --python 3.11
    uv pip install --python /tmp/sae-lens/bin/python sae-lens==6.54.12
    /tmp/sae-lens/bin/python benchmarks/peer_fixtures/sae_lens.py

The fixture holds each SAE's weights and its cfg.json as sae-lens saves them, the states that were
encoded, and the activations and reconstructions that came out.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

# Beside this script, whose folder Python puts first, lies a file of the same name as the package.
sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402
from sae_lens import (  # noqa: E402
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAE, SAEMetadata  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

OUT = Path(__file__).resolve().parents[2] / "tests" / "packs" / "fixtures" / "sae_lens.json"
D, FEATURES, K, TOKENS = 12, 40, 5, 6


def numbers(tensor):
    return tensor.detach().double().tolist()


def cases():
    """Name, class, configuration and options of each SAE."""
    for subtract in (True, False):
        yield f"topk, subtract {subtract}", TopKSAE, TopKSAEConfig, {
            "k": K, "apply_b_dec_to_input": subtract,
        }  # fmt: skip
        yield f"jumprelu, subtract {subtract}", JumpReLUSAE, JumpReLUSAEConfig, {
            "apply_b_dec_to_input": subtract,
        }  # fmt: skip
    yield "topk, rescaled by decoder norm", TopKSAE, TopKSAEConfig, {
        "k": K, "rescale_acts_by_decoder_norm": True,
    }  # fmt: skip
    yield "standard", StandardSAE, StandardSAEConfig, {}
    yield (
        "standard, layer_norm",
        StandardSAE,
        StandardSAEConfig,
        {"normalize_activations": "layer_norm"},
    )
    yield (
        "jumprelu, constant_norm_rescale",
        JumpReLUSAE,
        JumpReLUSAEConfig,
        {"normalize_activations": "constant_norm_rescale"},
    )


def main():
    generator = torch.Generator().manual_seed(0)
    done = []
    for name, kind, config, options in cases():
        metadata = SAEMetadata(hook_name="blocks.2.hook_resid_post", model_name="tiny")
        sae = kind(config(d_in=D, d_sae=FEATURES, metadata=metadata, **options))
        with torch.no_grad():
            for part in sae.parameters():
                part.copy_(torch.randn(part.shape, generator=generator) * 0.5)
            if hasattr(sae, "threshold"):
                sae.threshold.abs_()
        x = torch.randn(TOKENS, D, generator=generator) * 3
        with tempfile.TemporaryDirectory() as folder:
            sae.save_model(folder)
            again = SAE.load_from_disk(folder)  # what anybody else would compute from the files
            case = {
                "name": name,
                "cfg": json.loads((Path(folder) / "cfg.json").read_text()),
                "weights": {
                    k: numbers(v)
                    for k, v in load_file(Path(folder) / "sae_weights.safetensors").items()
                },
                "x": numbers(x),
            }
        with torch.no_grad():
            activations = again.encode(x)
            case["activations"] = numbers(activations)
            case["reconstruction"] = numbers(again.decode(activations))
        done.append(case)
    document = {"sae_lens": version("sae-lens"), "torch": torch.__version__, "cases": done}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(round_off(document)))
    print(f"{OUT}: {len(done)} SAEs, {OUT.stat().st_size / 1000:.0f} kB")


def round_off(value):
    """Floats to the nine digits that a float32 has."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {k: round_off(v) for k, v in value.items()}
    return [round_off(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
