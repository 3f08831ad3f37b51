"""What a sandbox's interpreter has, for the notebook: somebody who runs it again wants to know."""

import platform
from importlib import metadata
from typing import Any, Dict

PACKAGES = (
    *("accelerate", "bitsandbytes", "datasets", "einops", "ipykernel", "matplotlib", "nnsight"),
    *("numpy", "openai", "peft", "sae-lens", "safetensors", "scikit-learn", "scipy"),
    *("tokenizers", "torch", "transformer-lens", "transformers"),
)


def installed() -> Dict[str, Any]:
    found: Dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "machine": "%s %s" % (platform.system(), platform.machine()),
        "packages": found,
    }
