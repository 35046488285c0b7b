"""Half the price: the Batch API, which nothing may pay for twice, and flex."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from conftest import KEY, ROOT, Run
from replies import BROKEN
from server import Server, error_reply, hang_up, whole

import async_template

TEN = [f"m{n}" for n in range(10)]
LEAD = async_template.PROMPT.split("{text_message}")[0]
UPLOAD, CREATE = "POST /v1/files", "POST /v1/batches"
LIST, CONTENT = "GET /v1/batches", "GET /v1/files/content"
DELETE = "DELETE /v1/files"
posix = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")

Rows = list[dict[str, Any]]
Runner = Callable[..., Run]
Kill = Callable[..., None]
Action = Callable[[], object]
Monkey = pytest.MonkeyPatch


# --- Helpers --------------------------------------------------------------------------
ODD_TEXTS: dict[str, Callable[[str], str]] = {  # what may come instead of a reply
    "web page": lambda text: "<html>Please sign in</html>",
    "half": lambda text: text[: len(text) // 2],
    "first line": lambda text: text.splitlines(keepends=True)[0],
    "nothing": lambda text: "",
    "empty object": lambda text: "{}",
}


@dataclass(kw_only=True, eq=False, repr=False)
class Provider(Server):
    """The server, to which something may happen at the next calls of a kind."""

    calls: list[str] = field(default_factory=list)  # such as UPLOAD
    after: dict[str, list[Action | None]] = field(default_factory=dict)  # before reply
    refuse: dict[str, list[int]] = field(default_factory=dict)  # statuses
    odd: dict[str, list[str]] = field(default_factory=dict)  # names of ODD_TEXTS
    cut: list[str] = field(default_factory=list)  # calls whose connection breaks

    async def _route(self, http: web.BaseRequest) -> web.StreamResponse:
        """Answers any request."""
        call = f"{http.method} {re.sub('/(file-|batch_)[0-9]+', '', http.path)}"
        self.calls.append(call)
        if self.refuse.get(call):
            status = self.refuse[call].pop(0)
            # The client itself tries again only to delete.
            headers = {"x-should-retry": "false"} if call != DELETE else {}
            return whole(error_reply(status, **headers, **{"retry-after-ms": "1"}))
        response = await super()._route(http)
        if self.after.get(call) and (action := self.after[call].pop(0)):
            action()
        if call in self.cut:
            self.cut.remove(call)
            return hang_up(http, BROKEN["half"])
        if self.odd.get(call) and isinstance(response, web.Response):
            text = ODD_TEXTS[self.odd[call].pop(0)](response.text or "")
            kind = "text/html" if text.startswith("<") else "application/json"
            return web.Response(text=text, content_type=kind)
        return response

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
    """A started provider that the environment points to, and that is asked often."""
    monkeypatch.setattr(async_template, "POLL", 0.01)
    with Provider() as started:
        monkeypatch.setenv("OPENAI_BASE_URL", started.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield started


@pytest.fixture
def start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    """Runs --batch in a folder of its own, into the OUTPUT of this name there."""

    def start(folder: str, messages: Sequence[str], output: str = "out.jsonl") -> Run:
        source = tmp_path / folder / "in.txt"
        source.parent.mkdir(exist_ok=True)
        source.write_text("\n".join(messages), encoding="utf-8")
        out = source.with_name(output)
        capsys.readouterr()
        code = async_template.main([str(source), str(out), "--batch"])
        rows = [json.loads(line) for line in out.read_bytes().splitlines()]
        return Run(code, rows, capsys.readouterr().err, out)

    return start


QUICK = f"""\
import sys
sys.path.insert(0, {str(ROOT)!r})
import async_template
async_template.POLL = 0.01
async_template.MOST_LINES = 4
sys.exit(async_template.main(["in.txt", "out.jsonl", "--batch"]))
"""


@pytest.fixture
def kill(server: Provider, tmp_path: Path) -> Kill:
    """Runs --batch in another process, and kills it at the n-th call of a kind."""

    def kill(messages: Sequence[str], call: str, number: int = 1) -> None:
        (tmp_path / "in.txt").write_text("\n".join(messages), encoding="utf-8")
        with subprocess.Popen([sys.executable, "-c", QUICK], cwd=tmp_path) as process:
            server.after[call] = [*[None] * (number - 1), process.kill]
        assert server.after[call] == []

    return kill


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


def usd(result: Run, words: str = "used: ") -> float:
    """The amount of money in the closing line that has these words."""
    (amount,) = re.findall(words + r".*?([\d,]+\.\d+) USD", result.err)
    return float(amount.replace(",", ""))


# --- The same rows --------------------------------------------------------------------
ODD = ["same", "Snow ☃\u2028 😀", "same", 'Quo"te\\', "Bad. [refusal]", "No. [prose]"]
ODD += ["No. [400:code=invalid_prompt]", "Long. [incomplete]", "Fine. [fenced]", "m"]
ODD += [f"{n} [{n}]" for n in (404, 413, "400:param=input", "nan", "filter")]


def test_rows_are_as_live(server: Provider, run: Runner, tmp_path: Path) -> None:
    """Answers, errors, doubled messages, columns; equal messages share a line."""
    source = tmp_path / "messages.jsonl"
    source.write_text("".join(json.dumps({"text": m, "id": 7}) + "\n" for m in ODD))
    live = run(source, "--max-attempts", "1")
    live.out_path.unlink()
    batch = run(source, "--batch")
    assert (live.code, batch.code, len(batch.rows)) == (1, 1, len(ODD))
    for row in (*live.rows, *batch.rows):
        del row["answered_at"]
    assert batch.rows == live.rows
    assert "same" not in server.lines and {*server.lines.values()} == {1}


def test_batch_asks_what_a_live_run_asks(server: Provider, run: Runner) -> None:
    """The ids are short; its metadata says from the first moment whose it is."""
    run(TEN).out_path.unlink()
    live = {request.text: request.body for request in server.requests}
    rows = run(TEN, "--batch").rows
    (batch,) = server.batches
    ids = {line["custom_id"] for line in batch.lines}
    assert len(ids) == 9 and max(map(len, ids)) <= 64
    for line in batch.lines:
        assert line["body"] == live[line["body"]["input"]]
        assert (line["method"], line["url"]) == ("POST", "/v1/responses")
    assert (batch["endpoint"], batch["completion_window"]) == ("/v1/responses", "24h")
    assert {rows[0]["settings"], "out.jsonl"} <= set(batch["metadata"].values())
    assert server.files[batch["input_file_id"]]["purpose"] == "batch"


@posix
def test_answered_at_is_when_the_batch_ended(server: Provider, run: Runner) -> None:
    """Not when the answer was collected, perhaps days later."""
    submit(server, run, TEN, "--batch")
    server.batches[0]["completed_at"] = 1_800_000_000
    rows = run(TEN, "--batch").rows
    assert {row["answered_at"] for row in rows[1:]} == {"2027-01-15T08:00:00Z"}


@pytest.mark.parametrize(
    "first, second, live", [([], ["--batch"], 4), (["--batch"], [], 7)]
)
def test_live_and_batch_runs_continue_each_other(
    server: Provider, run: Runner, first: list[str], second: list[str], live: int
) -> None:
    """On one OUTPUT. Batches ask nothing live if there is an answer; a third run has
    nothing to do."""
    assert run(TEN, "--limit", "4", *first).code == 0
    check_whole(run(TEN, *second), server)
    calls = len(server.calls)
    check_whole(run(TEN), server)
    assert (len(server.calls), server.total) == (calls, live)


def test_most_lines(server: Provider, run: Runner, monkeypatch: Monkey) -> None:
    """The first message is asked live, the others go in parts; the list has pages."""
    assert async_template.MOST_LINES == 10_000
    monkeypatch.setattr(async_template, "MOST_LINES", 2)
    server.batch.page = 1
    server.batch.seconds = 0.05
    check_whole(run(TEN, "--batch"), server)
    assert server.sizes == [2, 2, 2, 2, 1]


def test_limit_and_shard_hold_for_batches(server: Provider, run: Runner) -> None:
    """What is not asked for is not submitted."""
    result = run(TEN, "--batch", "--limit", "3", "--shard", "2/2")
    assert (result.code, len(result.rows)) == (0, 3)
    assert server.lines.keys() == {*texts(result)[1:]}


def test_batches_in_a_notebook(server: Provider, tmp_path: Path) -> None:
    """Cancelled, the batch goes on, and the next call collects it."""

    async def ask() -> Rows:
        answers = async_template.answer_all(TEN, tmp_path / "rows.jsonl", batch=True)
        task = asyncio.create_task(answers)
        loop = asyncio.get_running_loop()
        server.after[CREATE] = [partial(loop.call_soon_threadsafe, task.cancel)]
        return await task

    server.batch.seconds = 1000
    with pytest.raises((async_template.StopRun, asyncio.CancelledError)):
        asyncio.run(ask())
    server.batch.seconds = 0
    assert [bool(row["response"]) for row in asyncio.run(ask())] == [True] * 10
    assert (server.sizes, set(server.paid.values())) == ([9], {1})


# --- Wrong settings -------------------------------------------------------------------
@pytest.mark.parametrize("item", ["401", "403", "404", "400:param=temperature"])
def test_wrong_settings(server: Provider, run: Runner, item: str) -> None:
    """A wrong key, model or setting shows in seconds, and nothing is uploaded."""
    server.default = item
    result = run(TEN, "--batch")
    assert (result.code, texts(result)) == (2, [])
    assert (server.total, server.files, server.batches) == (1, {}, [])
    assert f"Test server says {item[:3]}" in result.err
    assert "Traceback" not in result.err


def test_first_message_is_at_fault(server: Provider, run: Runner) -> None:
    """Nothing is uploaded; the same command asks another one, and goes on."""
    messages = ["Bad. [refusal]", *TEN]
    assert run(messages, "--batch").code == 2
    assert server.files == {}
    result = run(messages, "--batch")
    assert (result.code, texts(result), server.sizes) == (1, TEN, [10])


@pytest.mark.parametrize("status, advice", [(404, "batch"), (401, "key")])
def test_no_batches_or_no_key(
    server: Provider, run: Runner, status: int, advice: str
) -> None:
    """The list is looked at first: one line says what is wrong, nothing is paid."""
    server.batch.missing_status = status
    result = run(TEN, "--batch")
    assert (result.code, server.calls) == (2, [LIST])
    (reason,) = [line for line in result.err.splitlines() if f"says {status}" in line]
    assert advice in reason and "Traceback" not in result.err


def test_offline_batch_asks_nobody(run: Runner) -> None:
    """No key, no cost, no batch."""
    result = run(TEN, "--batch", "--offline")
    assert (result.code, texts(result)) == (0, TEN)


# --- Never paid twice -----------------------------------------------------------------
def test_killed_at_any_call(server: Provider, run: Runner, kill: Kill) -> None:
    """The call was carried out, its reply is on the way; another process goes on, and
    the list shows late what was created."""
    server.batch.hide = 1
    kills = [(LIST, 1), (UPLOAD, 1), (CREATE, 2), (CONTENT, 2), (DELETE, 1)]
    for call, number in kills:
        kill(TEN, call, number)
    check_whole(run(TEN, "--batch"), server)
    assert sorted(server.sizes) == [1, 4, 4]
    # Nobody knows of a file that was uploaded for a batch that was never created.
    assert len(server.left) == 1


@pytest.mark.parametrize("call", ["upload", "create", "list", "content", "delete"])
def test_reply_to_a_call_is_lost(server: Provider, run: Runner, call: str) -> None:
    """The call was carried out all the same."""
    server.batch.lose = {call}
    check_whole(run(TEN, "--batch"), server)
    assert server.sizes == [9]
    # Nobody knows of a file when the reply to its upload was lost.
    assert len(server.left) == (call == "upload")


@posix
@pytest.mark.timeout(20)
@pytest.mark.parametrize("call", [UPLOAD, CREATE, LIST, CONTENT, DELETE])
@pytest.mark.parametrize("kind", ODD_TEXTS)
def test_odd_replies_are_trouble(
    server: Provider, run: Runner, call: str, kind: str
) -> None:
    """A proxy's page, half a reply, nothing: it is looked at again, twice; {} once."""
    if call == LIST:  # what is no list does not say that nothing runs
        submit(server, run, TEN, "--batch")
    server.odd = {call: [kind] if kind == "empty object" else [kind, kind]}
    check_whole(run(TEN, "--batch"), server)
    assert server.sizes == [9]


@pytest.mark.parametrize("lost, looks", [(set(), 1), (set(), 999), ({"create"}, 1)])
def test_list_shows_a_new_batch_late_or_never(
    server: Provider, run: Runner, lost: set[str], looks: int
) -> None:
    """It is found by its id, or a look later if the reply was lost."""
    server.batch.lose = lost
    server.batch.hide = looks
    check_whole(run(TEN, "--batch"), server)
    assert server.sizes == [9]


def test_provider_drops_metadata(server: Provider, run: Runner) -> None:
    """The batch is found by its id, and a line warns that another run can't find it."""
    server.batch.omit = {"metadata"}
    result = run(TEN, "--batch")
    check_whole(result, server)
    (warning,) = [line for line in result.err.splitlines() if "do not stop" in line]
    assert "batch_1" in warning


@pytest.mark.parametrize(
    "controls",
    [
        {"omit": {"output_file_id"}},
        {"omit": {"request_counts"}},
        {"busy": "queued", "seconds": 0.1},
        {"pending": True},
    ],
)
def test_batches_that_look_odd(
    server: Provider, run: Runner, controls: dict[str, Any]
) -> None:
    """Completed, but without results or counts for a look; an unknown status, which
    runs; an upload that takes a moment, as Azure's."""
    vars(server.batch).update(controls)
    # The first two looks find no batch, the third finds it without that key.
    server.after[LIST] = [None, None, server.batch.omit.clear]
    check_whole(run(TEN, "--batch"), server)
    assert (server.sizes, server.left) == ([9], [])


REFUSED = [(call, n) for call in (UPLOAD, CREATE, LIST, CONTENT) for n in (429, 500)]


@pytest.mark.parametrize("call, status", [*REFUSED, (CONTENT, 404), (DELETE, 500)])
def test_provider_refuses_a_call(
    server: Provider, run: Runner, call: str, status: int
) -> None:
    """A limit, a failure, results that are not there yet: a matter of waiting. (Two
    creations that fail count as two rounds, since a batch may exist in spite of it.)"""
    server.refuse = {call: [status] if call == CREATE else [status, status]}
    check_whole(run(TEN, "--batch"), server)
    assert server.sizes == [9]
    if call != CREATE:  # an upload whose creation was refused stays for 30 days
        assert server.left == []


def test_key_that_may_not_delete(server: Provider, run: Runner) -> None:
    """Is no reason to stop."""
    server.refuse = {DELETE: [403] * 9}
    check_whole(run(TEN, "--batch"), server)


def test_download_breaks_off(server: Provider, run: Runner) -> None:
    """A connection that is lost in the middle of the results is none for good."""
    server.cut = [CONTENT, CONTENT]
    check_whole(run(TEN, "--batch"), server)
    assert server.left == []


@posix
def test_another_machine_collects(server: Provider, start: Runner) -> None:
    """INPUT and OUTPUT's name are enough, and nothing is asked live; the one row that
    is on the first machine alone is asked anew."""
    submit(server, partial(start, "here"), TEN)
    result = start("there", TEN)
    assert (result.code, texts(result), server.sizes) == (0, TEN, [9, 1])
    assert (server.total, set(server.batched.values())) == (1, {1})


ZERO_ONCE = {"zero_share": 0.5, "zero_once": True}


@pytest.mark.parametrize(
    "controls", [{"expire_after": 0.3}, ZERO_ONCE, {"cancel_next": True}]
)
def test_what_a_batch_left_undone(
    server: Provider, run: Runner, controls: dict[str, Any]
) -> None:
    """Expired, lost and cancelled lines are asked once more, the others are not."""
    vars(server.batch).update(controls)
    # The second batch does not expire.
    server.after[CREATE] = [None, partial(setattr, server.batch, "expire_after", None)]
    check_whole(run(TEN, "--batch"), server)
    assert (len(server.batches), server.left) == (2, [])


@pytest.mark.parametrize("item", ["408", "429", "500", "error200", "html"])
def test_line_met_a_failure(server: Provider, run: Runner, item: str) -> None:
    """A failure of the server, or its limit, says nothing of the message."""
    messages = ["m", "n", f"Late. [{item},ok]"]
    result = run(messages, "--batch")
    assert (result.code, texts(result), server.sizes) == (0, messages, [2, 1])


def test_lines_that_fail_are_asked_again(server: Provider, run: Runner) -> None:
    """Not by this run, but once by the next."""
    for count in (1, 2):
        assert run(["m", "Bad. [refusal]", "Bad. [400]"], "--batch").code == 1
        assert {*server.lines.values()} == {count}
    assert server.left == []


@pytest.mark.parametrize(
    "controls, most",
    [({"zero_share": 1.0}, 2), ({"expire_after": 0.0}, 2), ({"enqueued_limit": 0}, 30)],
)
def test_two_rounds_that_bring_no_row_end_the_run(
    server: Provider, run: Runner, controls: dict[str, Any], most: int
) -> None:
    """One line says so, instead of an endless loop; smaller batches are tried first."""
    vars(server.batch).update(controls)
    result = run(TEN, "--batch")
    assert (result.code, texts(result)) == (2, TEN[:1])
    assert 2 <= len(server.batches) <= most
    assert "two rounds" in result.err
    assert "Traceback" not in result.err


def test_line_that_always_fails_ends_the_run(server: Provider, run: Runner) -> None:
    """The others have their answers by then."""
    result = run([*TEN, "Never. [500]"], "--batch")
    assert (result.code, texts(result)) == (2, TEN)
    assert set(server.paid.values()) == {1}
    assert 1 < server.lines["Never. [500]"] < 5


def test_batches_that_nobody_can_find(server: Provider, run: Runner) -> None:
    """Neither in the list nor by an id: two are paid for, and no more."""
    server.odd = {CREATE: ["nothing"] * 9}
    server.batch.omit = {"metadata"}
    assert run(TEN, "--batch").code == 2
    assert len(server.batches) <= 2


def test_limit_of_the_account(server: Provider, run: Runner) -> None:
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
def test_results_that_are_gone(server: Provider, run: Runner) -> None:
    """Of a batch of an earlier run: it was collected, and is not waited for."""
    submit(server, run, TEN, "--batch")
    server.refuse = {CONTENT: [404]}
    result = run(TEN, "--batch")
    assert (result.code, texts(result), server.sizes) == (0, TEN, [9, 9])


# --- Privacy --------------------------------------------------------------------------
def test_files_are_deleted(server: Provider, run: Runner, tmp_path: Path) -> None:
    """Of input, results and errors nothing is left at the provider."""
    out = tmp_path / "out.jsonl"
    on_disk: list[int] = []
    server.after[DELETE] = [lambda: on_disk.append(out.read_bytes().count(b"\n"))]
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


@posix
@pytest.mark.timeout(20)
def test_done_waits_for_nobody(server: Provider, run: Runner, start: Runner) -> None:
    """Not for the batch of another folder, which looks like its own."""
    submit(server, start, "there", OTHERS["disjoint"])
    server.batches[0].begun += 1e9  # it does not end
    run(TEN)
    check_whole(run(TEN, "--batch"), server)
    assert server.sizes == [4]


@posix
def test_batches_of_others_are_left_alone(
    server: Provider, start: Runner, monkeypatch: Monkey
) -> None:
    """Neither waited for nor read: those of another OUTPUT, or of another question."""
    submit(server, start, "here", TEN)
    server.batches[0].begun += 1e9  # it does not end
    assert texts(start("here", TEN, "other.jsonl")) == TEN
    monkeypatch.setattr(async_template, "INSTRUCTIONS", "Be brief.")
    assert texts(start("there", TEN)) == TEN
    assert server.sizes == [9, 9, 9]
    assert server.left == [server.batches[0]["input_file_id"]]


def test_error_that_a_killed_run_asked_about_is_collected(
    server: Provider, run: Runner, kill: Kill
) -> None:
    """It is newer than the error in OUTPUT, so nothing is asked a second time."""
    messages = ["m", "Bad. [refusal]"]
    assert run(messages, "--batch").code == 1
    kill(messages, CREATE)
    server.batches[1]["completed_at"] = server.batches[0]["completed_at"] + 86_400
    assert run(messages, "--batch").code == 1
    assert server.lines["Bad. [refusal]"] == 2


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
    prices = {async_template.MODEL: (1e5, 1e5, 1e5)}
    monkeypatch.setattr(async_template, "PRICES", prices)


@pytest.mark.usefixtures("dear")
def test_batch_costs_half(server: Provider, run: Runner) -> None:
    """So says a pilot of what the rest may take."""
    first = run(TEN, "--limit", "1")
    live = usd(first)
    pilot = run(TEN, "--batch", "--limit", "4")
    assert usd(pilot) == pytest.approx(3 * live / 2, rel=0.001)
    assert usd(pilot, "may take ") == pytest.approx(6 * live / 2, rel=0.001)
    assert usd(run(TEN, "--batch")) == pytest.approx(6 * live / 2, rel=0.001)


def test_max_cost_is_refused_with_batches(server: Provider, run: Runner) -> None:
    """A batch cannot be stopped by it: one line says so, before anything is asked."""
    result = run(TEN, "--batch", "--max-cost", "5")
    assert (result.code, server.calls) == (2, [])
    (line,) = result.err.splitlines()
    assert "--max-cost" in line and "batch" in line


# --- What one sees --------------------------------------------------------------------
@posix
def test_ctrl_c_leaves_the_batches_running(server: Provider, run: Runner) -> None:
    """The bar shows their state, no rate and no time left; a line says how to go on."""
    server.batch.seconds = 1000
    for looks in (3, 1):  # the second run finds the batch of the first
        server.after[LIST] = [*[None] * looks, interrupt]
        stopped = run(TEN, "--batch")
        assert stopped.code == 130
        assert re.search("batches go on|keep --batch", stopped.err), stopped.err
        bars = re.findall(r"1/10 [^\r\n]*", stopped.err.rpartition("batch_1")[2])
        assert "in_progress" in bars[-1]
        assert all(len(bar) <= 100 for bar in bars)
        assert not re.search(r"/s|<|none|\b0 batches", "".join(bars)), bars
    server.batch.seconds = 0
    check_whole(run(TEN, "--batch"), server)
    assert server.sizes == [9]


@posix
@pytest.mark.parametrize("call, most", [(LIST, 0), (UPLOAD, 1), (CREATE, 1)])
def test_nothing_starts_after_ctrl_c(
    server: Provider, run: Runner, monkeypatch: Monkey, call: str, most: int
) -> None:
    """Whatever is just going on is finished, and no further batch is created."""
    monkeypatch.setattr(async_template, "MOST_LINES", 4)
    server.after[call] = [interrupt]
    assert run(TEN, "--batch").code == 130
    assert len(server.batches) <= most
    check_whole(run(TEN, "--batch"), server)


@posix
def test_list_without_an_end(server: Provider, run: Runner) -> None:
    """The first Ctrl-C ends it."""
    submit(server, run, TEN, "--batch")
    server.batch.stuck = True
    server.after[LIST] = [None] * 5 + [interrupt]
    assert run(TEN, "--batch").code == 130
    server.batch.stuck = False
    check_whole(run(TEN, "--batch"), server)


# --- Without batches ------------------------------------------------------------------
def test_part_6_can_be_cut_out(server: Provider, tmp_path: Path) -> None:
    """The rest runs without it."""
    code = (ROOT / "async_template.py").read_text(encoding="utf-8")
    rest = re.sub(r"(?ms)^# --- 6\..*(?=^# --- 7\.)", "", code)
    assert 'purpose="batch"' in code and 'purpose="batch"' not in rest
    (tmp_path / "cut.py").write_text(rest, encoding="utf-8")
    (tmp_path / "in.txt").write_text("\n".join(TEN), encoding="utf-8")
    command = [sys.executable, "cut.py", "in.txt", "out.jsonl"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert server.paid.total() == 10


# --- Flex -----------------------------------------------------------------------------
@pytest.mark.usefixtures("dear")
def test_what_was_served_as_flex_costs_half(server: Provider, run: Runner) -> None:
    """The reply says so; what was asked for does not count."""
    normal = run(["m [good]", "n [good]"])
    normal.out_path.unlink()
    mixed = run(["m [good]", "n [flex]"])
    assert usd(mixed) == pytest.approx(0.75 * usd(normal), rel=0.001)
