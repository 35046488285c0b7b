"""Half the price: the Batch API, which nothing may pay for twice, and flex."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from conftest import KEY, ROOT, Run
from replies import BROKEN
from server import Flaky, Server, error_reply, hang_up, whole

import async_template

TEN = [f"m{n}" for n in range(10)]
LEAD = async_template.PROMPT.split("{text_message}")[0]
UPLOAD, CREATE = "POST /v1/files", "POST /v1/batches"
LIST, CONTENT = "GET /v1/batches", "GET /v1/files/content"
DELETE = "DELETE /v1/files"
CALLS = [UPLOAD, CREATE, LIST, CONTENT, DELETE]
posix = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")

Rows = list[dict[str, Any]]
Runner = Callable[..., Run]
Action = Callable[[], object]
Monkey = pytest.MonkeyPatch
Process = subprocess.Popen[bytes]


# --- Helpers --------------------------------------------------------------------------
@dataclass(kw_only=True, eq=False, repr=False)
class Provider(Server):
    """The server, to which something may happen at the next calls of a kind."""

    calls: list[str] = field(default_factory=list)  # like CALLS
    after: dict[str, list[Action | None]] = field(default_factory=dict)  # before reply
    refuse: dict[str, list[int]] = field(default_factory=dict)  # statuses
    cut: list[str] = field(default_factory=list)  # calls with half a reply
    born: int | None = None  # when the answers in batches are made, if not now

    async def _route(self, http: web.BaseRequest) -> web.StreamResponse:
        """Answers any request."""
        call = f"{http.method} {re.sub('/(file-|batch_)[0-9]+', '', http.path)}"
        self.calls.append(call)
        if self.refuse.get(call):
            status = self.refuse[call].pop(0)
            return whole(error_reply(status, **{"x-should-retry": "false"}))
        response = await super()._route(http)
        if self.after.get(call) and (action := self.after[call].pop(0)):
            action()
        if call in self.cut:
            self.cut.remove(call)
            return hang_up(http, BROKEN["half"])
        return response

    def answer_line(self, body: dict[str, Any]) -> tuple[int, Any]:
        """The status and the body that come out for the body of a line."""
        status, response = super().answer_line(body)
        if self.born:
            response["created_at"] = self.born
        return status, response

    @property
    def sizes(self) -> list[int]:
        """How many lines each batch has."""
        return [len(batch.lines) for batch in self.batches]

    @property
    def lines(self) -> Counter[str]:
        """How often each message stands in a line of a batch."""
        lines = [line for batch in self.batches for line in batch.lines]
        return Counter(line["body"]["input"].removeprefix(LEAD) for line in lines)

    @property
    def left(self) -> list[str]:
        """The files that are not deleted."""
        return [name for name, file in self.files.items() if not file.deleted]


@pytest.fixture
def server(monkeypatch: Monkey) -> Iterator[Provider]:
    """A started provider that the environment points to."""
    with Provider() as started:
        monkeypatch.setenv("OPENAI_BASE_URL", started.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield started


@pytest.fixture(autouse=True)
def impatient(monkeypatch: Monkey) -> None:
    """The list is looked at often."""
    monkeypatch.setattr(async_template, "POLL", 0.01)


@pytest.fixture
def start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    """Runs --batch in a folder of its own, into the OUTPUT of this name there."""

    def start(
        folder: str, messages: Sequence[str], *options: str, output: str = "out.jsonl"
    ) -> Run:
        source = tmp_path / folder / "in.txt"
        source.parent.mkdir(exist_ok=True)
        source.write_text("\n".join(messages), encoding="utf-8")
        out = source.with_name(output)
        capsys.readouterr()
        code = async_template.main([str(source), str(out), "--batch", *options])
        rows = [json.loads(line) for line in out.read_bytes().splitlines()]
        return Run(code, rows, capsys.readouterr().err, out)

    return start


@contextlib.contextmanager
def in_terminal(*arguments: str, cwd: Path) -> Iterator[tuple[Process, int]]:
    """The script, in a wide terminal, and the terminal to read from."""
    import pty
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 200))
    command = [sys.executable, str(ROOT / "async_template.py"), *arguments]
    with subprocess.Popen(command, cwd=cwd, stderr=theirs) as process:
        os.close(theirs)
        try:
            yield process, ours
        finally:
            process.kill()
            os.close(ours)


def read_until(terminal: int, words: str) -> str:
    """What a terminal shows up to some words."""
    seen = ""
    while words not in seen:
        seen += os.read(terminal, 10_000).decode(errors="replace")
    return seen


def interrupt() -> None:
    """Ctrl-C, from another thread."""
    main = threading.main_thread().ident
    signal.pthread_kill(main or 0, signal.SIGINT)


def submit(server: Provider, run: Runner, *arguments: Any) -> None:
    """A run that ends by Ctrl-C while its batch, or batches, are in progress."""
    server.batch.seconds = 1000
    server.after[CREATE] = [interrupt]
    result = run(*arguments)
    assert result.code == 130, result.err
    assert server.batches
    server.batch.seconds = 0


def texts(result: Run) -> list[str]:
    """The messages that have an answer."""
    return [row["text_message"] for row in result.rows if row["response"]]


def check_whole(result: Run, server: Server, messages: Sequence[str] = TEN) -> None:
    """Every message has its answer, in INPUT's order, and was paid for once."""
    assert (result.code, texts(result)) == (0, [*messages]), result.err
    assert set(server.paid.values()) == {1}, server.paid


def alike(rows: Rows) -> Rows:
    """Rows without what differs between two runs."""
    different = {"usage", "answered_at"}
    return [{k: row[k] for k in row.keys() - different} for row in rows]


def usd(result: Run) -> float:
    """The amount of money that a run says it has cost."""
    amounts: list[str] = re.findall(r"([\d,]+\.\d+) USD", result.err)
    return float(amounts[0].replace(",", ""))


# --- The same rows --------------------------------------------------------------------
ODD = ["same", "Snow ☃\u2028 😀", "same", 'Quo"te\\', "Bad. [refusal]", "No. [prose]"]
ODD += ["No. [400:code=invalid_prompt]", "Long. [incomplete]", "Fine. [fenced]", "m"]


@pytest.mark.parametrize("suffix", [".txt", ".csv"])
def test_rows_are_those_of_a_live_run(
    server: Provider, run: Runner, tmp_path: Path, suffix: str
) -> None:
    """Answers and errors, doubled messages and columns: no row tells the difference."""
    source = tmp_path / f"messages{suffix}"
    table = ["text,id", *(f'"{text.replace(chr(34), "")}",7' for text in ODD)]
    source.write_text("\n".join(table if suffix == ".csv" else ODD), encoding="utf-8")
    live = run(source, "--max-attempts", "1")
    batch = run(source, "--batch", "--restart")
    assert (live.code, batch.code) == (1, 1)
    assert len(batch.rows) == 10
    assert alike(batch.rows) == alike(live.rows)
    assert [row["usage"] for row in batch.rows] == [row["usage"] for row in live.rows]


def test_lines_ask_what_a_live_request_asks(server: Provider, run: Runner) -> None:
    """The body is the same; the ids are short and unique."""
    run(TEN)
    live = {request.text: request.body for request in server.requests}
    run(TEN, "--batch", "--restart")
    (batch,) = server.batches
    ids = {line["custom_id"] for line in batch.lines}
    assert len(ids) == 9 and max(map(len, ids)) <= 64
    for line in batch.lines:
        assert line["body"] == live[line["body"]["input"]]
        assert (line["method"], line["url"]) == ("POST", "/v1/responses")


def test_batch_says_whose_it_is(server: Provider, run: Runner) -> None:
    """Its metadata has the settings' hash and OUTPUT's name from its first moment."""
    rows = run(TEN, "--batch").rows
    (batch,) = server.batches
    assert {rows[0]["settings"], "out.jsonl"} <= set(batch["metadata"].values())
    assert all(isinstance(value, str) for value in batch["metadata"].values())
    assert (batch["endpoint"], batch["completion_window"]) == ("/v1/responses", "24h")
    assert server.files[batch["input_file_id"]]["purpose"] == "batch"


def test_answered_at_is_when_the_model_answered(server: Provider, run: Runner) -> None:
    """Not when the answer was collected, perhaps days later."""
    server.born = 1_800_000_000
    rows = run(TEN, "--batch").rows
    assert {row["answered_at"] for row in rows[1:]} == {"2027-01-15T08:00:00Z"}


@pytest.mark.parametrize("first, second", [([], ["--batch"]), (["--batch"], [])])
def test_live_and_batch_runs_continue_each_other(
    server: Provider, run: Runner, first: list[str], second: list[str]
) -> None:
    """On one OUTPUT, in any order; a third run has nothing to do."""
    assert run(TEN, "--limit", "4", *first).code == 0
    check_whole(run(TEN, *second), server)
    calls = len(server.calls)
    check_whole(run(TEN), server)
    assert len(server.calls) == calls


def test_a_batch_holds_so_many_lines(
    server: Provider, run: Runner, monkeypatch: Monkey
) -> None:
    """The first message is asked live, the others go in parts."""
    assert async_template.MOST_LINES == 50_000
    monkeypatch.setattr(async_template, "MOST_LINES", 4)
    check_whole(run(TEN, "--batch"), server)
    assert server.sizes == [4, 4, 1]
    assert server.batched.total() == 9


def test_a_batch_holds_so_many_bytes(
    server: Provider, run: Runner, monkeypatch: Monkey
) -> None:
    """Plus the line that makes it full: the API takes 10 MB more."""
    assert async_template.MOST_FILE_BYTES == 190_000_000
    monkeypatch.setattr(async_template, "MOST_FILE_BYTES", 4000)
    messages = [f"{n}{'é' * 100}" for n in range(20)]
    check_whole(run(messages, "--batch"), server, messages)
    for batch in server.batches:
        content = server.files[batch["input_file_id"]].content
        assert len(content) - len(content.splitlines()[-1]) <= 4000
    assert 2 < len(server.batches) < 19


def test_equal_messages_share_a_line(server: Provider, run: Runner) -> None:
    """And its answer, or its error; the usage stands in the first of them."""
    bad = "Bad. [refusal]"
    result = run(["a", "b", "b", bad, "a", "b", bad], "--batch")
    assert (result.code, server.sizes) == (1, [2])
    assert [row["usage"] is None for row in result.rows] == [0, 0, 1, 0, 1, 1, 1]
    used = [row["usage"]["input_tokens"] for row in result.rows if row["usage"]]
    assert f"{sum(used)} input tokens" in result.err
    assert "1 refusal" in result.err


def test_limit_and_shard_hold_for_batches(server: Provider, run: Runner) -> None:
    """What is not asked for is not submitted."""
    result = run(TEN, "--batch", "--limit", "3", "--shard", "2/2")
    check_whole(result, server, ["m1", "m3", "m5"])
    assert server.lines.keys() == {"m3", "m5"}


def test_batches_in_a_notebook(server: Provider, tmp_path: Path) -> None:
    """`batch=True` is the flag."""
    rows = asyncio.run(
        async_template.answer_all(TEN, tmp_path / "rows.jsonl", batch=True)
    )
    assert [row["text_message"] for row in rows if row["response"]] == TEN
    assert server.sizes == [9]


def test_cancelled_in_a_notebook(server: Provider, tmp_path: Path) -> None:
    """The batch goes on, and the next call collects it."""

    async def ask() -> Rows:
        answers = async_template.answer_all(TEN, tmp_path / "rows.jsonl", batch=True)
        task = asyncio.create_task(answers)
        loop = asyncio.get_running_loop()
        server.after[CREATE] = [partial(loop.call_soon_threadsafe, task.cancel)]
        return await task

    server.batch.seconds = 1000
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(ask())
    server.batch.seconds = 0
    assert [bool(row["response"]) for row in asyncio.run(ask())] == [True] * 10
    assert (server.sizes, set(server.paid.values())) == ([9], {1})


# --- Wrong settings -------------------------------------------------------------------
@pytest.mark.parametrize("item", ["401", "403", "404", "400:param=temperature"])
def test_wrong_settings_stop_at_the_first_request(
    server: Provider, run: Runner, item: str
) -> None:
    """A wrong key, model or setting shows in seconds, and nothing is uploaded."""
    server.default = item
    result = run(TEN, "--batch")
    assert (result.code, result.rows) == (2, [])
    assert (server.total, server.files, server.batches) == (1, {}, [])
    assert "Traceback" not in result.err


def test_nothing_is_asked_live_if_output_has_an_answer(
    server: Provider, run: Runner
) -> None:
    """The settings are known to be right then."""
    run(TEN, "--limit", "1")
    check_whole(run(TEN, "--batch"), server)
    assert (server.total, server.sizes) == (1, [9])


@pytest.mark.parametrize("status", [403, 404])
def test_server_without_batches(server: Provider, run: Runner, status: int) -> None:
    """One line says so, and not that the model is wrong: it has just answered."""
    server.batch.missing_status = status
    result = run(TEN, "--batch")
    assert (result.code, texts(result)) == (2, TEN[:1])
    assert "Traceback" not in result.err
    (reason,) = [line for line in result.err.splitlines() if str(status) in line]
    assert "batch" in reason.lower()
    assert server.calls.count(LIST) < 3


def test_key_is_no_longer_accepted(server: Provider, run: Runner) -> None:
    """A run stops at once, too, if that shows after the first answer."""
    server.batch.missing_status = 401
    result = run(TEN, "--batch")
    assert (result.code, texts(result)) == (2, TEN[:1])
    assert "OPENAI_API_KEY" in result.err
    assert len(server.calls) < 4


@pytest.mark.timeout(20)
def test_no_batch_without_a_key(run: Runner) -> None:
    """--offline asks nobody, with --batch neither."""
    result = run(TEN, "--batch", "--offline")
    assert (result.code, len(texts(result))) in [(0, 10), (2, 0)]


# --- Never paid twice -----------------------------------------------------------------
QUICK = """\
import sys
import async_template
async_template.POLL = 0.01
async_template.MOST_LINES = 4
sys.exit(async_template.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "call, number",
    [(UPLOAD, 1), (CREATE, 1), (CREATE, 2), (UPLOAD, 3), (CONTENT, 2), (DELETE, 1)],
)
def test_killed_at_any_call(
    server: Provider,
    run: Runner,
    tmp_path: Path,
    monkeypatch: Monkey,
    call: str,
    number: int,
) -> None:
    """The call was carried out, its reply is on the way; another process goes on."""
    monkeypatch.setattr(async_template, "MOST_LINES", 4)
    (tmp_path / "in.txt").write_text("\n".join(TEN), encoding="utf-8")
    command = [sys.executable, "-c", QUICK, "in.txt", "out.jsonl", "--batch"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=tmp_path, env=env) as process:
        server.after[call] = [None] * (number - 1) + [process.kill]
    assert server.after[call] == []
    check_whole(run(TEN, "--batch"), server)
    assert sorted(server.sizes) == [1, 4, 4]
    # Nobody knows of a file that was uploaded for a batch that was never created.
    assert len(server.left) == (call == UPLOAD)


@pytest.mark.parametrize("call", ["upload", "create", "list", "content", "delete"])
def test_reply_to_a_call_is_lost(server: Provider, run: Runner, call: str) -> None:
    """The call was carried out all the same."""
    server.batch.lose = {call}
    check_whole(run(TEN, "--batch"), server)
    assert server.sizes == [9]
    # Nobody knows of a file when the reply to its upload was lost.
    assert len(server.left) == (call == "upload")


@pytest.mark.parametrize("lost, looks", [(set(), 1), (set(), 4), ({"create"}, 1)])
def test_list_shows_a_new_batch_late(
    server: Provider, run: Runner, lost: set[str], looks: int
) -> None:
    """It was created, and is not created again, even if the reply was lost."""
    server.batch.lose = lost
    server.batch.hide = looks
    check_whole(run(TEN, "--batch"), server)
    assert server.sizes == [9]


def test_started_again_before_the_list_shows_a_batch(
    server: Provider, run: Runner, tmp_path: Path
) -> None:
    """A run that was killed right after a creation is no reason to create it again."""
    (tmp_path / "in.txt").write_text("\n".join(TEN), encoding="utf-8")
    command = [sys.executable, "-c", QUICK, "in.txt", "out.jsonl", "--batch"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    server.batch.hide = 1
    with subprocess.Popen(command, cwd=tmp_path, env=env) as process:
        server.after[CREATE] = [process.kill]
    check_whole(run(TEN, "--batch"), server)


@pytest.mark.parametrize("status", [429, 500])
@pytest.mark.parametrize("call", CALLS)
def test_provider_refuses_a_call(
    server: Provider, run: Runner, call: str, status: int
) -> None:
    """A limit or a failure is a matter of waiting."""
    server.refuse = {call: [status, status]}
    check_whole(run(TEN, "--batch"), server)
    assert (server.sizes, server.left) == ([9], [])


def test_download_breaks_off(server: Provider, run: Runner) -> None:
    """A connection that is lost in the middle of the results is none for good."""
    server.cut = [CONTENT, CONTENT]
    check_whole(run(TEN, "--batch"), server)
    assert server.left == []


def test_provider_is_away_for_a_while(server: Provider, run: Runner) -> None:
    """Nobody listens there for a moment, while a batch is running."""
    server.batch.seconds = 0.5
    seen = threading.Event()
    server.after[LIST] = [None, None, seen.set]

    def go_away() -> None:
        seen.wait(30)
        server.pause_listening()
        time.sleep(0.3)
        server.resume_listening()

    with ThreadPoolExecutor() as pool:
        away = pool.submit(go_away)
        check_whole(run(TEN, "--batch"), server)
        away.result()


def test_list_has_many_pages(
    server: Provider, run: Runner, monkeypatch: Monkey
) -> None:
    """All batches are collected."""
    monkeypatch.setattr(async_template, "MOST_LINES", 2)
    server.batch.page = 1
    server.batch.seconds = 0.05
    check_whole(run(TEN, "--batch"), server)
    assert server.sizes == [2, 2, 2, 2, 1]


@posix
def test_nothing_is_submitted_while_a_batch_runs(server: Provider, run: Runner) -> None:
    """A run that finds a batch of its own waits for it before it submits the rest."""
    submit(server, run, TEN, "--batch", "--limit", "4")
    server.batch.seconds = 0.3
    server.batches[0].begun = time.monotonic()
    check_whole(run(TEN, "--batch"), server)
    assert server.sizes == [3, 6]
    assert server.batches[1].begun >= server.batches[0].begun + 0.3


@posix
def test_another_machine_collects(server: Provider, start: Runner) -> None:
    """INPUT and the name of OUTPUT are enough; only the first message is asked anew."""
    submit(server, start, "here", TEN)
    result = start("there", TEN)
    assert (result.code, texts(result), server.sizes) == (0, TEN, [9])
    assert set(server.batched.values()) == {1}


@pytest.mark.parametrize(
    "controls",
    [
        {"expire_after": 0.3},
        {"zero_share": 0.5, "zero_once": True},
        {"zero_share": 1.0, "zero_once": True},
        {"cancel_next": True},
    ],
)
def test_what_a_batch_left_undone_goes_again(
    server: Provider, run: Runner, controls: dict[str, Any]
) -> None:
    """Expired, lost and cancelled lines are asked once more, the others are not."""
    for name, value in controls.items():
        setattr(server.batch, name, value)
    # The second batch does not expire.
    server.after[CREATE] = [None, partial(setattr, server.batch, "expire_after", None)]
    check_whole(run(TEN, "--batch"), server)
    assert len(server.batches) == 2
    assert server.left == []


@pytest.mark.parametrize(
    "item",
    ["500", "503", "408", "429", "429:code=resource_unavailable", "error200", "html"],
)
def test_line_that_met_a_failure_goes_again(
    server: Provider, run: Runner, item: str
) -> None:
    """A failure of the server, or its limit, says nothing of the message."""
    messages = ["m", "n", f"Late. [{item},ok]"]
    result = run(messages, "--batch")
    assert (result.code, texts(result), server.sizes) == (0, messages, [2, 1])


FAILING = {
    "[400:code=invalid_prompt]": "bad_request",
    "[400:param=input]": "bad_request",
    "[400:param=max_output_tokens]": "bad_request",
    "[413]": "bad_request",
    "[404]": "bad_request",
    "[refusal]": "refusal",
    "[prose]": "invalid_answer",
    "[bounds]": "invalid_answer",
    "[nan]": "invalid_answer",
    "[incomplete]": "incomplete",
    "[filter]": "content_filter",
    "[failed_prompt]": "bad_request",
}


def test_lines_that_fail_are_error_rows(server: Provider, run: Runner) -> None:
    """Their message is not asked again by this run, but once by the next."""
    messages = ["m", *(f"Bad. {item}" for item in FAILING)]
    for count in (1, 2):
        result = run(messages, "--batch")
        assert result.code == 1
        errors = [row["error"] for row in result.rows[1:]]
        assert [error["type"] for error in errors] == [*FAILING.values()]
        assert {error["attempts"] for error in errors} == {1}
        assert set(server.lines.values()) == {count}
    assert server.left == []


@pytest.mark.parametrize(
    "controls", [{"zero_share": 1.0}, {"expire_after": 0.0}, {"enqueued_limit": 0}]
)
def test_batches_that_bring_nothing_end_the_run(
    server: Provider, run: Runner, controls: dict[str, Any]
) -> None:
    """One line says so, instead of an endless loop."""
    for name, value in controls.items():
        setattr(server.batch, name, value)
    result = run(TEN, "--batch")
    assert (result.code, texts(result)) == (2, TEN[:1])
    assert len(server.batches) < 30
    assert "Traceback" not in result.err


def test_line_that_always_fails_ends_the_run(server: Provider, run: Runner) -> None:
    """The others have their answers by then."""
    result = run([*TEN, "Never. [500]"], "--batch")
    assert (result.code, texts(result)) == (2, TEN)
    assert set(server.paid.values()) == {1}
    assert 1 < server.lines["Never. [500]"] < 5


def test_limit_of_the_account_makes_smaller_batches(
    server: Provider, run: Runner
) -> None:
    """A batch above it fails later and costs nothing; half of it goes then."""
    server.batch.enqueued_limit = 3
    server.batch.seconds = 0.02
    check_whole(run(TEN, "--batch"), server)
    done = [batch for batch in server.batches if batch["status"] == "completed"]
    assert 3 >= max(len(batch.lines) for batch in done) >= 2
    assert server.left == []


def test_rejected_batch_ends_the_run(server: Provider, run: Runner) -> None:
    """The provider's reason is shown; the same command tries again."""
    server.batch.fail = "billing_is_odd"
    result = run(TEN, "--batch")
    assert (result.code, texts(result)) == (2, TEN[:1])
    assert "billing_is_odd" in result.err
    assert len(server.batches) == 1
    check_whole(run(TEN, "--batch"), server)


@posix
@pytest.mark.parametrize("kind", ["output_file_id", "input_file_id"])
def test_files_were_deleted_by_hand(server: Provider, run: Runner, kind: str) -> None:
    """Without its results a batch was in vain; without its input it was not."""
    submit(server, run, TEN, "--batch")
    (batch,) = server.batches

    def delete() -> None:
        server.files[batch[kind]].deleted = True

    server.after[LIST] = [delete]
    result = run(TEN, "--batch")
    assert (result.code, texts(result)) == (0, TEN)
    assert server.sizes == ([9, 9] if kind == "output_file_id" else [9])


# --- Privacy --------------------------------------------------------------------------
def test_files_are_deleted_once_the_rows_are_on_disk(
    server: Provider, run: Runner, tmp_path: Path
) -> None:
    """Of input, results and errors nothing is left at the provider."""
    on_disk = []

    def look() -> None:
        on_disk.append((tmp_path / "out.jsonl").read_bytes().count(b"\n"))

    server.after[DELETE] = [look]
    assert run([*TEN, "Bad. [400:param=input]"], "--batch").code == 1
    assert (on_disk, len(server.files), server.left) == ([11], 3, [])


OTHERS = {
    "overlapping": [f"m{n}" for n in range(10, 4, -1)],
    "disjoint": [f"n{n}" for n in range(5)],
}


@posix
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_two_runs_that_look_the_same(
    server: Provider, start: Runner, kind: str, seconds: float
) -> None:
    """Two folders, one name of OUTPUT: neither loses an answer, or pays for one that
    is there, or to come."""
    submit(server, start, "here", TEN)
    server.batch.seconds = seconds
    server.batches[0].begun = time.monotonic()
    check_whole(start("there", OTHERS[kind]), server, OTHERS[kind])
    assert len(server.left) >= 2  # the run here still needs them
    check_whole(start("here", TEN), server)
    assert server.left == []


def test_two_runs_at_once(server: Provider, tmp_path: Path) -> None:
    """Neither loses an answer, though both look the same."""
    server.batch.seconds = 0.2

    async def both() -> list[Rows]:
        runs = []
        for folder, messages in (("here", TEN), ("there", OTHERS["overlapping"])):
            (tmp_path / folder).mkdir()
            out = tmp_path / folder / "out.jsonl"
            runs.append(async_template.answer_all(messages, out, batch=True))
        return await asyncio.gather(*runs)

    here, there = asyncio.run(both())
    assert [row["text_message"] for row in here if row["response"]] == TEN
    assert all(row["response"] for row in there)
    assert {server.paid[LEAD + text] for text in TEN[:5]} == {1}


@posix
@pytest.mark.timeout(20)
def test_a_run_that_has_all_its_rows_waits_for_nobody(
    server: Provider, run: Runner, start: Runner
) -> None:
    """Not for the batch of another folder, which looks like its own."""
    submit(server, start, "there", OTHERS["disjoint"])
    server.batches[0].begun += 1e9  # it does not end
    run(TEN)
    check_whole(run(TEN, "--batch"), server)
    assert server.sizes == [4]


@posix
@pytest.mark.parametrize("difference", ["output", "settings"])
def test_batches_of_others_are_left_alone(
    server: Provider, start: Runner, monkeypatch: Monkey, difference: str
) -> None:
    """Neither waited for nor read: those of another OUTPUT, or of another question."""
    submit(server, start, "here", TEN)
    server.batches[0].begun += 1e9  # it does not end
    if difference == "settings":
        monkeypatch.setattr(async_template, "INSTRUCTIONS", "Be brief.")
        result = start("there", TEN)
    else:
        result = start("here", TEN, output="other.jsonl")
    assert (result.code, texts(result), server.sizes) == (0, TEN, [9, 9])
    assert server.left == [server.batches[0]["input_file_id"]]


@posix
def test_rows_that_are_not_on_disk_keep_their_files(
    server: Provider, run: Runner, tmp_path: Path
) -> None:
    """OUTPUT is moved away just then: the run stops, nothing is deleted or lost."""
    out, away = tmp_path / "out.jsonl", tmp_path / "away.jsonl"
    server.after[CONTENT] = [lambda: out.rename(away)]
    assert run(TEN, "--batch").code == 2
    assert len(server.left) == 2
    away.rename(out)
    check_whole(run(TEN, "--batch"), server)
    assert (server.sizes, server.left) == ([9], [])


@posix
def test_errors_of_a_batch_that_is_kept_are_asked_again(
    server: Provider, run: Runner
) -> None:
    """A batch of which a line is nobody's keeps its files, and its errors with them."""
    messages = [*TEN, "Bad. [400:param=input]"]
    submit(server, run, [*messages, "gone"], "--batch")
    for count in (1, 2, 3):
        assert run(messages, "--batch").code == 1
        assert server.lines["Bad. [400:param=input]"] == count


@posix
def test_error_that_another_run_asked_about_is_collected(
    server: Provider, run: Runner
) -> None:
    """Day by day: submit, Ctrl-C, collect; submit what failed, Ctrl-C, collect."""
    messages = [*TEN, "Bad. [refusal]"]
    for day in (0, 1, 2):
        submit(server, run, messages, "--batch")
        server.batches[day]["created_at"] += day * 86_400
        result = run(messages, "--batch")
        assert (result.code, texts(result)) == (1, TEN)
        assert server.lines["Bad. [refusal]"] == day + 1


@posix
def test_message_left_input_meanwhile(server: Provider, run: Runner) -> None:
    """Its answer waits at the provider, in case that it is another run's."""
    submit(server, run, TEN, "--batch")
    check_whole(run(TEN[:9], "--batch"), server, TEN[:9])
    assert server.left != []
    check_whole(run(TEN, "--batch"), server)
    assert (server.sizes, server.left) == ([9], [])


@posix
def test_message_left_input_but_has_a_row(server: Provider, run: Runner) -> None:
    """OUTPUT knows it, so the batch is this run's, and its files are deleted."""
    submit(server, run, TEN, "--batch")
    assert run(["m0", "m9"]).code == 0
    assert run(TEN[:9], "--batch").code == 0
    assert (server.sizes, server.left) == ([9], [])


# --- Money ----------------------------------------------------------------------------
@pytest.fixture
def dear(monkeypatch: Monkey) -> None:
    """A price at which cents do not matter."""
    monkeypatch.setattr(async_template, "PRICES", (1e5, 1e5))


@pytest.mark.usefixtures("dear")
@pytest.mark.parametrize("tier", [{}, {"service_tier": "flex"}])
def test_batch_costs_half(
    server: Provider, run: Runner, monkeypatch: Monkey, tier: dict[str, str]
) -> None:
    """All but the first message; flex does not halve it again."""
    live = usd(run(TEN))
    monkeypatch.setattr(async_template, "EXTRA", tier)
    run(TEN, "--limit", "1", "--restart")
    batch = usd(run(TEN, "--batch"))
    assert batch == pytest.approx(live * 0.9 / 2, rel=0.001)


@pytest.mark.usefixtures("dear")
def test_max_cost_refuses_before_submitting(server: Provider, run: Runner) -> None:
    """By the cost of the first message, and says what all may cost."""
    first = sum(run(TEN, "--limit", "1").rows[0]["usage"].values()) / 10
    enough, too_little = (str(first * (1 + 9 / 2 + more)) for more in (0.1, -0.1))
    result = run(TEN, "--batch", "--restart", "--max-cost", too_little)
    assert (result.code, len(result.rows), server.files) == (2, 1, {})
    (line,) = [line for line in result.err.splitlines() if "--max-cost:" in line]
    assert f"{first * 9 / 2:,.2f}" in line
    result = run(TEN, "--batch", "--restart", "--max-cost", enough)
    assert (result.code, server.sizes) == (0, [9])


@pytest.mark.usefixtures("dear")
@pytest.mark.parametrize("item", ["400:param=input", "failed_prompt", "nousage"])
def test_max_cost_when_the_first_message_fails(
    server: Provider, run: Runner, item: str
) -> None:
    """It tells no cost, or none at all, and so nothing of what the others cost."""
    bad = [f"{word} [{item}]" for word in ("Bad.", "Worse.")]
    result = run([*bad, *TEN], "--batch", "--max-cost", "20")
    assert (result.code, server.files) == (2, {})
    assert server.total < 5


@posix
@pytest.mark.usefixtures("dear")
def test_max_cost_pays_for_nothing_that_is_running(
    server: Provider, run: Runner
) -> None:
    """What stands in a batch is not asked live to learn its price."""
    submit(server, run, TEN, "--batch", "--max-cost", "1000")
    check_whole(run(TEN, "--batch", "--max-cost", "1000"), server)


# --- What one sees --------------------------------------------------------------------
@posix
def test_ctrl_c_leaves_the_batches_running(
    server: Provider, run: Runner, tmp_path: Path
) -> None:
    """In a terminal: the state of the batches, what Ctrl-C does, how to go on."""
    server.batch.seconds = 1000
    (tmp_path / "in.txt").write_text("\n".join(TEN), encoding="utf-8")
    arguments = ("in.txt", "out.jsonl", "--batch")
    with in_terminal(*arguments, cwd=tmp_path) as (script, screen):
        state = read_until(screen, "0 of 9 ready")
        assert re.search(r"1 batch.*in.progress since \w+", state)
        script.send_signal(signal.SIGINT)
        assert "the batches go on" in read_until(screen, "the same command collects")
        assert script.wait(30) == 130
    server.batch.seconds = 0
    check_whole(run(TEN, "--batch"), server)
    assert server.sizes == [9]


@posix
@pytest.mark.parametrize("call", [LIST, UPLOAD, CREATE, CONTENT])
def test_nothing_starts_after_ctrl_c(
    server: Provider, run: Runner, monkeypatch: Monkey, call: str
) -> None:
    """Whatever is just going on is finished, and no further batch is created."""
    monkeypatch.setattr(async_template, "MOST_LINES", 4)
    server.batch.zero_share = 0.5
    server.batch.zero_once = True
    server.after[call] = [interrupt]
    result = run(TEN, "--batch")
    assert result.code == 130
    assert len(server.batches) <= {LIST: 0, CONTENT: 3}.get(call, 1)
    server.batch.zero_share = 0
    check_whole(run(TEN, "--batch"), server)


def test_log_has_a_line_now_and_then(
    server: Provider, run: Runner, monkeypatch: Monkey
) -> None:
    """Without a terminal the state of the batches is a line every 30 s."""
    clock = time.monotonic
    began = clock()
    # A clock that is 200 times as fast.
    monkeypatch.setattr(time, "monotonic", lambda: began + 200 * (clock() - began))
    monkeypatch.setattr(async_template, "PATIENCE", 1e6)
    server.batch.seconds = 100
    result = run(TEN, "--batch", "--timeout", "6000")
    assert result.code == 0
    lines = re.findall(r"1 batch.*in.progress since .*\d of 9 ready", result.err)
    assert 1 <= len(lines) < 10


# --- Without batches ------------------------------------------------------------------
def test_part_5_can_be_cut_out(server: Provider, tmp_path: Path) -> None:
    """The rest runs without it."""
    code = (ROOT / "async_template.py").read_text(encoding="utf-8")
    rest = re.sub(r"(?ms)^# --- 5\..*(?=^# --- 6\.)", "", code)
    assert 'purpose="batch"' in code and 'purpose="batch"' not in rest
    (tmp_path / "cut.py").write_text(rest, encoding="utf-8")
    (tmp_path / "in.txt").write_text("\n".join(TEN), encoding="utf-8")
    command = [sys.executable, "cut.py", "in.txt", "out.jsonl"]
    subprocess.run(command, cwd=tmp_path, check=True)
    rows = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["text_message"] for row in rows] == TEN
    assert server.paid.total() == 10


# --- Flex -----------------------------------------------------------------------------
FLEX = {"service_tier": "flex", "store": False}


@pytest.mark.usefixtures("dear")
def test_what_was_served_as_flex_costs_half(server: Provider, run: Runner) -> None:
    """The reply says so; what was asked for does not count."""
    normal = usd(run(["m [good]", "n [good]"]))
    mixed = usd(run(["m [good]", "n [flex]"], "--restart"))
    assert mixed == pytest.approx(0.75 * normal, rel=0.001)


def test_flex_goes_on_with_output(
    server: Provider, run: Runner, monkeypatch: Monkey
) -> None:
    """A pilot at the normal price, the rest as flex: the same settings, one OUTPUT."""
    run(TEN, "--limit", "4")
    monkeypatch.setattr(async_template, "EXTRA", async_template.EXTRA | FLEX)
    result = run(TEN)
    check_whole(result, server)
    assert len({row["settings"] for row in result.rows}) == 1
    assert server.requests[-1].body["service_tier"] == "flex"


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_no_room_for_flex_is_no_attempt(
    server: Provider, run: Runner, share: float
) -> None:
    """Nor a brake for the others: a pace cut by each would make this take minutes."""
    server.policies = [Flaky(share, 429, "resource_unavailable")]
    messages = [f"m{n}" for n in range(150)]
    result = run(messages, "--max-attempts", "1", "--concurrency", "20")
    check_whole(result, server, messages)


def test_answer_all_in_batches_needs_an_output(server: Provider) -> None:
    """A batch is found by OUTPUT's name, which a temporary file has not."""
    with pytest.raises(ValueError, match="output"):
        asyncio.run(async_template.answer_all(["a"], batch=True))
    assert (server.total, server.files) == (0, {})
