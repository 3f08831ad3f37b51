"""Tiny models of five families with random weights, saved as folders and loaded like any other."""

import pytest
import torch

from tests.packs.tiny import ARCHITECTURES, make_adapter, make_folder
from tool_packs.models import load_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Model folders by architecture, and for each an adapter folder under NAME-lora."""
    root = tmp_path_factory.mktemp("models")
    out = {}
    for name in ARCHITECTURES:
        out[name] = make_folder(root / name, name)
        out[f"{name}-lora"] = make_adapter(root / f"{name}-lora", out[name], seed=1)
    out["llama-lora2"] = make_adapter(root / "llama-lora2", out["llama"], seed=2)
    return out


@pytest.fixture(scope="session")
def models(folders):
    """Loaded models by architecture, and with their adapter under NAME-lora."""
    names = [*ARCHITECTURES, *(f"{name}-lora" for name in ARCHITECTURES)]
    return {name: load_model(str(folders[name])) for name in names}


@pytest.fixture(scope="session")
def llama(models):
    return models["llama"]


@pytest.fixture(autouse=True)
def no_hook_and_no_gradient_left(models):
    """Every test of the packs leaves the models as it found them."""
    yield
    for name, m in models.items():
        left = [
            path
            for path, module in m.hf.named_modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            # transformers leaves its own recorders behind after output_hidden_states=True
            if not hook.__module__.startswith("transformers")
        ]
        assert not left, f"hooks left on {name}: {left}"
        left = [path for path, weight in m.hf.named_parameters() if weight.grad is not None]
        assert not left, f"gradients left on {name}: {left}"
