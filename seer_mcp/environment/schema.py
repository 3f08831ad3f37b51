"""The JSON schema of investigation.toml, for editors that check while one writes."""

from __future__ import annotations

from typing import Any

from .investigation import InvestigationFile


def schema() -> dict[str, Any]:
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **InvestigationFile.model_json_schema(),
        "title": "investigation.toml",
    }
