"""`sync` in a sandbox: asks the control plane to commit what was written to volumes.

On Modal, syncing the mount of a volume (version 2) commits it. An overlay here cannot see syncfs, so
the command is replaced: it names the paths in a request file and waits for the answer.
"""

import os
import sys
import time

CONTROL = "/__modal/control"


def main():
    name = "%s/sync-%d-%d" % (CONTROL, os.getpid(), time.monotonic_ns())
    with open(name + ".part", "w") as file:
        file.write("\n".join(os.path.abspath(path) for path in sys.argv[1:] if path[:1] != "-"))
    os.rename(name + ".part", name + ".asked")
    deadline = time.monotonic() + 60
    while not os.path.exists(name + ".done"):
        if time.monotonic() > deadline:
            sys.exit("sync: the control plane did not answer")
        time.sleep(0.005)
    with open(name + ".done") as file:
        refused = file.read()
    os.unlink(name + ".done")
    if refused:
        sys.exit("sync: " + refused)


main()
