"""answer_all in a real Jupyter kernel: the bar, a second call, an interrupt."""

from __future__ import annotations

import queue
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import Server

manager = pytest.importorskip("jupyter_client.manager")
pytestmark = pytest.mark.filterwarnings("default")  # what Jupyter itself warns of

ROOT = Path(__file__).parent.parent
IMPORT = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from async_template import *"


class Kernel:
    """A Jupyter kernel: run a cell, interrupt it."""

    def __init__(self) -> None:
        self.manager = manager.KernelManager(kernel_name="python3")
        self.manager.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f"]
        self.manager.kernel_cmd.append("{connection_file}")
        self.manager.start_kernel()
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=40)

    def outputs(self, cell: str, interrupt: Server | None = None) -> Iterator[Any]:
        """What running the cell sends, until the kernel is idle again; interrupted as
        soon as a request is in flight at that server."""
        asked = self.client.execute(cell)
        while True:
            if interrupt and interrupt.in_flight:
                self.manager.interrupt_kernel()
                interrupt = None
            try:
                message = self.client.get_iopub_msg(timeout=0.1 if interrupt else 40)
            except queue.Empty:
                continue
            if message["parent_header"].get("msg_id") != asked:
                continue
            if message["content"].get("execution_state") == "idle":
                return
            yield message["content"]

    def run(self, cell: str) -> str:
        """All that the cell printed, shown or raised, as one text."""
        return "\n".join(map(str, self.outputs(cell)))

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    """One kernel for all tests of this file."""
    kernel = Kernel()
    kernel.run(IMPORT)
    yield kernel
    kernel.close()


def test_rows_and_bar(kernel: Kernel) -> None:
    """`await answer_all` gives the rows in order, and shows a bar."""
    shown = kernel.run("rows = await answer_all(['a', 'b'], offline=True)")
    assert "2/2" in shown
    assert "['a', 'b']" in kernel.run("print([r['text_message'] for r in rows])")


def test_second_call(kernel: Kernel) -> None:
    """No closed event loop stands in the way of a second call, nor a generator."""
    cell = "rows = await answer_all((t for t in 'abc'), offline=True); print(len(rows))"
    assert "'3\\n'" in kernel.run(cell)


def test_interrupt_leaves_a_usable_kernel(kernel: Kernel, server: Server) -> None:
    """The kernel's stop button ends a call that hangs; the next call works."""
    cell = "import os; os.environ.update(OPENAI_BASE_URL={!r}, OPENAI_API_KEY='k' * 9)"
    kernel.run(cell.format(server.url))
    assert [
        *kernel.outputs(
            "await answer_all(['[hang]'] * 3, timeout=3600)", interrupt=server
        )
    ]
    assert "'2\\n'" in kernel.run("print(len(await answer_all(['a', 'b'])))")
