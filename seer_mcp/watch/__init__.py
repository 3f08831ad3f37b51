"""Pages for people who watch: sandboxes, and notebooks that grow while cells run."""

from .routes import Pages
from .source import BUTTONS, FolderSource, ServerSource
from .visitors import OneTime, Visitor, Visitors

__all__ = ["BUTTONS", "FolderSource", "OneTime", "Pages", "ServerSource", "Visitor", "Visitors"]
