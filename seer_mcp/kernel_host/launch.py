"""The kernel's own entry point: `python launch.py CONNECTION_FILE`.

What differs from `python -m ipykernel_launcher`:
- the kernel dies with its host (Linux), so that a killed host leaves nothing behind;
- text that is not valid Unicode (lone surrogates) is sent escaped, where ipykernel would lose it;
- the connection file is not part of the IPython configuration: libraries that look there to
  choose a widget progress bar choose a text one, which a reader of text can follow.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any, Callable

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ["JPY_PARENT_PID"]):  # it died before the line above
            sys.exit("the kernel host is gone")


def surrogate_safe(pack: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    from jupyter_client.jsonutil import json_clean, json_default

    def packed(obj: Any) -> bytes:
        try:
            return pack(obj)
        except UnicodeEncodeError:
            clean = json_clean(obj)
            return json.dumps(clean, default=json_default, allow_nan=False).encode("ascii")

    return packed


def main() -> None:
    die_with_parent()
    # A script's own folder heads sys.path; the kernel's user must not import from it.
    sys.path[0] = ""
    from ipykernel.kernelapp import IPKernelApp

    app = IPKernelApp.instance(connection_file=sys.argv[1])
    app.initialize([])
    app.session.pack = surrogate_safe(app.session.pack)
    app.start()


if __name__ == "__main__":
    main()
