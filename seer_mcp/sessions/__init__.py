"""Sessions: one sandbox and its notebook each; and the register that starts and finds them."""

from .bridges import Bridges
from .register import Register, make_folders
from .scope import Limits, Outcome, Request, Scope
from .session import RunInfo, Session
from .starting import Starting

__all__ = [
    "Bridges",
    "Limits",
    "Outcome",
    "Register",
    "Request",
    "RunInfo",
    "Scope",
    "Session",
    "Starting",
    "make_folders",
]
