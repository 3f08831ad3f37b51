"""The docs as a site: uv run --group docs sphinx-build -W -n docs build/docs"""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import reference  # noqa: E402 (of this folder, which is no package)

reference.write(DOCS / "reference")

project = "seer-mcp"
author = "the authors of seer-mcp"
copyright = author
html_title = project
extensions = ["myst_parser"]
myst_heading_anchors = 3
exclude_patterns = ["deploy/[!R]*"]
html_theme = "furo"
html_copy_source = False
