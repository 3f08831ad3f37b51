"""What the server is told at its start: one frozen object. No other module reads the environment."""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from platformdirs import user_cache_path, user_state_path

from .files import NAME, RESERVED, writable
from .money import Allowance, parse_allowance
from .redact import Redactor
from .secret import Secrets

# What a sandbox's processes get of our environment. Everything else, secrets above all, stays here.
PASSED = frozenset(
    [
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "LANG",
        "LANGUAGE",
        "LC_ALL",
        "LC_CTYPE",
        "TZ",
        "TERM",
        "TMPDIR",
        "XDG_CACHE_HOME",
        "XDG_DATA_HOME",
        "XDG_CONFIG_HOME",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_DATASETS_CACHE",
        "HF_ENDPOINT",
        "TRANSFORMERS_CACHE",
        "TRANSFORMERS_OFFLINE",
        "TORCH_HOME",
        "TRITON_CACHE_DIR",
        "CUDA_HOME",
        "CUDA_VISIBLE_DEVICES",
        "CUDA_DEVICE_ORDER",
        "PYTORCH_CUDA_ALLOC_CONF",
        "NVIDIA_VISIBLE_DEVICES",
        "LD_LIBRARY_PATH",
        "DYLD_LIBRARY_PATH",
        "HIP_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "TOKENIZERS_PARALLELISM",
        "CONDA_PREFIX",
        "CONDA_DEFAULT_ENV",
        "VIRTUAL_ENV",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE",
    ]
)
# What the process that fetches models gets. It alone is given HF_TOKEN.
FOR_FETCHING = frozenset(
    [
        "PATH",
        "HOME",
        "LANG",
        "TMPDIR",
        "LD_LIBRARY_PATH",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE",
        "HF_ENDPOINT",
        "HF_HOME",
        "HF_TOKEN",
        "HF_TOKEN_PATH",
        "HF_HUB_OFFLINE",
        "HF_HUB_DOWNLOAD_TIMEOUT",
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
        *("http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    ]
)
NEVER_PASSED = ("MODAL_", "MCP_", "SEER_MCP_", "CLAUDE", "ANTHROPIC")


@dataclass(frozen=True)
class Config:
    """Built in cli.py from flags and the environment, passed down, never changed."""

    project_dir: Path
    """Where the client's user works: notebooks are found here by relative path."""
    outputs_dir: Path
    """Where new notebooks are saved, one folder each."""
    state_dir: Path
    """Records of sandboxes (0700)."""
    runtime_dir: Path
    """Sockets (0700); a short path, because a socket's address has about 100 characters."""
    sandbox_env: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    """The environment of sandboxes."""
    models_dir: Path = field(default_factory=lambda: user_cache_path("seer-mcp") / "models")
    """Where fetched models are kept, for all local sandboxes."""
    fetch_env: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    """The environment of the process that fetches models. It may hold HF_TOKEN, and goes nowhere else."""
    secrets: Secrets = field(default_factory=Secrets, repr=False)
    """Where the values of secrets are found that a sandbox names."""
    redactor: Redactor = field(default_factory=Redactor, repr=False, compare=False)
    """What must not be shown. It learns: whoever comes to know a secret's value tells it."""
    log_redactor: Redactor = field(default_factory=Redactor, repr=False, compare=False)
    """The same for logs and audit, which must not name hidden models of any sandbox either."""
    allowances: tuple[Allowance, ...] = ()
    """What all sandboxes of the state folder together may cost."""
    packs: tuple[Path, ...] = ()
    """Folders of the user's own packs."""
    investigations: tuple[Path, ...] = ()
    """Folders of the user's own investigations, beside the shipped ones."""
    notebook_roots: tuple[Path, ...] = ()
    """Further folders whose notebooks may be opened."""
    python: str = sys.executable
    """The interpreter of local sandboxes."""
    ssh: tuple[str, ...] = ("ssh",)
    """The ssh client and its own options (SEER_MCP_SSH)."""
    max_wait: float = 45.0
    """The longest that one tool call waits for a run, in seconds."""
    idle_limit: float = 2 * 3600.0
    """A sandbox that nobody used for so many seconds, with nothing running, ends itself."""
    output_cap: int = 200_000_000
    """Bytes of output that are kept of one run."""
    max_sandboxes: int = 60
    on_exit: Literal["keep", "stop"] = "keep"
    """Whether local sandboxes outlive the server (the next server finds them again)."""
    team: bool = False
    """Whether several people use the server. Each then has a folder of their own, and what is the operator's (the
    project, ssh, the local machine, secrets) is theirs only as far as the next three say."""
    team_backends: tuple[str, ...] = ("modal",)
    team_secrets: tuple[str, ...] = ()
    owner_uids: range = range(0)
    """Users of this machine, one for each owner's local sandboxes; none: they run as the server's."""
    owner_allowances: tuple[Allowance, ...] = ()
    """What the sandboxes of each owner may cost."""
    owner_sandboxes: int = 20
    """How many each owner may have at once, where there are several."""
    starts_at_once: int = 8
    """How many sandboxes start at the same time; further ones wait for their turn."""
    audit_code: int = 4000
    """Characters of each piece of code that the audit file keeps, beside its hash."""
    fault: str = ""
    """SEER_MCP_FAULT: where a test wants the server or its hosts killed (kernel_host/fault.py)."""

    def home(self, owner: str) -> Home:
        """Where an owner's notebooks are."""
        if not self.team:
            roots = (self.project_dir, self.outputs_dir, *self.notebook_roots)
            return Home(self.project_dir, self.outputs_dir, roots)
        folder = self.outputs_dir / folder_of(owner)
        return Home(folder, folder, (folder,))


@dataclass(frozen=True)
class Home:
    base: Path
    """What relative paths start from."""
    outputs: Path
    """Where new notebooks are saved."""
    roots: tuple[Path, ...]
    """Where files may be opened."""


def folder_of(owner: str) -> str:
    """A name for an owner's folder; two owners never share one."""
    if NAME.fullmatch(owner) and owner not in RESERVED:
        return owner
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in owner.lower())[:24]
    return f"{kept.strip('-') or 'owner'}.{hashlib.sha256(owner.encode()).hexdigest()[:12]}"


def default_outputs(project_dir: Path, home: Path) -> Path:
    """./outputs of the project where that can be written, else a folder in the user's home."""
    chosen = project_dir / "outputs"
    # A desktop client starts its servers in the root folder: that is nobody's project.
    if project_dir != Path(project_dir.anchor) and writable(chosen):
        return chosen
    return home / "seer-mcp" / "outputs"


def from_environment(
    environ: Mapping[str, str],
    cwd: Path,
    *,
    outputs: str | None = None,
    state: str | None = None,
    models: str | None = None,
    packs: tuple[str, ...] = (),
    investigations: tuple[str, ...] = (),
    notebook_roots: tuple[str, ...] = (),
    pass_env: tuple[str, ...] = (),
    python: str | None = None,
    idle_limit: float | None = None,
    max_wait: float | None = None,
    output_cap: int | None = None,
    on_exit: Literal["keep", "stop"] = "keep",
    audit_code: int | None = None,
    budgets: tuple[str, ...] = (),
) -> Config:
    """The Config of this process. Flags win over environment variables, these over defaults."""
    project = Path(environ.get("CLAUDE_PROJECT_DIR") or cwd)
    state_dir = Path(state or environ.get("SEER_MCP_STATE") or user_state_path("seer-mcp"))
    runtime = environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    given = outputs or environ.get("SEER_MCP_OUTPUTS")
    outputs_dir = Path(given) if given else default_outputs(project, Path.home())
    passed = {
        name: value
        for name, value in environ.items()
        if (name in PASSED or name in pass_env) and not name.startswith(NEVER_PASSED)
    }
    models_dir = models or environ.get("SEER_MCP_MODELS") or user_cache_path("seer-mcp") / "models"
    secrets = Secrets(environ, project.absolute() / ".env")
    redactor = Redactor(secrets.known())
    limits = budgets or tuple(filter(None, environ.get("SEER_MCP_BUDGET", "").split(",")))
    defaults = Config(project, outputs_dir, state_dir, Path(runtime))
    return Config(
        project_dir=project.resolve(),
        outputs_dir=outputs_dir.absolute(),
        state_dir=state_dir.absolute(),
        runtime_dir=Path(runtime) / f"seer-mcp-{os.getuid()}",
        sandbox_env=passed,
        models_dir=Path(models_dir).absolute(),
        fetch_env={name: value for name, value in environ.items() if name in FOR_FETCHING},
        secrets=secrets,
        redactor=redactor,
        log_redactor=redactor.child(),
        allowances=tuple(parse_allowance(limit) for limit in limits),
        packs=tuple(Path(p).absolute() for p in packs),
        investigations=tuple(Path(p).absolute() for p in investigations),
        notebook_roots=tuple(Path(p).absolute() for p in notebook_roots),
        python=python or environ.get("SEER_MCP_PYTHON") or sys.executable,
        ssh=tuple(shlex.split(environ.get("SEER_MCP_SSH", ""))) or defaults.ssh,
        max_wait=defaults.max_wait if max_wait is None else max_wait,
        idle_limit=defaults.idle_limit if idle_limit is None else idle_limit,
        output_cap=defaults.output_cap if output_cap is None else output_cap,
        on_exit=on_exit,
        audit_code=defaults.audit_code if audit_code is None else audit_code,
        fault=environ.get("SEER_MCP_FAULT", ""),
    )
