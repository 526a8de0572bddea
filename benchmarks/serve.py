"""Load on `beit3 serve`: latency, throughput, wrong answers, a full queue, SIGTERM, hang-ups.

    python benchmarks/serve.py --json benchmarks/serve.json
    python benchmarks/serve.py --json benchmarks/serve.json --only throughput --networks base

With `--only` or `--networks` what else the JSON file holds is kept.

The client is asyncio over plain sockets. Every answer is compared with that of the offline
predictor for the same image and question. Client, server and offline predictor share the cores; the
offline predictor is measured before and after each round of the server, and alone.
"""

import argparse
import asyncio
import gc
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from probe import save_results

from beit3.data.views.preprocessing import Preprocessing
from beit3.model.config import BASE, TINY, ModelConfig
from beit3.predict import Predictor, load
from beit3.task import grow_vocabulary
from beit3.tasks.vqa import VQA, VQAConfig
from beit3.tokenizer.text import TextTokenizer
from beit3.weights.store import save_weights

TOLERANCE = 1e-4
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
QUESTIONS = (
    "what color is the circle ?",
    "how many squares are there ?",
    "is there a red triangle left of the blue circle ?",
    "what shape is above the green square ?",
)
PARTS = ("throughput", "overload", "sigterm", "hangups")
"""What `--only` chooses from."""


@dataclass(frozen=True)
class Plan:
    """How much load measures the throughput of a network.

    Args:
        clients: Each sends one request after another.
        num_inputs: Distinct images.
        seconds: Of load in micro-batches, in all rounds.
        rounds: How often offline predictor and servers take turns.
        timeout: Seconds after which the server gives a request up.
    """

    clients: int = 64
    num_inputs: int = 256
    seconds: float = 60.0
    rounds: int = 3
    timeout: float = 30.0


@dataclass(frozen=True)
class Network:
    """A network of VQA with initial values, the side of its images, and the load it can take."""

    model: ModelConfig
    image_size: int
    plan: Plan = Plan()


NETWORKS = {
    "tiny": Network(TINY, 32),
    "small": Network(replace(TINY, dim=384, depth=12, num_heads=6, ffn_dim=1536), 32),
    "medium": Network(
        replace(TINY, dim=512, depth=12, num_heads=8, ffn_dim=2048), 32, Plan(rounds=2)
    ),
    # Of the released size. Two cores compute about three answers a second.
    "base": Network(BASE, 224, Plan(32, num_inputs=32, seconds=30, rounds=1, timeout=120)),
}
TRIAL = "small"
"""The network that is overloaded, stopped and left by its clients."""


# Inputs -------------------------------------------------------------------------------------------


@dataclass
class Input:
    """One request: an image, a question, and what the offline predictor answers."""

    image: bytes
    question: str
    expected: list[dict[str, Any]]

    def to_http(self) -> bytes:
        """Returns the whole request, a form as browsers send it."""
        boundary = b"beit3-load"
        body = (
            b'--%b\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n'
            b"Content-Type: image/jpeg\r\n\r\n%b\r\n"
            b'--%b\r\nContent-Disposition: form-data; name="question"\r\n\r\n%b\r\n--%b--\r\n'
        ) % (boundary, self.image, boundary, self.question.encode(), boundary)
        head = (
            b"POST /v1/vqa HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n"
            b"Content-Type: multipart/form-data; boundary=%b\r\n\r\n"
        ) % (len(body), boundary)
        return head + body


def make_inputs(predictor: Predictor, count: int) -> list[Input]:
    """Draws images of random boxes, each with a question, and predicts their answers."""
    size = predictor.task.config.image.image_size
    inputs = []
    for number in range(count):
        rng = np.random.default_rng(number)
        pixels = np.full((size, size, 3), rng.integers(0, 256, 3), np.uint8)
        for _ in range(4):
            top, left, height, width = rng.integers(1, size // 2, 4)
            pixels[top : top + height, left : left + width] = rng.integers(0, 256, 3)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=95)
        question = QUESTIONS[number % len(QUESTIONS)]
        inputs.append(Input(file.getvalue(), question, predictor(file.getvalue(), question)))
    return inputs


def make_weights(name: str, out: Path) -> Path:
    """Writes weights of VQA with initial values."""
    model, size = NETWORKS[name].model, NETWORKS[name].image_size
    tokenizer = TextTokenizer.train(list(QUESTIONS) * 8, vocab_size=64)
    answers = tuple(f"answer {number}" for number in range(64))
    config = VQAConfig(
        model=replace(model, final_norm=False, image_size=size, text_positions=514),
        image=Preprocessing(size),
        answers=answers,
        num_answers=len(answers),
        text_length=48,
    )
    task = VQA(grow_vocabulary(config, tokenizer), tokenizer=tokenizer)
    task.init_weights(0)
    save_weights(task, out)
    return out


def measure_offline(predictor: Predictor, inputs: Sequence[Input], seconds: float) -> float:
    """Returns the inputs per second of the predictor with batches of 32 and decoding threads."""
    images = [item.image for item in inputs]
    questions = [item.question for item in inputs]
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        predictor(images, questions, batch_size=32, workers=2)
        count += len(inputs)
    return count / (time.perf_counter() - started)


# The server ---------------------------------------------------------------------------------------


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int

    def read_memory(self) -> float:
        """Returns its resident memory in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(r"VmRSS:\s+(\d+)", status)
        return int(match[1]) / 1024 if match else 0.0


@contextmanager
def run_server(weights: Path | str, **options: object) -> Iterator[Server]:
    """Starts `beit3 serve` and stops it at the end."""
    words = [
        word
        for name, value in options.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    command = [sys.executable, "-m", "beit3", "serve", f"vqa={weights}", "--port", "0", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert process.stderr is not None
    port, lines = 0, []
    for line in process.stderr:
        lines.append(line.decode())
        if match := re.search(rb"ready at http://[^ ]+:(\d+)", line):
            port = int(match[1])
            break
    if not port:
        raise RuntimeError(f"the server did not start: {''.join(lines)[-2000:]}")
    # A full pipe would stop a server that writes to its log.
    drain = threading.Thread(target=forward_lines, args=(process.stderr,), daemon=True)
    drain.start()
    try:
        yield Server(process, port)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)
        drain.join(10)
        process.stderr.close()


def forward_lines(source: BinaryIO) -> None:
    """Passes on what a server writes, but for its last line."""
    for line in source:
        if not line.startswith(b"stopped; all"):
            sys.stderr.write(line.decode(errors="replace"))


# The client ---------------------------------------------------------------------------------------


@dataclass
class Load:
    """What clients saw."""

    latencies: list[float] = field(default_factory=list)
    """Seconds of answers with status 200."""
    refusals: list[float] = field(default_factory=list)
    """Seconds of answers with status 503."""
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    lost: int = 0
    """Requests that were sent entirely and got no answer."""
    refused_connections: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def describe(self) -> dict[str, float]:
        """Returns its figures; latencies in milliseconds."""
        ordered = sorted(self.latencies)
        figures = {
            f"p{quantile}": 1000 * ordered[min(len(ordered) - 1, len(ordered) * quantile // 100)]
            for quantile in (50, 95, 99)
        }
        return figures | {"rate": self.rate, "answers": len(ordered), "wrong": self.wrong}


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> tuple[int, bool, bytes]:
    """Sends a request; returns the status, whether the connection goes on, and the body."""
    writer.write(request)
    await writer.drain()
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
    body = await reader.readexactly(length)
    return int(head[9:12]), b"connection: close" not in head, body


def is_right(body: bytes, expected: list[dict[str, Any]]) -> bool:
    """Compares an answer with the offline predictor's; scores may differ by rounding."""
    predictions = json.loads(body)["predictions"]
    if len(predictions) != len(expected):
        return False
    scores = {item["answer"]: item["score"] for item in predictions}
    for served, offline in zip(predictions, expected, strict=True):
        if abs(served["score"] - offline["score"]) > TOLERANCE:
            return False
        # Answers of equal score may change places.
        is_same = served["answer"] == offline["answer"]
        is_tie = abs(scores.get(offline["answer"], offline["score"]) - offline["score"]) < TOLERANCE
        if not (is_same or is_tie):
            return False
    return True


async def run_client(
    number: int,
    port: int,
    inputs: Sequence[Input],
    requests: Sequence[bytes],
    load: Load,
    end: float,
) -> None:
    """Sends one request after another until `end`, or until nobody listens any more."""
    index = number * 37
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    while time.perf_counter() < end:
        if connection is None:
            try:
                connection = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                load.refused_connections += 1
                return
        index = (index + 1) % len(inputs)
        started = time.perf_counter()
        try:
            status, goes_on, body = await exchange(*connection, requests[index])
        except (OSError, asyncio.IncompleteReadError):
            load.lost += 1
            connection[1].close()
            connection = None
            continue
        elapsed = time.perf_counter() - started
        load.statuses[status] += 1
        if status == 200:
            load.latencies.append(elapsed)
            load.wrong += not is_right(body, inputs[index].expected)
        else:
            load.refusals.append(elapsed)
            await asyncio.sleep(0.2)
        if not goes_on:
            connection[1].close()
            connection = None
    if connection is not None:
        connection[1].close()


async def put_load(
    port: int, inputs: Sequence[Input], *, clients: int, seconds: float, memory: Any = None
) -> tuple[Load, list[float]]:
    """Runs clients for some seconds; returns what they saw, and samples of `memory()`."""
    load, requests = Load(), [item.to_http() for item in inputs]
    # A collection of all of torch's objects would stop the clients for 0.2 s.
    gc.collect()
    gc.freeze()
    started = time.perf_counter()
    running = asyncio.gather(
        *(
            run_client(number, port, inputs, requests, load, started + seconds)
            for number in range(clients)
        )
    )
    samples: list[float] = []
    while memory is not None and not running.done():
        samples.append(memory())
        await asyncio.wait((running,), timeout=1.0)
    await running
    load.seconds = time.perf_counter() - started
    return load, samples


def merge(loads: Sequence[Load]) -> Load:
    """Adds what clients saw in several rounds."""
    total = Load()
    for part in loads:
        total.latencies += part.latencies
        total.refusals += part.refusals
        total.statuses += part.statuses
        total.wrong += part.wrong
        total.lost += part.lost
        total.seconds += part.seconds
    return total


# Measurements -------------------------------------------------------------------------------------


def measure_throughput(weights: Path | str, plan: Plan) -> dict[str, Any]:
    """Measures offline, one at a time and in batches, in turns: others use the cores as well."""
    predictor = load(weights)
    inputs = make_inputs(predictor, plan.num_inputs)
    seconds = plan.seconds / plan.rounds
    offline, single, batched = [], [], []
    for _ in range(plan.rounds):
        offline.append(measure_offline(predictor, inputs, seconds / 4))
        single.append(measure_server(weights, inputs, plan, seconds / 3, max_batch=1))
        batched.append(measure_server(weights, inputs, plan, seconds))
        offline.append(measure_offline(predictor, inputs, seconds / 4))
    return {
        "offline": statistics.median(offline),
        "single": merge(single).describe(),
        "batched": merge(batched).describe(),
        "lost": merge(batched).lost,
    }


def measure_server(
    weights: Path | str, inputs: Sequence[Input], plan: Plan, seconds: float, **options: object
) -> Load:
    """Returns what clients see of a server of its own, which is warm."""
    with run_server(weights, timeout=plan.timeout, **options) as server:
        asyncio.run(put_load(server.port, inputs, clients=8, seconds=1))
        load, _ = asyncio.run(put_load(server.port, inputs, clients=plan.clients, seconds=seconds))
    return load


def measure_overload(weights: Path | str, inputs: Sequence[Input], seconds: float) -> dict:
    """Sends far more than a queue of 32 holds."""
    with run_server(weights, max_queue=32, max_batch=8) as server:
        load, memory = asyncio.run(
            put_load(server.port, inputs, clients=256, seconds=seconds, memory=server.read_memory)
        )
    refusals = sorted(load.refusals)
    half = len(memory) // 2
    return {
        "answers": len(load.latencies),
        "wrong": load.wrong,
        "refused": load.statuses[503],
        "others": sum(load.statuses.values()) - load.statuses[200] - load.statuses[503],
        "refusal_p50": 1000 * refusals[len(refusals) // 2] if refusals else 0,
        "refusal_p99": 1000 * refusals[len(refusals) * 99 // 100] if refusals else 0,
        "memory_early": statistics.median(memory[1:half] or memory),
        "memory_late": statistics.median(memory[half:]),
    }


def measure_shutdown(weights: Path | str, inputs: Sequence[Input], times: int) -> dict:
    """Sends SIGTERM under load, and counts requests without an answer."""
    totals: Counter[str] = Counter()
    for _ in range(times):
        with run_server(weights) as server:

            async def run(server: Server = server) -> Load:
                loading = asyncio.ensure_future(
                    put_load(server.port, inputs, clients=64, seconds=30)
                )
                await asyncio.sleep(1.5)
                server.process.send_signal(signal.SIGTERM)
                load, _ = await loading
                return load

            load = asyncio.run(run())
            totals["status"] += abs(server.process.wait(30))
        totals["answers"] += len(load.latencies)
        totals["lost"] += load.lost
        totals["wrong"] += load.wrong
    return dict(totals) | {"times": times}


async def hang_up(port: int, request: bytes, seconds: float) -> None:
    """Sends a request and closes the connection before the answer."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    await writer.drain()
    await asyncio.sleep(seconds)
    writer.transport.abort()


async def read_metric(port: int, name: str) -> float:
    """Returns the value of a metric."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    _, _, body = await exchange(reader, writer, request)
    writer.close()
    return sum(
        float(line.split()[-1]) for line in body.decode().splitlines() if line.startswith(name)
    )


def measure_hang_ups(weights: Path | str, inputs: Sequence[Input]) -> dict:
    """Sends 200 requests at once whose clients go at once, and counts what was computed."""
    count = 200
    with run_server(weights, max_batch=1) as server:

        async def run() -> dict[str, float]:
            request = inputs[0].to_http()
            await asyncio.gather(*(hang_up(server.port, request, 0.02) for _ in range(count)))
            started = time.perf_counter()
            while await read_metric(server.port, 'beit3_waiting{model="vqa"}'):
                await asyncio.sleep(0.01)
            seconds = time.perf_counter() - started
            computed = await read_metric(server.port, "beit3_batch_size_sum")
            load, _ = await put_load(server.port, inputs, clients=8, seconds=1)
            return {
                "sent": count,
                "computed": computed,
                "free_after_ms": 1000 * seconds,
                "answers_afterwards": len(load.latencies),
                "wrong": load.wrong,
            }

        return asyncio.run(run())


def make_table(figures: dict[str, Any]) -> str:
    """Returns the figures that there are as a table."""
    lines = [
        "| network | offline, batches of 32 | one at a time | micro-batches | gain | of offline "
        "| p50 / p95 / p99 | answers | wrong |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in figures["throughput"].items():
        offline, single, batched = result["offline"], result["single"], result["batched"]
        rates = [offline, single["rate"], batched["rate"]]
        shown = " | ".join(f"{rate:.{0 if rate >= 10 else 1}f}/s" for rate in rates)
        lines.append(
            f"| {name} | {shown} | "
            f"{batched['rate'] / single['rate']:.1f} x | {batched['rate'] / offline:.2f} | "
            f"{batched['p50']:.0f} / {batched['p95']:.0f} / {batched['p99']:.0f} ms | "
            f"{batched['answers']} | {batched['wrong']} |"
        )
    lines += ["", "| trial | result |", "|---|---|"]
    if overload := figures.get("overload"):
        lines.append(
            f"| 256 clients, a queue of 32 | {overload['answers']} answers ({overload['wrong']} "
            f"wrong), {overload['refused']} times 503 within {overload['refusal_p50']:.0f} ms "
            f"(median) and {overload['refusal_p99']:.0f} ms (p99), {overload['others']} other "
            f"answers; memory {overload['memory_early']:.0f} MiB, later "
            f"{overload['memory_late']:.0f} MiB |"
        )
    if shutdown := figures.get("shutdown"):
        lines.append(
            f"| SIGTERM under load, {shutdown['times']} times | {shutdown['answers']} answers, "
            f"{shutdown['wrong']} wrong, {shutdown['lost']} lost, status {shutdown['status']} |"
        )
    if hang_ups := figures.get("hang_ups"):
        lines.append(
            f"| {hang_ups['sent']} clients that hang up | {hang_ups['computed']:.0f} requests were "
            f"computed; all places free after {hang_ups['free_after_ms']:.0f} ms; then "
            f"{hang_ups['answers_afterwards']} answers in 1 s, {hang_ups['wrong']} wrong |"
        )
    return "\n".join(lines)


def measure_trials(parts: Sequence[str], weights: Path | str, seconds: float) -> dict[str, Any]:
    """Runs what is chosen of overload, SIGTERM and hang-ups."""
    inputs = make_inputs(load(weights), Plan.num_inputs)
    figures: dict[str, Any] = {}
    if "overload" in parts:
        figures["overload"] = measure_overload(weights, inputs, seconds)
    if "sigterm" in parts:
        figures["shutdown"] = measure_shutdown(weights, inputs, 3)
    if "hangups" in parts:
        figures["hang_ups"] = measure_hang_ups(weights, inputs)
    return figures


def read_figures(path: Path | None) -> dict[str, Any]:
    """Returns the figures of an earlier run, as far as there are some."""
    if path is None or not path.exists():
        return {"throughput": {}}
    return json.loads(path.read_text())["figures"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--weights", action="append", default=[], help="of VQA, beside the others")
    parser.add_argument("--seconds", type=float, help="of load in micro-batches, for all networks")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:
        # As the command line sets it; it has to be there before torch is imported.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | PASSIVE)
    figures = read_figures(arguments.json)
    with tempfile.TemporaryDirectory() as folder:
        measured = [*arguments.networks, *arguments.weights]
        for name in measured if "throughput" in arguments.only else ():
            weights, plan = name, Plan()
            if name in NETWORKS:
                weights, plan = make_weights(name, Path(folder, name)), NETWORKS[name].plan
            plan = replace(plan, seconds=arguments.seconds or plan.seconds)
            figures["throughput"][name] = measure_throughput(weights, plan)
            print(name, json.dumps(figures["throughput"][name]), flush=True)
        trials = [part for part in arguments.only if part != "throughput"]
        if trials:
            weights = make_weights(TRIAL, Path(folder, "trial"))
            seconds = max(4, (arguments.seconds or Plan.seconds) / 4)
            figures |= measure_trials(trials, weights, seconds)
    table = make_table(figures)
    print(table)
    if arguments.json:
        save_results(arguments.json, table, figures)


if __name__ == "__main__":
    main()
