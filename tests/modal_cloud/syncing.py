"""`sync` in a sandbox: asks the control plane to commit what was written to volumes.

On Modal, syncing the mount of a volume (version 2) commits it. An overlay here cannot see syncfs, so
the command is replaced: it names the paths in a request, and waits for the answer.
"""

import json
import os
import sys
import time

CONTROL = "/__modal/control/"


def main():
    answer = f"sync-{os.getpid()}-{time.monotonic_ns()}"
    paths = [os.path.abspath(path) for path in sys.argv[1:] if path[:1] != "-"]
    request = json.dumps({"answer": answer, "paths": paths}) + "\n"
    with open(CONTROL + "requests", "wb", 0) as pipe:
        pipe.write(request.encode())
    deadline = time.monotonic() + 60
    while not os.path.exists(CONTROL + answer):
        if time.monotonic() > deadline:
            sys.exit("sync: the control plane did not answer")
        time.sleep(0.005)
    with open(CONTROL + answer) as file:
        refused = file.read()
    os.unlink(CONTROL + answer)
    if refused:
        sys.exit("sync: " + refused)


main()
