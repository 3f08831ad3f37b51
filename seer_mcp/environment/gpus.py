"""GPUs that can be asked for, and how people write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from ..errors import BadInput, nearest


class Kind(NamedTuple):
    most: int
    """In one machine."""
    gigabytes: int
    """Memory of one of them, at least."""


GPUS: Mapping[str, Kind] = {
    "T4": Kind(8, 16),
    "L4": Kind(8, 24),
    "A10": Kind(4, 24),
    "L40S": Kind(8, 48),
    "A100": Kind(8, 40),
    "A100-40GB": Kind(8, 40),
    "A100-80GB": Kind(8, 80),
    "RTX-PRO-6000": Kind(8, 96),
    "H100": Kind(8, 80),
    "H100!": Kind(8, 80),
    "H200": Kind(8, 141),
    "B200": Kind(8, 180),
    "B200+": Kind(8, 180),
}
_WRITTEN = re.compile(
    r"(?:(?P<before>\d{1,4})\s*[x×*]\s*)?(?P<name>.+?)"
    r"(?:\s*(?:[:×*]\s*(?P<after>\d{1,4})|x\s*(?P<times>\d{1,2})))?",
    re.IGNORECASE,
)


def _plain(name: str) -> str:
    """Without what people add or leave out: NVIDIA_a100-80 -> A10080."""
    return re.sub(r"NVIDIA|TESLA|SXM\d?|PCIE|[\s_-]|G(?:I?B)?$", "", name.upper())


_NAMES = {_plain(name): name for name in GPUS} | {"H10080": "H100"}


def parse_gpu(text: str) -> tuple[str, int]:
    """The known name and the number: "4 x h100" or "H100:4" -> ("H100", 4). Raises BadInput."""
    name, count = split_count(text)
    try:
        known = known_gpu(name)
        return known, known_count(known, 1 if count is None else count)
    except ValueError as error:
        raise BadInput("gpu", text, str(error)) from error


def split_count(text: str) -> tuple[str, int | None]:
    """The name as it was written, and the number if one was: "H100:4" -> ("H100", 4)."""
    found = _WRITTEN.fullmatch(text.strip())
    counts = (
        [found[group] for group in ("before", "after", "times") if found[group]] if found else []
    )
    if found is None or len(counts) > 1:
        return text, None
    return found["name"], int(counts[0]) if counts else None


def known_gpu(name: str) -> str:
    """Our name of a GPU. Raises ValueError with the nearest one."""
    plain = _plain(name)
    found = _NAMES.get(plain) or _NAMES.get(name.strip().upper())
    if found is None:
        hint = nearest(name.upper(), GPUS)
        raise ValueError(
            f"no such GPU.{hint} Known: {', '.join(GPUS)}; several in one machine as H100:4"
        )
    return found


def known_count(name: str, count: int) -> int:
    """Raises ValueError for more than fit into one machine."""
    most = GPUS[name].most
    if not 1 <= count <= most:
        raise ValueError(f"{count} × {name}: 1 to {most} of them fit into one machine")
    return count
