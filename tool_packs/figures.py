"""Drawing of results: three kinds of figure, each a PNG of at most 60 kB."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from tool_packs.errors import ResultError

__all__ = ["Plot"]

PNG_LIMIT = 60_000  # bytes
GRID_COLUMNS = 32  # more token columns than this cannot be read


@dataclass
class Plot:
    """A drawn figure. Jupyter shows it as it is; `figure` is matplotlib's."""

    figure: Any

    @cached_property
    def png(self) -> bytes:
        """The PNG, at the finest resolution that stays within 60 kB."""
        for dpi in (110, 90, 72, 56, 44, 32, 20):
            buffer = io.BytesIO()
            self.figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
            if buffer.tell() <= PNG_LIMIT:
                return buffer.getvalue()
        raise ResultError("the figure is above 60 kB at 20 dpi: draw fewer layers or positions")

    def save(self, path: str | Path) -> Path:
        """Writes the PNG to `path`."""
        path = Path(path)
        path.write_bytes(self.png)
        return path

    def _repr_png_(self) -> bytes:
        return self.png


def draw(
    title: str,
    spec: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dims: Mapping[str, tuple[str, ...]],
    labels: Mapping[str, Sequence[Any]],
    rows: Sequence[Mapping[str, Any]],
) -> Plot:
    """Draws `spec`. Called by Result.plot, and after load as well: a spec is plain JSON.

    kind "lines": `lines` are tensor names over the axis `x`; the other axes are averaged, and
    `bands` maps a tensor name to the axis whose 5-95 % range is shaded (the controls).
    kind "grid": tensor `values` [.., y, x] as colours, with `cells` (a label key) as text.
    kind "bars": column `y` of the rows over column `x`, one colour for each value of `by`.
    """
    from matplotlib.figure import Figure

    drawers = {"lines": _lines, "grid": _grid, "bars": _bars}
    if spec.get("kind") not in drawers:
        raise ResultError(f"no figure of kind {spec.get('kind')!r}: {', '.join(drawers)}")
    figure = Figure(figsize=(7, 4), layout="constrained")
    drawers[spec["kind"]](figure, spec, tensors, dims, labels, rows)
    figure.suptitle(_printable(title, 90), fontsize=10)
    return Plot(figure)


def _lines(figure: Any, spec: Any, tensors: Any, dims: Any, labels: Any, rows: Any) -> None:
    panels: list[list[str]] = spec.get("panels") or [spec["lines"]]
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    bands, each, limits = (spec.get(key, {}) for key in ("bands", "each", "limits"))
    units = spec.get("units") or [""] * len(panels)
    for ax, names, unit in zip(axes, panels, units, strict=True):
        for name in names:
            values, axis = tensors[name].float(), list(dims[name])
            x_axis = axis.index(spec["x"])
            values = values.movedim(x_axis, 0)  # [x, ...]
            axis.insert(0, axis.pop(x_axis))
            x = labels.get(spec["x"]) or list(range(values.shape[0]))
            x = [float(v) for v in x]
            if name in bands:
                values = values.movedim(axis.index(bands[name]), -1)  # [x, ..., controls]
                values = values.reshape(len(x), -1)
                low, high = values.quantile(0.05, 1), values.quantile(0.95, 1)
                ax.fill_between(x, low, high, alpha=0.3, color="0.5", linewidth=0)
                ax.plot(x, values.mean(1), color="0.4", linestyle="--", label=_printable(name))
            elif name in each:  # a line for each entry of that dimension
                values = values.movedim(axis.index(each[name]), -1)  # [x, ..., each]
                values = values.reshape(len(x), -1, values.shape[-1]).mean(1)
                for entry, line in zip(labels[each[name]], values.T, strict=True):
                    ax.plot(x, line, marker=".", label=_printable(f"{name} {entry}"))
            else:
                ax.plot(x, values.reshape(len(x), -1).mean(1), marker=".", label=_printable(name))
            if name in limits:
                bound = limits[name]
                ax.axhspan(-bound, bound, alpha=0.3, color="0.5", label="random, 95 %")
        ax.set_ylabel(unit)
        ax.set_xlabel(spec["x"])
        ax.legend(fontsize=8)


def _grid(figure: Any, spec: Any, tensors: Any, dims: Any, labels: Any, rows: Any) -> None:
    name = spec["values"]
    values, axes = tensors[name].float(), list(dims[name])
    index: list[int] = []
    while len(axes) > 2:  # leading axes: one step of each is drawn, the first unless told
        step = int(spec.get(axes[0], 0))
        if not -values.shape[0] <= step < values.shape[0]:
            raise ResultError(f"{axes[0]} {step} is not among the {values.shape[0]} of this result")
        index.append(step % values.shape[0])
        values = values[step]
        axes.pop(0)
    cells, ticks = labels.get(spec.get("cells", "")), labels.get(spec.get("ticks", axes[1]))
    for step in index:
        cells = cells[step] if cells else cells
        if ticks and isinstance(ticks[0], list):
            ticks = ticks[step]
    if ticks:
        values = values[:, : len(ticks)]  # a shorter prompt than the longest of the result
    keep = max(0, values.shape[1] - GRID_COLUMNS)  # the last columns are the ones asked about
    values = values[:, keep:]
    height, width = values.shape
    figure.set_size_inches(min(16, 2 + 0.62 * width), min(12, 1.5 + 0.27 * height))
    ax = figure.subplots()
    image = ax.imshow(values.numpy(), aspect="auto", origin="lower", cmap="viridis")
    figure.colorbar(image, ax=ax, label=_printable(spec.get("label", name)))
    ax.set_ylabel(axes[0])
    y = labels.get(axes[0]) or list(range(height))
    stride = 1 + height // 24
    ax.set_yticks(range(0, height, stride), [str(v) for v in y[::stride]], fontsize=7)
    if ticks:
        names = [_printable(str(t), 12) for t in ticks[keep : keep + width]]
        ax.set_xticks(range(width), names, rotation=60, ha="right", fontsize=7)
    if cells and height <= 40:
        middle = values.nan_to_num().mean().item()
        for row in range(height):
            for column in range(width):
                ax.text(
                    column,
                    row,
                    _printable(str(cells[row][keep + column]), 9),
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if values[row, column].item() < middle else "black",
                )


def _bars(figure: Any, spec: Any, tensors: Any, dims: Any, labels: Any, rows: Any) -> None:
    ax = figure.subplots()
    groups = list(dict.fromkeys(row.get(spec["by"]) for row in rows)) if "by" in spec else [None]
    names = list(dict.fromkeys(str(row[spec["x"]]) for row in rows))[:24]
    width = 0.8 / len(groups)
    for g, group in enumerate(groups):
        mine = {
            str(row[spec["x"]]): row[spec["y"]]
            for row in rows
            if "by" not in spec or row.get(spec["by"]) == group
        }
        heights = [mine.get(name) or 0.0 for name in names]
        where = [i + g * width for i in range(len(names))]
        ax.bar(where, heights, width, label=None if group is None else str(group))
    shown = [_printable(name, 24) for name in names]
    ax.set_xticks(range(len(names)), shown, rotation=40, ha="right", fontsize=8)
    ax.set_ylabel(spec["y"])
    if "by" in spec:
        ax.legend(fontsize=8)


def _printable(text: str, limit: int = 40) -> str:
    """Text that any font can draw: what is not printable ASCII is escaped, dollars are no TeX."""
    shown = text.replace("\n", "\\n").replace("\t", "\\t")
    shown = "".join(
        c if 32 <= ord(c) < 0x250 and ord(c) != 127 else f"\\u{ord(c):04x}" for c in shown
    )
    return (shown if len(shown) <= limit else shown[: limit - 1] + "…").replace("$", r"\$")
