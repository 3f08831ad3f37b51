"""Pages for people who watch: sandboxes, and notebooks that grow while cells run."""

from .routes import Pages
from .source import FolderSource, ServerSource
from .visitors import OneTime, Visitor, Visitors

__all__ = ["FolderSource", "OneTime", "Pages", "ServerSource", "Visitor", "Visitors"]
