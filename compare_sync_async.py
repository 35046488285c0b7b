# From https://github.com/yang3kc/llm_for_css. It needs async_template.py beside it.
"""Ask the same question about many messages in four ways: how fast, how many errors?

  python compare_sync_async.py --offline --n 200 > table.md   no key, no cost
  python compare_sync_async.py messages.txt --n 5 --yes       the real API

The question is that of async_template.py, which alone retries. The ways take turns.
Exit status: 0; 1 calls failed; 2 not started, one line says why; 130 interrupted.
"""

import argparse
import asyncio
import io
import itertools
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

from aiohttp import web  # comes with openai[aiohttp]
from openai import VERSION, AsyncOpenAI, OpenAI, OpenAIError

import async_template as template


def loop(calls: list[Any], limit: int) -> int:
    """One after the other."""
    with OpenAI(max_retries=0) as client:
        return sum(fails(client, call) for call in calls)


def threads(calls: list[Any], limit: int) -> int:
    """A pool of threads."""
    with OpenAI(max_retries=0) as client, ThreadPoolExecutor(limit) as pool:
        return sum(pool.map(lambda call: fails(client, call), calls))


def fails(client: OpenAI, call: Any) -> bool:
    """Whether there is no answer. ValueError: it does not fit the schema."""
    with suppress(OpenAIError, ValueError):
        return client.responses.parse(**call).output_parsed is None
    return True


def gather(calls: list[Any], limit: int) -> int:
    """All at the same moment, whatever the limit."""

    async def ask_all() -> Any:
        async with AsyncOpenAI(max_retries=0) as client:
            asking = [client.responses.parse(**call) for call in calls]
            return await asyncio.gather(*asking, return_exceptions=True)

    replies = asyncio.run(ask_all())
    return sum(getattr(reply, "output_parsed", None) is None for reply in replies)


def async_template(calls: list[Any], limit: int) -> int:
    """The template's own pool; its bar is hidden."""
    texts = [call["input"] for call in calls]  # PROMPT is filled in
    changes = {"prompt": "{text_message}", "concurrency": limit}
    with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        asking = template.answer_all(texts, f"{folder}/rows.jsonl", **changes)
        rows = asyncio.run(asking)
    return sum(bool(row["error"]) for row in rows)


def start_server(latency: float) -> None:
    """Has clients ask a server in a thread, which always answers with EXAMPLE."""
    text = template.EXAMPLE.model_dump_json(by_alias=True)
    part = {"type": "output_text", "text": text}

    async def answer(request: web.Request) -> web.Response:
        await asyncio.sleep(latency)
        return web.json_response({"output": [{"type": "message", "content": [part]}]})

    app = web.Application()
    app.router.add_post("/v1/responses", answer)
    sock = socket.create_server(("127.0.0.1", 0))
    options = {"sock": sock, "backlog": 1000, "print": None, "handle_signals": False}
    Thread(target=web.run_app, args=[app], kwargs=options, daemon=True).start()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
    os.environ.update(OPENAI_BASE_URL=url, OPENAI_API_KEY="offline", no_proxy="*")


def race(calls: list[Any], args: argparse.Namespace) -> int:
    """Times the ways and prints a table; returns how many calls failed."""
    ways = [loop, threads, gather, async_template]
    for way in ways:
        way(calls[:1], args.concurrency)  # the first call loads half of the SDK
    runs: dict[str, list[tuple[float, int]]] = {way.__name__: [] for way in ways}
    for way in ways * args.repeat:
        started = time.perf_counter()
        failed = way(calls, args.concurrency)
        seconds = time.perf_counter() - started
        print(f"{way.__name__}: {seconds:.2f} s", file=sys.stderr)
        runs[way.__name__].append((seconds, failed))
    print(time.strftime(f"%Y-%m-%d, Python {sys.version.split()[0]}, openai {VERSION}"))
    print("python", *sys.argv, end="\n\n")
    print("| | best | spread | rows/s | speedup | errors |\n|---|---|---|---|---|---|")
    for name in runs:
        times, errors = zip(*runs[name])
        best = min(times)
        row = f"{best:.2f} s | {max(times) - best:.2f} s | {len(calls) / best:.1f}"
        speedup = min(runs["loop"])[0] / best
        print(f"| {name} | {row} | {speedup:.1f}x | {sum(errors)} |")
    return sum(failed for name in runs for _, failed in runs[name])


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    add = parser.add_argument
    add("input", nargs="?", type=Path, default=Path(__file__).with_name("messages.txt"))
    add("--offline", action="store_true", help="a stand-in answers: no key, no cost")
    add("--yes", action="store_true", help="call the real API")
    add("--latency", type=float, default=0.5, help="seconds, offline (0.5)")
    add("--repeat", type=int, default=3, help="runs of each way, 3 or more (3)")
    add("--concurrency", type=int, default=template.CONCURRENCY)
    add("--n", type=int, default=30, help="how many messages, in a cycle (30)")
    args = parser.parse_args(argv)
    if not args.latency >= 0 or args.repeat < 3 or args.concurrency < 1 or args.n < 1:
        parser.error("a number is too small")
    interrupts = (KeyboardInterrupt, asyncio.CancelledError)
    try:
        question = template.Question(template.parse_args(["messages.txt", "out.jsonl"]))
        messages = template.read_messages(args.input, question.field)
        messages = itertools.islice(itertools.cycle(messages), args.n)
        shared = {"text_format": question.schema, "extra_body": question.shared}
        texts = [f"{question.text(m)} ({n})" for n, m in enumerate(messages)]
        calls = [shared | {"input": text} for text in texts]  # no text comes twice
        if args.offline:
            start_server(args.latency)
        elif not args.yes:
            count = 4 * (args.repeat * len(calls) + 1)  # of 300 tokens each way
            usd = count * 300 * sum(question.prices or [float("nan")]) / 1e6
            raise template.StopRun(f"{count} calls, some {usd:.2f} USD: add --yes")
        return min(1, race(calls, args))
    except (template.StopRun, OSError, OpenAIError, *interrupts) as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130 if isinstance(stop, interrupts) else 2


if __name__ == "__main__":
    raise SystemExit(main())
