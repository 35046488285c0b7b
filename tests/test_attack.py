"""What an attack on the finished file found; each would have cost somebody a night."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from server import Server, sample_answer

import async_template

Runner = Callable[..., Run]


def can(server: Server, text: str, **fields: object) -> None:
    """Makes the server answer `[canned=x]` with a 200 that has this text, or none."""
    part = {"type": "output_text", "text": text}
    output = [{"type": "message", "content": [part]}] if text else []
    usage = {"input_tokens": 1000, "output_tokens": 100}
    body = {"status": "completed", "output": output, "usage": usage} | fields
    headers = {"content-type": "application/json"}
    server.canned["x"] = (200, headers, json.dumps(body).encode())


@pytest.mark.parametrize("text", ["[" * 3000, '{"a":' * 3000])
def test_degenerate_answer_is_a_row(server: Server, run: Runner, text: str) -> None:
    """A model that repeats itself for ever costs its message, and no other."""
    can(server, text)
    result = run(["a", "b [canned=x]", "c"], "--max-attempts", "1")
    kinds = [row["error"] and row["error"]["type"] for row in result.rows]
    assert (result.code, kinds) == (1, [None, "invalid_answer", None])


def test_a_reply_without_a_message_is_paid_for(server: Server, run: Runner) -> None:
    """What was used stands in the row of the error, too."""
    can(server, "")
    result = run(["a", "b [canned=x]"], "--max-attempts", "2")
    assert result.rows[1]["error"]["type"] == "bad_response"
    assert result.rows[1]["usage"] == {"input_tokens": 2000, "output_tokens": 200}


def test_max_cost_holds_when_long_messages_follow_short_ones(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request is set aside for by its length."""
    monkeypatch.setattr(async_template, "PRICES", (10.0, 10.0))
    server.latency = 0.02
    messages = [f"short {n}" for n in range(40)]
    messages += [f"long {n} " + "word " * 8000 for n in range(40)]
    result = run(messages, "--max-cost", "0.2")
    used = [row["usage"] for row in result.rows if row["usage"]]
    tokens = sum(usage["input_tokens"] + usage["output_tokens"] for usage in used)
    assert result.code == 2
    assert tokens * 10 / 1e6 <= 0.2


def test_odd_date_to_retry_after(server: Server, run: Runner) -> None:
    """A date in a year that no calendar has is none."""
    date = "Mon, 01 Jan 99999999999999 00:00:00 GMT"
    server.canned["x"] = (429, {"retry-after": date}, b"{}")
    assert run(["a [canned=x,ok]"]).code == 0


def test_a_word_as_the_key(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local server takes any word as the key; answers keep that word."""
    monkeypatch.setenv("OPENAI_API_KEY", "explanation")
    assert run(["a"]).rows[0]["response"]["explanation"]


def test_zeros_at_the_end_of_output(server: Server, run: Runner) -> None:
    """A power failure can leave them: they are dropped, and no row is lost."""
    out = run(["a"]).out_path
    out.write_bytes(out.read_bytes() + b"\0" * 100)
    result = run(["a", "b"])
    assert (result.code, len(result.rows), server.total) == (0, 2, 2)


@pytest.mark.parametrize(
    "fields",
    [
        {"output": [{"type": "message", "content": None}]},
        {"output": [{"type": "message", "content": [{"type": "output_text"}]}]},
        {"error": "overloaded"},
    ],
)
def test_usage_of_odd_replies_counts(
    server: Server, run: Runner, fields: dict[str, object]
) -> None:
    """What the provider bills is in the row, whatever else is in the reply."""
    can(server, "", **fields)
    result = run(["a", "b [canned=x]"], "--max-attempts", "2")
    assert result.rows[1]["usage"] == {"input_tokens": 2000, "output_tokens": 200}


@pytest.mark.parametrize("count", [10**400, -1, "3", None])
def test_usage_that_is_no_number(server: Server, run: Runner, count: object) -> None:
    """It is left out, and the answer stays."""
    text = '{"score": 0.5, "explanation": "x"}'
    can(server, text, usage={"input_tokens": 1, "output_tokens": count})
    (row,) = run(["b [canned=x]"]).rows
    assert row["response"] and row["usage"] is None


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 0.5, "explanation": "it quotes </think> itself"}',
        '[Answer] {"score": 0.5, "explanation": "x"}',
    ],
)
def test_answers_that_fit_are_taken(server: Server, run: Runner, text: str) -> None:
    """They are paid for once."""
    can(server, text)
    assert run(["b [canned=x]"], "--max-attempts", "1").code == 0


def fault(server: Server, status: int, **fields: object) -> None:
    """Makes the server answer `[canned=x]` with an error of this status."""
    body = {"error": {"message": "Too long.", "type": "api_error"} | fields}
    headers = {"content-type": "application/json"}
    server.canned["x"] = (status, headers, json.dumps(body).encode())


def test_a_message_above_the_limit_is_a_row(server: Server, run: Runner) -> None:
    """Some servers say so with a 413 whose code is that of a rate limit."""
    fault(server, 413, code="rate_limit_exceeded")
    result = run(["a", "b [canned=x]", *map(str, range(50))])
    assert (result.code, server.total) == (1, 52)


@pytest.mark.parametrize("status", [429, 500])
def test_status_counts_more_than_the_parameter(
    server: Server, run: Runner, status: int
) -> None:
    """A limit or a failure passes, though it names the input."""
    fault(server, status, param="input")
    assert run(["a [canned=x,ok]"]).code == 0


def test_no_parameter_is_no_setting(server: Server, run: Runner) -> None:
    """An empty name does not stop the run."""
    fault(server, 400, param="", code="")
    result = run(["a [canned=x]", "b", "c"], "--concurrency", "1")
    assert (result.code, len(result.rows)) == (1, 3)


def test_password_in_the_address(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take the place of the key."""
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://me:pw@127.0.0.1:{server.port}/v1")
    result = run(["a"])
    assert (result.code, server.total) == (2, 0)
    assert "OPENAI_BASE_URL" in result.err


def test_line_that_somebody_appends_in_mid_run(server: Server, run: Runner) -> None:
    """Rows are found behind it."""
    out = run(["0"]).out_path

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        if body["input"].endswith("4"):
            with out.open("a") as file:
                file.write("\n")
        return sample_answer(body)

    server.answer = answer
    result = run([str(n) for n in range(9)], "--concurrency", "1")
    assert (result.code, len(result.rows)) == (0, 9)


def test_every_record_has_fields(server: Server, run: Runner, tmp_path: Path) -> None:
    """Even if there is nothing else in it, so that tables have the same columns."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a", "id": 1}\n{"text": "b"}\n', encoding="utf-8")
    assert [row["fields"] for row in run(source).rows] == [{"id": 1}, {}]


def test_mark_at_the_head_of_output(server: Server, run: Runner) -> None:
    """An editor puts it there; the first row may move behind the others."""
    out = run(["a", "b"]).out_path
    out.write_bytes(b"\xef\xbb\xbf" + out.read_bytes().replace(b"\n", b"\r\n"))
    assert [row["text_message"] for row in run(["b", "c"]).rows] == ["b", "c", "a"]
    assert b"\xef" not in out.read_bytes() and b"\r" not in out.read_bytes()


def test_no_bound_of_output_tokens(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is what the API takes for it."""
    monkeypatch.setattr(async_template, "EXTRA", {"max_output_tokens": None})
    assert run(["a"]).code == 0
