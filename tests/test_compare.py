"""compare_sync_async.py: four ways to ask the same question, one table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import async_template

SCRIPT = Path(async_template.__file__).with_name("compare_sync_async.py")
BAD = "--latency=-1 --latency=nan --repeat=0 --repeat=2 --concurrency=0 --n=0 --n=some"


def compare(*args: str) -> subprocess.CompletedProcess[str]:
    """The finished command; nothing is on its standard input."""
    command = [sys.executable, "-W", "error", str(SCRIPT), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, input="")


def test_table() -> None:
    """A table of four rows, no errors; a bar for each run on standard error."""
    done = compare("--offline", "--n", "5", "--latency", "0.01")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if " s | " in line]
    names = ["| loop", "| threads", "| gather", "| async_template"]
    assert [row[0] for row in rows] == names
    assert [row[5] for row in rows] == ["0"] * 4
    assert rows[0][6] == "1 |" and done.stderr.count("#\n") == 12


@pytest.mark.parametrize("arg", BAD.split())
def test_bad_usage(arg: str) -> None:
    """argparse's own error line."""
    done = compare("--offline", arg)
    assert done.returncode == 2 and not done.stdout
    assert f"error: argument {arg.split('=')[0]}: " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "line"), [("", "no key: "), ("gone.txt --offline", "[Errno 2]")]
)
def test_cannot_start(args: str, line: str) -> None:
    """One line says why."""
    done = compare(*args.split())
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_real_api_needs_a_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 ways * (3 runs * 30 messages + a warm-up); an empty standard input is a no."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")
    done = compare()
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("364 calls, ") and "not started" in done.stderr


def test_question_is_not_copied() -> None:
    """There is one prompt: the one in async_template.py."""
    source = SCRIPT.read_text(encoding="utf-8")
    assert async_template.INSTRUCTIONS not in source
    assert async_template.PROMPT.splitlines()[0] not in source


def test_messages() -> None:
    """30 lines, no blank ones, no duplicates."""
    lines = SCRIPT.with_name("messages.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(lines)) == len(lines) == 30 and all(map(str.strip, lines))
