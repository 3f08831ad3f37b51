"""Sandboxes at Modal: the kernel host is the entrypoint of a container, reached by a command in it.

No port is opened, and nothing of ours has to be installed there. What is started is found again by
its name and its tags, so that nothing runs unseen although a response was lost.
"""

from .backend import ModalBackend

__all__ = ["ModalBackend"]
