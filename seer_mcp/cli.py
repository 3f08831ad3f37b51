"""seer-mcp: the command line."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from . import __version__
from .bench import add_bench, run_bench
from .clients import add_install, run_install
from .cloud_models import run_cloud_models
from .config import Config, from_environment
from .environment import read_scope, schema
from .errors import BadInput, SeerError
from .export import add_export, run_export, run_report
from .flags import above_zero, count
from .grading import kept
from .kernel_host.fault import arm, in_host
from .logs import log_to_stderr
from .model_store.command import add_models, run_models
from .own_packs import add_packs, begin_pack, check_packs
from .replay import add_replay, run_replay
from .sandboxes import add_sandboxes, run_sandboxes
from .serve import add_scope, add_serve, add_watch, run_token
from .sessions import make_folders


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="seer-mcp",
        description="An MCP server through which any MCP client investigates a language model. "
        "Without a command it serves one client over stdio.",
    )
    top.add_argument("--version", action="version", version=f"seer-mcp {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--outputs",
        metavar="DIR",
        help="where new notebooks are saved (default: ./outputs of the project)",
    )
    common.add_argument(
        "--state",
        metavar="DIR",
        help="where records of sandboxes are kept (default: the user's state folder)",
    )
    common.add_argument(
        "--models",
        metavar="DIR",
        help="where fetched models are kept (default: the user's cache folder)",
    )
    common.add_argument(
        "--packs",
        metavar="DIR",
        action="append",
        default=[],
        help="a folder of your own tool packs",
    )
    common.add_argument(
        "--investigations",
        metavar="DIR",
        action="append",
        default=[],
        help="a folder of your own investigations, beside the shipped ones",
    )
    common.add_argument(
        "--notebooks",
        metavar="DIR",
        action="append",
        default=[],
        help="a further folder whose notebooks may be opened",
    )
    common.add_argument(
        "--python", metavar="PATH", help="the interpreter of local sandboxes (needs ipykernel)"
    )
    common.add_argument(
        "--pass-env",
        metavar="NAME",
        action="append",
        default=[],
        help="an environment variable that sandboxes get",
    )
    common.add_argument(
        "--idle-minutes",
        type=above_zero,
        metavar="N",
        help="a sandbox without use ends itself after N minutes (default: 120)",
    )
    common.add_argument(
        "--max-wait",
        type=above_zero,
        metavar="S",
        help="the longest that one tool call waits, in seconds (default: 45)",
    )
    common.add_argument(
        "--output-cap",
        type=count,
        metavar="BYTES",
        help="how much output of one run is kept (default: 200000000)",
    )
    common.add_argument(
        "--on-exit",
        choices=("keep", "stop"),
        default="keep",
        help="whether sandboxes outlive the server (default: keep)",
    )
    common.add_argument(
        "--log-level",
        default="warning",
        choices=("debug", "info", "warning", "error"),
        help="what is said on stderr; the files in the state folder's logs/ hold all (default: warning)",
    )
    common.add_argument(
        "--audit-code",
        type=count,
        metavar="CHARACTERS",
        help="how much of each piece of code the audit file keeps beside its hash (default: 4000)",
    )
    common.add_argument(
        "--budget",
        metavar="AMOUNT",
        action="append",
        default=[],
        help="what all sandboxes together may cost: '$20 a day', '600 GPU-minutes a month'; may be given twice",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    stdio = commands.add_parser(
        "stdio", parents=[common], help="serve one client over stdin and stdout (the default)"
    )
    add_scope(stdio)
    add_serve(commands, common)
    add_watch(commands, common)
    add_install(commands)
    add_packs(commands, common)
    demo = commands.add_parser(
        "demo", help="find a planted belief in a shipped model, with its control"
    )
    demo.add_argument("--json", action="store_true", help="print the finding as one JSON object")
    demo.add_argument("--outputs", metavar="DIR", help="where the notebook is saved")
    demo.add_argument(
        "--backend",
        choices=("local", "modal"),
        default="local",
        help="where its sandbox runs (modal is billed: about a cent, a dollar at most)",
    )
    doctor = commands.add_parser(
        "doctor", parents=[common], help="check this machine and what earlier servers left"
    )
    doctor.add_argument(
        "--fix", action="store_true", help="repair what can be repaired without losing anything"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument(
        "--only", metavar="CHECK", action="append", default=[], help="make only this check"
    )
    add_bench(commands)
    add_models(commands, common)
    add_sandboxes(commands, common)
    add_replay(commands, common)
    add_export(commands, common)
    grades = commands.add_parser(
        "grades", parents=[common], help="what graders said of submitted findings"
    )
    grades.add_argument("--json", action="store_true", help="print one JSON list")
    commands.add_parser(
        "schema", help="print the JSON schema of investigation.toml, for editors that check it"
    )
    return top


def config_of(flags: argparse.Namespace) -> Config:
    on_exit: Literal["keep", "stop"] = flags.on_exit
    idle: float | None = flags.idle_minutes
    return from_environment(
        os.environ,
        Path.cwd(),
        outputs=flags.outputs,
        state=flags.state,
        models=flags.models,
        packs=tuple(flags.packs),
        investigations=tuple(flags.investigations),
        notebook_roots=tuple(flags.notebooks),
        pass_env=tuple(flags.pass_env),
        python=flags.python,
        idle_limit=None if idle is None else idle * 60,
        max_wait=flags.max_wait,
        output_cap=flags.output_cap,
        on_exit=on_exit,
        audit_code=flags.audit_code,
        budgets=tuple(flags.budget),
    )


def arm_faults(plan: str) -> None:
    """Where SEER_MCP_FAULT wants this process killed (docs/fault-points.md)."""
    try:
        arm("" if in_host(plan) else plan)
    except ValueError as error:
        raise BadInput("SEER_MCP_FAULT", plan, str(error)) from error


def run_grades(config: Config, as_json: bool) -> int:
    """Print all grades; 1 if one could not be read, else 0."""
    found, problems = kept(config.state_dir)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        for one in found:
            score = "no grade" if one["score"] is None else f"{one['score']:.2f}"
            why = one["failed"] or one["notes"]
            tail = f"\n    {' '.join(why.split())}" if why else ""
            print(
                f"{score:8} {one['investigation']}  {one['sandbox']} findings {one['number']}, "
                f"confidence {one['confidence']:.0%}: {' '.join(one['claim'].split())[:200]}\n"
                f"    {one['notebook']}{tail}"
            )
        if not found:
            print("no findings were graded")
    for problem in problems:
        print(f"seer-mcp: {problem}", file=sys.stderr)
    return 1 if problems else 0


async def run_doctor(config: Config, only: Sequence[str], fix: bool, as_json: bool) -> int:
    """Print the report; 0 if nothing failed, else 1."""
    from .doctor import Line, Patient, examine

    patient = Patient(config, os.environ, Path.home())
    lines: list[Line] = []
    async for line in examine(patient, only, fix):
        lines.append(line)
        if not as_json:
            mend = f"\n      {'':12} -> {line.mend}" if line.mend else ""
            print(f"{line.status:5} {line.check:12} {line.says}{mend}", flush=True)
    bad = sum(line.status == "fail" for line in lines)
    if as_json:
        report = {"ok": not bad, "lines": [vars(line) for line in lines]}
        print(json.dumps(report, indent=1))
    else:
        doubtful = sum(line.status == "warn" for line in lines)
        hint = any(line.fixable for line in lines)
        tail = "; seer-mcp doctor --fix repairs some of it" if hint and not fix else ""
        print(f"{bad} failed, {doubtful} warnings{tail}")
    return 1 if bad else 0


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    known = (
        "stdio",
        "serve",
        "watch",
        "install",
        "packs",
        "demo",
        "doctor",
        "bench-techniques",
        "models",
        "sandboxes",
        "token",
        "replay",
        "export",
        "report",
        "grades",
        "schema",
        "--version",
        "--help",
        "-h",
    )
    if not given or (given[0] not in known and given[0].startswith("-")):
        given.insert(0, "stdio")
    flags = parser().parse_args(given)
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        if os.environ.get(name) == "":  # a client's empty setting, which would hide ~/.modal.toml
            del os.environ[name]
    try:
        if flags.command == "demo":
            from .demo import run_demo

            return asyncio.run(run_demo(flags.json, flags.outputs, flags.backend))
        if flags.command == "bench-techniques":
            os.environ.setdefault("TQDM_DISABLE", "1")  # for its processes too
            return run_bench(flags)
        if flags.command == "schema":
            print(json.dumps(schema(), indent=1))
            return 0
        if flags.command == "install":
            return run_install(flags, os.environ)
        if flags.command == "packs" and flags.verb == "new":
            return begin_pack(flags)
        config = config_of(flags)
        log_to_stderr(flags.log_level, config.log_redactor)
        arm_faults(config.fault)
        if flags.command == "models" and getattr(flags, "backend", "local") == "modal":
            return asyncio.run(run_cloud_models(flags, config))
        if flags.command == "models":
            return run_models(flags, config)
        if flags.command == "packs":
            return check_packs(flags, config)
        if flags.command == "sandboxes":
            return asyncio.run(run_sandboxes(flags, config))
        if flags.command == "replay":
            return run_replay(flags, config)
        if flags.command == "export":
            return run_export(flags, config)
        if flags.command == "report":
            return run_report(flags, config)
        if flags.command == "watch":
            from .watching import run_watch

            return run_watch(flags, config)
        if flags.command == "token":
            return run_token(flags, config)
        if flags.command == "grades":
            return run_grades(config, flags.json)
        if flags.command == "doctor":
            return asyncio.run(run_doctor(config, flags.only, flags.fix, flags.json))
        if flags.command == "serve":
            from .serve import run_serve

            return run_serve(flags, config)
        else:
            from .server import build_server, serve_stdio

            make_folders(config)  # a client shows one sentence rather than a traceback
            if flags.scope is None:
                asyncio.run(serve_stdio(build_server(config)))
            else:
                from .scoped import build_scoped_server

                found = read_scope(Path(flags.scope))
                asyncio.run(serve_stdio(build_scoped_server(config, found)))
    except (SeerError, OSError) as error:
        print(f"seer-mcp: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
