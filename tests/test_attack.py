"""What once broke it: replies nobody expects, an INPUT that shrinks, a late Ctrl-C."""

from __future__ import annotations

import asyncio
import json
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
