"""Sessions: one sandbox and its notebook each; and the register that starts and finds them."""

from .register import Register, make_folders
from .session import RunInfo, Session
from .starting import Starting

__all__ = ["Register", "RunInfo", "Session", "Starting", "make_folders"]
