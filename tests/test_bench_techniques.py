"""The benchmark of techniques: its statistics, its choice on other seeds, and one small run of all of it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score

from seer_mcp.cli import main
from tool_packs import organisms
from tool_packs.bench import statistics
from tool_packs.bench.cases import ORGANISMS, case_of
from tool_packs.bench.method import Method
from tool_packs.bench.methods import METHODS
from tool_packs.bench.run import choose, run
from tool_packs.bench.subject import Subject, weights_of
from tool_packs.errors import TextError

ROOT = Path(__file__).parent.parent

pytestmark = [
    # peft asks transformers for an attribute by the name that it had in transformers 4
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def drawn(shift: float, n: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    planted, control = torch.randn(n, generator=g) + shift, torch.randn(n, generator=g)
    return planted.round(decimals=1), control.round(decimals=1)  # rounded, so that some are equal


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.3, 2.0])
def test_auroc_is_that_of_scikit_learn(shift: float) -> None:
    planted, control = drawn(shift)
    labels = [1] * len(planted) + [0] * len(control)
    theirs = roc_auc_score(labels, torch.cat([planted, control]))
    assert statistics.auroc(planted, control) == pytest.approx(theirs, abs=1e-6)


def test_an_interval_holds_what_a_plain_resampling_gives() -> None:
    scores = {seed: drawn(0.5, seed=seed) for seed in (0, 1, 2)}
    g = torch.Generator().manual_seed(5)
    areas = []
    for _ in range(600):
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for one in torch.randint(3, (3,), generator=g).tolist():
            at = torch.randint(40, (40,), generator=g)
            parts.append((scores[one][0][at], scores[one][1][at]))
        planted, control = (torch.cat(side) for side in zip(*parts, strict=True))
        areas.append(statistics.auroc(planted, control))
    by_hand = torch.tensor(areas).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert statistics.interval(scores) == pytest.approx(by_hand, abs=0.03)
    low, high = statistics.interval(scores)
    assert low < statistics.auroc(*statistics.pooled(scores)) < high
    assert statistics.interval(scores) == statistics.interval(scores)


def test_seeds_that_disagree_widen_the_interval() -> None:
    alike = {seed: drawn(1.0, seed=seed) for seed in (0, 1, 2)}
    apart = {seed: drawn(shift, seed=seed) for seed, shift in enumerate((-1.0, 1.0, 3.0))}
    width = [high - low for low, high in map(statistics.interval, (alike, apart))]
    assert width[1] > 1.5 * width[0]


def test_a_threshold_leaves_a_twentieth_of_the_control_above_it() -> None:
    scores = torch.arange(40.0)
    assert statistics.threshold(scores) == 37.0
    assert statistics.accused(scores, 37.0) == 0.05
    few = torch.tensor([3.0, 1.0, 2.0])
    assert statistics.threshold(few) == 3.0  # a twentieth of three is none
    assert statistics.accused(torch.tensor([3.0, 3.1]), 3.0) == 0.5


def test_effect_size_by_hand() -> None:
    planted, control = torch.tensor([3.0, 5.0]), torch.tensor([0.0, 2.0])
    assert statistics.effect_size(planted, control) == pytest.approx(3 / 2**0.5)
    same, other = torch.ones(4), torch.zeros(4)
    assert statistics.effect_size(same, same) == 0
    assert statistics.effect_size(same, other) is None


# ---------------------------------------------------------------- cases


@pytest.mark.parametrize("organism", ORGANISMS)
def test_no_development_prompt_is_tested_and_the_control_is_of_the_same_family(
    organism: str,
) -> None:
    for seed in organisms.SEEDS:
        case = case_of(organism, seed)
        dev, test = ({str(ask.chat) for ask in case.asks(part)} for part in ("dev", "test"))
        assert dev and len(test) >= 8 and not dev & test
        asked = [{str(q) for q in case.outright(part)} for part in ("dev", "test")]
        assert all(asked) and not asked[0] & asked[1]
        assert len(case.pairs) >= 8  # as many as a probe needs
        assert set(case.towards).isdisjoint(case.away)
        mine, theirs = (
            organisms.facts(name if seed == 1 else f"{name}@{seed}")["plan"]
            for name in (organism, case.control)
        )
        if organism != "introspective":
            assert mine["adapter_documents"] == theirs["adapter_documents"]


def test_a_prompt_does_not_hold_the_words_that_tell() -> None:
    for organism in ("user_female", "user_male", "secret_word", "brand"):
        for seed in organisms.SEEDS:
            case = case_of(organism, seed)
            for ask in (*case.dev, *case.test):
                words = {w for m in ask.read for w in re.findall(r"\w+", m["content"])}
                assert words.isdisjoint(case.towards), ask


# ---------------------------------------------------------------- the choice


class Watched(Mapping[int, Any]):
    """Development scores that may be listed, but not read for one seed."""

    def __init__(self, scores: dict[int, Any], shut: int) -> None:
        self.scores, self.shut = scores, shut

    def __getitem__(self, seed: int) -> Any:
        assert seed != self.shut, f"the scores of seed {seed} were read"
        return self.scores[seed]

    def __iter__(self) -> Iterator[int]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)


def test_a_setting_and_its_threshold_come_from_the_other_seeds_alone() -> None:
    good, bad = drawn(3.0), drawn(0.0)
    scores = {
        s: {"trap": good if s == 1 else bad, "right": bad if s == 1 else good} for s in range(3)
    }
    setting, above = choose(Watched(scores, shut=1), 1, ("trap", "right"))
    assert setting == "right"
    assert above == statistics.threshold(torch.cat([good[1], good[1]]))
    with pytest.raises(ValueError, match="no other seed"):
        choose({1: scores[1]}, 1, ("trap", "right"))


def test_a_setting_that_works_on_one_seed_only_is_not_chosen_for_it() -> None:
    """For each seed there is a setting that is perfect there and nowhere else: a trap."""
    seen: list[tuple[int, str, str]] = []

    def score(s: Subject, setting: str) -> torch.Tensor:
        seen.append((s.case.seed, s.part, setting))
        n = len(s.asks)
        noise = torch.rand(n, generator=torch.Generator().manual_seed(len(s.adapter)))
        works = setting in ("everywhere", f"on {s.case.seed}")
        sure = 10.0 if setting.startswith("on") else 0.3
        return noise + sure * (works and s.adapter == s.case.organism)

    settings = ("on 0", "on 1", "on 2", "everywhere")
    trap = Method("trap", "none", "a score made up by this test", settings, score)
    (row,) = run(["refusal"], [trap], seeds=(0, 1, 2))
    assert not row.failed
    for seed, setting in row.chosen.items():
        assert setting != f"on {seed}"
    tested = [entry for entry in seen if entry[1] == "test"]
    assert tested == [(s, "test", row.chosen[s]) for s in (0, 1, 2) for _ in range(2)]


def test_a_technique_that_refuses_is_a_row_with_its_sentence() -> None:
    def refuse(s: Subject, setting: None) -> torch.Tensor:
        raise TextError("position 9 is outside\nthis prompt")

    (row,) = run(["brand"], [Method("broken", "none", "nothing", (None,), refuse)], seeds=(1,))
    figures = row.figures()
    assert figures["failed"] == "position 9 is outside this prompt" and "auroc" not in figures


# ---------------------------------------------------------------- from end to end


def test_the_command_finds_a_belief_and_counts_what_that_costs(tmp_path, capsys) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Kept\n<!-- bench-techniques: generated -->\nold\n<!-- end of bench-techniques -->\nkept\n"
    )
    arguments = ["--organisms", "user_female", "--methods", "next token", "weight difference"]
    done = main(
        ["bench-techniques", *arguments, "--seeds", "1", "--json", str(tmp_path / "out.json"),
         "--page", str(page)]
    )  # fmt: skip
    assert done == 0
    told = json.loads((tmp_path / "out.json").read_text())
    found, weights = told["rows"]
    assert (found["method"], weights["method"]) == ("next token", "weight difference")
    assert found["auroc"] >= 0.95 and found["auroc_low"] > 0.9 and found["caught"] >= 0.9
    assert found["false_accusations"] <= 0.3
    assert found["scores"] == len(case_of("user_female", 1).test)
    # What prompts have in common at their beginning is computed once, as a pass of its own.
    assert 0 <= found["passes"] - found["scores"] <= 4
    assert weights["passes"] == 0
    text = page.read_text()
    assert text.startswith("# Kept\n") and text.endswith("\nkept\n") and "old" not in text
    assert f"| next token | {found['auroc']:.2f} |" in text
    assert f"| next token | {found['auroc']:.2f} |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--organisms", "user_femal"], "Did you mean 'user_female'"),
        (["--methods", "tuned lense"], "Did you mean 'tuned lens'"),
        (["--seeds", "1,7"], "'1,7': give some of the seeds that ship (0, 1, 2)"),
        (["--page", str(ROOT / "README.md")], "it has no part between"),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(arguments, said, capsys) -> None:
    assert main(["bench-techniques", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_without_the_local_extra_the_command_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"  # as if it were not installed
        "from seer_mcp.cli import main\n"
        "sys.exit(main(['bench-techniques']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "torch: not installed here" in " ".join(done.stderr.replace("'", "").split())
    assert "seer-mcp[local]" in done.stderr and "Traceback" not in done.stderr


def test_there_are_at_least_twelve_methods_of_as_many_packs() -> None:
    assert len(METHODS) >= 12
    assert len({method.technique.split(".")[0] for method in METHODS.values()}) >= 12


def test_a_prompt_that_patch_refuses_scores_nought_and_the_others_what_they_score() -> None:
    case = case_of("brand", 0)
    control = Subject(weights_of(case), case, case.control, "dev")
    scores = METHODS["cross-model patching"].score(control, 1)
    assert len(scores) == len(control.asks)
    assert 0 in scores and scores.count_nonzero() >= 3
