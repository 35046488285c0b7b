"""What the API and other servers reply: an answer, another try, a row, or the end."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
from conftest import KEY, Run
from pydantic import BaseModel, model_validator
from server import OUTPUT_TOKENS, Server, input_tokens, message, score_of

import async_template

Runner = Callable[..., Run]
Patch = pytest.MonkeyPatch

GOOD = "Fine. [ok]"
BAD = "Bad. [canned=case]"
ONE = ("--concurrency", "1")  # the messages are asked in their order
ONCE = ("--max-attempts", "1")
TWICE = ("--max-attempts", "2")
REASON = "Not this one."
ANSWER = '{"score": 0.5, "explanation": "Rather good."}'


def many(count: int = 200) -> list[str]:
    """So many messages without a directive."""
    return [f"number {number}" for number in range(count)]


def can(server: Server, status: int, body: Any, **headers: str) -> None:
    """Makes this the reply to BAD. Text goes out as it is, anything else as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    if isinstance(body, str):
        content = body.encode()
        headers = {"content-type": "text/html"} | headers
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    server.canned["case"] = (status, headers, content)


def response(*texts: str, **fields: Any) -> dict[str, Any]:
    """The body of a 200 whose message has these parts."""
    parts = [{"type": "output_text", "text": text} for text in texts]
    return {"object": "response", "output": [message("", content=parts)], **fields}


def error(text: str = REASON, **fields: Any) -> dict[str, Any]:
    """The body of an error as OpenAI sends it."""
    usual = {"message": text, "type": "invalid_request_error", "param": None}
    return {"error": {**usual, "code": None, **fields}}


def bad_row(result: Run) -> dict[str, Any]:
    """The only row that is an error."""
    (row,) = [row for row in result.rows if row["error"]]
    assert row["response"] is None and "Traceback" not in result.err
    return row


# --- An answer ------------------------------------------------------------------------
SHAPES = "ok reasoning commentary twice fenced think thinkbrace thinkfence"


@pytest.mark.parametrize("shape", [*SHAPES.split(), "nousage", "nomodel"])
def test_answer_is_read(server: Server, run: Runner, shape: str) -> None:
    """The last output message is read at once, whatever is around it or left out."""
    result = run([f"Fine. [{shape}]"])
    (row,) = result.rows
    score = score_of(server.requests[0].text)
    assert (result.code, server.total, row["error"]) == (0, 1, None)
    assert row["response"] == {"score": score, "explanation": "By the test server."}
    assert (row["usage"] is None) == (shape == "nousage")
    assert (row["model"] is None) == (shape == "nomodel")


@pytest.mark.parametrize(
    "texts",
    [
        [ANSWER[:9], ANSWER[9:]],
        [f"Here it is:\n{ANSWER}\nHope it helps!"],
        [f"[Answer] {ANSWER} This is {{not}} sure."],
        [f"{ANSWER}\n{{}}"],
    ],
)
def test_first_object_is_the_answer(
    server: Server, run: Runner, texts: list[str]
) -> None:
    """The JSON is found among prose, and put together from its parts."""
    can(server, 200, response(*texts))
    result = run([BAD])
    assert (result.code, server.total) == (0, 1)
    assert result.rows[0]["response"] == json.loads(ANSWER)


def test_answer_that_quotes_think(server: Server, run: Runner) -> None:
    """Nothing is cut away in the middle of an answer."""
    answer = {"score": 0.5, "explanation": "It quotes </think> itself."}
    server.answer = lambda body: answer
    assert run(["x"]).rows[0]["response"] == answer


def test_keys_of_a_row(server: Server, run: Runner) -> None:
    """They are always the same; the model is the snapshot that answered."""
    good, bad = run([GOOD, "Bad. [400]"]).rows
    keys = "line text_message response error model answered_at usage settings"
    tokens = input_tokens(server.requests[0].text)
    assert list(good) == list(bad) == keys.split()
    assert list(good["response"]) == ["score", "explanation"]
    assert good["usage"] == {"input_tokens": tokens, "output_tokens": OUTPUT_TOKENS}
    assert good["model"] == f"{async_template.MODEL}-2026-01-01"
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", good["answered_at"])
    assert list(bad["error"]) == ["type", "message", "attempts"]
    assert (bad["response"], bad["usage"]) == (None, None)
    assert bad["settings"] == good["settings"]


@pytest.mark.parametrize(
    "answer",
    [
        {"score": "0.5", "explanation": "A string."},
        {"score": True, "explanation": "A bool."},
        {"score": 1.01, "explanation": "Too much."},
        {"score": 0.5, "explanation": 3},
        {"score": 0.5},
        {"score": 0.5, "explanation": "Half a character: \ud83d"},
        [],
        0.5,
        None,
    ],
    ids=str,
)
def test_answer_has_to_fit(server: Server, run: Runner, answer: Any) -> None:
    """What doesn't fit the schema to the letter is no answer, and is tried again."""
    server.answer = lambda body: answer
    row = bad_row(run(["x"], *TWICE))
    assert (row["error"]["type"], row["error"]["attempts"]) == ("invalid_answer", 2)


class Loose(BaseModel):
    """An answer with any score, and a check that has a bug."""

    score: float
    explanation: str

    @model_validator(mode="after")
    def look_up(self) -> Self:
        """Raises an exception that is no ValueError."""
        if self.score == 7:
            raise KeyError("bug")
        return self


LOOSE = Loose(score=0, explanation="")


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_no_number(
    server: Server, run: Runner, monkeypatch: Patch, score: float
) -> None:
    """NaN and infinity, which JSON can't hold, are no numbers."""
    monkeypatch.setattr(async_template, "EXAMPLE", LOOSE)
    server.answer = lambda body: {"score": score, "explanation": ""}
    assert bad_row(run(["x"], *ONCE))["error"]["type"] == "invalid_answer"


# --- Trouble of one message -----------------------------------------------------------
AGAIN = {
    "server_error": "408 409 424 425 498 499 500 502 504 failed error200 "
    "500:x-should-retry=true 500:code=401",
    "invalid_answer": "prose bounds badjson 400:code=json_validate_failed",
    "bad_response": "nulloutput empty html sse 204",
    "connection": "drop half garbage",
    "timeout": "hang trickle",
}
FINAL = {
    "bad_request": "failed_prompt",
    "refusal": "refusal",
    "content_filter": "filter",
    "incomplete": "incomplete",
}
TRIED = [(kind, one, 2) for kind, some in AGAIN.items() for one in some.split()]
TRIED += [(kind, one, 1) for kind, one in FINAL.items()]


# Some words of the error, by directive.
SAID = {
    "error200": "upstream",
    "refusal": "I can't help with that",
    "incomplete": "max_output_tokens",
    "html": "Bad gateway",
    "bounds": "score",
    "500": "Test server says 500.",
}


@pytest.mark.parametrize(("kind", "directive", "tries"), TRIED)
def test_trouble(
    server: Server, run: Runner, kind: str, directive: str, tries: int
) -> None:
    """It becomes an error row if it stays, and leaves no trace if it passes."""
    bad = f"Bad. [{directive}]"
    later = f"Later. [{directive},ok]" if tries == 2 else "Later. [ok]"
    options = [*TWICE, "--timeout", "0.4" if kind == "timeout" else "9"]
    result = run([GOOD, bad, later], *options)
    found = bad_row(result)["error"]
    assert (result.code, len(result.rows), server.count("Later")) == (1, 3, tries)
    assert (found["type"], found["attempts"], server.count(bad)) == (kind, tries, tries)
    assert SAID.get(directive, "") in found["message"]
    assert f"{kind}, {found['message']}" in result.err


ALIBABA = error("Allocated quota exceeded, try later.", code="insufficient_quota")
LIMIT = error(code="rate_limit_exceeded")


@pytest.mark.parametrize(("status", "body"), [(200, LIMIT), (429, ALIBABA)])
def test_wait_is_no_try(server: Server, run: Runner, status: int, body: Any) -> None:
    """A limit counts as one, whatever it looks like."""
    can(server, status, body)
    result = run(["Bad. [canned=case,canned=case,ok]"], *ONCE)
    assert (result.code, server.total) == (0, 3)


ODD: list[Any] = [b"null", b"[]", b"3", b'"x"', b"{}", b"\xff", b"[" * 100_000]
ODD += [response(""), response("[" * 3000), response('{"a":' * 3000)]
ODD += [{"output": output} for output in (None, 3, [3], [])]
ODD += [
    b'{"output": [], "usage": {"input_tokens": 1e999}}',
    {"output": [{"type": "message", "content": [None]}]},
    {"output": [message("", content=[{"type": "output_text", "text": None}])]},
    {"output": [], "usage": [1]},
    {"output": [], "status": "incomplete", "incomplete_details": "x"},
    {"output": [], "error": {"code": [], "message": {}}},
    {"output": [], "error": {"code": 307, "message": "Who knows?"}},
    {"output": [], "error": 3},
]


@pytest.mark.parametrize("body", ODD, ids=lambda body: str(body)[:50])
def test_odd_body(server: Server, run: Runner, body: Any) -> None:
    """It costs its message some tries, and no other message, let alone the run."""
    can(server, 200, body)
    result = run([GOOD, BAD, "Fine as well. [ok]"], *TWICE)
    kinds = ("bad_response", "invalid_answer", "server_error")
    assert bad_row(result)["error"]["type"] in kinds
    assert (len(result.rows), server.count(BAD)) == (3, 2)


# --- The bill -------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fields",
    [
        {"output": []},
        {"output": [{"type": "message", "content": None}]},
        {"output": [{"type": "message", "content": [{"type": "output_text"}]}]},
        {"output": [], "error": "overloaded"},
    ],
    ids=str,
)
def test_billed_without_a_message(
    server: Server, run: Runner, fields: dict[str, Any]
) -> None:
    """What the provider bills is in the row, and is not asked for ever."""
    usage = {"input_tokens": 1000, "output_tokens": 100}
    can(server, 200, {"status": "completed", "usage": usage} | fields)
    bad = [f"{number} [canned=case]" for number in range(6)]  # as many as an outage
    result = run([GOOD, *bad], *TWICE)
    assert (result.code, server.total) == (1, 1 + 2 * 6)
    for row in result.rows[1:]:
        assert row["error"]["attempts"] == 2
        assert row["usage"] == {"input_tokens": 2000, "output_tokens": 200}


@pytest.mark.parametrize(("cached", "usd"), [(800_000, " 2.8"), (None, " 10.0")])
def test_cached_input_is_cheaper(
    server: Server, run: Runner, monkeypatch: Patch, cached: int | None, usd: str
) -> None:
    """The cost shown is that of the bill: input, cached input, output."""
    monkeypatch.setattr(async_template, "PRICES", {async_template.MODEL: (10, 1, 50)})
    usage = {"input_tokens": 1_000_000, "output_tokens": 0}
    details = {"input_tokens_details": {"cached_tokens": cached}}
    can(server, 200, response(ANSWER, usage=usage | details))
    result = run([BAD])
    assert result.code == 0 and usd in result.err
    assert result.rows[0]["usage"] == usage


# --- The reason -----------------------------------------------------------------------
# Bodies in which servers give their reason; some of them behind a lot else.
FAR = {"id": "-" * 250}
BODIES: dict[str, Any] = {
    "OpenAI": FAR | error(),
    "Ollama": FAR | {"error": REASON},
    "FastAPI": FAR | {"detail": REASON},
    "FastAPI's list": FAR | {"detail": [{"loc": ["body"], "msg": REASON}]},
    "Gemini": [FAR | {"error": {"code": 400, "message": REASON, "status": "INVALID"}}],
    "OpenRouter": error("Provider error", metadata=FAR | {"raw": REASON}),
    "OpenRouter's JSON": error("?", metadata=FAR | {"raw": f'{{"error":"{REASON}"}}'}),
    "flat": {"object": "error", "message": REASON, "code": 40001},
    "numeric code": {"error": {"message": REASON, "type": None, "code": 400}},
    "list of strings": {"errors": [REASON]},
    "text": f"\n\n{REASON}\n" + "#" * 1000,
    "HTML": f"<html><body>{REASON}</body></html>",
    "no UTF-8": b"\xff\xfe " + REASON.encode(),
    "null message": {"error": {"message": None}, "reason": REASON},
    "object message": {"error": {"message": {"text": REASON}}},
}


NOTHING = [b"", b"null", b"[]", b"{}", b'{"error": null}', b'{"error": [3]}']
NOTHING.append(b"[" * 100_000)
WORDS = [pytest.param(body, REASON, id=name) for name, body in BODIES.items()]
WORDS += [pytest.param(body, "400", id=str(body)[:20]) for body in NOTHING]


@pytest.mark.parametrize(("body", "words"), WORDS)
def test_reason(server: Server, run: Runner, body: Any, words: str) -> None:
    """It is in the row and on the screen, whatever the body's shape; or the status."""
    can(server, 400, body)
    result = run([GOOD, BAD])
    found = bad_row(result)["error"]
    assert words in found["message"] and words in result.err
    assert found["message"].isprintable() and len(found["message"]) <= 300
    assert found["type"] == "bad_request"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, error(f"Something is wrong with your key {KEY}.")),
        (400, {"detail": [{"loc": [KEY], "msg": f"'{KEY}' is bad"}]}),
        (400, error(metadata={"raw": "x" * 190 + KEY})),
        (400, error("x" * 280 + KEY)),
        (400, error(" " * 4985 + KEY)),
        (401, error(f"Incorrect API key provided: {KEY}.")),
        (500, KEY),
        (200, f"<html>{KEY}</html>"),
        (200, response(f"Your key is {KEY}.")),
    ],
    ids=lambda part: str(part)[:40],
)
def test_key_is_nowhere(
    server: Server, run: Runner, tmp_path: Path, status: int, body: Any
) -> None:
    """A key that the server quotes is in no file and no line, not even a part of it."""
    can(server, status, body)
    result = run([BAD], *ONCE)
    files = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert KEY[:10] not in result.err and KEY[:10].encode() not in files


def test_a_word_as_the_key(server: Server, run: Runner, monkeypatch: Patch) -> None:
    """A local server takes any word as the key; rows keep that word."""
    monkeypatch.setenv("OPENAI_API_KEY", "Fine")
    can(server, 400, error("Fine is another word."))
    good, bad = run([GOOD, BAD]).rows
    assert good["text_message"] == GOOD and "Fine is" in bad["error"]["message"]


UNSAFE = "\x1b[2J\x1b]0;title\x07 \rall is well \x9b31m \x00\x7f\x08 \u2028\u2029\x85"
UNSAFE += " \u202egnp.exe\u2066\u200f\u200b\ufeff\U000e0041"


@pytest.mark.parametrize("body", [error(UNSAFE, code=UNSAFE), UNSAFE], ids=type)
@pytest.mark.parametrize("status", [200, 400, 401])
def test_control_characters(
    server: Server, run: Runner, status: int, body: Any
) -> None:
    """Nothing in a server's words moves the cursor, or turns the direction."""
    can(server, status, body)
    result = run([BAD], *ONCE)
    assert "all is well" in result.err and "\rall" not in result.err
    assert re.sub("[\r\n]", "", result.err).isprintable()  # but for the bar's own
    assert all(row["error"]["message"].isprintable() for row in result.rows)


# --- What stops the run, and what is a row --------------------------------------------
SPENT = f"Your team has reached its monthly spending limit. {REASON}"
STOPS = {
    "401": (401, error(code="invalid_api_key")),
    "401 text": (401, REASON),
    "402": (402, error()),
    "quota": (429, error(code="insufficient_quota")),
    "quota by type": (429, error(type="insufficient_quota", code="x")),
    "billing limit": (400, error(code="billing_hard_limit_reached")),
    "LiteLLM's budget": (429, error(type="budget_exceeded", code="429")),
    "OpenRouter's key": (403, error(f"Key limit exceeded. {REASON}")),
    "xAI's credits": (429, {"code": "exhausted", "error": SPENT}),
    "xAI's credits, wrapped": (429, error(SPENT)),
}

DEEP = {"innererror": {"code": "ResponsibleAIPolicyViolation"}}
FLAGGED = error(code=403, metadata={"reasons": ["violence"], "flagged_input": "..."})
QUOTE = 'Bad input {"type": "insufficient_quota", "param": "model", "code": "401"}'
TOO_LARGE = f"Request too large for gpt-6-luna on tokens per min (TPM). {REASON}"
LIMIT_CODE = "rate_limit_exceeded"
ROWS: dict[str, tuple[int, Any]] = {
    # For its message, however many there are.
    "filter": (400, error(code="content_filter")),
    "filter in a 200": (200, error(code="content_filter")),
    "filter, DALL-E's": (400, error(code="content_policy_violation")),
    "filter, LiteLLM's": (400, error(code="400", provider_specific_fields=DEEP)),
    "413": (413, REASON),
    "413 as a limit": (413, error(code=LIMIT_CODE)),
    "too large": (429, error(TOO_LARGE, code=LIMIT_CODE)),
    "too large, wrapped": (429, error(f"RateLimitError: {TOO_LARGE}")),
    "invalid prompt": (400, error(code="invalid_prompt")),
    "context": (400, error(code="context_length_exceeded")),
    "string": (400, error(code="string_above_max_length")),
    "failed": (200, {"status": "failed", **error(code="invalid_prompt")}),
    # For its message or a setting, who knows.
    "400 in words": (400, error(f"insufficient_quota: {REASON}")),
    "400 with a quote": (400, error(f"{QUOTE}: {REASON}")),
    "400 with words": (400, error(f"Bad input 'a spending limit'. {REASON}")),
    "403 of a firewall": (403, f"<html><body>{REASON}</body></html>"),
    "403 of a moderator": (403, FLAGGED),
    "403 in a 200": (200, {"error": {"code": 403, "message": REASON}}),
    "404": (404, error(code="model_not_found")),
    "422": (422, {"detail": REASON}),
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", STOPS)
def test_stop_costs_little(server: Server, run: Runner, name: str) -> None:
    """What no message can get past is asked at most 10 times; a line says why."""
    can(server, *STOPS[name])
    server.default = "canned=case"
    result = run(many())
    *_, line = [line for line in result.err.splitlines() if REASON in line]
    assert result.code == 2 and server.total <= 10
    assert "API_KEY" in line and "plan" in line


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", ROWS)
def test_message_is_a_row(server: Server, run: Runner, name: str) -> None:
    """What a server rejects is a row at once, and others get their answers."""
    can(server, *ROWS[name])
    kind = "content_filter" if "filter" in name else "bad_request"
    result = run([BAD, GOOD, "Fine as well. [ok]"], *ONE)
    found = bad_row(result)["error"]
    assert (result.code, server.total) == (1, 3)
    assert (found["type"], found["attempts"]) == (kind, 1)
    assert REASON in found["message"]


def test_stop_keeps_what_is_done(server: Server, run: Runner) -> None:
    """A key that dies in mid-run leaves the answers so far; then all are answered."""
    messages = [f"{number} [ok]" for number in range(40)] + many()
    server.default = "401"
    result = run(messages, "--concurrency", "4")
    assert result.code == 2 and server.count("number") <= 10
    assert sum(row["response"] is not None for row in result.rows) == 40
    server.default = "ok"
    again = run(messages)
    assert again.code == 0 and server.count("[ok]") == 40
    assert [row["text_message"] for row in again.rows] == messages


# --- 25 in a row ----------------------------------------------------------------------
# Of the message alone: after an answer they never stop a run.
ALONE = ["refusal", "filter", "incomplete", "prose", "400:code=invalid_prompt"]


@pytest.mark.parametrize("directive", ["400", "404", *ALONE])
def test_25_without_an_answer(server: Server, run: Runner, directive: str) -> None:
    """Before the first answer a setting may be at fault, whatever is replied."""
    server.default = directive
    result = run(many(), *TWICE)
    assert result.code == 2 and len(result.rows) <= 25 + 16
    assert 25 <= server.total <= 2 * (25 + 16)
    (line,) = [line for line in result.err.splitlines() if "part 1" in line]
    assert all(row["error"]["message"] in line for row in result.rows)


def test_24_without_an_answer(server: Server, run: Runner) -> None:
    """So many bad messages at the head of INPUT are their own rows."""
    bad = [f"Bad {number}. [400]" for number in range(12)]
    bad += [f"Bad {number}. [refusal]" for number in range(12)]
    result = run([*bad, GOOD], *ONE)
    assert (result.code, len(result.rows)) == (1, 25)


@pytest.mark.parametrize("directive", ALONE)
def test_30_bad_messages(server: Server, run: Runner, directive: str) -> None:
    """They are rows, however many there are, once this run has an answer."""
    server.default = directive
    result = run([GOOD, *many(30)], *ONCE)
    assert (result.code, len(result.rows)) == (1, 31)


def test_pilot_does_not_count(server: Server, run: Runner) -> None:
    """A server that gets worse after a pilot costs no more than a bad one."""
    run([GOOD])
    server.default = "prose"
    assert run([GOOD, *many()]).code == 2 and server.total <= 1 + 25 + 16


def test_old_errors_stop_nothing(server: Server, run: Runner) -> None:
    """30 messages that are refused again do not look like a wrong setting."""
    server.default = "refusal"
    assert run([GOOD, *many(30)]).code == 1
    assert (run([GOOD, *many(30)]).code, server.total) == (1, 61)


@pytest.mark.parametrize("directive", ["400", "403"])
def test_25_rejected_in_a_row(server: Server, run: Runner, directive: str) -> None:
    """After an answer, too, 25 in a row stop the run; those before are rows."""
    server.default = directive
    result = run([GOOD, *many()], *ONE)
    kinds = [row["error"] and row["error"]["type"] for row in result.rows]
    assert result.code == 2 and 26 <= server.total <= 27
    assert kinds == [None] + ["bad_request"] * 24


def test_24_rejected_in_a_row(server: Server, run: Runner) -> None:
    """An answer in between, and the count of 25 begins anew."""
    server.default = "400"
    result = run([GOOD, *many(24), "Fine again. [ok]", *many(48)[24:]], *ONE)
    assert (result.code, len(result.rows)) == (1, 50)


# --- The request ----------------------------------------------------------------------
def test_request(server: Server, run: Runner) -> None:
    """A request carries the question's parts, the strict schema, and the key."""
    run([GOOD], "--model", "other")
    (request,) = server.requests
    form = request.body["text"]["format"]
    assert request.body == {
        "model": "other",
        "instructions": async_template.INSTRUCTIONS,
        "input": async_template.PROMPT.replace("{text_message}", GOOD),
        "temperature": async_template.TEMPERATURE,
        "text": {"format": form},
        **async_template.EXTRA,
    }
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert (form["type"], form["strict"]) == ("json_schema", True)
    assert form["schema"]["required"] == ["score", "explanation"]
    assert form["schema"]["additionalProperties"] is False
    score = form["schema"]["properties"]["score"]
    assert (score["minimum"], score["maximum"]) == (-1, 1)
    assert "negative" in score["description"]


def test_extra_settings(server: Server, run: Runner, monkeypatch: Patch) -> None:
    """EXTRA goes out as it is, also what the SDK doesn't know, beside the schema."""
    extra = {"text": {"verbosity": "low"}, "top_k": 3, "max_output_tokens": None}
    monkeypatch.setattr(async_template, "EXTRA", extra)
    monkeypatch.setattr(async_template, "TEMPERATURE", None)
    assert run([GOOD]).code == 0
    body = server.requests[0].body
    assert (body["top_k"], body["max_output_tokens"]) == (3, None)
    assert body["text"]["verbosity"] == "low"
    assert body["text"]["format"]["type"] == "json_schema"
    assert "store" not in body and "temperature" not in body


def test_odd_messages_reach_the_model_verbatim(server: Server, tmp_path: Path) -> None:
    """Braces, quotes and line breaks in a message don't break the prompt."""
    odd = [
        "{text_message}",
        "{} {0} {text_message!r} {{x}} %s $x \\n \\ \\1 \\g<0>",
        '"double" and \'single\' and """triple"""',
        "two\nlines\r\nand a tab\t",
        "line\u2028separator, \x85 and \x00 and \x7f",
        "emoji 🙂👩‍👩‍👧 and العربية and 漢字",
    ]
    rows = asyncio.run(async_template.answer_all(odd, tmp_path / "out.jsonl"))
    before, after = async_template.PROMPT.split("{text_message}")
    inputs = {request.body["input"] for request in server.requests}
    assert inputs == {before + message + after for message in odd}
    assert [row["text_message"] for row in rows if row["response"]] == odd


# --- A bug, and files -----------------------------------------------------------------
@pytest.mark.timeout(15)
def test_bug_surfaces(
    server: Server, run: Runner, tmp_path: Path, monkeypatch: Patch
) -> None:
    """What was in flight lands, and is kept; the traceback leads to the bug."""
    monkeypatch.setattr(async_template, "EXAMPLE", LOOSE)
    slow = [f"{number} [ok:ms=300]" for number in range(7)]
    with pytest.raises(KeyError) as caught:
        run([*slow, "Bad. [bounds:ms=100]", *many()])
    assert "look_up" in [entry.name for entry in caught.traceback]
    rows = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["text_message"] for row in rows][:7] == slow
    assert len(rows) < 20


@pytest.mark.parametrize("directive", ["ok", "400", "401", "drop", "refused"])
def test_files_are_closed(
    server: Server, run: Runner, tmp_path: Path, directive: str
) -> None:
    """INPUT and OUTPUT are closed after a run, however it ended."""
    server.default = directive
    if directive == "refused":
        (tmp_path / "out.jsonl").write_text("[1]\n")
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        run(many(4), *ONCE)
        gc.collect()


def test_messages_behind_rejected_ones(server: Server, run: Runner) -> None:
    """Errors are remembered until they are asked again: a block of them is passed."""
    messages = [GOOD, *(f"Bad {n}. [403]" for n in range(40)), "Fine as well."]
    codes = [run(messages, *ONE).code for _ in range(3)]
    rows = run(messages, *ONE).rows
    assert codes[0] == 2 and sum(bool(row["response"]) for row in rows) == 2
    assert len(rows) == len(messages)


def test_retry_after_of_one_message(
    server: Server, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for a day; at most for as long as the run has patience."""
    monkeypatch.setattr(async_template, "PATIENCE", 0.5)
    assert run([GOOD, "Late. [500:retry-after=86400,ok]"]).code == 0
