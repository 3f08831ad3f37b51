"""Which techniques let an agent find which secret: a table of the logs of planted.py, in Markdown.

uv run --extra evals python examples/evals/table.py logs
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from inspect_ai.log import EvalLog, EvalSample, list_eval_logs, read_eval_log

SCORER = "grader"


def found(samples: Iterable[EvalSample]) -> str:
    """How many were right, and what one took on average."""
    scores = [each.scores[SCORER] for each in samples if each.scores and SCORER in each.scores]
    if not scores:
        return ""
    took = {
        key: mean((score.metadata or {}).get(key, 0) for score in scores)
        for key in ("calls", "cells", "dollars", "model_dollars")
    }
    right = sum(score.as_float() == 1 for score in scores)
    dollars = took["dollars"] + took["model_dollars"]
    return f"{right} of {len(scores)}; calls {took['calls']:.0f}, cells {took['cells']:.0f}, ${dollars:.2f}"


def table(logs: Iterable[EvalLog]) -> str:
    """A table for each model: a row for each organism, a column for each set of techniques."""
    samples = [(log.eval.model, sample) for log in logs for sample in log.samples or []]
    parts = []
    for model in dict.fromkeys(model for model, _ in samples):
        mine = [sample for other, sample in samples if other == model]
        sets = list(dict.fromkeys(sample.metadata["techniques"] for sample in mine))
        lines = [
            f"**{model}**",
            "",
            f"| organism | {' | '.join(sets)} |",
            "|---" * (1 + len(sets)) + "|",
        ]
        for organism in dict.fromkeys(sample.metadata["organism"] for sample in mine):
            cells = [
                found(
                    sample
                    for sample in mine
                    if (sample.metadata["organism"], sample.metadata["techniques"])
                    == (organism, name)
                )
                for name in sets
            ]
            lines.append(f"| `{organism}` | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("give the folder of Inspect's logs: python examples/evals/table.py logs")
    infos = list_eval_logs(sys.argv[1])
    logs = [read_eval_log(info) for info in infos if info.task == "planted"]
    if not logs:
        sys.exit(f"{sys.argv[1]} has no log of the task planted; run `inspect eval` first")
    print(table(logs))
