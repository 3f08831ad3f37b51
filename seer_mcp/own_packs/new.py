"""A pack to begin with: one technique that runs, documented as `packs check` wants it, and its tests."""

from __future__ import annotations

import keyword
from pathlib import Path

from ..errors import BadInput, Conflict
from ..packs import would_hide

HERE = Path(__file__).parent


def begin(folder: Path, name: str) -> list[Path]:
    """Write NAME.py and tests/test_NAME.py into `folder`. Raises BadInput, Conflict; overwrites nothing."""
    if not (name.isascii() and name.isidentifier() and name.islower()) or keyword.iskeyword(name):
        raise BadInput("name", name, "a module's name: a-z, digits and '_', as in my_lens")
    if would_hide(name):
        raise BadInput("name", name, "it would hide the installed module of that name")
    made = {
        folder / f"{name}.py": "template.py.txt",
        folder / "tests" / f"test_{name}.py": "template_test.py.txt",
    }
    for path in made:
        if path.exists():
            raise Conflict(f"{path} exists already; choose another name or another --in folder.")
    for path, template in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((HERE / template).read_text(encoding="utf-8").format(name=name))
    return list(made)
