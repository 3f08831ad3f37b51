"""The endpoint: streamable HTTP behind tokens, and the pages of those who watch."""

from .app import build_app, kept_token, serve_http
from .serving import Serving
from .tokens import SCOPES, Token, TokenFile

__all__ = ["SCOPES", "Serving", "Token", "TokenFile", "build_app", "kept_token", "serve_http"]
