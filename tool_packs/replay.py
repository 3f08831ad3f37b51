"""Record a pass once, then restart it at any layer on many rows: the engine of patching.

A recording keeps what each decoder layer was called with beside its states (masks, rotary tables,
positions), so the stack can be restarted at any layer on a batch of rows, each of which joins at
the layer where it first differs. What two prompts have in common at their beginning is computed
once, into a KV cache that the replayed rows read and never grow. Nothing here knows an
architecture. Before a model is first replayed, one changed row is compared with plain hooks over
the whole prompt; a model that does not pass (or keeps no plain cache) gets the plain hooks.
"""

from __future__ import annotations

import contextlib
import copy
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tool_packs.engine import _register_read, _site_module, _Stop, fitting, removing
from tool_packs.errors import MemoryFull, ModelError
from tool_packs.structure import first_tensor

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["Change", "Recording"]

GROUPS = 4  # a sweep over positions restarts behind this many prefixes
BRANCHES = ("attn_in", "mlp_in")
Read = tuple[str, int, Callable[[Tensor], None]]


@dataclass(frozen=True, eq=False)
class Change:
    """What one row does differently from the recorded run: other values at columns of a site.

    Sites are those of `capture`, and "attn_in" and "mlp_in": what that part alone reads from the
    residual stream, which goes on unchanged.
    """

    site: str
    layer: int
    columns: Sequence[int]  # positions in the prompt
    values: Tensor  # [columns, d]; of one head [columns, head_dim]
    head: int | None = None
    add: bool = False  # values are added, not put in place


@dataclass
class Prefix:
    """The first tokens of a prompt, in a KV cache."""

    ids: tuple[int, ...]
    cache: Any

    def copy(self, rows: int = 1) -> Any:
        """A cache that may grow: these layers concatenate anew and change no tensor in place."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:
            layer.keys = layer.keys.expand(rows, -1, -1, -1)
            layer.values = layer.values.expand(rows, -1, -1, -1)
        return cache


class _Frozen:
    """The cache that replayed layers see: the prefix before whatever they bring, every time."""

    def __init__(self, cache: Any) -> None:
        self.held = [(layer.keys, layer.values) for layer in cache.layers]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        rows = keys.shape[0]
        k, v = (x.expand(rows, -1, -1, -1) for x in self.held[layer_idx])
        return torch.cat([k, keys], dim=2), torch.cat([v, values], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.held[layer_idx][0].shape[2]


@dataclass
class Recording:
    """One prompt's pass from column `start` on, and what is needed to restart it.

    Prompts of one length may be recorded together; `row` says which of them this is.
    """

    m: Model
    ids: tuple[int, ...]
    start: int  # columns before it are in `frozen`
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]  # of each layer, beside its states
    states: list[Tensor]  # into each layer, and out of the last: L + 1 of [B, T - start, d]
    sites: dict[str, list[Tensor]] = field(default_factory=dict)  # [B, T - start, ...] of a layer
    cache: Any = None  # as the layers were given it
    frozen: _Frozen | None = None
    restarts: bool = True  # False: plain hooks over the whole prompt
    row: int = 0

    def at(self, site: str, layer: int) -> Tensor:
        """The states of a site [T - start, d]; of "head" [T - start, heads, head_dim]."""
        if site == "resid_pre":
            return self.states[layer][self.row]
        if site == "resid_post":
            return self.states[layer + 1][self.row]
        h = self.sites[site][layer][self.row]
        s = self.m.structure
        return h.unflatten(-1, (s.heads, s.head_dim)) if site == "head" else h

    @property
    def final(self) -> Tensor:
        """The last token's state before the final norm [1, d]."""
        return self.states[-1][self.row, -1:]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts share at their beginning, the last never among them."""
    limit = min(len(one), len(other)) - 1
    return next((i for i in range(limit) if one[i] != other[i]), limit)


# Recording


@torch.no_grad()
def make_prefix(m: Model, ids: Sequence[int], stop: int, known: Prefix | None = None) -> Any:
    """The first `stop` tokens in a cache, `known` continued where it fits; None: no plain cache."""
    if stop == 0 or not _trusted(m).get("prefix", True):
        return None
    begin = 0
    if known is not None and len(known.ids) <= stop and known.ids == tuple(ids[: len(known.ids)]):
        if len(known.ids) == stop:
            return known
        begin = len(known.ids)
    keywords = _keywords(m, [ids], begin, stop)
    past = known.copy() if begin and known is not None else None
    with fitting(m, *keywords["attention_mask"].shape):
        out = m.structure.backbone(**keywords, past_key_values=past, use_cache=True)
    cache = getattr(out, "past_key_values", None)
    if not _is_plain(m, cache):
        _trusted(m)["prefix"] = False
        return None
    return Prefix(tuple(ids[:stop]), cache)


def _is_plain(m: Model, cache: Any) -> bool:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", ())
    known = (DynamicLayer, DynamicSlidingWindowLayer)  # their subclasses hold other states too
    return len(layers) == m.n_layers and all(type(layer) in known for layer in layers)


def _keywords(
    m: Model, prompts: Sequence[Sequence[int]], begin: int, stop: int
) -> dict[str, Tensor]:
    rows = len(prompts)
    ids = torch.tensor([list(p[begin:stop]) for p in prompts], device=m.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones(rows, stop, dtype=torch.long, device=m.device),
        "position_ids": torch.arange(begin, stop, device=m.device).expand(rows, -1),
    }


def record(
    m: Model, ids: Sequence[int], *, prefix: Prefix | None = None, sites: Sequence[str] = ()
) -> Recording:
    """One pass over `ids` behind `prefix`, with every layer's arguments, states, and `sites`."""
    return record_all(m, [ids], prefix=prefix, sites=sites)[0]


@torch.no_grad()
def record_all(
    m: Model,
    prompts: Sequence[Sequence[int]],
    *,
    prefix: Prefix | None = None,
    sites: Sequence[str] = (),
) -> list[Recording]:
    """`record` of several prompts of one length behind one prefix, in one pass."""
    start = len(prefix.ids) if prefix is not None else 0
    first = Recording(m, tuple(prompts[0]), start, [], [], {site: [] for site in sites})

    def keep_call(_: nn.Module, args: Any, kwargs: Any) -> None:
        kwargs = dict(kwargs)
        first.states.append(args[0] if args else kwargs.pop("hidden_states"))
        first.calls.append((args[1:], kwargs))

    def finish(_: nn.Module, args: Any, output: Any) -> None:
        first.states.append(first_tensor(output))
        raise _Stop

    stop = len(first.ids)
    keywords: dict[str, Any] = _keywords(m, prompts, start, stop) | {"use_cache": False}
    if prefix is not None:
        first.frozen, first.cache = _Frozen(prefix.cache), prefix.copy(len(prompts))
        keywords |= {"use_cache": True, "past_key_values": first.cache}
    with removing([]) as handles:
        for layer in range(m.n_layers):
            for site, kept in first.sites.items():
                handles.append(_register_read(m, site, layer, kept.append))
            hook = m.layers[layer].register_forward_pre_hook(keep_call, with_kwargs=True)
            handles.append(hook)
        handles.append(m.layers[-1].register_forward_hook(finish))
        with fitting(m, len(prompts), stop), contextlib.suppress(_Stop):
            m.structure.backbone(**keywords)
    kind = "behind a prefix" if start else "restart"
    if kind not in _trusted(m):
        _trusted(m)[kind] = _as_plain_hooks(first)
    first.restarts = _trusted(m)[kind]
    if start and not first.restarts:
        _trusted(m)["prefix"] = False
        return record_all(m, prompts, sites=sites)
    return [replace(first, ids=tuple(ids), row=row) for row, ids in enumerate(prompts)]


_checked: weakref.WeakKeyDictionary[Model, dict[str, bool]] = weakref.WeakKeyDictionary()


def _trusted(m: Model) -> dict[str, bool]:
    """What has been found out about this model: whether it restarts, and behind a prefix."""
    return _checked.setdefault(m, {})


def _as_plain_hooks(rec: Recording) -> bool:
    """Whether rows changed early, in the middle and late come out as by hooks on the whole prompt.

    A layer that uses what an earlier one left behind (shared keys and values) shows in late rows.
    """
    m = rec.m
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(m.width, generator=generator)
    rows = []
    for layer in sorted({0, m.n_layers // 2, max(m.n_layers - 2, 0)}):
        before = rec.at("resid_post", layer)[0].float()
        other = before + noise.to(before.device) * before.norm() / math.sqrt(m.width)
        rows.append(Change("resid_post", layer, [rec.start], other[None]))
    whole = Recording(m, rec.ids, 0, [], [], restarts=False)
    want = replay(whole, rows).float()
    try:
        got = replay(rec, rows).float()
    except MemoryFull:
        raise
    except RuntimeError:  # a shape that depends on the number of rows: not replayable
        return False
    tolerance = 1e-4 if rec.states[-1].dtype == torch.float32 else 5e-2
    return ((got - want).norm() <= tolerance * want.norm()).item()


# Replaying


@torch.no_grad()
def replay(rec: Recording, changes: Sequence[Change]) -> Tensor:
    """The last token's state before the final norm [R, d] of the run with each change, one a row."""
    out: Tensor | None = None
    order = sorted(range(len(changes)), key=lambda i: _joins_at(changes[i]))
    width = len(rec.ids) - rec.start
    size = max(1, rec.m.batch_tokens // (len(rec.ids) if rec.frozen else width))
    for begin in range(0, len(order), size):
        chunk = order[begin : begin + size]
        final = _replay(rec, [changes[i] for i in chunk])
        if out is None:
            out = final.new_empty(len(changes), final.shape[-1])
        out[torch.tensor(chunk, device=out.device)] = final
    if out is None:
        return rec.final.new_empty(0, rec.m.width)
    return out


def _joins_at(change: Change) -> int:
    return change.layer + (change.site == "resid_post")


def _replay(rec: Recording, changes: Sequence[Change]) -> Tensor:
    """`replay` of one batch, whose changes are sorted by the layer at which they join."""
    if not rec.restarts:
        joins = [0] * len(changes)
        states = {}
    else:
        joins = [_joins_at(change) for change in changes]
        states = {
            layer: rec.states[layer][rec.row].expand(joins.count(layer), -1, -1)
            for layer in set(joins)
        }
    groups: dict[tuple[int, str], list[int]] = {}
    for row, change in enumerate(changes):
        site, layer = change.site, change.layer
        if rec.restarts and site == "resid_post":
            site, layer = "resid_pre", layer + 1
        groups.setdefault((layer, site), []).append(row)
    edits = []
    for (layer, site), rows in groups.items():
        # A batch grows downwards: the rows of a layer keep their numbers when others join.
        edit = _edit(rec, [(row, changes[row]) for row in rows])
        if rec.restarts and site == "resid_pre":
            first = joins.index(layer)
            states[layer] = _edit(rec, [(r - first, changes[r]) for r in rows])(states[layer])
        else:
            edits.append((site, layer, edit))
    return stack(rec, states, rows=len(changes), edits=edits)[:, -1]


def _edit(rec: Recording, mine: Sequence[tuple[int, Change]]) -> Callable[[Tensor], Tensor]:
    """The function of states [R, T - start, d] that makes these rows' changes."""
    rows = torch.tensor([row for row, change in mine for _ in change.columns])
    columns = torch.tensor([c - rec.start for _, change in mine for c in change.columns])
    values = torch.cat([change.values for _, change in mine])  # [rows, d] or [rows, head_dim]
    heads = None
    if mine[0][1].head is not None:
        heads = torch.tensor([change.head for _, change in mine for _ in change.columns])
    add = mine[0][1].add
    s = rec.m.structure

    def edit(h: Tensor) -> Tensor:
        h = h.clone()
        at = (rows.to(h.device), columns.to(h.device))
        target = h
        if heads is not None:
            target = h.unflatten(-1, (s.heads, s.head_dim))  # a view
            at = (*at, heads.to(h.device))
        target.index_put_(at, values.to(h.device, h.dtype), accumulate=add)
        return h

    return edit


def stack(
    rec: Recording,
    joins: dict[int, Tensor],
    *,
    rows: int,
    edits: Sequence[tuple[str, int, Callable[[Tensor], Tensor]]] = (),
    reads: Sequence[Read] = (),
) -> Tensor:
    """The output of the last layer [R, T - start, d], gradients kept where they are enabled.

    `joins` are the states [R_l, T - start, d] of the rows that join at each layer, in that order;
    an edit (site, layer, function) changes a site as it passes, a read sees it.
    """
    m = rec.m
    out: list[Tensor] = []
    if any(site in BRANCHES for site, _, _ in (*edits, *reads)):
        readers(m)  # found by a pass of its own, which no hook may change
    with fitting(m, rows, len(rec.ids)), removing([]) as handles:
        for site, layer, change in edits:
            handles.append(_register_edit(m, site, layer, change))
        for site, layer, see in reads:
            handles.append(_register_branch(m, site, layer, see))
        if not rec.restarts:
            handles.extend(_register_joins(m, joins, out))
            ids = torch.tensor([rec.ids], device=m.device).expand(rows, -1)
            keywords = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "position_ids": torch.arange(ids.shape[1], device=m.device).expand(rows, -1),
            }
            try:
                m.structure.backbone(**keywords, use_cache=False)
            except _Stop:
                pass
            return out[0]
        h: Tensor | None = None
        for layer in range(min(joins), m.n_layers + 1):
            if layer in joins:
                new = joins[layer]
                h = new if h is None else torch.cat([h.to(new.device), new])
            if layer < m.n_layers:
                h = _call(rec, layer, h)
    assert h is not None
    return h


def _call(rec: Recording, layer: int, h: Any) -> Tensor:
    args, kwargs = rec.calls[layer]
    args = tuple(_for_rows(rec, x, h.shape[0]) for x in args)
    kwargs = {name: _for_rows(rec, x, h.shape[0]) for name, x in kwargs.items()}
    return first_tensor(rec.m.layers[layer](h, *args, **kwargs))


def _for_rows(rec: Recording, value: Any, rows: int) -> Any:
    """A recorded argument, for as many rows: without padding, those of all prompts are alike."""
    if value is None:
        return None
    if value is rec.cache:
        return rec.frozen
    if isinstance(value, Tensor) and value.ndim >= 2:
        recorded = rec.states[0].shape[0]
        if value.shape[0] in (1, recorded):
            return value[:1].expand(rows, *value.shape[1:])
    if type(value) in (tuple, list):
        return type(value)(_for_rows(rec, x, rows) for x in value)
    return value


def _register_joins(m: Model, joins: dict[int, Tensor], out: list[Tensor]) -> Iterator[Any]:
    """Plain hooks in place of restarts: the rows that join at a layer are overwritten there."""
    first = 0
    for layer in sorted(joins):
        states, begin = joins[layer], first
        first += len(states)

        def put(h: Tensor, states: Tensor = states, begin: int = begin) -> Tensor:
            return torch.cat([h[:begin], states.to(h.device), h[begin + len(states) :]])

        if layer == m.n_layers:
            yield _register_edit(m, "resid_post", layer - 1, put)
        else:
            yield _register_edit(m, "resid_pre", layer, put)

    def finish(_: nn.Module, args: Any, output: Any) -> None:
        out.append(first_tensor(output))
        raise _Stop

    yield m.layers[-1].register_forward_hook(finish)


def _register_edit(m: Model, site: str, layer: int, change: Callable[[Tensor], Tensor]) -> Any:
    """A hook that puts change(h) in place of what passes at a site."""
    reads = site in BRANCHES
    module = readers(m)[layer][site].module if reads else _site_module(m, site, layer)
    if site in ("resid_pre", "head", *BRANCHES):

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        h = change(first_tensor(output))
        return h if isinstance(output, Tensor) else (h, *output[1:])

    return module.register_forward_hook(after)


def _register_branch(m: Model, site: str, layer: int, see: Callable[[Tensor], None]) -> Any:
    """A read; of "attn_in" and "mlp_in", of a view that this part alone reads.

    A gradient at the stream itself would be that of everything above; at the view it is the part's.
    """
    if site not in BRANCHES:
        return _register_read(m, site, layer, see)

    def branch(h: Tensor) -> Tensor:
        view = h.view_as(h)
        see(view)
        return view

    return _register_edit(m, site, layer, branch)


# Sweeps


@torch.no_grad()
def sweep(
    rec: Recording,
    changes: Sequence[Change],
    *,
    prefix: Prefix | None = None,
    bar: Any = None,
) -> Tensor:
    """`replay` of many changes of one prompt [N, d], each behind as long a prefix as it allows.

    A change at position p leaves everything before p as it was, so the changes are grouped by
    their first position, and each group is replayed behind a cache of the tokens before it.
    `prefix` is the one that `rec` was recorded behind.
    """
    m, ids = rec.m, rec.ids
    first = [min(change.columns) for change in changes]
    out = rec.final.new_empty(len(changes), m.width)
    known = prefix
    for low, members in _grouped(first):
        here = rec
        if low > rec.start and (longer := make_prefix(m, ids, low, known)) is not None:
            known = longer
            here = record(m, ids, prefix=known)
        final = replay(here, [changes[i] for i in members])
        out[torch.tensor(members, device=out.device)] = final
        if bar is not None:
            bar.update(len(members))
    return out


def _grouped(first: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Groups of changes by first position, from left to right: (lowest position, indices)."""
    if not first:
        return
    order = sorted(range(len(first)), key=lambda i: first[i])
    groups = max(1, min(GROUPS, len(set(first)) // 4))
    size = math.ceil(len(order) / groups)
    begin = 0
    while begin < len(order):
        stop = min(begin + size, len(order))
        while stop < len(order) and first[order[stop]] == first[order[stop - 1]]:
            stop += 1  # cells of one position belong together
        yield first[order[begin]], order[begin:stop]
        begin = stop


# Who reads the residual stream


@dataclass
class Reader:
    """The module through which a part of a layer reads the residual stream."""

    module: nn.Module
    sees_attention: bool  # of its own layer: False for the MLP of a parallel block


_readers: weakref.WeakKeyDictionary[nn.Module, list[dict[str, Reader]]] = (
    weakref.WeakKeyDictionary()
)


@torch.no_grad()
def readers(m: Model) -> list[dict[str, Reader]]:
    """For each layer, through which module attention and MLP read the residual stream.

    Found by value: the first child that is given the stream before the layer is attention's, the
    next one that is given the stream before or after attention is the MLP's.

    Raises:
        ModelError: a layer where the two cannot be told apart.
    """
    backbone = m.structure.backbone
    if backbone in _readers:
        return _readers[backbone]
    count = min(4, m.vocab_size)
    seen: list[list[tuple[nn.Module, Tensor]]] = [[] for _ in m.layers]
    pre: dict[int, Tensor] = {}
    added: dict[int, Tensor] = {}

    def look(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            h = args[0] if args else kwargs.get("hidden_states")
            if isinstance(h, Tensor):
                seen[layer].append((module, h))

        return hook

    with removing([]) as handles:
        for i, block in enumerate(m.layers):
            handles.append(_register_read(m, "resid_pre", i, _keep(pre, i)))
            handles.append(_register_read(m, "attn_out", i, _keep(added, i)))
            for child in block.children():
                handles.append(child.register_forward_pre_hook(look(i), with_kwargs=True))
        with fitting(m, 1, count):
            backbone(**_keywords(m, [range(count)], 0, count), use_cache=False)
    found = []
    for i, calls in enumerate(seen):
        middle = pre[i] + added[i]
        here: list[tuple[nn.Module, bool]] = []
        for module, h in calls:
            if h.shape != middle.shape:
                continue
            after = _same(h, middle)
            if after or _same(h, pre[i]):
                here.append((module, after))
        if len(here) != 2 or here[0][1]:
            raise ModelError(
                f"layer {i} ({type(m.layers[i]).__name__}) has {len(here)} modules that read the "
                "residual stream, and edges need one for attention and one for the MLP: "
                "method='atp' or 'ig' works"
            )
        found.append(
            {"attn_in": Reader(here[0][0], False), "mlp_in": Reader(here[1][0], here[1][1])}
        )
    _readers[backbone] = found
    return found


def _keep(into: dict[int, Tensor], key: int) -> Callable[[Tensor], None]:
    def see(h: Tensor) -> None:
        into[key] = h

    return see


def _same(one: Tensor, other: Tensor) -> bool:
    tolerance = 1e-5 if one.dtype == torch.float32 else 1e-2
    return bool((one - other).abs().max() <= tolerance * other.abs().max())
