"""compare_sync_async.py: four ways to ask the same question, one table."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import ROOT
from pydantic import BaseModel
from server import Server

import async_template
import compare_sync_async

SCRIPT = ROOT / "compare_sync_async.py"
HEAD = "| | best | spread | rows/s | speedup | errors |"
WAYS = ["loop", "threads", "gather", "async_template"]
BAD = "--latency=-1 --latency=nan --repeat=2 --concurrency=0 --n=0 --n=some"

Compare = Callable[..., tuple[int, str, str]]


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Compare:
    """Runs the script on messages or a file; gives the exit status and the streams."""

    def compare(messages: Any, *options: str) -> tuple[int, str, str]:
        path = messages
        if not isinstance(messages, Path):
            path = tmp_path / "in.txt"
            path.write_text("\n".join(messages), encoding="utf-8")
        try:
            status = compare_sync_async.main([str(path), *options])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return compare


def column(printed: str, number: int) -> list[str]:
    """A column of the table, without its head."""
    _, table = printed.split(f"\n\n{HEAD}\n")
    return [line.split(" | ")[number].strip(" |") for line in table.splitlines()[1:]]


# --- The table ------------------------------------------------------------------------
def test_offline_command() -> None:
    """No key: date, versions, command, and a table of four rows without errors."""
    options = ["--offline", "--n=4", "--latency=0.05", "--concurrency=2"]
    command = [sys.executable, "-W", "error", SCRIPT.name, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    versions, again = done.stdout.splitlines()[:2]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d, Python 3\.\d+\.\S+, openai [\d.]+", versions)
    assert again == f"python {SCRIPT.name} {' '.join(options)}"
    assert column(done.stdout, 0) == WAYS
    assert column(done.stdout, 5) == ["0"] * 4
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == WAYS * 3


def test_errors_are_counted(server: Server, compare: Compare) -> None:
    """Four bad messages are twelve errors in three runs. A fifth one is answered from
    its fifth request on: an error for three ways, but the template asks once more."""
    bad = ["[400]", "[refusal]", "[prose]", "[incomplete]"]
    messages = ["fine", *bad, "[500,500,500,500,ok]"]
    status, out, _ = compare(messages, "--yes", "--n=6")
    assert status == 1
    assert column(out, 5) == ["13", "13", "13", "12"]


def test_question(
    server: Server, tmp_path: Path, compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ways send the same bodies, by what the user made of part 1."""

    class Digest(BaseModel):
        topic: Literal["economy", "health"]

    monkeypatch.setattr(async_template, "PROMPT", "{title}: {text_message}")
    monkeypatch.setattr(async_template, "EXAMPLE", Digest(topic="health"))
    path = tmp_path / "in.csv"
    path.write_text("title,text\nFirst,one {title}\nSecond,two\n")
    assert compare(path, "--yes", "--n=3", "--concurrency=2")[0] == 0
    assert server.count("First: one {title} (") == 16 + 12  # four are a warm-up
    assert server.count("Second: two (1)") == 12
    bodies = {json.dumps(request.body, sort_keys=True) for request in server.requests}
    body = server.requests[0].body
    assert len(bodies) == 3 and body.items() >= async_template.EXTRA.items()
    assert set(body["text"]["format"]["schema"]["properties"]) == {"topic"}


# --- How it ends ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("messages", "option", "why"),
    [
        (["", " "], "--offline", "there is no message"),
        (Path("gone.txt"), "--offline", "gone.txt"),
        (["a"], "--yes", "OPENAI_API_KEY"),  # there is none
        *((["a"], option, ": error: ") for option in BAD.split()),
    ],
)
def test_cannot_start(compare: Compare, messages: Any, option: str, why: str) -> None:
    """The last line says why."""
    status, out, err = compare(messages, option)
    assert status == 2 and not out
    assert why in err.splitlines()[-1]


def test_real_api_needs_a_yes(server: Server, compare: Compare) -> None:
    """4 ways * (3 runs * 30 messages + a warm-up), their price, and nothing asked."""
    status, out, err = compare(["a"])
    assert status == 2 and not out and server.total == 0
    assert re.fullmatch(r"364 calls, some 0\.07 USD: add --yes\n", err)


def test_wrong_key(server: Server, compare: Compare) -> None:
    """It is found by the warm-up, after one request of each way."""
    server.default = "401"
    status, out, err = compare(["a", "b"], "--yes")
    assert status == 2 and not out and server.total == 4
    assert "OPENAI_API_KEY" in err and err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is another thing there")
@pytest.mark.parametrize("replies", ["hang", "ok,ok,ok,ok:ms=900"])
def test_interrupt(server: Server, tmp_path: Path, replies: str) -> None:
    """Ctrl-C ends the loop at once, and the template once its requests have landed:
    with 130 and no traceback."""
    source = tmp_path / "in.txt"
    source.write_text(f"[{replies}]")
    command: list[Any] = [sys.executable, SCRIPT, source, "--yes", "--n=1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while server.total < len(replies.split(",")) or not server.in_flight:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.startswith("interrupted") and err.count("\n") == 1
