"""Put activations of one run into another, cell by cell, and see what brings the answer back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.activations import Layers
from tool_packs.engine import site_name
from tool_packs.errors import ModelError, TextError
from tool_packs.prompts import Position, Prompt, Text, read, resolve, token_strings, word_ids
from tool_packs.replay import Change, Prefix, Recording, common, make_prefix, record_all, sweep
from tool_packs.result import Result, mean_sd, provenance, to_cpu
from tool_packs.sides import refuse_other_tokens

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["patch"]

GRIDS = ("layer x pos", "heads", "sites")
SITES = ("resid_post", "attn_out", "mlp_out")  # of grid="sites"
METRICS = ("logit_diff", "prob", "kl")
CHUNK = 64 * 1024 * 1024  # logits held at once
TOP = 6  # cells of a pair that are listed and controlled
LEAST = 1e-4  # a smaller difference of the metric cannot be shared out

Score = Callable[[Tensor], Tensor]  # logits [R, V] -> [R]
Answer = str | int
Answers = Answer | tuple[Answer, Answer] | Sequence["Answer | tuple[Answer, Answer]"] | None


@torch.no_grad()
def patch(
    m: Model,
    clean: Text,
    corrupt: Text,
    metric: str | Score = "logit_diff",
    *,
    answers: Answers = None,
    grid: str = "layer x pos",
    site: str = "resid_post",
    layers: Layers = "all",
    positions: Position = "all",
    source: Model | str | None = None,
    n_control: int = 3,
    seed: int = 0,
) -> Result:
    """Which activations carry what makes the two prompts' answers differ?

    Exact activation patching: the model runs on `corrupt`, and one cell at a time gets the
    activation it has on `clean`. What the prompts share at their beginning is computed once, and a
    cell costs only the layers above it and the tokens after it.

    Args:
        clean: a prompt, or several; a str is plain text, a chat goes through the template.
        corrupt: as many, each of as many tokens as its clean one.
        metric: "logit_diff" of the two answers, "prob" of the first, "kl" from the clean run's
            next-token distribution, or a function of logits [R, V] that gives [R].
        answers: (right, wrong) as words or token ids, or a list with one such tuple a pair; of a
            word the form that is likelier where it is the answer. None: what the clean and the
            corrupt run say.
        grid: "layer x pos" of one site, "heads" (each at all `positions` together), or "sites"
            (resid_post, attn_out and mlp_out, each layer x pos).
        site: "resid_post", "resid_pre", "attn_out" or "mlp_out", for grid "layer x pos".
        layers: as in `capture`.
        positions: which positions are patched, as in `capture`.
        source: where the clean activations come from: another Model of the same shape, the name
            of an adapter on the same weights, or "base". `corrupt` may then be the same prompts.
        n_control: unrelated runs (the tokens in which the pair differs drawn at random) patched
            into the strongest cells.
        seed: of the unrelated runs.

    Returns:
        Result: effect [pair, layer, position] ("heads": [pair, layer, head]; "sites": [pair, site,
        layer, position]), 0 as in the corrupt run and 1 as in the clean one, nan where a prompt is
        shorter or a position was not asked for; metric, the same before it is normalised; clean
        and corrupt [pair]; noise [pair, layer], the effect of patching a run with itself;
        unrelated [pair, cell, control] for the strongest cells. Rows: those cells.

    Raises:
        TextError: prompts of unequal length, a metric that does not tell them apart, answers that
            do not differ, a layer, position, site or grid that does not exist here.
        ModelError: a source of another shape, or a model whose logits are not
            unembed(norm(state)).

    Use when:
        You have a pair of prompts that differ in one thing and ask where that thing is read, moved
        and used; or two models, and ask which activations make one answer as the other.

    Not when:
        There are thousands of cells: `attribute` ranks them in two passes and checks the top. The
        prompts differ in length: rewrite them.

    Cost:
        of N cells on T tokens with d in common about N * (T - d) / 2T forward passes, and less.

    Controls:
        a run patched with itself (noise), and the strongest cells patched from unrelated runs.

    Paper:
        2202.05262, 2309.16042, 2404.15255

    Example:
        from tool_packs.patching import patch
        r = patch(m, "the cat sat on the mat", "the dog sat on the mat", answers=("he", "she"))
        r["effect"].shape  # [pair 1, layer, position]
        r.plot()
    """
    started = time.perf_counter()
    refuse_inexact(m)
    if grid not in GRIDS:
        raise TextError(f"no grid {grid!r}: {', '.join(map(repr, GRIDS))}")
    site = site_name(site)
    if grid == "layer x pos" and site == "head":
        raise TextError(
            'site "head" has a grid of its own: grid="heads", with positions= to narrow'
        )
    sites = {"heads": ("head",), "sites": SITES}.get(grid, (site,))
    index = m.layer_indices(layers)
    with from_source(m, source) as other:
        pairs = read_pairs(m, clean, corrupt, other)
    where = [resolve(p.corrupt, positions) for p in pairs]
    generator = torch.Generator().manual_seed(seed)
    tables, notes = [], []
    columns = m.structure.heads if grid == "heads" else max(len(w) for w in where)
    shape = (len(sites), len(index), columns)
    chosen = answers_of(answers, len(pairs))
    bar = _progress(sum(len(sites) * len(index) * len(w) for w in where))
    with bar:
        for pair, w, names in zip(pairs, where, chosen, strict=True):
            others = [_other_tokens(m, pair, generator) for _ in range(n_control)]
            run = record_pair(m, pair, sites, source, metric, names, others)
            cells = _cells(run, grid, sites, index, w)
            found = _sweep(run, cells, sites, index, bar)
            table, metric_table = torch.full((2, *shape), float("nan"))
            for cell, effect, value in zip(cells, found.effect, found.values, strict=True):
                table[cell.at], metric_table[cell.at] = effect, value
            strongest = found.effect.abs().argsort(descending=True)[:TOP].tolist()
            top = [cells[i] for i in strongest]
            control = _unrelated(run, top)
            tables.append((table, metric_table, found.noise, control, run, top))
            notes.append(run.note)
    n_top = max(len(t[5]) for t in tables)
    unrelated = torch.full((len(pairs), n_top, n_control), float("nan"))
    for i, t in enumerate(tables):
        unrelated[i, : len(t[5])] = t[3]
    tensors = {
        "effect": torch.stack([t[0] for t in tables]),  # [pair, site, layer, column]
        "metric": torch.stack([t[1] for t in tables]),
        "noise": torch.stack([t[2] for t in tables]),
        "unrelated": unrelated,
        "clean": torch.tensor([t[4].high for t in tables]),
        "corrupt": torch.tensor([t[4].low for t in tables]),
    }
    axes = ("pair", "site", "layer", "head" if grid == "heads" else "position")
    if grid != "sites":
        tensors["effect"], tensors["metric"] = tensors["effect"][:, 0], tensors["metric"][:, 0]
        axes = (axes[0], *axes[2:])
    rows, lines = [], []
    for i, (table, _, noise, control, run, top) in enumerate(tables):
        lines.append(
            f"pair {i}: {run.name} {run.high:.3g} clean, {run.low:.3g} corrupt{run.note}; "
            f"a run patched with itself moves by at most {noise.abs().max():.1g}"
        )
        for k, cell in enumerate(top):
            row: dict[str, Any] = {"pair": i, "site": cell.change.site, "layer": cell.change.layer}
            if grid == "heads":
                row["head"] = cell.change.head
            else:
                row["position"] = cell.change.columns[0]
                row["token"] = run.tokens[cell.change.columns[0]]
            row["effect"] = round(table[cell.at].item(), 4)
            if n_control:
                row["unrelated"] = mean_sd(control[k])
            rows.append(row)
        lines += [_told(row) for row in rows[-len(top) :][:3]] if top else []
    tokens = [[t[4].tokens[p] for p in w] for t, w in zip(tables, where, strict=True)]
    labels: dict[str, list[Any]] = {"layer": index, "tokens": tokens, "site": list(sites)}
    return Result(
        title=f"patching {', '.join(sites)} of {len(pairs)} pairs" + _from(source),
        tensors=to_cpu(tensors),
        dims={
            "effect": axes,
            "metric": axes,
            "noise": ("pair", "layer"),
            "unrelated": ("pair", "cell", "control"),
            "clean": ("pair",),
            "corrupt": ("pair",),
        },
        labels=labels,
        rows=rows,
        lines=lines,
        figure={
            "kind": "grid",
            "values": "effect",
            "label": "effect (0 corrupt, 1 clean)",
        }
        | ({} if grid == "heads" else {"ticks": "tokens"}),
        provenance=provenance(
            m,
            "patch",
            started,
            prompts=[p.ids for pair in pairs for p in (pair.clean, pair.corrupt)],
            seed=seed,
            metric=metric if isinstance(metric, str) else getattr(metric, "__name__", "function"),
            grid=grid,
            sites=list(sites),
            layers=index,
            positions=str(positions),
            source=source if isinstance(source, str) else getattr(source, "name", None),
        ),
    )


# Pairs of runs: what `attribute` needs as well


class NoDifference(TextError):
    """Both runs score alike, so that no part of a difference can be given back."""


@dataclass(frozen=True)
class Pair:
    """Two prompts of equal length."""

    clean: Prompt
    corrupt: Prompt


@dataclass
class Run:
    """A pair as it was run: recordings of both, and the metric between them."""

    m: Model
    pair: Pair
    start: int  # before it, the two runs are the same
    prefix: Prefix | None
    clean: Recording
    corrupt: Recording
    score: Score
    name: str  # of the metric
    high: float  # the metric of the clean run
    low: float  # of the corrupt run
    tokens: list[str]  # "clean/corrupt" where they differ
    unrelated: list[Recording]
    note: str = ""

    def values(self, site: str, layer: int, columns: Sequence[int], head: int | None = None) -> Any:
        """The clean run's activations at these columns [columns, d]."""
        return at_columns(self.clean, site, layer, columns, head)

    def normal(self, metric: Tensor) -> Tensor:
        """The metric on the scale on which the corrupt run is 0 and the clean one 1."""
        return (metric - self.low) / (self.high - self.low)


def at_columns(
    rec: Recording, site: str, layer: int, columns: Sequence[int], head: int | None = None
) -> Tensor:
    """A site's recorded activations at columns of the prompt [columns, d or head_dim]."""
    h = rec.at(site, layer)
    h = h[torch.tensor([c - rec.start for c in columns], device=h.device)]
    return h if head is None else h[:, head]


def refuse_inexact(m: Model) -> None:
    """Raises ModelError where the metric cannot be read off the last layer's state."""
    if not m.lens_exact:
        raise ModelError(
            f"{m.name}: its logits are not unembed(norm(state)) (error "
            f"{m.structure.lens_error:.2g}), so no metric can be read off a patched state; "
            'name the final norm: load_model(name, norm="path.to.the.norm")'
        )


def read_pairs(m: Model, clean: Text, corrupt: Text, source: Model) -> list[Pair]:
    """The prompts in pairs. Raises TextError where they do not match."""
    one, two = read(source, clean), read(m, corrupt)
    if len(one) != len(two):
        raise TextError(f"{len(one)} clean prompts and {len(two)} corrupt ones: give as many")
    for i, (a, b) in enumerate(zip(one, two, strict=True)):
        if len(a) != len(b):
            raise TextError(
                f"pair {i}: {len(a)} clean tokens and {len(b)} corrupt ones, and a cell is a "
                f"position in both; reword one ({_around(m, a, b)})"
            )
    return [Pair(a, b) for a, b in zip(one, two, strict=True)]


def _around(m: Model, a: Prompt, b: Prompt) -> str:
    at = common(a.ids, b.ids)
    one, two = ("".join(token_strings(m, p.ids[at : at + 4])) for p in (a, b))
    return f"they part at token {at}: {one!r} and {two!r}"


@contextlib.contextmanager
def from_source(m: Model, source: Model | str | None) -> Iterator[Model]:
    """Within this, the model that gives the clean activations computes as asked."""
    if source is None:
        yield m
    elif isinstance(source, str):
        with m.adapter(None if source == "base" and "base" not in m.adapters else source):
            yield m
    else:
        refuse_other_tokens(m, source)
        one, two = (_shape_of(x) for x in (m, source))
        if one != two:
            raise ModelError(
                f"the source {source.name} has (layers, d, heads, head_dim) {two} and {m.name} has "
                f"{one}: activations fit between models of one shape only"
            )
        yield source


def _shape_of(m: Model) -> tuple[int, ...]:
    return m.n_layers, m.width, m.structure.heads, m.structure.head_dim


def _from(source: Model | str | None) -> str:
    if source is None:
        return ""
    return f", activations from {source if isinstance(source, str) else source.name}"


def answers_of(answers: Answers, pairs: int) -> list[Any]:
    """One entry a pair: None, an answer, or a tuple of two."""
    if answers is None or isinstance(answers, (str, int)):
        return [answers] * pairs
    two = isinstance(answers, tuple) and len(answers) == 2
    if two and all(isinstance(a, (str, int)) for a in answers):
        return [answers] * pairs
    given = list(answers)
    if len(given) != pairs:
        raise TextError(
            f"{len(given)} answers for {pairs} pairs: give (right, wrong) for all, or one tuple each"
        )
    return given


@torch.no_grad()
def record_pair(
    m: Model,
    pair: Pair,
    sites: Sequence[str],
    source: Model | str | None,
    metric: str | Score,
    answers: Any,
    others: Sequence[Sequence[int]] = (),
) -> Run:
    """Runs both prompts of a pair (and `others` of their length), the shared beginning once."""
    start, prefix = 0, None
    if source is None:
        if pair.clean.ids == pair.corrupt.ids:
            raise TextError(
                f"clean and corrupt are one prompt ({pair.clean.text[:40]!r}): give two that "
                "differ, or source= for another model's activations"
            )
        start = common(pair.clean.ids, pair.corrupt.ids)
        prefix = make_prefix(m, pair.corrupt.ids, start)
    kept = [s for s in sites if s not in ("resid_pre", "resid_post")]
    ids = [pair.clean.ids, *others]
    if source is None:
        corrupt, clean, *unrelated = record_all(
            m, [pair.corrupt.ids, *ids], prefix=prefix, sites=kept
        )
        high_logits = logits_of(m, clean.final)
    else:
        (corrupt,) = record_all(m, [pair.corrupt.ids], prefix=prefix, sites=kept)
        with from_source(m, source) as other:
            clean, *unrelated = record_all(other, ids, sites=kept)
            high_logits = logits_of(other, clean.final)
    low_logits = logits_of(m, corrupt.final)
    for rec, kind in ((clean, "clean"), (corrupt, "corrupt")):
        if not rec.final.isfinite().all():
            raise TextError(f"the {kind} run's last state is not finite (NaN or inf)")
    score, name = _metric(m, metric, answers, high_logits[0], low_logits[0])
    high, low = (_scored(score, x).item() for x in (high_logits, low_logits))
    if not abs(high - low) >= LEAST:
        raise NoDifference(
            f"{name} is {high:.4g} on the clean prompt and {low:.4g} on the corrupt one: "
            "there is no difference to find; choose other answers, another metric or prompts"
        )
    one, two = token_strings(m, pair.clean.ids), token_strings(m, pair.corrupt.ids)
    tokens = [a if a == b else f"{a}/{b}" for a, b in zip(one, two, strict=True)]
    run = Run(m, pair, start, prefix, clean, corrupt, score, name, high, low, tokens, unrelated)
    if name.startswith("logit difference") and high < low:
        run.note = " (the clean run likes the first answer less: are the answers in order?)"
    return run


def logits_of(m: Model, h: Tensor) -> Tensor:
    """Logits [R, V] of states [R, d] before the final norm."""
    return m.unembed(m.norm(h))


def _metric(
    m: Model, metric: str | Score, answers: Any, clean: Tensor, corrupt: Tensor
) -> tuple[Score, str]:
    if callable(metric):
        return metric, getattr(metric, "__name__", "metric")
    if metric not in METRICS:
        raise TextError(f"no metric {metric!r}: {', '.join(METRICS)}, or a function of logits")
    if metric == "kl":
        target = clean.float().log_softmax(-1)

        def kl(logits: Tensor) -> Tensor:
            got = logits.log_softmax(-1)
            return (target.exp().to(got.device) * (target.to(got.device) - got)).sum(-1)

        return kl, "KL from the clean run"
    if answers is None:
        right, wrong = int(clean.argmax()), int(corrupt.argmax())
    elif isinstance(answers, (str, int)):
        right = wrong = _token(m, answers, clean)
    else:
        right, wrong = _token(m, answers[0], clean), _token(m, answers[1], corrupt)
    a, b = (repr(s) for s in token_strings(m, [right, wrong]))
    if metric == "prob":
        return lambda logits: logits.softmax(-1)[:, right], f"probability of {a}"
    if right == wrong:
        raise TextError(
            f"the right and the wrong answer are one token ({a}): name two, as in "
            'answers=(" Paris", " Rome")'
        )
    return lambda logits: logits[:, right] - logits[:, wrong], f"logit difference {a} - {b}"


def _token(m: Model, answer: Answer, logits: Tensor) -> int:
    """The token that stands for an answer: of a word's forms the likeliest in this run."""
    if isinstance(answer, int):
        if not 0 <= answer < m.vocab_size:
            raise TextError(f"token {answer} is outside this model's 0..{m.vocab_size - 1}")
        return answer
    exact = m.tokenizer(answer, add_special_tokens=False)["input_ids"]
    if answer.startswith(" ") and len(exact) == 1:
        return exact[0]
    forms = word_ids(m, answer)
    return max(forms, key=lambda i: logits[i].item())


def _scored(score: Score, logits: Tensor) -> Tensor:
    value = score(logits)
    if not isinstance(value, Tensor) or value.shape != logits.shape[:1]:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TextError(
            f"the metric gave {shape} for logits {tuple(logits.shape)}: it must give one number "
            f"a row, shape ({logits.shape[0]},)"
        )
    return value


def score_states(run: Run, h: Tensor) -> Tensor:
    """The metric [R] of last states [R, d], unembedded in chunks."""
    size = max(1, CHUNK // run.m.vocab_size)
    chunks = [_scored(run.score, logits_of(run.m, part)) for part in h.split(size)]
    return torch.cat(chunks).float() if chunks else torch.empty(0)


# Cells


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: where it stands and what is done."""

    at: tuple[int, int, int]  # site, layer, column of the table
    change: Change


@dataclass
class Found:
    effect: Tensor  # [cells]
    values: Tensor  # [cells], the metric
    noise: Tensor  # [layers]


def _cells(
    run: Run, grid: str, sites: Sequence[str], index: Sequence[int], where: Sequence[int]
) -> list[Cell]:
    cells = []
    live = [p for p in where if p >= run.start]
    for s, site in enumerate(sites):
        for j, layer in enumerate(index):
            if grid == "heads":
                for head in range(run.m.structure.heads):
                    values = run.values(site, layer, live, head) if live else None
                    cells.append(Cell((s, j, head), Change(site, layer, live, values, head)))
                continue
            for k, p in enumerate(where):
                values = run.values(site, layer, [p]) if p >= run.start else None
                cells.append(Cell((s, j, k), Change(site, layer, [p], values)))
    return cells


def _sweep(
    run: Run, cells: Sequence[Cell], sites: Sequence[str], index: Sequence[int], bar: Any
) -> Found:
    """Every cell's effect; where both runs have the same tokens so far it is 0 without a run."""
    metric = torch.full((len(cells),), run.low)
    live = [i for i, cell in enumerate(cells) if cell.change.values is not None]
    columns = list(range(run.start, len(run.corrupt.ids)))
    head = 0 if sites[0] == "head" else None
    itself = [
        Change(
            sites[0], layer, columns, at_columns(run.corrupt, sites[0], layer, columns, head), head
        )
        for layer in index
    ]
    changes = [cells[i].change for i in live]
    final = sweep(run.corrupt, [*itself, *changes], prefix=run.prefix, bar=bar)
    scored = score_states(run, final).cpu()
    metric[live] = scored[len(itself) :]
    return Found(run.normal(metric), metric, run.normal(scored[: len(itself)]))


def _unrelated(run: Run, top: Sequence[Cell]) -> Tensor:
    """The effect [cells, n] of these cells patched from runs with other tokens where they differ."""
    live = [k for k, cell in enumerate(top) if cell.change.values is not None]
    n = len(run.unrelated)
    out = torch.zeros(len(top), n)
    if not n or not live:
        return out
    changes = []
    for k in live:
        c = top[k].change
        for rec in run.unrelated:
            values = at_columns(rec, c.site, c.layer, c.columns, c.head)
            changes.append(Change(c.site, c.layer, c.columns, values, c.head))
    final = sweep(run.corrupt, changes, prefix=run.prefix)
    out[live] = run.normal(score_states(run, final)).cpu().view(len(live), n)
    return out


def _other_tokens(m: Model, pair: Pair, generator: torch.Generator) -> list[int]:
    """The clean prompt with random tokens where it differs from the corrupt one, or everywhere."""
    special = set(m.tokenizer.all_special_ids)
    ids = list(pair.clean.ids)
    differ = [i for i, (a, b) in enumerate(zip(ids, pair.corrupt.ids, strict=True)) if a != b]
    differ = differ or [i for i, a in enumerate(ids) if a not in special]
    size = min(len(m.tokenizer), m.vocab_size)
    for i in differ:
        while True:
            token = int(torch.randint(size, (), generator=generator))
            if token not in special and token not in (pair.clean.ids[i], pair.corrupt.ids[i]):
                break
        ids[i] = token
    return ids


def _told(row: dict[str, Any]) -> str:
    where = (
        f"head {row['head']}" if "head" in row else f"position {row['position']} {row['token']!r}"
    )
    control = f" (unrelated runs there {row['unrelated']})" if "unrelated" in row else ""
    return f"  {row['site']} layer {row['layer']} {where}: {row['effect']:.3f}{control}"


def _progress(cells: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=cells, desc="patch", leave=False, disable=cells < 512)
