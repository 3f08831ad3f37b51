"""The one home of hooks: batches, forward passes that stop early, and edits under the KV cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from tool_packs.errors import MemoryFull, TextError
from tool_packs.prompts import Position, Prompt, resolve
from tool_packs.structure import first_tensor, require_numbers

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["Batch", "Intervention"]

SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "head")
SHORT = {"resid": "resid_post", "attn": "attn_out", "mlp": "mlp_out", "heads": "head"}
CPU_FULL = "DefaultCPUAllocator: can't allocate memory"  # torch has no error class for it
FOREVER = 2**31 - 1  # a position no text reaches
SOON = 2.0  # seconds before a progress bar shows

Edit = Callable[[Tensor], Tensor]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Intervention:
    """A change to the residual stream after one layer, from `start` on, decoded tokens included.

    `vector` [d] times `strength` is added; or else `edit` maps the states [n, d] to new ones.
    `start` and `stop` are positions in the prompt ("last", "assistant_start", an int); without
    `stop` every later token is changed too, those that are decoded under the KV cache among them.
    """

    layer: int
    vector: Tensor | None = None
    strength: float = 1.0
    edit: Edit | None = None
    start: int | str = 0
    stop: int | str | None = None

    def __mul__(self, factor: float) -> Intervention:
        if self.vector is None:
            raise TextError("only an added vector can be scaled; this intervention is an edit")
        return Intervention(
            self.layer, self.vector, self.strength * factor, None, self.start, self.stop
        )

    __rmul__ = __mul__

    def __neg__(self) -> Intervention:
        return self * -1.0


Steer = Intervention | Sequence["Intervention | tuple[Intervention, ...] | None"] | None


@dataclass
class Batch:
    """Prompts of like length, padded on the left so that their last tokens stand in one column."""

    index: list[int]  # which prompts these rows are
    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T], 0 on padding
    positions: Tensor  # [B, T], 0 at each prompt's first token (GPT-2 needs to be told)
    pad: list[int]  # padding of each row

    def keywords(self) -> dict[str, Tensor]:
        return {
            "input_ids": self.ids,
            "attention_mask": self.mask,
            "position_ids": self.positions,
        }


class _Stop(Exception):
    """Ends a forward pass at the deepest layer that was asked for."""


def batches(m: Model, prompts: Sequence[Prompt], *, rows: int | None = None) -> Iterator[Batch]:
    """The prompts in buckets of like length, the shortest first, within m.batch_tokens a pass."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    bucket: list[int] = []
    for i in order:
        longest = len(prompts[i])
        full = bucket and (
            (len(bucket) + 1) * longest > m.batch_tokens
            or longest > 1.5 * len(prompts[bucket[0]]) + 16  # more padding than it saves
            or (longest > len(prompts[bucket[0]]) and not m.ignores_padding)
            or (rows is not None and len(bucket) >= rows)
        )
        if full:
            yield make_batch(m, prompts, bucket)
            bucket = []
        bucket.append(i)
    if bucket:
        yield make_batch(m, prompts, bucket)


def shown_batches(
    m: Model, prompts: Sequence[Prompt], what: str, *, rows: int | None = None
) -> Iterable[Batch]:
    """The same as `batches`, with a progress bar where it takes long."""
    return shown(list(batches(m, prompts, rows=rows)), what)


def shown(steps: Sequence[T], what: str) -> Iterable[T]:
    """The steps, with a progress bar where there are several and they take more than SOON s."""
    from tqdm.auto import tqdm

    return tqdm(steps, desc=what, leave=False, delay=SOON, disable=len(steps) < 2)


def progress(total: int, what: str) -> Any:
    """A progress bar to update by hand, which shows where it takes more than SOON s."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=what, leave=False, delay=SOON, disable=total < 2)


def make_batch(m: Model, prompts: Sequence[Prompt], index: list[int]) -> Batch:
    """One left-padded batch of the prompts named by `index`."""
    width = max(len(prompts[i]) for i in index)
    pad = [width - len(prompts[i]) for i in index]
    ids = [[m.pad_id] * p + list(prompts[i].ids) for i, p in zip(index, pad, strict=True)]
    mask = torch.tensor([[0] * p + [1] * (width - p) for p in pad], device=m.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Batch(list(index), torch.tensor(ids, device=m.device), mask, positions, pad)


@contextlib.contextmanager
def removing(handles: list[Any]) -> Iterator[list[Any]]:
    """Hooks registered into `handles` are gone afterwards, whatever happened, Ctrl-C included."""
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def sparing(device: torch.device, what: str, reduce: str) -> Iterator[None]:
    """Says what to reduce where `what` finds no memory on the device, and gives back what it took.

    Raises:
        MemoryFull: in place of torch's own words.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and CPU_FULL not in str(error):
            raise
        error.__traceback__ = None  # its frames hold the activations
        full = MemoryFull(f"no memory on {device} for {what}: {reduce}")
    else:
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise full


def fitting(m: Model, rows: int, width: int) -> contextlib.AbstractContextManager[None]:
    """`sparing` of a pass of [rows, width] tokens, and of its gradients where there are any."""
    return sparing(
        m.device,
        f"a pass of {rows} x {width} tokens",
        f"lower m.batch_tokens (now {m.batch_tokens}), give fewer or shorter texts, or load the "
        "model with dtype='bfloat16'",
    )


# Reading


def site_name(site: str) -> str:
    """The full name of a site. Raises TextError on one that does not exist."""
    name = SHORT.get(site, site)
    if name not in SITES:
        raise TextError(f"no site {site!r}: {', '.join(SITES)} (short: {', '.join(SHORT)})")
    return name


def _site_module(m: Model, site: str, layer: int) -> nn.Module:
    s = m.structure
    module = {
        "resid_pre": s.layers,
        "resid_post": s.layers,
        "attn_out": s.attn_out,
        "mlp_out": s.mlp_out,
        "head": s.head_mix,
    }[site][layer]
    if module is None:
        raise TextError(
            f"{site} of layer {layer} was not found in {type(s.layers[layer]).__name__}: "
            "its parts do not sum to what the layer adds. resid_pre and resid_post work."
        )
    return module


Read = tuple[str, int, Callable[[Tensor], None]]


def _register_read(m: Model, site: str, layer: int, see: Callable[[Tensor], None]) -> Any:
    module = _site_module(m, site, layer)
    if site == "resid_pre":

        def pre(_: nn.Module, args: Any, kwargs: Any) -> None:
            see(args[0] if args else kwargs["hidden_states"])

        return module.register_forward_pre_hook(pre, with_kwargs=True)
    if site == "head":

        def mix(_: nn.Module, args: Any) -> None:
            see(args[0])

        return module.register_forward_pre_hook(mix)

    def post(_: nn.Module, args: Any, output: Any) -> None:
        see(first_tensor(output))

    return module.register_forward_hook(post)


@torch.no_grad()
def run(
    m: Model,
    batch: Batch,
    reads: Sequence[Read],
    *,
    steer: Sequence[tuple[Intervention, ...]] = (),
    spans: Sequence[Sequence[tuple[int, int]]] = (),
) -> None:
    """One forward pass up to the deepest layer in `reads`, without the unembedding.

    Each read sees its [B, T, d] (for "head" [B, T, heads * head_dim]) as it passes, after edits.
    """
    deepest = max(layer for _, layer, _ in reads)

    def stop(_: nn.Module, args: Any, output: Any) -> None:
        require_numbers(m.core, first_tensor(output)[:, -1])  # no row has padding there
        raise _Stop

    with editing(m, steer, spans), removing([]) as handles:
        handles.extend(_register_read(m, site, layer, see) for site, layer, see in reads)
        handles.append(m.layers[deepest].register_forward_hook(stop))
        with fitting(m, *batch.ids.shape), contextlib.suppress(_Stop):
            m.structure.backbone(**batch.keywords(), use_cache=False)


# Editing


def per_row(steer: Steer, rows: int) -> list[tuple[Intervention, ...]]:
    """What a `steer` argument does to each row.

    One Intervention: every row. A list: one entry a row, each None, an Intervention or a tuple of
    them. A tuple: all of them on every row.
    """
    if steer is None:
        return []
    if isinstance(steer, Intervention):
        return [(steer,)] * rows
    if isinstance(steer, tuple):
        return [tuple(steer)] * rows
    if len(steer) != rows:
        raise TextError(
            f"steer has {len(steer)} entries for {rows} rows: give one Intervention for all, "
            "a tuple of them for all, or a list with one entry a row"
        )
    return [_entry(item) for item in steer]


def _entry(item: Any) -> tuple[Intervention, ...]:
    if item is None:
        return ()
    if isinstance(item, Intervention):
        return (item,)
    if isinstance(item, (tuple, list)) and all(isinstance(x, Intervention) for x in item):
        return tuple(item)
    raise TextError(f"{item!r:.60} is no Intervention: make one with steering.intervention(...)")


def span_of(prompt: Prompt, intervention: Intervention) -> tuple[int, int]:
    """First and last-but-one position that the intervention changes in this prompt."""
    start = _one(prompt, intervention.start)
    if intervention.stop is None:
        return start, FOREVER
    if type(intervention.stop) is int and intervention.stop == len(prompt):
        return start, len(prompt)  # the prompt's last token is the last one changed
    return start, _one(prompt, intervention.stop)


def _one(prompt: Prompt, position: Position) -> int:
    return resolve(prompt, position)[0]


def spans_of(
    prompts: Sequence[Prompt], steer: Sequence[tuple[Intervention, ...]]
) -> list[list[tuple[int, int]]]:
    """The span of every intervention of every row."""
    return [[span_of(p, i) for i in row] for p, row in zip(prompts, steer, strict=bool(steer))]


@contextlib.contextmanager
def editing(
    m: Model,
    steer: Sequence[tuple[Intervention, ...]],
    spans: Sequence[Sequence[tuple[int, int]]],
) -> Iterator[None]:
    """Within this, row b of every pass is changed by steer[b]; one entry alone stands for all rows.

    Which positions a pass computes is read from its position_ids, so a decoded token under the KV
    cache, which comes alone, is known for what it is.
    """
    if not any(steer):
        yield
        return
    now: dict[str, Tensor] = {}

    def note_positions(module: nn.Module, args: Any, kwargs: Any) -> None:
        now["positions"] = _positions(args, kwargs)  # [B, T]

    with removing([]) as handles:
        backbone = m.structure.backbone
        handles.append(backbone.register_forward_pre_hook(note_positions, with_kwargs=True))
        depth = max(len(row) for row in steer)
        for layer in sorted({i.layer for row in steer for i in row}):
            slots = []
            for k in range(depth):  # the k-th intervention of each row, in the order given
                mine = [
                    (b, row[k], spans[b][k])
                    for b, row in enumerate(steer)
                    if k < len(row) and row[k].layer == layer
                ]
                if mine:
                    slots.append(_slot(mine, len(steer), m.width))
            handles.append(m.layers[layer].register_forward_hook(_edit_hook(slots, now)))
        yield


def _positions(args: Any, kwargs: Any) -> Tensor:
    """The position of each token of this pass [B, T], -1 on padding."""
    positions = _given_positions(args, kwargs)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        shown = mask[:, -positions.shape[1] :]
        positions = positions.expand(shown.shape[0], -1).masked_fill(shown == 0, -1)
    return positions


def _given_positions(args: Any, kwargs: Any) -> Tensor:
    if (positions := kwargs.get("position_ids")) is not None:
        return positions if positions.ndim == 2 else positions[0]
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        ids = kwargs["inputs_embeds"][..., 0]
    cache = kwargs.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return torch.arange(past, past + ids.shape[1], device=ids.device).expand(ids.shape)


Slot = Callable[[Tensor, Tensor], Tensor]


def _slot(mine: list[tuple[int, Intervention, tuple[int, int]]], rows: int, width: int) -> Slot:
    """One function (h [B, T, d], positions [B, T]) -> h for the k-th intervention of every row."""
    if any(i.vector is None and i.edit is None for _, i, _ in mine):
        raise TextError("an Intervention needs a vector or an edit")
    for _, i, _ in mine:
        if i.vector is not None and i.vector.shape != (width,):
            raise TextError(
                f"the vector has shape {tuple(i.vector.shape)}; this model adds [{width}]"
            )
    added = torch.zeros(rows, width)
    start = torch.full((rows,), FOREVER)
    stop = torch.full((rows,), FOREVER)
    edits = []
    for b, i, (first, last) in mine:
        start[b], stop[b] = first, last
        if i.vector is not None:
            added[b] = i.vector.detach().float().cpu() * i.strength
        else:
            edits.append((b, i.edit))
    on_device: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}

    def apply(h: Tensor, positions: Tensor) -> Tensor:
        key = (h.device, h.dtype)
        if key not in on_device:
            on_device[key] = added.to(*key), start.to(h.device), stop.to(h.device)
        add, first, last = on_device[key]
        where = positions.to(h.device)
        if where.shape[0] == 1:
            where = where.expand(h.shape[0], -1)
        if rows not in (1, h.shape[0]):
            raise TextError(f"steering is set for {rows} rows and the pass has {h.shape[0]}")
        inside = (where >= first[:, None]) & (where < last[:, None])  # [B, T]
        out = h + inside[..., None].to(h.dtype) * add[:, None, :]
        for b, edit in edits:
            chosen = (
                inside
                if rows == 1
                else inside & (torch.arange(rows, device=h.device) == b)[:, None]
            )
            if chosen.any():
                out = out.clone()
                out[chosen] = edit(out[chosen]).to(out.dtype)
        return out

    return apply


def _edit_hook(slots: list[Slot], now: dict[str, Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        h = first_tensor(output)
        for slot in slots:
            h = slot(h, now["positions"])
        return h if isinstance(output, Tensor) else (h, *output[1:])

    return hook


# Logits under a cache


@torch.no_grad()
def step_logits(
    m: Model, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any
) -> tuple[Tensor, Any]:
    """Logits [B, V] (float32) of the last column, and the KV cache after it (None: it keeps none)."""
    keywords: dict[str, Any] = {"logits_to_keep": 1} if _keeps_logits(m) else {}
    with fitting(m, *mask.shape):
        out = m.core(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **keywords,
        )
    logits = out.logits[:, -1]  # [B, V]
    if cache is None:  # once, and not at each token
        require_numbers(m.core, logits)
    return logits.float(), getattr(out, "past_key_values", None)


@torch.no_grad()
def all_logits(m: Model, batch: Batch) -> Tensor:
    """Logits [B, T, V] in the model's precision."""
    with fitting(m, *batch.ids.shape):
        logits = m.core(**batch.keywords(), use_cache=False).logits
    require_numbers(m.core, logits[:, -1])
    return logits


def _keeps_logits(m: Model) -> bool:
    import inspect

    return "logits_to_keep" in inspect.signature(m.core.forward).parameters
