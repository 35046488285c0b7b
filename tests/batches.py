"""A fake of OpenAI's Files and Batch APIs, as a part of the test server."""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Json = dict[str, Any]


# --- The Batch API --------------------------------------------------------------------
@dataclass
class BatchControls:
    """What the Batch API does; may be set at any time."""

    seconds: float = 0.0  # how long a batch is in progress
    enqueued_limit: float = math.inf  # most requests of all batches that haven't ended
    expire_after: float | None = None  # the share of lines done when a batch expires
    zero_share: float = 0.0  # the share of lines with status code 0 ...
    zero_once: bool = False  # ... in the first batch only
    lose: set[str] = field(default_factory=set)  # calls whose next reply is lost
    page: int = 100  # most records in a page of a list
    stuck: bool = False  # a list without end: each page is the first
    hide: int = 0  # how many lists don't show a new batch yet
    fail: str | None = None  # the error code with which the next batch fails
    cancel_next: bool = False  # the next batch ends as cancelled, half done
    busy: str = "in_progress"  # the status while it runs
    omit: set[str] = field(default_factory=set)  # keys that no batch shows
    pending: bool = False  # an upload is not processed before it is looked at
    missing_status: int | None = None  # the reply to every call, without a Batch API


class File(dict[str, Any]):
    """A file as the API shows it, and what is in it."""

    content: bytes
    deleted = False


class Batch(dict[str, Any]):
    """A batch as the API shows it, and what decides its fate."""

    begun: float  # of the monotonic clock
    lines: list[Json]
    faults: list[str]  # error codes
    hidden: int  # lists that don't show it yet
    is_cancelled: bool

    def enter(self, status: str, completed: int = 0, failed: int = 0) -> None:
        """Takes a status, and tells how many lines are done."""
        counts = {"total": len(self.lines), "completed": completed, "failed": failed}
        self.update({"status": status, "request_counts": counts})
        self.setdefault(f"{status}_at", int(time.time()))

    def has_ended(self) -> bool:
        """Whether nothing more will happen."""
        return self["status"] in {"completed", "failed", "expired", "cancelled"}


def find_faults(lines: list[Json], size: int, endpoint: str) -> list[str]:
    """The codes of what is wrong with the lines of a batch."""
    ids = {line["custom_id"] for line in lines}
    faults = {
        "empty_file": not lines,
        "too_many_requests": len(lines) > 50_000,
        "file_too_large": size > 200_000_000,
        "duplicate_custom_id": len(ids) < len(lines),
        "invalid_custom_id": not all(0 < len(name) <= 64 for name in ids),
        "invalid_method": any(line["method"] != "POST" for line in lines),
        "invalid_url": any(line["url"] != endpoint for line in lines),
    }
    return [code for code, is_wrong in faults.items() if is_wrong]


def output_line(line: Json, response: Json | None, error: Json | None = None) -> Json:
    """What comes out for a line of a batch."""
    output = {"id": f"batch_req_{line['custom_id']}", "custom_id": line["custom_id"]}
    return {**output, "response": response, "error": error}


@dataclass(kw_only=True)
class BatchApi:
    """The files and batches of the provider."""

    batch: BatchControls = field(default_factory=BatchControls)
    files: dict[str, File] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)

    def answer_line(self, body: Json) -> tuple[int, Any]:
        """The status and the body that come out for the body of a line."""
        raise NotImplementedError

    async def call(self, http: web.BaseRequest) -> tuple[str, Any]:
        """The name of the call and its result; KeyError if something isn't there."""
        files = {name: file for name, file in self.files.items() if not file.deleted}
        batches = {batch["id"]: batch for batch in self.batches}
        match http.method, *http.path.split("/")[2:]:
            case "POST", "files":
                return "upload", await self._upload(http)
            case "GET", "files", file_id:
                files[file_id]["status"] = "processed"
                return "retrieve_file", files[file_id]
            case "GET", "files", file_id, "content":
                return "content", files[file_id].content
            case "DELETE", "files", file_id:
                files[file_id].deleted = True
                return "delete", {"id": file_id, "object": "file", "deleted": True}
            case "POST", "batches":
                asked = json.loads(await http.content.read())
                file = files[asked["input_file_id"]]
                if file["status"] != "processed":
                    raise web.HTTPBadRequest(text="The file is not processed yet.")
                return "create", self._show(self._create(asked, file))
            case "GET", "batches":
                return "list", self._page(self._shown(), http.query)
            case "GET", "batches", batch_id:
                return "retrieve", self._show(self._look(batches[batch_id]))
        raise KeyError(http.path)

    async def _upload(self, http: web.BaseRequest) -> File:
        """Stores the file of a form."""
        boundary = http.headers["content-type"].partition("boundary=")[2].strip('"')
        body = await http.content.read()
        filename = ""
        form = {}
        for part in body.split(f"--{boundary}".encode())[1:-1]:
            head, _, value = part.partition(b"\r\n\r\n")
            names = dict(re.findall(r'(\w+)="([^"]*)"', head.decode()))
            form[names["name"]] = value.removesuffix(b"\r\n")
            filename = names.get("filename", filename)
        return self._store(form["file"], filename, form["purpose"].decode())

    def _store(self, content: bytes, filename: str, purpose: str) -> File:
        """A new file."""
        file = File(id=f"file-{len(self.files) + 1}", object="file")
        file["status"] = "pending" if self.batch.pending else "processed"
        file.update(filename=filename, purpose=purpose)
        file.update(bytes=len(content), created_at=int(time.time()))
        file.content = content
        self.files[file["id"]] = file
        return file

    def _page(self, records: Sequence[Json], query: Mapping[str, str]) -> Json:
        """The page of a list that a query asks for."""
        size = min(int(query.get("limit", 20)), self.batch.page)
        ids = [record["id"] for record in records]
        is_first = "after" not in query or self.batch.stuck
        start = 0 if is_first else ids.index(query["after"]) + 1
        page = records[start : start + size]
        return {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": self.batch.stuck or start + size < len(records),
        }

    def _show(self, batch: Batch) -> Json:
        """The batch as a reply has it."""
        return {key: batch[key] for key in batch if key not in self.batch.omit}

    def _shown(self) -> list[Json]:
        """The batches that a list shows, the newest first."""
        for batch in self.batches:
            batch.hidden -= 1
        shown = [batch for batch in reversed(self.batches) if batch.hidden < 0]
        return [self._show(self._look(batch)) for batch in shown]

    def _create(self, asked: Json, file: File) -> Batch:
        """A new batch; what is wrong with it shows at the next look."""
        control = self.batch
        batch = Batch(asked, id=f"batch_{len(self.batches) + 1}", object="batch")
        batch["created_at"] = int(time.time())
        batch["expires_at"] = batch["created_at"] + 86_400
        batch.begun = time.monotonic()
        batch.hidden = control.hide
        batch.is_cancelled = control.cancel_next
        batch.lines = [json.loads(line) for line in file.content.splitlines()]
        batch.faults = find_faults(batch.lines, file["bytes"], asked["endpoint"])
        running = [one for one in self.batches if not self._look(one).has_ended()]
        enqueued = sum(len(one.lines) for one in [*running, batch])
        if enqueued > control.enqueued_limit:
            batch.faults.append("token_limit_exceeded")
        if control.fail:
            batch.faults.append(control.fail)
        control.fail = None
        control.cancel_next = False
        batch.enter("validating")
        self.batches.append(batch)
        return batch

    def _look(self, batch: Batch) -> Batch:
        """The batch, moved on to what it is by now."""
        share = (time.monotonic() - batch.begun) / max(self.batch.seconds, 1e-9)
        if batch.has_ended():
            return batch
        if batch.faults:
            faults = [{"code": code, "message": code} for code in batch.faults]
            batch["errors"] = {"object": "list", "data": faults}
            batch.enter("failed")
        elif share < 1:
            batch.enter(self.batch.busy, int(share * len(batch.lines)))
        elif batch.is_cancelled:
            self._end(batch, "cancelled", 0.5)
        elif self.batch.expire_after is not None:
            self._end(batch, "expired", self.batch.expire_after)
        else:
            self._end(batch, "completed", 1.0)
        return batch

    def _end(self, batch: Batch, status: str, share: float) -> None:
        """Does a share of the lines, in any order, and stores what comes out."""
        dice = random.Random(batch["id"])
        dice.shuffle(batch.lines)
        done = int(share * len(batch.lines))
        is_spared = self.batch.zero_once and batch is not self.batches[0]
        zero_share = 0.0 if is_spared else self.batch.zero_share
        outputs: dict[str, list[Json]] = {"output_file_id": [], "error_file_id": []}
        for line in batch.lines[:done]:
            response = self._do(line, is_zero=dice.random() < zero_share)
            is_good = response["status_code"] < 400
            kind = "output_file_id" if is_good else "error_file_id"
            outputs[kind].append(output_line(line, response))
        if status == "expired":
            error = {"code": "batch_expired", "message": "The batch has expired."}
            late = [output_line(line, None, error) for line in batch.lines[done:]]
            outputs["error_file_id"].extend(late)
        for kind, lines in outputs.items():
            content = "".join(json.dumps(line) + "\n" for line in lines)
            if lines:
                file = self._store(content.encode(), f"{kind}.jsonl", "batch_output")
                batch[kind] = file["id"]
        batch.enter(status, *map(len, outputs.values()))

    def _do(self, line: Json, is_zero: bool) -> Json:
        """The response to a line of a batch."""
        if is_zero:
            return {"status_code": 0, "request_id": "", "body": ""}
        status, body = self.answer_line(line["body"])
        return {"status_code": status, "request_id": "req_batch", "body": body}
