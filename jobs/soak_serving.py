"""Soak a server of its own, on this machine alone, and say what waited, and whether anything was lost.

    python jobs/soak_serving.py runs/quickstart --minutes 10 --json soak.json

Clients classify short texts, write, learn small and large tasks, send prompts of 8,000 tokens, and leave in the middle;
at half time one replica is killed. In the end every adapter that was acknowledged is asked once more.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import requests

sys.path.append(str(Path(__file__).resolve().parents[1] / "serve"))
from client import Adapter, ApiError, Client

TICKETS = [
    ("I was charged twice", "billing"), ("please refund my order", "billing"), ("the app crashes at start", "bug"),
    ("the page stays blank", "bug"), ("where is my parcel", "delivery"), ("it never came", "delivery"),
]  # fmt: skip
START_SECONDS, CALL_SECONDS = 600, 600
LONG_WORDS = 7_900


class Soak:
    """What clients saw: seconds by kind of request, what failed, and what was acknowledged."""

    def __init__(self, url: str):
        self.url, self.seconds, self.failures = url, dict[str, list[float]](), Counter[str]()
        self.learned: list[tuple[Adapter, set[str]]] = []
        self.over, self.lock = threading.Event(), threading.Lock()
        self.base = self.client().base()

    def client(self) -> "Known":
        return Known(self.url, tries=30, timeout_seconds=CALL_SECONDS)

    def timed(self, kind: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            found = work()
        except (ApiError, requests.RequestException) as error:
            with self.lock:
                self.failures[f"{kind}: {str(error)[:120]}"] += 1
            return None
        with self.lock:
            self.seconds.setdefault(kind, []).append(time.perf_counter() - began)
        return found

    def repeat(self, work: Callable[[Client, random.Random], None], pause: float, seed: int) -> None:
        client, rng = self.client(), random.Random(seed)
        while not self.over.is_set():
            work(client, rng)
            self.over.wait(pause * (0.5 + rng.random()))

    def classify(self, client: Client, rng: random.Random) -> None:
        adapter, labels = rng.choice(self.learned)
        answers = self.timed("classify", lambda: client.classify(adapter.model, ["my screen is frozen"]))
        if answers and set(answers[0].probabilities) != labels:
            self.failures["classify: another adapter's labels"] += 1

    def write(self, client: Client, rng: random.Random) -> None:
        prompt = f"Ticket {rng.randrange(10**6)}: the app"
        self.timed("write", lambda: "".join(client.stream(self.base, prompt, max_tokens=24)))

    def learn(self, client: Client, rng: random.Random) -> None:
        number = rng.randrange(10**9)
        pairs = [(text, f"{label}-{number}") for text, label in TICKETS]
        self.keep("learn 6 examples", pairs, lambda: client.learn(pairs, name=f"soak-{number}"))

    def learn_much(self, client: Client, rng: random.Random) -> None:
        number = rng.randrange(10**6)
        words = " ".join(text for text, _ in TICKETS[:4])  # 42 tokens or so; the quickstart's model reads 48
        pairs = [(f"{n} {number} {words}", f"{TICKETS[n % 6][1]}-{number}") for n in range(64)]
        learn = lambda: client.learn(pairs, name=f"much-{number}", background=True)  # noqa: E731
        self.keep("learn 64 examples, in the background", pairs, learn)

    def keep(self, kind: str, pairs: list[tuple[str, str]], learn: Callable[[], Adapter]) -> None:
        if adapter := self.timed(kind, learn):
            self.learned.append((adapter, {label for _, label in pairs}))

    def read_long(self, client: Client, rng: random.Random) -> None:
        prompt = f"{rng.randrange(10**6)} " + "word " * LONG_WORDS
        self.timed("write behind 7,900 words", lambda: client.complete(self.base, prompt, max_tokens=4))

    def leave(self, _client: Client, rng: random.Random) -> None:
        body: Any = {"model": self.base, "prompt": f"{rng.random()} " + "word " * 4000, "stream": True}
        with contextlib.suppress(requests.RequestException):  # that is to leave
            requests.post(f"{self.url}/v1/completions", json=body, stream=True, timeout=(5, 1 + rng.random())).close()


class Known(Client):
    def base(self) -> str:
        return self._request("GET", "/v1/models").json()["data"][0]["id"]


def main() -> None:
    options = parse()
    port = free_port()
    log = Path(options.log).open("w")  # noqa: SIM115
    command = [sys.executable, "-m", "rayml", "serve", options.run, "--port", str(port), *options.settings]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, server)
        result = soak(Soak(url), server.pid, options.minutes * 60)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(120)
    result |= {"cpu": f"{os.cpu_count()} processors", "minutes": options.minutes, "settings": options.settings}
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(result["failures"] or result["lost"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder")
    parser.add_argument("settings", nargs="*", default=["replicas.min=2"], help="of the server, such as replicas.min=2")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--json", type=Path, help="write the result here, too")
    parser.add_argument("--log", default="soak.log", help="of the server")
    return parser.parse_args()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_until_ready(url: str, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if requests.get(f"{url}/readyz", timeout=20).ok:
                return
        except requests.RequestException:
            time.sleep(0.5)
    raise SystemExit("the server did not start; its log says why")


def soak(soak: Soak, server: int, seconds: float) -> dict[str, Any]:
    client = soak.client()
    soak.keep("first", TICKETS, lambda: client.learn(TICKETS, name="first"))
    for _ in range(40):
        soak.classify(client, random.Random(0))
    idle = soak.seconds.pop("classify")
    memory = [resident(server)]
    work: list[tuple[Any, float]] = [
        (soak.classify, 0.5),
        (soak.classify, 0.5),
        (soak.write, 0.5),
        (soak.write, 1),
        (soak.learn, 4),
    ]
    work += [(soak.learn_much, 20), (soak.read_long, 5), (soak.leave, 3)]
    threads = [
        threading.Thread(target=soak.repeat, args=(kind, pause, seed)) for seed, (kind, pause) in enumerate(work)
    ]
    for thread in threads:
        thread.start()
    ends, killed = time.monotonic() + seconds, False
    while time.monotonic() < ends:
        time.sleep(1)
        memory.append(resident(server))
        if not killed and time.monotonic() > ends - seconds / 2:
            replicas(server)[0].kill()
            killed = True
    soak.over.set()
    for thread in threads:
        thread.join(CALL_SECONDS)
    loaded = dict(soak.seconds)
    lost = [adapter.id for adapter, labels in soak.learned if not answers(client, adapter, labels)]
    time.sleep(5)
    return {
        "idle": percentiles(idle),
        "loaded": {kind: percentiles(found) for kind, found in loaded.items()},
        "p99_over_idle": percentiles(loaded["classify"])["p99"] / percentiles(idle)["p99"],
        "failures": dict(soak.failures),
        "acknowledged": len(soak.learned),
        "lost": lost,
        "mib": {"before": memory[0], "most": max(memory), "after": resident(server)},
    }


def answers(client: Client, adapter: Adapter, labels: set[str]) -> bool:
    try:
        return set(client.classify(adapter.model, ["my screen is frozen"])[0].probabilities) == labels
    except (ApiError, requests.RequestException):
        return False


def replicas(server: int) -> list[psutil.Process]:
    found = psutil.Process(server).children(recursive=True)
    return [one for one in found if "ServeReplica:rayml:Model" in " ".join(one.cmdline())]


def resident(server: int) -> float:
    """Return the MiB of all replicas of the model."""
    total = 0.0
    try:
        for replica in replicas(server):
            total += replica.memory_info().rss / 2**20
    except psutil.Error:  # one is ending
        pass
    return total


def percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        "requests": len(ordered),
        "median": statistics.median(ordered),
        "p99": ordered[min(last, round(0.99 * last))],
        "longest": ordered[-1],
    }


def table(result: dict[str, Any]) -> str:
    lines = ["| request | how many | median s | p99 s | longest s |", "|---|---|---|---|---|"]
    for kind, found in ({"classify, idle": result["idle"]} | result["loaded"]).items():
        cells = [f"{found[name]:.2f}" for name in ("median", "p99", "longest")]
        lines.append(f"| {kind} | {found['requests']} | {' | '.join(cells)} |")
    mib = result["mib"]
    lines += [
        "",
        f"p99 of classify: {result['p99_over_idle']:.1f} times the idle one. Failed: {result['failures'] or 'none'}. "
        f"{result['acknowledged']} adapters acknowledged, lost: {len(result['lost'])}. Memory of the replicas: "
        f"{mib['before']:.0f} MiB before, {mib['most']:.0f} at most, {mib['after']:.0f} after.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
