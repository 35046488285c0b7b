"""What an attack on the finished file found; each would have cost somebody a night."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from conftest import Run
from server import Server

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
