from __future__ import annotations

import asyncio
import json
import sys

from . import fault
from .host import Host


def main() -> int:
    with open(sys.argv[1], encoding="utf-8") as file:
        config = json.load(file)
    fault.arm(config.get("fault", ""))
    return asyncio.run(Host(config).serve())


if __name__ == "__main__":
    sys.exit(main())
