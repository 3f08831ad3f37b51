"""Models whose names nobody may learn: what is looked for, who judges it, what is said of it.

The copies without names are made in model_store (hidden.py, staging.py); what a kernel can read is
gathered there by tool_packs/blind.py; docs/blind.md says what all that is worth.
"""

from .judge import Found, judge
from .names import HiddenNames
from .receipt import check_cell, failure, receipt

__all__ = ["Found", "HiddenNames", "check_cell", "failure", "judge", "receipt"]
