"""What a docstring promises under "Returns" is what the result of its own example holds."""

import importlib
import re

import pytest
import torch

from tests.packs.test_bad_input import TECHNIQUES
from tests.packs.test_examples import sections
from tool_packs.engine import SITES
from tool_packs.models import load_model
from tool_packs.result import Result

OF_SITES = {name for site in SITES for name in (site, f"{site}_norm")}  # told as "each site"
PROSE = {"tensor", "site", "each", "entries", "lens"}  # words before [axes] that name no tensor


def function_of(name):
    module, function = name.split(".")
    return getattr(importlib.import_module(f"tool_packs.{module}"), function)


def returns_of(name):
    """The section in one line, and those that it names ("as `logit_lens`")."""
    text = " ".join(sections(function_of(name).__doc__)["Returns"].split())
    for other in re.findall(r"Result: as (?:of )?`([\w.]+)`", text):
        text += " " + returns_of(other if "." in other else f"{other}.{other}")
    return text


def promised(text):
    """The tensors that stand before [their axes], but for those that some argument alone gives."""
    text = text.split("Rows:")[0].split(" rows ")[0]
    while (bare := re.sub(r"\([^()]*\)", "", text)) != text:
        text = bare
    clauses = [c for c in re.split(r"[;:.] ", text) if not re.search(r"\bwith \w+|also|For ", c)]
    names = set()
    for some in re.findall(r"((?:\w+(?:,| and) )*\w+) \[", "; ".join(clauses)):
        names |= set(re.split(r",? and |, ", some))
    return names - PROSE


NAMES = sorted(name for name in TECHNIQUES if re.match(r"(Result|SAE)\b", returns_of(name)))


@pytest.mark.parametrize("name", NAMES)
def test_the_names_under_returns_are_those_of_the_result(folders, monkeypatch, name):
    function, results = function_of(name), []

    def recording(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    text = returns_of(name)
    for module in (name.split(".")[0], "sae"):  # which offers what is in sae_diff and others
        pack = importlib.import_module(f"tool_packs.{module}")
        if getattr(pack, function.__name__, None) is function:
            monkeypatch.setattr(pack, function.__name__, recording)
    code = compile(TECHNIQUES[name].example, name, "exec")
    exec(code, {"m": load_model(str(folders["llama-lora"])), "torch": torch})
    assert results
    for result in [x if isinstance(x, Result) else x.result for x in results]:
        if result is None:  # an SAE that was loaded has learned nothing here
            continue
        columns = {key for row in result.rows for key in row}
        lacking = promised(text) - result.tensors.keys() - columns
        assert not lacking, f"promised and not there: {lacking} of {sorted(result.tensors)}"
        told = [key for key in result.tensors if re.search(rf"\b{key}\b", text)]
        silent = result.tensors.keys() - told - OF_SITES
        assert not silent, f"there and not told: {silent}"
