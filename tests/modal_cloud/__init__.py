"""A loopback control plane for Modal: what the tests of the Modal backend stand on.

It is our own implementation, on the classes that ship in the modal wheel, of the slice of Modal's
protocol that sandboxes need. The client is the unmodified `modal` package; every method that is not
here answers UNIMPLEMENTED with its name.

    python -m tests.modal_cloud          prints the environment that a client's process needs

fixtures.py runs it in a process of its own for tests, and control.py has what they can plan and ask:
faults by call, capacity, builds that fail, machines that are taken away, the ledger. It needs root on
Linux, for namespaces and overlays; elsewhere it refuses to run, and the tests on it are skipped.

What is real: sandboxes are processes of this machine in their own PID, mount, IPC and UTS namespaces
(and network namespace when the network is blocked), on an overlay of `/`; files that are sent, volumes
with commits, secrets, execs with replayable streams, tags, names, timeouts, idle timeouts, snapshots
of files. Processes, mounts and namespaces end with the sandbox, and all of them with this server.
In a sandbox, the checkout that the tests run from is hidden (except its virtual environment), and
`/tmp`, `/run` and `/var/tmp` are empty. `python` is the interpreter that runs this server.

What it cannot show:
- GPUs. A GPU is a name in a request, a number in `capacity` and a price in the ledger.
- Image builds. Nothing is installed, whatever an image says: of its steps only ENV, WORKDIR and COPY
  have an effect. Logs and failures are scripted.
- Scheduling, quotas and capacity, except as a test sets them.
- Real billing. The ledger counts seconds from scheduled to ended, at the prices of a dated table.
- Limits. CPU and memory are not limited, disks are this machine's, an allow-list of domains or
  addresses is accepted and not enforced. There are no tunnels, terminals, sidecars, memory
  snapshots or cloud buckets.
- The isolation of a real sandbox: these share this machine's kernel, and run as its root.
- Where the protocol leaves a behaviour open, what is here is a guess; such places say so.
"""
