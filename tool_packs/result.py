"""What every technique returns: named tensors, rows, a figure and where it all came from."""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tool_packs.errors import ResultError
from tool_packs.figures import Plot, draw

__all__ = ["Provenance", "Result", "Table"]

SUMMARY_LIMIT = 1500  # characters
CELL = 32  # characters of a table's cell
FORMAT = 1


@dataclass(frozen=True)
class Provenance:
    """What is needed to make a result again, or to doubt it."""

    technique: str
    model: str = ""
    fingerprint: str = ""
    adapter: str | None = None
    dtype: str = ""
    device: str = ""
    seed: int | None = None
    prompts: int = 0
    prompts_sha256: str = ""
    seconds: float = 0.0
    made_at: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Table:
    """Some rows of a result, which a notebook shows as aligned text; `str(table)` is that text."""

    columns: list[str]
    rows: list[dict[str, Any]]
    left_out: int = 0  # rows that are not shown

    def __str__(self) -> str:
        cells = [self.columns]
        cells += [[_cell(row.get(name)) for name in self.columns] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(text.ljust(wide) for text, wide in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        if self.left_out:
            lines.append(f"... {self.left_out} more in .rows")
        return "\n".join(lines)

    __repr__ = __str__


@dataclass(repr=False)
class Result:
    """The outcome of one technique.

    `tensors` are float or integer CPU tensors and `dims` names the axes of each. `labels` names the
    steps along an axis (layers, tokens). `rows` is the table that a person reads first. `lines` are
    the sentences of the summary; each effect stands beside its control. `figure` says how to
    draw it.
    """

    title: str
    tensors: dict[str, Tensor]
    dims: dict[str, tuple[str, ...]]
    provenance: Provenance
    lines: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    labels: dict[str, list[Any]] = field(default_factory=dict)
    figure: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if name not in self.dims or len(self.dims[name]) != tensor.ndim:
                raise ResultError(
                    f"tensor {name!r} has shape {tuple(tensor.shape)} but its axes are named "
                    f"{self.dims.get(name)}: name each axis once"
                )

    def __getitem__(self, name: str) -> Any:
        """A tensor by its name, or else a column of the rows as a list."""
        if name in self.tensors:
            return self.tensors[name]
        if any(name in row for row in self.rows):
            return [row.get(name) for row in self.rows]
        columns = sorted({key for row in self.rows for key in row})
        raise KeyError(f"no {name!r} here: tensors {sorted(self.tensors)}, columns {columns}")

    def shapes(self) -> dict[str, str]:
        """The shape of each tensor in words, as in {'resid_post': '[prompt 3, layer 4, d 32]'}."""
        return {
            name: "[" + ", ".join(f"{d} {n}" for d, n in zip(dims, t.shape, strict=True)) + "]"
            for name, dims in self.dims.items()
            if (t := self.tensors.get(name)) is not None
        }

    def summary(self) -> str:
        """What was found, at most 1,500 characters; every effect beside its control."""
        shapes = "; ".join(f"{name} {shape}" for name, shape in self.shapes().items())
        p = self.provenance
        named = p.adapter is None or p.model.split(":")[-1] == p.adapter
        where = p.model if named else f"{p.model} + {p.adapter}"
        tail = f"{where}, {p.prompts} prompts, seed {p.seed}, {p.seconds:.2f} s"
        if shapes:
            tail = f"tensors: {_clip(shapes, 400)}\n{tail}"
        head = _clip("\n".join([self.title, *self.lines]), SUMMARY_LIMIT - len(tail) - 1)
        return f"{head}\n{tail}"

    def table(self, *columns: str, limit: int = 20) -> Table:
        """The first `limit` rows, or of them the columns that are named, as in table("layer", "p").

        Raises:
            ResultError: there are no rows, or no such column.
        """
        if not self.rows:
            raise ResultError(f"{self.title!r} has no rows; its numbers are in .tensors")
        known = list(dict.fromkeys(key for row in self.rows for key in row))
        for name in columns:
            if name not in known:
                raise ResultError(f"no column {name!r} in this result: {', '.join(known)}")
        if limit < 1:
            raise ResultError(f"limit={limit}: a table has at least 1 row")
        return Table(list(columns) or known, self.rows[:limit], max(0, len(self.rows) - limit))

    def plot(self, **select: Any) -> Plot:
        """The figure, drawn anew: shows itself in a notebook; `.png` are its bytes (<= 60 kB).

        `select` picks a slice of what is drawn, as in `plot(prompt=1)`.
        """
        if self.figure is None:
            raise ResultError(
                f"{self.title!r} has no figure; its numbers are in .tensors and .rows"
            )
        return draw(
            self.title, self.figure | select, self.tensors, self.dims, self.labels, self.rows
        )

    def save(self, folder: str | Path) -> Path:
        """Writes tensors.safetensors and result.json into `folder`; an earlier save is replaced."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.detach().contiguous().clone() for k, v in self.tensors.items()},
            folder / "tensors.safetensors",
        )
        self.save_rest(folder)
        return folder

    def save_rest(self, folder: Path) -> None:
        """Writes result.json: all but the tensors."""
        document = {
            "format": FORMAT,
            "title": self.title,
            "lines": self.lines,
            "dims": {k: list(v) for k, v in self.dims.items()},
            "labels": self.labels,
            "rows": self.rows,
            "figure": self.figure,
            "provenance": asdict(self.provenance),
        }
        text = json.dumps(document, indent=1, ensure_ascii=False, default=_plain)
        (folder / "result.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Result:
        """Reads what `save` wrote.

        Raises:
            ResultError: the folder holds no result, or one of a newer format.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        file = folder / "result.json"
        if not file.is_file():
            raise ResultError(f"no result.json in {folder}: give the folder that Result.save wrote")
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["format"] > FORMAT:
            raise ResultError(
                f"{file} has format {document['format']}; this version reads {FORMAT}"
            )
        return cls(
            title=document["title"],
            tensors=load_file(folder / "tensors.safetensors"),
            dims={k: tuple(v) for k, v in document["dims"].items()},
            provenance=Provenance(**document["provenance"]),
            lines=document["lines"],
            rows=document["rows"],
            labels=document["labels"],
            figure=document["figure"],
        )

    def __repr__(self) -> str:
        return self.summary()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """What Jupyter shows: the summary, and the figure where there is one."""
        bundle: dict[str, Any] = {"text/plain": self.summary()}
        if self.figure is not None:
            bundle["image/png"] = self.plot().png
        return bundle


def provenance(
    m: Any,
    technique: str,
    started: float,
    *,
    prompts: Sequence[Sequence[int]] = (),
    seed: int | None = None,
    **arguments: Any,
) -> Provenance:
    """The provenance of a call on `m` that started at `started` (time.perf_counter).

    `prompts` are token ids; `arguments` those of the call that a reader wants to see.
    """
    digest = hashlib.sha256()
    for ids in prompts:
        digest.update(json.dumps(list(ids)).encode())
    return Provenance(
        technique=technique,
        model=m.name,
        fingerprint=m.fingerprint(),
        adapter=m.active_adapter,
        dtype=str(m.dtype).removeprefix("torch."),
        device=str(m.device),
        seed=seed,
        prompts=len(prompts),
        prompts_sha256=digest.hexdigest(),
        seconds=round(time.perf_counter() - started, 4),
        made_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(),
        arguments=json.loads(json.dumps(arguments, default=_plain)),
    )


def versions() -> dict[str, str]:
    """The versions of what computes: torch, transformers, and peft where it is installed."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str] = {}
    found["torch"] = torch.__version__
    for package in ("transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached CPU copies; half precision becomes float32, so that numpy can read it."""
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        out[name] = tensor.float() if tensor.is_floating_point() else tensor
    return out


def _plain(value: Any) -> Any:
    """What JSON cannot hold, in its nearest readable form."""
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= 16 else f"tensor {tuple(value.shape)}"
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return getattr(value, "item", lambda: str(value))()


def _cell(value: Any) -> str:
    """One line of at most 32 characters; numbers with four significant digits."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return _clip(value if isinstance(value, str) else repr(value), CELL).replace("\n", "\\n")


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def mean_sd(values: Tensor) -> str:
    """'mean ± sd' of a 1-d tensor, as a control is written in a summary."""
    values = values.float()
    sd = values.std(unbiased=False).item() if values.numel() > 1 else 0.0
    return f"{torch.mean(values).item():.3g} ± {sd:.2g}"
