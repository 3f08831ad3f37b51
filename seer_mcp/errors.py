"""Everything that can go wrong, as sentences a reader can act on.

SeerError
├── NotFound            a handle, cell, run, technique, backend, file that is not there
├── BadInput            an argument that cannot be used
│   └── PathRefused     a path that leaves its folder
├── Conflict            something else already has it
├── BudgetSpent         what may be spent is spent
├── KernelUnavailable   the kernel cannot run anything now
│   ├── KernelDead      it died; restart_kernel starts an empty one
│   └── KernelStartFailed
├── SandboxUnavailable  the machine cannot be used now
│   ├── SandboxUnreachable   it may come back
│   │   └── Unanswered       what was asked of it may be done all the same
│   ├── SandboxLost          it is gone
│   └── SandboxStartFailed
├── InvestigationRefused   an investigation.toml that cannot be used
│   └── InterfaceRefused   an interface file that cannot be served
├── ScopeUnavailable    the sandbox of an interface cannot answer; nothing of it is told
│   └── ScopeStarting   not yet
├── ModelUnavailable    a model of the hub that could not be fetched
├── NotebookUnreadable  the file is not a notebook that can be opened without losing something
├── NotebookNotSaved    the disk refused the document (nothing is lost: the journal has it)
├── PackError           a pack that cannot be read
└── Refused             the operating system refused a step

Each class writes its sentence from the facts: what is wrong, with the value, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence


class SeerError(Exception):
    """An anticipated failure. Its text is a whole answer for the caller."""


def show(value: object, limit: int = 80) -> str:
    """A value as it can stand in a sentence: quoted, escaped, short."""
    text = ascii(value) if isinstance(value, str) else str(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def nearest(value: str, known: Iterable[str]) -> str:
    """' Did you mean x?' or ''."""
    close = difflib.get_close_matches(value, list(known), n=1, cutoff=0.5)
    return f" Did you mean {show(close[0])}?" if close else ""


class NotFound(SeerError):
    """`what` named `value` is not among `known`; `then` says what to do."""

    def __init__(self, what: str, value: str, known: Iterable[str] = (), then: str = "") -> None:
        names = sorted(known)
        listed = ""
        if names:
            more = f" and {len(names) - 12} more" if len(names) > 12 else ""
            listed = f" Known: {', '.join(show(n) for n in names[:12])}{more}."
        tail = f" {then}" if then else ""
        super().__init__(f"No {what} {show(value)}.{nearest(value, names)}{listed}{tail}")


class BadInput(SeerError):
    """`argument` had `value`, which cannot be used because of `why`."""

    def __init__(self, argument: str, value: object, why: str) -> None:
        super().__init__(f"{argument} = {show(value)}: {why}")


class PathRefused(BadInput):
    """A path that would leave the folder it belongs to, or cannot be a path at all."""

    def __init__(self, argument: str, value: object, why: str) -> None:
        super().__init__(argument, value, f"{why}. Use a plain relative path inside the folder.")


class Conflict(SeerError):
    pass


class BudgetSpent(SeerError):
    """The budget of `whose` does not last for another sandbox; `used` says what of it is used.

    `flag` is the option that sets it, to `limit`; `period`: "day", "month", or "" if it never begins anew.
    """

    def __init__(self, whose: str, used: str, flag: str, limit: str, period: str) -> None:
        wait = f"wait for the next {period} (UTC), " if period else ""
        super().__init__(
            f"No sandbox that costs money is started: the budget of {whose} is used up ({used}). End what runs and is "
            f"not needed (stop_sandbox), {wait}or ask the operator to raise it ({flag}, now {show(limit)})."
        )


class KernelUnavailable(SeerError):
    pass


class KernelDead(KernelUnavailable):
    """The kernel died as `how` tells; its variables are gone."""

    def __init__(self, how: str) -> None:
        super().__init__(
            f"The kernel died ({how}); its variables are gone and nothing can run in it. "
            "Call restart_kernel for a new, empty kernel, then run the cells that you need again."
        )


class KernelStartFailed(KernelUnavailable):
    def __init__(self, why: str, stderr: str) -> None:
        tail = "\n".join(stderr.splitlines()[-20:])
        shown = f"\nLast lines of its stderr:\n{tail}" if tail.strip() else ""
        super().__init__(f"The kernel did not start: {why}.{shown}")


class SandboxUnavailable(SeerError):
    pass


class SandboxUnreachable(SandboxUnavailable):
    pass


class Unanswered(SandboxUnreachable):
    """What was asked may have been heard, and done, all the same."""


class SandboxLost(SandboxUnavailable):
    def __init__(self, handle: str, why: str, again: Mapping[str, str]) -> None:
        """`again`: what start_sandbox is told to open its notebook on such a machine."""
        asked = ", ".join(f"{name}={show(value, 1000)}" for name, value in again.items())
        super().__init__(
            f"Sandbox {handle} is gone ({why}); its variables are lost, its notebook is kept: "
            f"{again['notebook']}. Start a new one with start_sandbox({asked}) and run "
            "the cells that you need again."
        )


NOTHING_LEFT = "Nothing was left running."


class SandboxStartFailed(SandboxUnavailable):
    def __init__(self, why: str, log: str = "") -> None:
        tail = "\n".join(log.splitlines()[-20:])
        shown = f"\nLast lines of its log:\n{tail}" if tail.strip() else ""
        super().__init__(f"The sandbox did not start: {why}. {NOTHING_LEFT}{shown}")


class StillStarting(SandboxUnavailable):
    def __init__(self, handle: str, report: str, seconds: float) -> None:
        super().__init__(
            f"Sandbox {handle} is still starting ({report}; {seconds:.0f} s so far). It goes on by itself. "
            f"Next: list_sandboxes(wait=45) waits for it, stop_sandbox(sandbox={show(handle)}) gives it up."
        )


class EndUnconfirmed(SandboxUnavailable):
    """A machine that may still run, and cost money if it is billed, although its end was asked for."""

    def __init__(self, handle: str, id: str, why: str, billed: bool = True) -> None:
        super().__init__(
            f"STILL {'BILLING' if billed else 'RUNNING'}: sandbox {handle} ({id}) could not be ended: {why}. "
            "Its end is asked for again and again; list_sandboxes shows when it is confirmed."
        )
        self.id = id
        self.why = why


class ModelUnavailable(SeerError):
    """A model that is not there, for the reason that `code` names (docs/models.md)."""

    def __init__(self, model: str, code: str, why: str) -> None:
        super().__init__(f"Model {show(model)} could not be fetched: {why}")
        self.code = code


class InvestigationRefused(SeerError):
    """Each of `problems` names a key of the file, its value, and what is allowed."""

    def __init__(self, path: str, problems: Sequence[str]) -> None:
        listed = problems[0] if len(problems) == 1 else "".join(f"\n- {each}" for each in problems)
        end = "" if listed.endswith((".", "?")) else "."
        super().__init__(f"{path} cannot be used: {listed}{end}")
        self.problems = tuple(problems)


class InterfaceRefused(InvestigationRefused):
    """Each of `problems` names a function of the file and what must be changed."""


class ScopeUnavailable(SeerError):
    """For clients that may know nothing of the sandbox: what they can do, and never why."""


class ScopeStarting(ScopeUnavailable):
    def __init__(self) -> None:
        super().__init__(
            "The sandbox behind these functions is still starting. Nothing was called; call again in a moment."
        )


class NotebookUnreadable(SeerError):
    def __init__(self, path: str, why: str) -> None:
        super().__init__(
            f"The notebook {path} cannot be opened: {why}. The file was not changed and nothing "
            "was started. Repair it, or start without notebook=."
        )


class NotebookNotSaved(SeerError):
    def __init__(self, path: str, why: str) -> None:
        super().__init__(
            f"The notebook {path} could not be saved: {why}. The file on disk is the last whole "
            "version; outputs are kept in the sandbox's journal. What this call changed is kept too: "
            "do not repeat it. Once that is mended, the next save will be complete."
        )


class PackError(SeerError):
    pass


class Refused(SeerError):
    def __init__(self, error: OSError) -> None:
        where = "".join(f": {show(name, 300)}" for name in (error.filename,) if name)
        super().__init__(
            f"This could not be done ({error.strerror or error}{where}). Mend that and call again; "
            "the server's log says where it happened."
        )
