"""What one looks at: the bar, lines in a log, the closing lines, costs."""

from __future__ import annotations

import os
import re
import signal
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
Spawn = Callable[..., subprocess.Popen[str]]
SCRIPT = ROOT / "async_template.py"
USD = re.compile(r"\$?([\d,]+\.\d+) ?(?:USD)?(?<=USD)")


def many(count: int) -> list[str]:
    """So many messages, all of one length."""
    return [f"m{n:04}" for n in range(count)]


def usd(rows: list[dict[str, Any]]) -> float:
    """What the rows cost, by the prices of the default model."""
    prices = async_template.PRICES or (0.0, 0.0)
    used = [row["usage"] for row in rows if row["usage"]]
    tokens = [(one["input_tokens"], one["output_tokens"]) for one in used]
    return (
        sum(sum(map(float.__mul__, prices, map(float, pair))) for pair in tokens) / 1e6
    )


def amounts(said: str) -> list[float]:
    """The amounts of USD in a text."""
    return [float(text.replace(",", "")) for text in USD.findall(said)]


# --- Closing lines


def test_counts(server: Server, run: Runner) -> None:
    """How many are answered, and how many of them were before this run."""
    assert "20 of 20 answered" in run(many(30), "--limit", "20").err
    assert "30 of 30 answered (20 before, 10 now)" in run(many(30)).err


def test_messages_are_counted_and_not_texts(server: Server, run: Runner) -> None:
    """The same text is asked once, but answers each of its messages."""
    assert "1,005 of 1,005 answered" in run(["a", "b", *["a"] * 1003]).err
    assert server.total == 2


def test_nothing_to_do(server: Server, run: Runner) -> None:
    """A run that finds all done says so, with no figures about nothing."""
    run(many(3))
    result = run(many(3))
    assert (result.code, server.total) == (0, 3)
    assert "3 of 3 answered" in result.err
    assert not re.search(r"USD|tokens|\b0 answered|resume", result.err)


def test_a_good_run_says_nothing_of_trouble(server: Server, run: Runner) -> None:
    """Tokens, USD, time, rows a second, OUTPUT; no line about what didn't happen."""
    result = run(many(30))
    used = [row["usage"] for row in result.rows]
    for name in "input_tokens", "output_tokens":
        assert f"{sum(one[name] for one in used):,}" in result.err
    assert amounts(result.err) == [pytest.approx(usd(result.rows), abs=0.0001)]
    assert re.search(r"\d\.\d s\b", result.err)
    assert re.search(r"\d rows (a|per) second", result.err)
    assert "out.jsonl" in result.err
    assert not re.search(r"error|refus|lost|wait|resume|placeholder", result.err)


def test_errors_by_type_with_an_example(server: Server, run: Runner) -> None:
    """How many of each, and the reason of one of them; the others are in OUTPUT."""
    refused = [f"{n} [refusal]" for n in range(12)]
    rejected = [f"{n} [400:message=Too long {n}.:param=input]" for n in range(2)]
    result = run([*many(10), *refused, *rejected])
    assert result.code == 1 and "10 of 24 answered" in result.err
    assert "12 refusal" in result.err and "2 bad_request" in result.err
    assert 1 <= result.err.count("I can't help with that") <= 2
    assert 1 <= result.err.count("Too long") <= 2
    assert re.search(r"(?m)^to resume: python .*in\.txt .*out\.jsonl$", result.err)


def test_pilot_estimates_the_rest(server: Server, run: Runner) -> None:
    """Twenty cost more than 0.00, and what is said of the others comes true."""
    pilot = run(many(300), "--limit", "20")
    so_far, *rest = amounts(pilot.err)
    assert so_far == pytest.approx(usd(pilot.rows), abs=0.0001) and so_far > 0
    assert "280" in pilot.err and re.search(r"\d (seconds|minutes|hours)", pilot.err)
    others = usd(run(many(300)).rows[20:])
    assert min(rest) <= 1.2 * others and max(rest) >= 0.8 * others
    assert max(rest) < 2 * others


def test_estimate_is_of_what_was_asked_now(server: Server, run: Runner) -> None:
    """Rows of an earlier run do not make the rest look cheaper, or divide by zero."""
    run(many(500), "--limit", "20")
    (_, rest) = amounts(run(many(500), "--limit", "40").err)
    assert rest == pytest.approx(
        460 * usd(run(many(500), "--limit", "40").rows) / 40, 0.2
    )
    assert amounts(run(many(500), "--limit", "40").err) == []


def test_placeholders_are_said(run: Runner) -> None:
    """Nobody takes the answers of --offline for real ones, or for free ones."""
    said = run(many(3), "--offline").err
    assert "placeholder" in said and "USD" not in said


# --- Costs


def test_failed_tries_cost_as_well(server: Server, run: Runner) -> None:
    """An answer that does not fit is paid for, and counted."""
    result = run([f"{n:04} [bounds,bounds,ok]" for n in range(30)])
    assert result.code == 0
    assert amounts(result.err)[0] == pytest.approx(usd(result.rows), abs=0.0001)
    assert result.rows[0]["usage"]["output_tokens"] == 3 * 24


@pytest.mark.parametrize("prices", [None, "of another model"])
def test_no_prices_no_costs(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch, prices: str | None
) -> None:
    """Where nobody knows what a model costs, no amount is shown, but tokens are."""
    options = ["--model", "other"] if prices else []
    if not prices:
        monkeypatch.setattr(async_template, "PRICES", None)
    said = run(many(30), "--limit", "20", *options).err
    assert "tokens" in said and not re.search(r"USD|\$", said)


def test_another_model_has_no_known_cost(server: Server, run: Runner) -> None:
    """PRICES are those of MODEL; with --model the line says that no cost is known."""
    result = run(many(3), "--model", "other")
    assert result.code == 0 and result.rows[0]["model"].startswith("other")
    assert re.search("(?i)cost|price", result.err)


def test_longest_answer_is_in_max_cost(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `max_output_tokens` not even answers of that length would pass the cap."""
    monkeypatch.setattr(async_template, "EXTRA", {"max_output_tokens": 5000})
    server.latency = 0.02
    run(many(30), "--max-cost", "0.003")  # 5,000 tokens cost 0.0025
    assert server.peak == 1


@pytest.mark.parametrize("model", [[], ["--model", "other"]], ids=["none", "other"])
def test_max_cost_needs_prices(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch, model: list[str]
) -> None:
    """A cap that cannot be kept is refused, not silently ignored."""
    if not model:
        monkeypatch.setattr(async_template, "PRICES", None)
    result = run(["a"], "--max-cost", "1", *model)
    assert (result.code, server.total, len(result.err.splitlines())) == (2, 0, 1)
    assert "PRICES" in result.err and not result.out_path.exists()


def test_max_cost_is_never_passed(server: Server, run: Runner) -> None:
    """Exit 2 below the cap, yet not far below; the same without a cap goes on."""
    stopped = run(many(150), "--max-cost", "0.0015")
    assert stopped.code == 2 and "--max-cost" in stopped.err.splitlines()[-1]
    assert 0.0012 < usd(stopped.rows) <= 0.0015
    assert len(stopped.rows) == server.total
    assert (run(many(150)).code, server.total) == (0, 150)


def test_max_cost_is_of_this_run(server: Server, run: Runner) -> None:
    """What an earlier run has cost doesn't count."""
    run(many(60), "--limit", "40")
    assert run(many(60), "--max-cost", "0.0006").code == 0


def test_small_max_cost_is_kept_from_the_start(server: Server, run: Runner) -> None:
    """As long as nobody knows what one costs, one at a time is asked."""
    server.latency = 0.02
    result = run(many(30), "--max-cost", "0.00001")
    assert (result.code, server.total, server.peak) == (2, 1, 1)


def test_dear_message_does_not_end_the_run_early(server: Server, run: Runner) -> None:
    """Near the cap it waits for what is in flight, instead of stopping far from it."""
    messages = ["long " * 4000, *many(60)]
    assert run(messages, "--max-cost", "0.005").code == 0


def test_max_cost_needs_usage(server: Server, run: Runner) -> None:
    """A cap cannot be kept where the server doesn't say what it used."""
    result = run([f"{n} [nousage]" for n in range(30)], "--max-cost", "1")
    assert result.code == 2 and server.total <= 2
    assert "--max-cost" in result.err


def test_max_cost_offline(run: Runner) -> None:
    """Placeholders cost nothing, whatever the cap."""
    assert run(many(3), "--offline", "--max-cost", "0.000001").code == 0


# --- While it runs


def test_log_has_a_line_every_30_seconds(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no terminal: how far it is, not a bar. (The clock runs faster.)"""
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: 1000 * clock())
    start = clock()
    server.latency = 0.05
    result = run(many(200), "--concurrency", "10", "--timeout", "99999")
    lines = re.findall(r"(?m)^(\d+) of 200\b.*\d+ in flight", result.err)
    assert 1 <= len(lines) <= 1000 * (clock() - start) / 30 + 1
    assert sorted(map(int, lines)) == [*map(int, lines)]
    assert "\r" not in result.err and "%|" not in result.err


def in_terminal(columns: int, folder: Path, url: str, until: str = "") -> list[str]:
    """What a run shows in a terminal of so many columns; this text ends it."""
    pty = pytest.importorskip("pty")
    from fcntl import ioctl
    from termios import TIOCSWINSZ

    folder.mkdir()
    messages = ["Bad. [refusal]", *many(40), f"{columns} [429:retry-after=2,ok]"]
    (folder / "in.txt").write_text("\n".join(messages), encoding="utf-8")
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    args = ["in.txt", "out.jsonl", "--timeout", "9", "--concurrency", "8"]
    command = [sys.executable, str(SCRIPT), *args]
    env = {
        key: value for key, value in os.environ.items() if "proxy" not in key.lower()
    }
    env |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": KEY}
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdin=theirs, stderr=theirs
    )
    os.close(theirs)
    seen = bytearray()
    try:
        while part := os.read(ours, 10_000):
            seen += part
            if until and until.encode() in seen.rpartition(b"\r")[0]:  # a whole frame
                process.kill()
    except OSError:  # Linux: nobody has the terminal open any more
        pass
    os.close(ours)
    assert process.wait() == (-signal.SIGKILL if until else 1)
    return re.split(r"[\r\n]+", seen.decode())


SIZES = [40, 80, 120]
DOWN = 0  # instead of a size: a server that is down


@pytest.fixture(scope="module", autouse=True)
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Shown]]:
    """Runs in terminals of several sizes, beside the other tests."""
    folder = tmp_path_factory.mktemp("terminals")
    usual, down = Server(latency=0.25), Server(default="500")
    with usual, down, ThreadPoolExecutor() as pool:
        runs = {
            columns: pool.submit(in_terminal, columns, folder / f"{columns}", usual.url)
            for columns in SIZES
        }
        args = (80, folder / "down", down.url, "server down")
        yield {**runs, DOWN: pool.submit(in_terminal, *args)}


@pytest.mark.parametrize("columns", SIZES)
def test_bar_fits_the_terminal(shown: dict[int, Shown], columns: int) -> None:
    """Never wider than the terminal; where there is room: how far, how fast, how long,
    errors, in flight, USD and, while it waits, why and for how long. No colors."""
    lines = shown[columns].result()
    frames = [line for line in lines if re.search(r"\b\d+/42\b", line)]
    assert max(map(len, frames)) <= columns
    assert "42/42" in frames[-1] and "41 of 42 answered" in "\n".join(lines)
    assert not re.search(r"\x1b\[\d*m", "".join(lines))
    if columns >= 80:
        text = "\n".join(frames)
        assert re.search(r"rate limit\w*\D*[12] ?s", text) and USD.search(text)
        assert re.search(r"\b1 error", text) and re.search(r"\d in flight", text)
        assert re.search(r"\d+:\d\d<", text) and re.search(r"\d ?msg/s", text)


def test_bar_says_that_the_server_is_down(shown: dict[int, Shown]) -> None:
    """And when it is asked again; within the 80 columns."""
    lines = shown[DOWN].result()
    assert re.search(r"server down\D*\d+ ?s", "\n".join(lines))
    assert max(map(len, lines)) <= 80


def test_any_code_page(server: Server, spawn: Spawn, tmp_path: Path) -> None:
    """A message of emoji, quoted in what is said, is no crash in an old terminal."""
    text = "Grüße 🙂 [prose]"
    (tmp_path / "🙂.txt").write_text(text, encoding="utf-8")
    args = ("🙂.txt", "🙂.jsonl", "--max-attempts", "1")
    process = spawn(*args, PYTHONIOENCODING="ascii")
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert text in (tmp_path / "🙂.jsonl").read_text(encoding="utf-8")
    assert "Traceback" not in said and "1 invalid_answer" in said
