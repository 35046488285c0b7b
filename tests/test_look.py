"""What one looks at: the bar, a log, the closing lines, costs, the cap on them."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import KEY, ROOT, Run
from server import Server

import async_template

Runner = Callable[..., Run]
Shown = Future[list[str]]


def many(count: int) -> list[str]:
    """So many messages, all of one length."""
    return [f"m{n:04}" for n in range(count)]


def usd(rows: list[dict[str, Any]]) -> float:
    """What the rows cost, by the prices of the default model."""
    prices = async_template.PRICES[async_template.MODEL]
    used = [row["usage"] for row in rows if row["usage"]]
    tokens_in = sum(usage["input_tokens"] for usage in used)
    tokens_out = sum(usage["output_tokens"] for usage in used)
    return float(tokens_in * prices[0] + tokens_out * prices[2]) / 1e6


def amounts(said: str) -> list[float]:
    """The amounts of USD in a text."""
    return [float(text) for text in re.findall(r"(\d+\.\d+) USD", said)]


# --- Closing lines


def test_counts(server: Server, run: Runner) -> None:
    """Of how many texts, how many were before; if all, nothing is left to resume."""
    assert "20 of 20 texts answered" in run(many(30), "--limit", "20").err
    assert "30 of 30 texts answered, 20 of them before" in run(many(30)).err
    result = run([*many(30), *many(3)])
    assert (result.code, server.total) == (0, 30)
    assert "30 of 30 texts answered, 30 of them before" in result.err
    assert "resume" not in result.err


def test_a_good_run_says_nothing_of_trouble(server: Server, run: Runner) -> None:
    """Tokens, USD, time, OUTPUT; no line about what didn't happen."""
    result = run(many(30))
    closing = result.err[result.err.index("30 of 30") :]
    used = [row["usage"] for row in result.rows]
    for name in "input_tokens", "output_tokens":
        assert f"{sum(one[name] for one in used):,} {name[:-7]} tokens" in closing
    assert amounts(closing) == [pytest.approx(usd(result.rows), abs=0.0001)]
    assert re.search(r"\d\.\d s\b", closing) and str(result.out_path) in closing
    assert not re.search(r"error(?!s: none)|refus|lost|wait|resume|INPUT", closing)


def test_errors_by_type_with_an_example(server: Server, run: Runner) -> None:
    """How many of each, and the reason of one of them; the others are in OUTPUT."""
    refused = [f"{n} [refusal]" for n in range(12)]
    rejected = [f"{n} [400:message=Too long {n}.]" for n in range(2)]
    result = run([*many(10), *refused, *rejected])
    assert result.code == 1 and "10 of 24 texts answered" in result.err
    assert "12 refusal" in result.err and "2 bad_request" in result.err
    assert result.err.count("I can't help with that") == 1
    assert result.err.count("Too long") == 1
    assert re.search(r"(?m)^to resume: python .*in\.txt .*out\.jsonl$", result.err)


def test_estimate_of_the_cost(server: Server, run: Runner) -> None:
    """By what was asked now, of the texts that nobody has asked; it comes true."""
    run(["m0000", "long " * 500, *many(60)[50:]])
    pilot = run([*many(100), *many(100)], "--limit", "20")
    others = usd(run(many(100)).rows) - usd(pilot.rows)
    assert amounts(pilot.err)[-1] == pytest.approx(others, abs=0.0001)
    assert others > 0.001 and server.total == 101


def test_estimate_of_the_time(server: Server, run: Runner) -> None:
    """By how long an answer took, though the pilot began with eight in flight."""
    server.latency = 1.0
    said = run(many(1210), "--limit", "10", "--concurrency", "10").err
    (minutes,) = re.findall(r"([\d.]+) minutes", said)
    assert 2.0 <= float(minutes) <= 3.0  # by its ten rows in two seconds: 4.0


# --- Costs


def test_another_model_has_no_known_cost(server: Server, run: Runner) -> None:
    """PRICES are by model: where there is none, no amount is shown, but tokens are."""
    said = run(many(30), "--limit", "20", "--model", "other").err
    assert "tokens" in said and not amounts(said)


def test_max_cost_needs_prices(server: Server, run: Runner) -> None:
    """A cap that cannot be kept is refused, not silently ignored."""
    result = run(["a"], "--max-cost", "1", "--model", "other")
    assert (result.code, server.total, len(result.err.splitlines())) == (2, 0, 1)
    assert "PRICES" in result.err and not result.out_path.exists()


def test_max_cost(server: Server, run: Runner) -> None:
    """It is passed by what was in flight at most, and that lands and is kept."""
    server.latency = 0.02
    stopped = run(many(150), "--max-cost", "0.001", "--concurrency", "5")
    assert stopped.code == 2 and "--max-cost" in stopped.err
    assert len(stopped.rows) == server.total
    one = usd(stopped.rows[:1])
    assert 0.001 <= usd(stopped.rows) <= 0.001 + 5 * one
    assert (run(many(150)).code, server.total) == (0, 150)


def test_max_cost_is_of_this_run(server: Server, run: Runner) -> None:
    """What an earlier run has cost doesn't count; what failed tries have, does."""
    run(many(60), "--limit", "40")
    assert run(many(60), "--max-cost", "0.0006").code == 0
    messages = [*many(60), *[f"m{n:04} [bounds,bounds,ok]" for n in range(20)]]
    assert run(messages, "--max-cost", "0.0006", "--concurrency", "1").code == 2


def test_max_cost_needs_usage(server: Server, run: Runner) -> None:
    """A cap cannot be kept where the server doesn't tell what it used."""
    result = run([f"{n} [nousage]" for n in range(50)], "--max-cost", "1")
    assert result.code == 2 and "--max-cost" in result.err
    assert server.total == len(result.rows) <= 10


def test_max_cost_offline(run: Runner) -> None:
    """Placeholders cost nothing, whatever the cap."""
    assert run(many(3), "--offline", "--max-cost", "0.000001").code == 0


# --- While it runs


def test_log_is_refreshed_every_30_seconds(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no terminal; here the bar's clock runs a hundred times as fast."""
    monkeypatch.setattr("tqdm.std.time", lambda: 100 * time.monotonic())
    start = time.monotonic()
    server.latency = 0.05
    result = run(many(200), "--concurrency", "10")
    done = [int(count) for count in re.findall(r"\b(\d+)/200\b", result.err)]
    first_and_last = 3  # tqdm shows the last one twice
    assert 5 <= len(done) <= (time.monotonic() - start) * 100 / 30 + first_and_last
    assert done == sorted(done)


def in_terminal(folder: Path, url: str, columns: int, later: int) -> list[str]:
    """What a run shows in a terminal, whose width changes with the first answers."""
    pty = pytest.importorskip("pty")
    from fcntl import ioctl
    from termios import TIOCSWINSZ

    def set_width(columns: int) -> None:
        ioctl(ours, TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    late = f"{columns} {later} [429:retry-after=2,ok]"
    messages = ["Bad. [refusal]", *many(40), late]
    (folder / "in.txt").write_text("\n".join(messages), encoding="utf-8")
    command = [sys.executable, str(ROOT / "async_template.py"), "in.txt", "out.jsonl"]
    command += ["--concurrency", "8"]
    env = {
        name: text for name, text in os.environ.items() if "proxy" not in name.lower()
    }
    env |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": KEY}
    ours, theirs = pty.openpty()
    set_width(columns)
    process = subprocess.Popen(command, cwd=folder, env=env, stderr=theirs)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # Linux: nobody has the terminal open any more
        while part := os.read(ours, 10_000):
            seen += part
            if b"errors: 1" in seen:
                set_width(later)
    os.close(ours)
    assert process.wait() == 1
    return re.split(r"[\r\n]+", seen.decode())


WIDTHS = [(40, 40), (100, 100), (100, 60)]


@pytest.fixture(scope="module", autouse=True)
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Any, Shown]]:
    """Runs in terminals of these widths, beside the other tests."""
    with Server(latency=0.25) as server, ThreadPoolExecutor() as pool:
        runs = {}
        for columns, later in WIDTHS:
            folder = tmp_path_factory.mktemp("terminal")
            args = (folder, server.url, columns, later)
            runs[columns, later] = pool.submit(in_terminal, *args)
        yield runs


@pytest.mark.parametrize(("columns", "later"), WIDTHS)
def test_bar_fits_the_terminal(
    shown: dict[Any, Shown], columns: int, later: int
) -> None:
    """Also if it is made narrower; no colors. Where there is room it says how far, how
    long, how fast, errors, in flight, USD and what it waits for."""
    lines = shown[columns, later].result()
    frames = [line for line in lines if re.match(r"\d+/42\b", line)]
    assert max(map(len, frames)) <= columns
    assert max(map(len, frames[-5:])) <= later
    assert frames[-1].startswith("42/42") and "\x1b[" not in "".join(frames)
    if later == 100:
        text = "\n".join(frames)
        for part in r"\d:\d\d<", r"\d\w+/s", "errors: 1", "in flight: [1-8]", "USD":
            assert re.search(part, text)
        assert re.search("[12] s for a pause", text)
