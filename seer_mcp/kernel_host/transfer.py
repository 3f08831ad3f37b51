"""Files of any size into and out of the working folder, for machines that are reached by a command.

python -m kernel_host.transfer CONFIG put '{"path": …, "mode": …, "size": …}' < CONTENT
python -m kernel_host.transfer CONFIG get '{"path": …}'

CONFIG is the host's. The answer is a line of JSON: {"ok": true} (of get with "size" and "mode", and the
content behind it), or {"ok": false, "code": "refused" or "failed", "error": …}.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from typing import Any, Dict

from .folder import Folder, replace

PIECE = 1 << 20


def put(folder: Folder, asked: Dict[str, Any]) -> None:
    def fill(file: Any) -> None:
        left: int = asked["size"]
        while left:
            data = sys.stdin.buffer.read(min(left, PIECE))
            if not data:
                raise OSError("the file did not arrive whole; nothing was changed")
            file.write(data)
            left -= len(data)

    replace(folder.target(asked["path"]), fill, asked["mode"])
    say({"ok": True})


def get(folder: Folder, asked: Dict[str, Any]) -> None:
    with open(folder.existing(asked["path"]), "rb") as file:
        info = os.fstat(file.fileno())
        say({"ok": True, "size": info.st_size, "mode": stat.S_IMODE(info.st_mode)})
        left = info.st_size
        while left:
            data = file.read(min(left, PIECE))
            if not data:
                return  # it became shorter: who asked sees that bytes are missing
            sys.stdout.buffer.write(data)
            left -= len(data)
    sys.stdout.buffer.flush()


def say(answer: Dict[str, Any]) -> None:
    sys.stdout.buffer.write((json.dumps(answer) + "\n").encode("ascii"))
    sys.stdout.buffer.flush()


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        config = json.load(file)
    folder = Folder(config["cwd"], config.get("protected", []))
    try:
        {"put": put, "get": get}[sys.argv[2]](folder, json.loads(sys.argv[3]))
    except ValueError as error:
        say({"ok": False, "code": "refused", "error": str(error)})
    except OSError as error:
        say({"ok": False, "code": "failed", "error": str(error)})


if __name__ == "__main__":
    main()
