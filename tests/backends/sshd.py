"""A real OpenSSH server on loopback, with keys and a client configuration of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
ABSENT = "" if SSHD and shutil.which("ssh-keygen") else "no OpenSSH server (install openssh-server)"

SERVER = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
LogLevel ERROR
MaxStartups 100
SetEnv HOME={home} PATH={programs}:{path}
"""
CLIENT = """
Host lab
    HostName 127.0.0.1
    Port {port}
    IdentityFile {folder}/key
    UserKnownHostsFile {folder}/known_hosts
Host stranger
    HostName 127.0.0.1
    Port {port}
    IdentityFile {folder}/other_key
    UserKnownHostsFile {folder}/known_hosts
Host unknown-key
    HostName 127.0.0.1
    Port {port}
    IdentityFile {folder}/key
    UserKnownHostsFile {folder}/nothing_known
Host changed-key
    HostName 127.0.0.1
    Port {port}
    IdentityFile {folder}/key
    UserKnownHostsFile {folder}/changed_hosts
Host closed
    HostName 127.0.0.1
    Port {closed}
    IdentityFile {folder}/key
Host silent
    HostName 127.0.0.1
    Port {silent}
    IdentityFile {folder}/key
Host *
    IdentitiesOnly yes
    GlobalKnownHostsFile none
"""


def key(path: Path) -> str:
    """A new key pair; the public part."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)], check=True
    )
    return path.with_suffix(".pub").read_text().strip()


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


class Machine:
    """`lab` leads to it; the other names of the client's configuration are bad days."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.programs = folder / "programs"
        for path in (self.home, self.programs):
            path.mkdir(parents=True)
        host, ours = key(folder / "host_key"), key(folder / "key")
        other = key(folder / "other_key")
        self.port, self._silent = free_port(), socket.socket()
        self._silent.bind(("127.0.0.1", 0))
        self._silent.listen()
        (folder / "authorized_keys").write_text(ours + "\n")
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {host}\n")
        (folder / "changed_hosts").write_text(f"[127.0.0.1]:{self.port} {other}\n")
        facts = {
            "folder": folder,
            "port": self.port,
            "closed": free_port(),
            "silent": self._silent.getsockname()[1],
            "home": self.home,
            "programs": self.programs,
            "path": os.environ["PATH"],
        }
        (folder / "sshd_config").write_text(SERVER.format(**facts))
        (folder / "ssh_config").write_text(CLIENT.format(**facts))
        self.ssh = ("ssh", "-F", str(folder / "ssh_config"))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if os.getuid() == 0:  # it separates privileges then, and wants this folder
            os.makedirs("/run/sshd", exist_ok=True)
        assert SSHD is not None
        with (self.folder / "sshd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.02)
        raise AssertionError((self.folder / "sshd.log").read_text())

    def stop(self) -> None:
        """The server goes, and every connection with it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None
            self.cut()

    def cut(self) -> int:
        """Every connection breaks; how many there were. What was started over them goes on."""
        cut = 0
        for process in psutil.process_iter(["cmdline"]):
            command = " ".join(process.info["cmdline"] or [])
            listener = self._process is not None and process.pid == self._process.pid
            if listener or not command.startswith("sshd:"):
                continue
            try:
                ours = any(c.laddr.port == self.port for c in process.net_connections("tcp"))
                if ours:
                    process.send_signal(signal.SIGKILL)
                    cut += 1
            except psutil.NoSuchProcess:
                continue
        return cut

    def end_shared(self, runtime: Path) -> None:
        """End the connections that clients share."""
        for control in runtime.glob("ssh-*"):
            subprocess.run(
                [*self.ssh, "-o", f"ControlPath={control}", "-O", "exit", "lab"],
                capture_output=True,
                check=False,
            )

    def close(self) -> None:
        self.stop()
        self._silent.close()
