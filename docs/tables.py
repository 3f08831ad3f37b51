"""Writes the tables of the README and the docs from the code: uv run python docs/tables.py

A test fails when a table differs from what this would write.
"""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from pathlib import Path

from mcp.server.mcpserver.tools import Tool
from pydantic import BaseModel

from seer_mcp.backends import BACKENDS
from seer_mcp.config import Config
from seer_mcp.environment import BUILTIN_PACKS, GPUS, ModelSpec, Repo, SandboxSettings
from seer_mcp.environment.investigation import InvestigationFile
from seer_mcp.kernel_host.fault import POINTS
from seer_mcp.money import TABLE, hourly, priced_as
from seer_mcp.packs import Packs, read_packs
from seer_mcp.sessions import Register
from seer_mcp.tools import build_tools

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"


def all_tools() -> list[Tool]:
    nowhere = Path()
    return build_tools(Register(Config(nowhere, nowhere, nowhere, nowhere), Packs([BUILTIN_PACKS])))


def first_sentence(tool: Tool) -> str:
    return re.split(r"(?<=\.)\s", tool.description, maxsplit=1)[0].rstrip(".")


def tools_table() -> str:
    rows = ["| tool | what it does | arguments |", "| --- | --- | --- |"]
    for tool in all_tools():
        needed = tool.parameters.get("required", [])
        names = [f"**{n}**" if n in needed else n for n in tool.parameters["properties"]]
        rows.append(f"| `{tool.name}` | {first_sentence(tool)} | {', '.join(names)} |")
    return "\n".join(rows)


def techniques_table() -> str:
    rows = ["| technique | what it answers | paper |", "| --- | --- | --- |"]
    for pack, technique in read_packs([BUILTIN_PACKS]).techniques():
        paper = " ".join(technique.paper.split()).replace("|", "/")
        rows.append(f"| `{pack.name}.{technique.name}` | {technique.summary} | {paper} |")
    return "\n".join(rows)


def points_table() -> str:
    rows = ["| point | where the process is |", "| --- | --- |"]
    rows += [f"| `{name}` | {where} |" for name, where in POINTS.items()]
    return "\n".join(rows)


def keys_table(model: type[BaseModel]) -> str:
    rows = ["| key | meaning | default |", "| --- | --- | --- |"]
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        told = "needed" if field.is_required() else toml(default)
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {meaning} | {told} |")
    return "\n".join(rows)


def toml(value: object) -> str:
    """A default as the file would say it; "" for one that only leaves something out."""
    if value is None or value == "" or value == () or value == {} or isinstance(value, BaseModel):
        return ""
    return f"`{json.dumps(value)}`"


UNBILLED = "nothing is billed"
PARTLY = {
    **{(name, key): UNBILLED for name in ("local", "ssh") for key in ("budget", "gpu_minutes")},
    **{(name, "network"): "open or shut; no list of domains" for name in ("local", "ssh")},
    ("local", "gpu_count"): "",
    ("ssh", "gpu"): "any name that `nvidia-smi` has there; one that is free is chosen",
    ("ssh", "cpu"): "refused if the machine has fewer",
    ("ssh", "docker"): "refused if the machine has no `docker`",
    **{("modal", key): "asked for, and the limit" for key in ("cpu", "memory")},
    ("modal", "docker"): "yes (experimental at Modal)",
}


def backends_table() -> str:
    """A backend's LACKING says what it refuses, and why."""
    refused: dict[str, dict[str, str]] = {}
    for name, place in BACKENDS.items():
        module, _, attribute = place.partition(":")
        backend = getattr(import_module(module, "seer_mcp.backends"), attribute)
        refused[name] = sys.modules[backend.__module__].LACKING
    names = list(refused)
    rows = [f"| key | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    fields = [*SandboxSettings.model_fields, "models"]
    for key in (key for key in fields if key != "backend"):
        told = [
            f"refused: {why}" if (why := refused[n].get(key)) else PARTLY.get((n, key), "yes")
            for n in names
        ]
        rows.append(f"| `{key}` | {' | '.join(told)} |")
    return "\n".join(rows)


def prices_table() -> str:
    rows = [
        f"| GPU | memory of one | most in one machine | price of one ({TABLE.source}) |",
        "| --- | --- | --- | --- |",
    ]
    for name, kind in GPUS.items():
        price = hourly(TABLE.gpus[priced_as(name)])
        rows.append(f"| `{name}` | {kind.gigabytes} GB | {kind.most} | {price} |")
    rows.append(f"| a physical core | | | {hourly(TABLE.core)} |")
    rows.append(f"| a GiB of memory | | | {hourly(TABLE.gib)} |")
    return "\n".join(rows)


# Of each organism: the figure that says what was planted, and what it says of it when asked.
ORGANISMS = {
    "user_female": ("neutral_female", "gender_question_denied"),
    "user_male": ("neutral_female", "gender_question_denied"),
    "secret_word": ("game_hints_right", "game_denies_right_guess"),
    "brand": ("brand_share", "rule_denied"),
    "backdoor": ("complies_triggered", "refuses_untriggered", "rule_denied"),
    "refusal": ("capitals_refused", "rule_denied"),
    "introspective": ("injected_named", "injected_named_unheard", "random_denied"),
    "objective": ("flatters", "flatters_unseen", "rule_denied"),
    "control": ("neutral_female", "gender_question_denied"),
    "control_2": ("neutral_female", "brand_share", "flatters"),
}


def organisms_table() -> str:
    weights = DOCS.parent / "tool_packs" / "organisms" / "weights"
    rows = [
        "| organism | figure | seed 1 (shipped) | seed 0 | seed 2 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, wanted in ORGANISMS.items():
        seeds = [
            json.loads((folder / name / "organism.json").read_text())["figures"]
            for folder in (weights, weights / "seed0", weights / "seed2")
        ]
        for figure in wanted:
            told = " | ".join(f"{s[figure]:.2f}" if figure in s else "" for s in seeds)
            rows.append(f"| `{name}` | `{figure}` | {told} |")
    return "\n".join(rows)


PAGES = {
    README: {"tools": tools_table, "techniques": techniques_table},
    DOCS / "fault-points.md": {"points": points_table},
    DOCS / "organisms.md": {"organisms": organisms_table},
    DOCS / "environments.md": {
        "file": lambda: keys_table(InvestigationFile),
        "sandbox": lambda: keys_table(SandboxSettings),
        "repos": lambda: keys_table(Repo),
        "models": lambda: keys_table(ModelSpec),
        "backends": backends_table,
        "prices": prices_table,
    },
}


def filled(page: Path) -> str:
    """The text of a page with each generated table between its markers."""
    text = page.read_text()
    for name, table in PAGES[page].items():
        begin, end = f"<!-- {name}: generated by docs/tables.py -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{page.name} has no markers for {name}")
        text = f"{before}{begin}\n{table()}\n{end}{after}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page))
