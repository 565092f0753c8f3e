"""The server under many streams at once, for benchmarks/serve.py; run by itself this is its clients.

python -m benchmarks.serve_streams URL MODEL
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openai

from benchmarks.serve_case import ERRORS, PAUSE, ROOT, Contestant, Task, answer, prompts_of, threads


def main() -> None:
    """Ask the server of the command line for streams when told to."""
    answer(start)


def start() -> tuple[dict[str, object], Mapping[str, Task]]:
    """Make one client, whose connections stay open from turn to turn."""
    runner = asyncio.Runner()
    url, model = sys.argv[1:]
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=3600)

    async def stream(prompt: list[int], new: int) -> tuple[int, list[float]]:
        """Return how many tokens an answer had, and the seconds from its request to each of its chunks of text."""
        begun, times, tokens = time.perf_counter(), list[float](), 0
        chunks = await client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=new,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async for chunk in chunks:
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            elif chunk.choices[0].text:
                times.append(time.perf_counter() - begun)
        return tokens, times

    async def all_streams(prompts: list[list[int]], new: int) -> list[tuple[int, list[float]]]:
        return await asyncio.gather(*(stream(prompt, new) for prompt in prompts))

    def streams(prompts: list[list[int]], new: int) -> dict[str, object]:
        """Return the tokens a second of all streams together, and how long people waited."""
        begun, busy = time.perf_counter(), time.process_time()
        answers = runner.run(all_streams(prompts, new))
        seconds = time.perf_counter() - begun
        return {
            "rate": sum(tokens for tokens, _ in answers) / seconds,
            "firsts": [times[0] for _, times in answers],
            "gaps": [b - a for _, times in answers for a, b in pairwise(times)],
            "seconds": seconds,
            "busy": time.process_time() - busy,
        }

    return {}, {"streams": streams}


def measure_streams(flags: argparse.Namespace, stack: ExitStack) -> None:
    """Measure the server under so many streams at once."""
    slots = flags.slots or max(flags.streams)
    begun = time.perf_counter()
    server, url = _start_server(flags, slots, stack)
    ready = time.perf_counter() - begun
    clients = Contestant("clients", [sys.executable, "-m", "benchmarks.serve_streams", url, "served"])
    stack.callback(clients.close)
    prompts = prompts_of(flags, json.loads((Path(flags.model) / "config.json").read_text())["vocab_size"])
    print(
        f"{Path(flags.model).name} through HTTP, {slots} slots, {threads()} CPUs, ready after {ready:.1f} s; "
        f"prompts of {flags.prompt} tokens, {flags.new} new ones, {flags.rounds} rounds",
        flush=True,
    )
    for number in flags.streams:
        clients.ask("streams", prompts=prompts.draw(number, flags.prompt), new=4)
    found: dict[int, list[dict[str, Any]]] = {number: [] for number in flags.streams}
    for turn in range(flags.rounds):
        for number in random.Random(turn).sample(flags.streams, len(flags.streams)):
            time.sleep(PAUSE)
            busy = _cpu_seconds(server.pid)
            result = clients.ask("streams", prompts=prompts.draw(number, flags.prompt), new=flags.new)
            found[number].append({**result, "server": _cpu_seconds(server.pid) - busy})
    _show_streams(found)
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        late = re.findall(r"^easylm_like_compilations_total\S* (\S+)", reply.read().decode(), re.MULTILINE)
    peak = re.findall(r"^VmHWM:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text(), re.MULTILINE)
    print(f"compiled later: {', '.join(late)}; the server's peak: {int(peak[0]) / 1024:,.0f} MiB")


def _show_streams(found: dict[int, list[dict[str, Any]]]) -> None:
    """Print the total rates and what one client sees of them."""
    rates = {number: [turn["rate"] for turn in turns] for number, turns in found.items()}
    heads = f"{'first token, ms':>20} {'between chunks, ms':>20} {'CPUs':>7}"
    print(f"\n{'':8} {'tokens/s':>9} {'':>9} {'of the':>6} {heads}")
    print(f"{'streams':8} {'best':>9} {'median':>9} {'first':>6} " + f"{'p50      p95':>20} " * 2 + " server  clients")
    one = next(iter(rates.values()))
    for number, turns in found.items():
        firsts, gaps = ([1000 * t for turn in turns for t in turn[key]] for key in ("firsts", "gaps"))
        seconds, server, busy = (sum(turn[key] for turn in turns) for key in ("seconds", "server", "busy"))
        middle = statistics.median(rates[number])
        print(
            f"{number:8} {max(rates[number]):9,.0f} {middle:9,.0f} {middle / statistics.median(one):6.2f} "
            f"{_percentiles(firsts)} {_percentiles(gaps)} {server / seconds:7.2f} {busy / seconds:8.2f}  "
            f"rounds {', '.join(f'{rate:,.0f}' for rate in rates[number])}"
        )


def _start_server(flags: argparse.Namespace, slots: int, stack: ExitStack) -> tuple["subprocess.Popen[str]", str]:
    """Start the server on a free port; return its process and its address."""
    words = [f"--model=served={Path(flags.model).resolve()}", "--port=0", f"--slots={slots}"]
    words += [f"--queue={max(64, *flags.streams)}", *([f"--context={flags.context}"] if flags.context else [])]
    errors = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115  the stack closes it
    command = [sys.executable, "-m", "easylm_like.serve", *words]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    stack.callback(server.wait)
    stack.callback(server.terminate)
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith("serving on "):
            return server, line.split()[-1]
    errors.seek(0)
    sys.exit(f"the server failed:\n{errors.read()[-ERRORS:]}")


def _percentiles(values: list[float]) -> str:
    return "{:11.1f} {:8.1f}".format(*np.percentile(values, [50, 95])) if values else f"{'':>20}"


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()  # proc(5): utime 14th, stime 15th
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
