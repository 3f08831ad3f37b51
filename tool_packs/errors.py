"""What can go wrong in a pack, one tree.

PackError
├── ModelError (also a ValueError)        the name, folder, adapter or option given to `load_model`
│   ├── ModelNotFound                     nothing loadable at that name
│   ├── WeightsIncomplete                 the files lack some of the model's weights
│   └── StructureUnknown                  the layers, the norm or the unembedding were not found
├── TextError (also a ValueError)         a text, chat, position, layer or site that does not fit
├── ResultError (also a ValueError)       a result that cannot be read, drawn or saved
├── CaptureTooLarge (also a RuntimeError) more activations asked for than the limit allows
├── MemoryFull (also a RuntimeError)      a pass, or a step of a training, that finds no memory
└── ServiceError (also a RuntimeError)    a service on the network that did not give what was asked
"""

from __future__ import annotations

__all__ = [
    "CaptureTooLarge",
    "MemoryFull",
    "ModelError",
    "ModelNotFound",
    "PackError",
    "ResultError",
    "ServiceError",
    "StructureUnknown",
    "TextError",
    "WeightsIncomplete",
]


class PackError(Exception):
    """Every error that a pack raises on purpose. The sentence says what to do next."""


class ModelError(PackError, ValueError):
    """The model asked for cannot be loaded as asked."""


class ModelNotFound(ModelError):
    """Nothing loadable was found at that name."""


class WeightsIncomplete(ModelError):
    """The files lack some of the model's weights, which would have been filled at random."""


class StructureUnknown(ModelError):
    """The layers, the final norm or the unembedding of this model were not found."""


class TextError(PackError, ValueError):
    """A text, a chat, a position, a layer or a site that does not fit this model."""


class ResultError(PackError, ValueError):
    """A result that cannot be read, drawn or saved."""


class CaptureTooLarge(PackError, RuntimeError):
    """More activations were asked for than the limit allows."""


class MemoryFull(PackError, RuntimeError):
    """A pass or a step of a training found no memory on its device; what it had taken is free again."""


class ServiceError(PackError, RuntimeError):
    """A service on the network did not give what was asked of it."""
