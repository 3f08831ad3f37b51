"""How fast the packs are beside the usual ways of doing the same, in one process, on one thread.

uv run python -m benchmarks.techniques [--rounds 5] [--device cuda] [--transformer-lens PEER/bin/python]
    [--out benchmarks/techniques.json] [--page docs/performance.md]

On a CPU the model has 8 layers and 9.7 M parameters, with --device cuda 1.2 B in bfloat16; weights are random.
Each way is checked to give the same numbers before it is timed; the ways take turns. TransformerLens needs an
environment of its own (benchmarks/peer_fixtures/transformer_lens_timing.py says which).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nnsight
import torch
from rich.console import Console
from rich.table import Table

from tool_packs.activations import capture
from tool_packs.engine import Intervention, make_batch, step_logits
from tool_packs.generation import generate
from tool_packs.models import Model, load_model
from tool_packs.patching import patch
from tool_packs.prefix import prefill
from tool_packs.prompts import read

from .page import machine, replace_section
from .subject import ANSWERS, LARGE, SMALL, SWEEP, Size, make_model, make_tokenizer, pair, text

HERE = Path(__file__).parent
IMPORTS = """
import time, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
began = time.perf_counter()
import {packs}
print(time.perf_counter() - began)
"""


@dataclass(frozen=True)
class Row:
    what: str
    ours: float
    theirs: float
    goal: float
    unit: str = "s"
    least: bool = False
    """Whether `goal` is a ceiling of ours / theirs, instead of a floor of theirs / ours."""

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs if self.least else self.theirs / self.ours

    @property
    def met(self) -> bool:
        return self.ratio <= self.goal if self.least else self.ratio >= self.goal


def turns(rounds: int, *ways: Callable[[], Any]) -> list[float]:
    """Median seconds of each way. They take turns, so that all meet the same machine."""
    seconds: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for way, kept in zip(ways, seconds, strict=True):
            began = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:  # the first warms up
                kept.append(time.perf_counter() - began)
    return [statistics.median(kept) for kept in seconds]


def check(name: str, got: Any, want: Any, m: Model) -> None:
    """The ways do the same thing, or else there is nothing to compare."""
    got, want = (torch.as_tensor(x).float().cpu() for x in (got, want))
    allowed = 1e-4 if m.dtype == torch.float32 else 0.05 * float(want.abs().max())
    error = float((got - want).abs().max())
    if not error <= allowed:
        raise RuntimeError(f"{name}: differs by {error}, {allowed} is allowed")


# -- the usual ways ---------------------------------------------------------------------------


def ids_of(m: Model, words: str) -> torch.Tensor:
    return m.tokenizer(words, return_tensors="pt")["input_ids"].to(m.device)


@torch.no_grad()
def forward_per_layer(m: Model, texts: list[str]) -> torch.Tensor:
    """A forward pass for each prompt and layer, with all hidden states [N, L - 1, d].

    (Without the last layer, whose hidden state transformers gives after the final norm.)
    """
    kept = []
    for each in texts:
        ids = ids_of(m, each)
        for layer in range(m.n_layers):
            out = m.core(ids, output_hidden_states=True, use_cache=False)
            kept.append(out.hidden_states[layer + 1][0, -1, :].cpu())
    return torch.stack(kept).reshape(len(texts), m.n_layers, -1)[:, :-1]


@torch.no_grad()
def trace_per_prompt(m: Model, texts: list[str]) -> torch.Tensor:
    """An nnsight trace for each prompt [N, L, d]."""
    net, kept = m.nnsight, []
    for each in texts:
        with net.trace({"input_ids": ids_of(m, each)}):
            states = nnsight.save([])
            for layer in net.model.layers:
                states.append(layer.output[0, -1])
        kept.append(torch.stack(list(states)))
    return torch.stack(kept)


def logit_difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[..., ANSWERS[0]].float() - logits[..., ANSWERS[1]].float()


@torch.no_grad()
def clean_states(m: Model, clean: str) -> list[torch.Tensor]:
    out = m.core.model(ids_of(m, clean), output_hidden_states=True, use_cache=False)
    return [h[0] for h in out.hidden_states[1:]]  # the last one is overwritten below


@torch.no_grad()
def naive_sweep(m: Model, clean: str, corrupt: str, cells: list[tuple[int, int]]) -> torch.Tensor:
    """A hooked forward pass for each cell."""
    ids, wanted = ids_of(m, corrupt), {}
    for number, layer in enumerate(m.layers):

        def keep(_: Any, __: Any, out: Any, number: int = number) -> None:
            wanted[number] = (out if torch.is_tensor(out) else out[0])[0].clone()

        handle = layer.register_forward_hook(keep)
        m.core(ids_of(m, clean), use_cache=False)
        handle.remove()
    found = []
    for layer, position in cells:

        def put(_: Any, __: Any, out: Any, at: tuple[int, int] = (layer, position)) -> None:
            (out if torch.is_tensor(out) else out[0])[0, at[1]] = wanted[at[0]][at[1]]

        handle = m.layers[layer].register_forward_hook(put)
        found.append(logit_difference(m.core(ids, use_cache=False).logits[0, -1]))
        handle.remove()
    return torch.stack(found)


@torch.no_grad()
def traced_states(m: Model, clean: str) -> list[torch.Tensor]:
    net = m.nnsight
    with net.trace({"input_ids": ids_of(m, clean)}):
        states = nnsight.save([])
        for layer in net.model.layers:
            states.append(layer.output[0])
    return list(states)


@torch.no_grad()
def trace_per_cell(
    m: Model, clean: str, corrupt: str, cells: list[tuple[int, int]]
) -> torch.Tensor:
    """An nnsight trace for each cell."""
    net, ids, states = m.nnsight, ids_of(m, corrupt), traced_states(m, clean)
    found = []
    for layer, position in cells:
        value = states[layer][position]
        with net.trace({"input_ids": ids}):
            net.model.layers[layer].output[0, position] = value
            logits = net.output.logits[0, -1].save()
        found.append(logit_difference(logits))
    return torch.stack(found)


@torch.no_grad()
def batched_invokes(
    m: Model, clean: str, corrupt: str, cells: list[tuple[int, int]]
) -> torch.Tensor:
    """An nnsight invoke for each cell, all cells of a layer in one trace."""
    net, ids, states = m.nnsight, ids_of(m, corrupt), traced_states(m, clean)
    found = []
    for layer in range(m.n_layers):
        mine = [position for at, position in cells if at == layer]
        with net.trace() as tracer:
            saved = nnsight.save([])
            for position in mine:
                value = states[layer][position]
                with tracer.invoke({"input_ids": ids}):
                    net.model.layers[layer].output[0, position] = value
                    saved.append(net.output.logits[0, -1])
        found += [logit_difference(logits) for logits in saved]
    return torch.stack(found)


# -- what is compared -------------------------------------------------------------------------


def of_capture(m: Model, rounds: int) -> list[Row]:
    texts = [text(6 + i % 12, i) for i in range(64)]

    def ours() -> torch.Tensor:
        return capture(m, texts)["resid_post"][:, :, 0]

    check("hidden states", ours()[:, :-1], forward_per_layer(m, texts), m)
    check("nnsight", ours(), trace_per_prompt(m, texts), m)
    mine, loop, traces = turns(
        rounds, ours, lambda: forward_per_layer(m, texts), lambda: trace_per_prompt(m, texts)
    )
    return [
        Row("capture, 64 prompts of 7 to 18 tokens: a pass per prompt and layer", mine, loop, 20),
        Row("… nnsight, a trace per prompt", mine, traces, 3),
    ]


def of_patching(m: Model, rounds: int, peer: str) -> list[Row]:
    clean, corrupt = pair(*SWEEP)
    positions = range(1, SWEEP[0] + 1)
    cells = [(layer, position) for layer in range(m.n_layers) for position in positions]

    def ours() -> torch.Tensor:
        got = patch(m, clean, corrupt, answers=ANSWERS, n_control=0)["metric"][0]
        return got[:, 1:].flatten()

    ways = {
        "nnsight, a trace per cell": trace_per_cell,
        "nnsight, batched invokes": batched_invokes,
    }
    for name, way in ways.items():
        check(name, ours(), way(m, clean, corrupt, cells), m)
    mine, *others = turns(
        rounds,
        ours,
        *(lambda way=way: way(m, clean, corrupt, cells) for way in ways.values()),
    )
    made = [
        Row(
            f"exact patching, {m.n_layers} layers × {len(positions)} positions: {name}",
            mine,
            s,
            goal,
        )
        for name, s, goal in zip(ways, others, (5, 1.7), strict=True)
    ]
    if peer:
        made.append(beside_transformer_lens(m, peer, clean, corrupt))
    return made


def beside_transformer_lens(m: Model, peer: str, clean: str, corrupt: str) -> Row:
    """Its sweep of resid_pre, in its own process, between two halves of ours."""

    def ours() -> torch.Tensor:
        given = {"answers": ANSWERS, "n_control": 0, "site": "resid_pre"}
        return patch(m, clean, corrupt, **given)["metric"][0]

    script = HERE / "peer_fixtures" / "transformer_lens_timing.py"
    before = turns(3, ours)
    done = subprocess.run([peer, "-P", str(script)], capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    check("TransformerLens", ours(), theirs["metric"], m)
    mine = statistics.median([*before, *turns(3, ours)])
    name = f"… TransformerLens {theirs['version']} (its own process)"
    return Row(name, mine, statistics.median(theirs["seconds"][1:]), 9)


def of_prefix(m: Model, rounds: int) -> list[Row]:
    length, common = 114, 100
    clean, corrupt = pair(length, common)
    live = [(layer, common + 1) for layer in range(m.n_layers)]

    def ours() -> torch.Tensor:
        return patch(m, clean, corrupt, answers=ANSWERS, n_control=0)["metric"][0]

    check("a pass per cell", ours()[:, common + 1], naive_sweep(m, clean, corrupt, live), m)
    # The naive loop over all cells costs the same for each: some are timed, and the whole is told.
    some = live * 4
    mine, part = turns(rounds, ours, lambda: naive_sweep(m, clean, corrupt, some))
    whole = part * m.n_layers * (length + 1) / len(some)
    share = common / length
    return [Row(f"… with {share:.0%} in common: a pass for each of all cells", mine, whole, 100)]


def of_steering(m: Model, rounds: int) -> list[Row]:
    texts = [text(12, i) for i in range(8)]
    vector = torch.randn(m.width, generator=torch.Generator().manual_seed(0))
    hook = Intervention(m.n_layers // 2, vector, 0.1)
    tokens = 64

    def decode(steer: Any, texts: list[str] = texts) -> list[Any]:
        return generate(m, texts, raw=True, max_new_tokens=tokens, steer=steer).rows

    plain, steered = turns(rounds, lambda: decode(None), lambda: decode(hook))
    strengths = [0.05 * i for i in range(16)]
    one = texts[:1]

    def together() -> list[Any]:
        return decode([hook * s for s in strengths], one * len(strengths))

    def alone() -> list[Any]:
        return [row for s in strengths for row in decode(hook * s, one)]

    rows, each = turns(max(1, rounds // 2), together, alone)
    if m.dtype == torch.float32 and [r["tokens"] for r in together()] != [
        r["tokens"] for r in alone()
    ]:
        raise RuntimeError("16 strengths in one batch answer otherwise than one by one")
    return [
        Row("steered decoding: unhooked", steered, plain, 0.97),
        Row("16 strengths: one after another", rows, each, 6),
    ]


def of_shared_beginnings(m: Model, rounds: int) -> list[Row]:
    beginning = text(160, 0)
    prompts = read(m, [f"{beginning} {text(8, i + 1)}" for i in range(32)])
    batch = make_batch(m, prompts, list(range(32)))

    def ours() -> torch.Tensor:
        return prefill(m, batch)[0]

    def whole() -> torch.Tensor:
        return step_logits(m, batch.ids, batch.mask, batch.positions, None)[0]

    check("a shared beginning", ours(), whole(), m)
    mine, theirs = turns(rounds, ours, whole)
    return [Row("32 questions behind 160 tokens: all of each", mine, theirs, 7)]


def of_imports(rounds: int) -> list[Row]:
    packs = sorted(
        f"tool_packs.{path.stem}"
        for path in (HERE.parent / "tool_packs").glob("*.py")
        if path.stem != "__init__"
    )
    source = IMPORTS.format(packs=", ".join(packs))
    seconds = [
        float(
            subprocess.run(
                [sys.executable, "-c", source],
                capture_output=True,
                text=True,
                check=True,
                cwd=HERE.parent,
            ).stdout
        )
        for _ in range(rounds)
    ]
    name = f"import of all {len(packs)} modules of the packs, over torch and transformers (ceiling)"
    return [Row(name, statistics.median(seconds), 1.0, 0.3, least=True)]


def of_memory() -> list[Row]:
    def size(m: Model) -> float:
        tensors = [*m.hf.parameters(), *m.hf.buffers()]
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values()) / 1e6

    with_adapter, base = (size(load_model(f"organism:{n}")) for n in ("user_female", "base"))
    return [Row("base and adapter beside the base alone", with_adapter, base, 1.1, "MB", True)]


def measure(size: Size, rounds: int, peer: str = "") -> tuple[Model, list[Row]]:
    torch.set_num_threads(1)
    m = Model(make_model(size), make_tokenizer(), "random")
    rows = [
        *of_capture(m, rounds),
        *of_patching(m, rounds, peer),
        *of_prefix(m, rounds),
        *of_steering(m, rounds),
        *of_shared_beginnings(m, rounds),
        *of_imports(rounds),
        *of_memory(),
    ]
    return m, rows


# -- what is told -----------------------------------------------------------------------------


def told(row: Row) -> tuple[str, str, str, str, str]:
    sign, unit = ("≤", "") if row.least else ("≥", " ×")
    digits = 3 if row.unit == "s" else 1
    return (
        row.what,
        f"{row.ours:.{digits}f} {row.unit}",
        f"{row.theirs:.{digits}f} {row.unit}",
        f"{row.ratio:.2f}{unit}",
        f"{sign} {row.goal:g}{unit} {'met' if row.met else 'MISSED'}",
    )


HEAD = ("what, and beside which way", "ours", "that way", "ratio", "goal")


def page(m: Model, rows: list[Row], where: str) -> str:
    count = sum(p.numel() for p in m.hf.parameters())
    lines = [
        f"{where}, torch {torch.__version__.split('+')[0]}, nnsight {version('nnsight')}; one thread, "
        f"{count / 1e6:,.1f} M parameters with random weights, {str(m.dtype).removeprefix('torch.')}. The ways give "
        "the same numbers and take turns; medians.",
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{' --- |' * len(HEAD)}",
        *(f"| {' | '.join(told(row))} |" for row in rows),
    ]
    return "\n".join(lines)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    flags.add_argument("--transformer-lens", metavar="PYTHON", default="")
    flags.add_argument("--out", type=Path, default=Path("benchmarks/techniques.json"))
    flags.add_argument("--page", type=Path)
    given = flags.parse_args()
    on_gpu = given.device == "cuda"
    m, rows = measure(LARGE if on_gpu else SMALL, given.rounds, given.transformer_lens)
    where = machine()
    if on_gpu:
        where += f", {torch.cuda.get_device_name()}"
    table = Table(*HEAD, title=where)
    for row in rows:
        table.add_row(*told(row))
    Console(width=150).print(table)
    kept = [{**vars(row), "ratio": row.ratio, "met": row.met} for row in rows]
    given.out.write_text(json.dumps({"machine": where, "rows": kept}, indent=1) + "\n")
    if given.page:
        replace_section(
            given.page, "techniques-gpu" if on_gpu else "techniques", page(m, rows, where)
        )


if __name__ == "__main__":
    main()
