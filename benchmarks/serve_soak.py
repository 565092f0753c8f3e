"""A soak: the server for minutes under clients that behave and clients that do not, and then a look at what is left.

    python -m benchmarks.serve_soak --model=DIR [--minutes=3] [--slots=4] [--queue=8] [--quick]

A fixed set of requests is answered while the server has nothing else to do. During the soak their answers must be the
same to the token, streamed or whole, while other clients abort, send damaged JSON, huge bodies and huge prompts, read a
byte now and then, send as slowly, use wrong keys, open connections and drop them, and ask for more than the queue holds
(such a one comes again when the server says so).

At the end nothing may run or wait, nothing may have been compiled, the file descriptors must be those of the beginning,
the memory at most 15 % above that of half a minute after the beginning (what the cache of past texts has grown counts
apart), and SIGTERM must let running answers finish. Ends with status 1 and a sentence for each violation. Asserts no
times.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

import openai

from benchmarks.serve_case import ERRORS, ROOT
from benchmarks.serve_soak_clients import CLIENTS, KEY, Ask, Soak, Told, ask_once, healthy, known_requests

GROWTH = 1.15  # of the memory, between SETTLED seconds and the end
WAIT = 20.0  # seconds until everything must have been given back
HOSTILE_PAUSE = 0.4  # seconds between two of one badly behaved client, on average


def main() -> None:
    """Run the soak, print what happened, end with status 1 if something was wrong."""
    flags = _flags()
    with ExitStack() as stack:
        server, url, log = _start_server(flags, stack)
        soak = asyncio.run(_soak(flags, server, url))
        status = server.wait()
        log.seek(0)
        lines = log.read()
    if status != 0:
        soak.blame(f"the server ended with status {status}, 0 was wanted")
    if "Traceback" in lines:
        soak.blame(f"the server's log has a traceback:\n{lines[lines.index('Traceback') :][:ERRORS]}")
    _show(soak)
    sys.exit("\n" + "\n".join(f"violation: {text}" for text in soak.violations) if soak.violations else 0)


async def _soak(flags: argparse.Namespace, server: "subprocess.Popen[bytes]", url: str) -> Soak:
    """Return what happened from the first request to the server's end."""
    soak = _open_soak(flags, server, url)
    before = _files(server)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=600) as soak.client:
        for ask in soak.asks:
            ask.told = await ask_once(soak, ask, stream=False)
            _compare_streamed(soak, ask, await ask_once(soak, ask, stream=True))
        tokens, began = _metrics(url)["answer_tokens"], time.monotonic()
        soak.end = began + flags.seconds
        watch = asyncio.create_task(_watch(soak, server, flags.settle))
        await asyncio.gather(*_clients(soak, flags))
        seconds = time.monotonic() - began
        soak.report.append(f"{seconds:.0f} s, {(_metrics(url)['answer_tokens'] - tokens) / seconds:,.0f} tokens/s")
        await watch
    await asyncio.to_thread(_check_idle, soak, server, before, long=not flags.quick)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=600) as soak.client:
        await _check_drain(soak, server)
    return soak


def _clients(soak: Soak, flags: argparse.Namespace) -> list["asyncio.Task[None]"]:
    """Start everybody: those who behave, and one or several of each kind of the others."""

    async def behaved(rng: random.Random) -> None:
        while time.monotonic() < soak.end:
            await healthy(soak, rng.choice(soak.asks), rng)
            await asyncio.sleep(rng.expovariate(10))

    async def other(kind: str, rng: random.Random) -> None:
        while time.monotonic() < soak.end:
            begun = time.monotonic()
            try:
                outcome = await CLIENTS[kind](soak, rng)
            except (ConnectionError, TimeoutError, EOFError) as error:
                outcome = f"{type(error).__name__}"
                soak.blame(f"{kind}: {error!r}")
            soak.note(kind, outcome, time.monotonic() - begun)
            await asyncio.sleep(rng.expovariate(1 / HOSTILE_PAUSE))

    tasks = [behaved(random.Random(number)) for number in range(flags.clients)]
    tasks += [other(kind, random.Random(f"{kind} {number}")) for kind in CLIENTS for number in range(flags.each)]
    return [asyncio.create_task(task) for task in tasks]


async def _watch(soak: Soak, server: "subprocess.Popen[bytes]", settle: float) -> None:
    """Take down the memory when everything has happened at least once; /metrics must answer all the while."""
    begun, most, rss = time.monotonic(), dict.fromkeys(("running", "queued", "files"), 0.0), [_rss(server)]
    while time.monotonic() < soak.end:
        await asyncio.sleep(0.5)
        metrics = await asyncio.to_thread(_metrics, soak.url)
        now = {**metrics, "files": len(_files(server))}
        most = {name: max(value, now[name]) for name, value in most.items()}
        rss.append(_rss(server))
        if not soak.memory and time.monotonic() - begun >= settle:
            soak.memory = [(_rss(server), metrics["cache_bytes"] / 2**20)]
    course = ", ".join(f"{value:,.0f}" for value in rss[:: max(1, len(rss) // 12)])
    soak.report.append(f"RSS in the course of it, MiB: {course}")
    soak.report.append("at most " + ", ".join(f"{value:.0f} {name}" for name, value in most.items()))


def _check_idle(soak: Soak, server: "subprocess.Popen[bytes]", before: list[str], *, long: bool) -> None:
    """See that what was taken has been given back; memory only after a `long` time, when it no longer grows."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        metrics, files = _metrics(soak.url), _files(server)
        if metrics["running"] == metrics["queued"] == 0 and len(files) <= len(before):
            break
        time.sleep(0.2)
    for name in ("running", "queued", "compilations"):
        if metrics[name]:
            soak.blame(f"{metrics[name]:.0f} {name} after the soak, 0 were wanted")
    if len(files) > len(before):
        soak.blame(
            f"{len(files)} open files after the soak, {len(before)} before: {sorted(set(files) - set(before))[:5]}"
        )
    soak.memory.append((_rss(server), metrics["cache_bytes"] / 2**20))
    (first, cached_first), (last, cached_last) = soak.memory
    soak.report.append(
        f"RSS {first:,.0f} MiB when settled, {last:,.0f} at the end (peak {_rss(server, 'VmHWM'):,.0f}), "
        f"KV cache {cached_first:,.0f} and {cached_last:,.0f}; {len(before)} files open before, {len(files)} after"
    )
    soak.report.append(f"largest difference of a log-probability: {soak.worst:.1e}")
    allowed = GROWTH * first + max(0.0, cached_last - cached_first)
    if last > allowed and long:
        soak.blame(f"the memory grew from {first:,.0f} to {last:,.0f} MiB, at most {allowed:,.0f} were wanted")


async def _check_drain(soak: Soak, server: "subprocess.Popen[bytes]") -> None:
    """End the server while it answers: those answers must be whole, and it must take no others."""
    single = [ask for ask in soak.asks if ask.told is not None and len(ask.told.texts) == 1]
    asks = sorted(single, key=lambda ask: -(ask.told or Told()).usage[1])[: soak.slots + 2]
    running = [asyncio.create_task(ask_once(soak, ask, stream=True)) for ask in asks]
    end, taken = time.monotonic() + WAIT, 0.0
    while time.monotonic() < end and taken < len(asks):
        metrics = await asyncio.to_thread(_metrics, soak.url)
        taken = metrics["running"] + metrics["queued"] + sum(task.done() for task in running)
    server.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.05)
    refused = await asyncio.gather(ask_once(soak, soak.asks[0], stream=False), return_exceptions=True)
    if not isinstance(refused[0], openai.APIStatusError | openai.APIConnectionError):
        soak.blame(f"a request after SIGTERM was answered {refused[0]}")
    answers = await asyncio.gather(*running, return_exceptions=True)
    for ask, told in zip(asks, answers, strict=True):
        if told != ask.told:
            soak.blame(f"SIGTERM: {ask.name} was answered {told!r}, {ask.told} was wanted")
    right = sum(told == ask.told for ask, told in zip(asks, answers, strict=True))
    soak.report.append(f"SIGTERM with {len(asks)} answers running: {right} were right and whole")
    with suppress(subprocess.TimeoutExpired):
        await asyncio.to_thread(server.wait, 60)
    if server.poll() is None:
        soak.blame("the server has not ended a minute after SIGTERM")
        server.kill()


def _compare_streamed(soak: Soak, ask: Ask, streamed: Told) -> None:
    if streamed != ask.told:
        soak.blame(f"{ask.name}, alone: streamed {streamed}, whole {ask.told}")


def _open_soak(flags: argparse.Namespace, server: "subprocess.Popen[bytes]", url: str) -> Soak:
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request) as reply:
        described = json.load(reply)["data"][0]
    vocabulary = json.loads((Path(flags.model) / "config.json").read_text())["vocab_size"]
    context = described["max_model_len"]
    asks = known_requests(described["id"], context, vocabulary, chat=described["chat"])
    return Soak(url=url, model=described["id"], context=context, slots=flags.slots, asks=asks, most=flags.max_body)


def _start_server(flags: argparse.Namespace, stack: ExitStack) -> tuple["subprocess.Popen[bytes]", str, IO[str]]:
    """Start the server on a free port; return its process, its address and its log."""
    keys = stack.enter_context(tempfile.NamedTemporaryFile("w"))  # noqa: SIM115  the stack closes it
    keys.write(f"{KEY}\n")
    keys.flush()
    words = [f"--model=soaked={Path(flags.model).resolve()}", "--port=0", f"--api_key_file={keys.name}"]
    words += [f"--{name}={getattr(flags, name)}" for name in ("slots", "queue", "prefix_gib", "max_body")]
    log = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115  the stack closes it
    command = [sys.executable, "-m", "easylm_like.serve", *words]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log)
    stack.callback(server.wait)
    stack.callback(server.kill)
    assert server.stdout is not None
    stack.callback(server.stdout.close)
    for line in server.stdout:
        if line.startswith(b"serving on "):
            return server, line.split()[-1].decode(), log
    log.seek(0)
    sys.exit(f"the server failed:\n{log.read()[-ERRORS:]}")


def _metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as reply:
        lines = reply.read().decode()
    found = re.findall(r'^easylm_like_(\w+?)(?:_total)?\{model="\w+"\} (\S+)$', lines, re.MULTILINE)
    return {name: float(value) for name, value in found}


def _files(server: "subprocess.Popen[bytes]") -> list[str]:
    """Return what the server has open."""
    found = []
    for entry in os.scandir(f"/proc/{server.pid}/fd"):
        with suppress(OSError):  # it may have been closed meanwhile
            found.append(os.readlink(entry.path))
    return found


def _rss(server: "subprocess.Popen[bytes]", name: str = "VmRSS") -> float:
    """Return the server's memory in MiB."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(re.findall(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[0]) / 1024


def _show(soak: Soak) -> None:
    """Print who did what and how it ended."""
    print(f"{'client':16} {'outcome':34} {'number':>7} {'p50, s':>8} {'p95, s':>8}")
    for (kind, outcome), times in sorted(soak.seconds.items()):
        high = statistics.quantiles(times, n=20)[-1] if len(times) > 1 else times[0]
        print(f"{kind:16} {outcome:34} {len(times):7,} {statistics.median(times):8.3f} {high:8.3f}")
    print("\n".join(soak.report), flush=True)


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--quick", action="store_true", help="10 seconds, for a test")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--queue", type=int, default=8)
    parser.add_argument("--prefix_gib", type=float, default=0.05)
    parser.add_argument("--max_body", type=float, default=1.0, help="largest request, in MiB")
    parser.add_argument("--clients", type=int, default=5, help="that behave")
    parser.add_argument("--each", type=int, default=1, help="of each kind that does not")
    flags = parser.parse_args()
    flags.seconds, flags.settle = (10.0, 4.0) if flags.quick else (60 * flags.minutes, min(30.0, 30 * flags.minutes))
    return flags


if __name__ == "__main__":
    main()
