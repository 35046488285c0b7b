# From https://github.com/yang3kc/llm_for_css. It needs async_template.py beside it.
"""Ask the same question about many messages in four ways: how fast, how many errors?

  python compare_sync_async.py --offline --n 200 > table.md   no key, no cost
  python compare_sync_async.py messages.txt --n 5 --yes       the real API

The question is that of async_template.py, which alone retries. The ways take turns.
Exit status: 0; 1 calls failed; 2 not started, one line says why; 130 interrupted.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import VERSION, AsyncOpenAI, OpenAI, OpenAIError

import async_template as template

Calls = list[dict[str, Any]]  # for `responses.parse`
FAILURES = (OpenAIError, ValueError)  # ValueError: the answer does not fit the schema


# --- 1. Four ways; each counts its failed calls ---
def loop(calls: Calls, limit: int) -> int:
    """One after the other."""
    with OpenAI(max_retries=0) as client:
        return sum(fails(client, call) for call in calls)


def threads(calls: Calls, limit: int) -> int:
    """A pool of threads."""
    with OpenAI(max_retries=0) as client, ThreadPoolExecutor(limit) as pool:
        return sum(pool.map(lambda call: fails(client, call), calls))


def fails(client: OpenAI, call: Any) -> bool:
    with contextlib.suppress(*FAILURES):
        return client.responses.parse(**call).output_parsed is None
    return True


def gather(calls: Calls, limit: int) -> int:
    """All at the same moment, whatever the limit."""

    async def ask_all() -> Any:
        async with AsyncOpenAI(max_retries=0) as client:
            asking = [client.responses.parse(**call) for call in calls]
            return await asyncio.gather(*asking, return_exceptions=True)

    replies = asyncio.run(ask_all())
    return sum(isinstance(r, FAILURES) or r.output_parsed is None for r in replies)


def async_template(calls: Calls, limit: int) -> int:
    """The template's own pool; its bar is hidden."""
    texts = [call["extra_body"]["input"] for call in calls]  # PROMPT is filled in
    asking = template.answer_all(texts, prompt="{text_message}", concurrency=limit)
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        rows = asyncio.run(asking)
    return sum(row["error"] is not None for row in rows)


# --- 2. A stand-in for the API ---
def start_server(latency: float, load: dict[str, int]) -> None:
    """Has clients ask a server that gives EXAMPLE."""
    part = {"type": "output_text", "text": template.EXAMPLE.model_dump_json()}
    body = json.dumps({"output": [{"type": "message", "content": [part]}]})
    reply = (
        "HTTP/1.1 200 OK\r\n"
        "content-type: application/json\r\n"
        "x-ratelimit-limit-requests: 30000\r\n"  # so high that nobody has to wait
        "x-ratelimit-remaining-requests: 29999\r\n"
        f"content-length: {len(body)}\r\n\r\n{body}"
    ).encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(EOFError, OSError):
            while True:  # until the client hangs up
                asked = await reader.readuntil(b"\r\n\r\n")
                size = asked.lower().split(b"content-length: ")[1].split()[0]
                await reader.readexactly(int(size))
                load["now"] += 1
                load["peak"] = max(load["peak"], load["now"])
                await asyncio.sleep(latency)
                load["now"] -= 1
                writer.write(reply)

    events = asyncio.new_event_loop()
    threading.Thread(target=events.run_forever, daemon=True).start()
    starting = asyncio.start_server(serve, "127.0.0.1", backlog=1000)
    server = asyncio.run_coroutine_threadsafe(starting, events).result()
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    os.environ.update(OPENAI_BASE_URL=url, OPENAI_API_KEY="offline", no_proxy="*")


# --- 3. The race ---
def race(calls: Calls, args: argparse.Namespace, load: dict[str, int]) -> int:
    """Times the ways and prints a table; returns how many calls failed."""
    ways = [loop, threads, gather, async_template]
    for way in ways:
        way(calls[:1], args.concurrency)  # the first call loads half of the SDK
    runs: dict[str, list[tuple[float, int, int]]] = {way.__name__: [] for way in ways}
    for way in ways * args.repeat:
        load["peak"] = 0
        started = time.perf_counter()
        errors = way(calls, args.concurrency)
        took = time.perf_counter() - started
        runs[way.__name__].append((took, errors, load["peak"]))
        bar = "#" * min(60, round(60 * took / runs["loop"][0][0]))
        print(f"{way.__name__:14} {took:7.2f} s {bar}", file=sys.stderr)
    at = f"latency {args.latency:g} s offline" if args.offline else template.MODEL
    print(time.strftime(f"%Y-%m-%d, Python {sys.version.split()[0]}, openai {VERSION}"))
    print(f"{at}, n {len(calls)}, concurrency {args.concurrency}, {args.repeat} runs\n")
    print("| | best | spread | rows/s | speedup | errors | in flight |")
    print("|---|---|---|---|---|---|---|")
    for name in runs:
        seconds, errors, peaks = zip(*runs[name])
        best = min(seconds)
        speedup = min(runs["loop"])[0] / best
        row = f"{best:.2f} s | {max(seconds) - best:.2f} s | {len(calls) / best:.1f}"
        peak = max(peaks) or "?"
        print(f"| {name} | {row} | {speedup:.1f}x | {sum(errors)} | {peak} |")
    return sum(errors for name in runs for _, errors, _ in runs[name])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    add = parser.add_argument
    add("input", nargs="?", type=Path, default=Path(__file__).with_name("messages.txt"))
    add("--offline", action="store_true", help="a stand-in answers: no key, no cost")
    add("--yes", action="store_true", help="call the real API")
    add("--latency", type=float, default=0.5, help="seconds, offline")
    add("--repeat", type=int, default=3, help="runs of each way, 3 or more")
    add("--concurrency", type=int, default=template.CONCURRENCY)
    add("--n", type=int, help="how many messages, in a cycle; default all")
    args = parser.parse_args(argv)
    for name, least in {"latency": 0, "repeat": 3, "concurrency": 1, "n": 1}.items():
        value = getattr(args, name)
        if value is not None and not least <= value < 1e6:
            parser.error(f"argument --{name}: must be {least} or more, not {value}")
    load = {"now": 0, "peak": 0}  # requests in flight
    calls: Calls = []
    try:
        question = template.Question()
        rows = list(template.read_messages(args.input, "text"))
        if not rows:
            raise template.StopRun(f"there is no message in {args.input}")
        for i in range(args.n or len(rows)):
            body = question.request(rows[i % len(rows)])
            body["input"] += f" ({i})"  # the template asks the same text only once
            calls.append({"text_format": type(question.example), "extra_body": body})
        if args.offline:
            start_server(args.latency, load)
        elif not os.environ.get("OPENAI_API_KEY"):
            raise template.StopRun("no key: set OPENAI_API_KEY, or try --offline")
        elif not args.yes:
            count = 4 * (args.repeat * len(calls) + 1)
            usd = count * 300 * sum(template.PRICES or ()) / 1e6  # 300 tokens each way
            raise template.StopRun(f"{count} calls, some {usd:.2f} USD: add --yes")
        return min(1, race(calls, args, load))
    except (template.StopRun, OSError, KeyboardInterrupt) as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else 2


if __name__ == "__main__":
    raise SystemExit(main())
