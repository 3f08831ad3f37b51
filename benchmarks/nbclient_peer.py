"""nbclient as a peer of `peers.py`: each request is one JSON line, each cell is run and the notebook saved.

Runs in the peers' own environment. Requests: {"open": PATH}, {"run": SOURCE}, {"close": true}.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError


class Book:
    def __init__(self, path: str) -> None:
        self.path = path
        self.notebook = nbformat.read(path, as_version=4)
        self.client = NotebookClient(self.notebook, timeout=None, kernel_name="python3")

    async def open(self) -> None:
        self.client.reset_execution_trackers()
        self.client.create_kernel_manager()
        await self.client.async_start_new_kernel()
        await self.client.async_start_new_kernel_client()

    async def run(self, source: str) -> None:
        cell = nbformat.v4.new_code_cell(source)
        self.notebook.cells.append(cell)
        try:
            await self.client.async_execute_cell(cell, len(self.notebook.cells) - 1)
        finally:
            nbformat.write(self.notebook, self.path)

    async def close(self) -> None:
        await self.client._async_cleanup_kernel()


async def main() -> None:
    book: Book | None = None
    while line := await asyncio.to_thread(sys.stdin.readline):
        request: dict[str, Any] = json.loads(line)
        answer: dict[str, Any] = {"ok": True}
        try:
            if "open" in request:
                book = Book(request["open"])
                await book.open()
            elif book is not None and "run" in request:
                await book.run(request["run"])
            elif book is not None:
                await book.close()
                book = None
        except (CellExecutionError, DeadKernelError) as error:
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
