"""What once broke it: replies nobody expects, an INPUT that shrinks, a late Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from server import Arrival, Reply, Server

import async_template

Runner = Callable[..., Any]


class Odd:
    """A policy that gives one prepared reply to whatever it is asked first."""

    def __init__(self, status: int, body: Any) -> None:
        self.reply: Reply | None = Reply(status, json.dumps(body).encode())

    def check(self, arrival: Arrival) -> Reply | None:
        """That reply, once."""
        reply, self.reply = self.reply, None
        return reply

    def take(self, arrival: Arrival) -> None:
        """Nothing is taken."""

    def headers(self, arrival: Arrival) -> dict[str, str]:
        """No headers."""
        return {}

    def stats(self) -> dict[str, Any]:
        """No figures."""
        return {}


TEXT = json.dumps({"score": 0.5, "explanation": "Fine."})
PART = {"type": "output_text", "text": TEXT}
BODY = {"model": "m", "output": [{"type": "message", "content": [PART]}]}
REFUSAL = {"type": "refusal", "refusal": "no \ud83d"}
ODD = [
    (200, BODY | {"model": "\ud83d"}),
    (200, BODY | {"model": float("nan")}),
    (200, BODY | {"model": ["m"]}),
    (200, BODY | {"usage": {"input_tokens": 1e999, "output_tokens": 1}}),
    (200, BODY | {"usage": {"input_tokens": None, "output_tokens": 1}}),
    (200, BODY | {"usage": {"total_tokens": 15}}),
    (200, BODY | {"output": [{"type": "message", "content": [REFUSAL]}]}),
    (200, BODY | {"output": [{"type": "message", "content": "text"}]}),
    (400, {"error": {"message": "half \ud83d", "param": ["body", "input"]}}),
    (400, {"error": {"message": "no", "param": 5, "code": {"a": 1}}}),
    (400, {"error": {"message": "too long", "param": "input_tokens"}}),
    (400, {"error": {"message": "no", "type": {"a": 1}, "param": "input"}}),
    (200, BODY | {"usage": {"input_tokens": 10**400, "output_tokens": 1}}),
]


@pytest.mark.parametrize(("status", "body"), ODD)
def test_odd_reply_is_a_row(
    server: Server, run: Runner, status: int, body: Any
) -> None:
    """Whatever one reply holds, each message has a row of strict JSON."""
    server.policies = [Odd(status, body)]
    result = run(["a", "b", "c"], "--max-attempts", "1")
    assert result.code in (0, 1), result.err
    assert len(result.rows) == 3


def test_usage_with_gaps_is_no_reason_to_pay_again(server: Server, run: Runner) -> None:
    """The answer counts; only its usage is unknown."""
    server.policies = [Odd(200, BODY | {"usage": {"input_tokens": None}})]
    result = run(["a"])
    assert (result.code, server.total) == (0, 1)
    assert result.rows[0]["usage"] is None


def test_input_that_shrinks_costs_no_row(
    server: Server, run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INPUT cut short in mid-run: OUTPUT keeps what was paid for, and it is said."""
    order = async_template.Results.order

    def shrink(self: Any, messages: Any) -> None:
        (tmp_path / "in.txt").write_text("c\n", encoding="utf-8")
        order(self, messages)

    monkeypatch.setattr(async_template.Results, "order", shrink)
    result = run(["a", "b", "c"])
    assert [row["text_message"] for row in result.rows] == ["c", "a", "b"]
    assert re.search(r"kept +2 rows", result.err) and "3 answered" in result.err


def test_early_rejections_do_not_block_a_good_file(server: Server, run: Runner) -> None:
    """Three quick rejections are rows, when those in flight with them are answered."""
    messages = [f"Bad {n}. [400]" for n in range(3)]
    result = run([*messages, *(f"Fine {n}. [ok:ms=50]" for n in range(20))])
    assert (result.code, len(result.rows)) == (1, 23)


def test_small_budget_is_kept_from_the_start(server: Server, run: Runner) -> None:
    """As long as nobody knows what one costs, one at a time is asked."""
    server.latency = 0.02
    result = run([f"m{n}" for n in range(30)], "--max-cost", "0.00001")
    assert (result.code, server.total, server.peak) == (2, 1, 1)


def test_dear_message_does_not_end_the_run_early(server: Server, run: Runner) -> None:
    """Near the cap it waits for what is in flight, instead of stopping far from it."""
    messages = ["long " * 4000, *(f"m{n}" for n in range(60))]
    assert run(messages, "--max-cost", "0.02").code == 0


def test_budget_without_usage_is_refused(server: Server, run: Runner) -> None:
    """A cap cannot be kept where the server does not say what it used."""
    result = run([f"m{n} [nousage]" for n in range(30)], "--max-cost", "1")
    assert result.code == 2 and server.total <= 2
    assert "--max-cost" in result.err


def test_two_columns_of_one_name(server: Server, run: Runner, tmp_path: Path) -> None:
    """Which of the two is meant nobody knows."""
    path = tmp_path / "in.csv"
    path.write_text("text,text\na,b\n", encoding="utf-8")
    assert (run(path).code, server.total) == (2, 0)


def test_notebook_leaves_out_what_is_no_text(server: Server) -> None:
    """Blank and missing cells of a column have no row; the others keep their number."""
    cells: list[Any] = ["a", None, float("nan"), " ", "b"]
    rows = asyncio.run(async_template.answer_all(cells))
    assert [row["line"] for row in rows] == [1, 5]


def test_answers_survive_an_output_that_is_moved(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """OUTPUT renamed, another one in its place: neither is touched, and it is said."""
    out, moved = tmp_path / "out.jsonl", tmp_path / "moved.jsonl"
    source = tmp_path / "in.txt"
    source.write_text("\n".join(f"m{n}" for n in range(200)), encoding="utf-8")

    def look(chance: Any) -> float:
        if server.total == 20:
            out.rename(moved)
            out.write_text('{"line": 1, "te', encoding="utf-8")
        return 0.05

    server.latency = look
    assert async_template.main([str(source), str(out)]) == 2
    assert "moved or deleted" in capsys.readouterr().err
    assert out.read_text("utf-8") == '{"line": 1, "te'
    assert len(moved.read_text("utf-8").splitlines()) == server.statuses[200]


@pytest.mark.parametrize("torn", [False, True])
def test_output_that_is_emptied_is_noticed(
    server: Server, run: Runner, tmp_path: Path, torn: bool
) -> None:
    """Whatever empties OUTPUT in mid-run, the status is not that of a success."""
    if torn:  # a run that begins by mending the end of OUTPUT
        run(["m0", "m1"])
        with (tmp_path / "out.jsonl").open("a") as file:
            file.write('{"line": 3, "te')

    def look(chance: Any) -> float:
        if server.total == (3 if torn else 20):
            (tmp_path / "out.jsonl").write_text("")
        return 0.02

    server.latency = look
    result = run([f"m{n}" for n in range(60)])
    assert result.code == 2 and "was cut" in result.err


def test_output_that_cannot_be_ordered_is_said_at_once(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no other file can be made beside OUTPUT nothing is asked."""
    (tmp_path / "in.txt").write_text("a", encoding="utf-8")
    out = tmp_path / ("x" * 253)  # its temporary copy has a name too long
    assert async_template.main([str(tmp_path / "in.txt"), str(out)]) == 2
    assert server.total == 0 and "Traceback" not in capsys.readouterr().err


def test_longest_answer_is_in_the_budget(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `max_output_tokens` not even answers of that length pass --max-cost."""
    monkeypatch.setattr(async_template, "EXTRA", {"max_output_tokens": 5000})
    server.latency = 0.02
    run([f"m{n}" for n in range(300)], "--max-cost", "0.0095")  # 5,000 cost 0.008
    assert server.peak == 1


def test_notebook_keeps_what_was_paid_for(server: Server) -> None:
    """What stops `answer_all` has the rows; half a character stops nothing."""
    texts = [*(f"m{n}" for n in range(20)), "half \ud83d", "x [401:ms=300]"]
    with pytest.raises(async_template.StopRun) as stopped:
        asyncio.run(async_template.answer_all(texts))
    assert len([*stopped.value.rows]) == 21


def test_error_of_a_server_cannot_control_the_terminal(
    server: Server, run: Runner
) -> None:
    """Escapes are left out of what is shown and of the row."""
    body = {"error": {"message": "no \x1b[31m\x07good", "param": "input"}}
    server.policies = [Odd(400, body)]
    result = run(["a", "b"])
    assert "\x1b" not in result.err and "no [31m good" in result.err


def test_early_interrupt_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while the SDK is imported for the settings."""

    def interrupted(argv: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(async_template, "parse_args", interrupted)
    assert async_template.main(["in.txt", "out.jsonl"]) == 130
    assert "to go on" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")
def test_pipe_with_a_name_is_refused(
    server: Server, run: Runner, tmp_path: Path
) -> None:
    """INPUT is read more than once, which a pipe cannot be."""
    os.mkfifo(tmp_path / "pipe.txt")
    result = run(tmp_path / "pipe.txt")
    assert result.code == 2 and "- for a pipe" in result.err
