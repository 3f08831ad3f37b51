"""What a scoped client may call: functions of a file, read without running it."""

from .kinds import Kind, Schema
from .reading import Exposed, Interface, Parameter, parse_interface, read_interface

__all__ = [
    "Exposed",
    "Interface",
    "Kind",
    "Parameter",
    "Schema",
    "parse_interface",
    "read_interface",
]
