"""What a scoped client may call: functions of a file, read without running it."""

from .kinds import Kind, Schema
from .library import module_source, told
from .reading import Exposed, Interface, Parameter, parse_interface, read_interface

__all__ = [
    "Exposed",
    "Interface",
    "Kind",
    "Parameter",
    "Schema",
    "module_source",
    "parse_interface",
    "read_interface",
    "told",
]
