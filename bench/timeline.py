"""Whether the stages of a request add up to what its client waited for the first token.

    python -m bench.timeline --requests 200

Starts ``kvferry serve`` and streams completions over open connections, from one client and from
several at once, each as fast as it is answered. A client's time to first token is from its sending
the request to the arrival of the first token's event at its host; ``GET /admin/requests/{id}``
tells the stages up to the same token. The difference is what nobody accounts for: before the
request's first byte, as the router knows it, and after the router wrote the token. Both ends read
the same host's clock.

The clients share their cores with the servers, so the kernel stamps what arrives
(``SO_TIMESTAMPNS``): that a client reads it late is its own time, shown beside. They ask for token
ids, since a stream of text alone shows half a character with the token that completes it.
"""

from __future__ import annotations

import json
import random
import socket
import statistics
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import httpx
import typer
from rich.console import Console
from rich.table import Table

from bench.deployment import serving
from cli.placement import add_niceness

RESULTS = Path(__file__).parent / "results"
TOLERANCE, SHARE = 2e-3, 0.05  # seconds and share of the time to first token: the larger counts
ROUNDING = 2e-6  # seconds: of three times, each rounded to a microsecond
CLIENT_NICENESS = -10  # where that is allowed: it shares its cores with what it measures
WARM_UP = 3  # requests of each client that are not counted
OUTPUT_TOKENS = 8
STREAM = {"stream": True, "ignore_eos": True, "return_token_ids": True}
PERCENTILES = (1, 10, 50, 90, 99)


SO_TIMESTAMPNS = 35  # asm-generic/socket.h, as is the kind of the stamp's message
TIMESPEC = struct.Struct("@qq")  # seconds, nanoseconds


class StampedSocket(socket.socket):
    """A connection that knows when what was read last had arrived, in Unix seconds."""

    arrived = 0.0

    @classmethod
    def to(cls, host: str, port: int) -> Self:
        """Connect over IPv4."""
        connection = cls(socket.AF_INET, socket.SOCK_STREAM)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        connection.connect((host, port))
        return connection

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """See socket.socket."""
        room = socket.CMSG_SPACE(TIMESPEC.size)
        count, messages, _, _ = self.recvmsg_into([buffer], room, flags)
        for _, kind, content in messages:
            if kind == SO_TIMESTAMPNS:
                seconds, nanoseconds = TIMESPEC.unpack(content)
                self.arrived = seconds + nanoseconds * 1e-9
        return count


class StampedConnection(HTTPConnection):
    """HTTP over such a socket."""

    sock: StampedSocket

    def connect(self) -> None:
        """See HTTPConnection."""
        self.sock = StampedSocket.to(self.host, self.port)


class Answer(NamedTuple):
    """When it was asked for, and its first event arrived and was read, in Unix seconds."""

    answer_id: str
    sent: float
    arrived: float
    read: float


class Wait(NamedTuple):
    """One request's time to first token, in seconds."""

    client: float  # as the client's host measured it
    stages: float  # the sum of the router's stages
    before: float  # from sending the request to its first byte, as the router knows it
    after: float  # from the router's write to the event's arrival
    late: float  # from then until the client read it: no part of the above


def main(
    model: Annotated[str, typer.Option(help="What to serve.")] = "demo",
    requests: Annotated[int, typer.Option(help="At each number of clients.", min=100)] = 400,
    clients: Annotated[
        list[int] | None, typer.Option(help="At once; may be repeated. Default: 1 and 8.", min=1)
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 256,
) -> None:
    """Print the figures and write them to bench/results/timeline.json."""
    with serving(model, "--disaggregation", "always") as deployment:
        with suppress(PermissionError):
            add_niceness(CLIENT_NICENESS)
        rows = [
            measure(deployment.url, requests, number, prompt_tokens) for number in clients or (1, 8)
        ]
    show(rows)
    RESULTS.mkdir(exist_ok=True)
    settings = {"model": model, "requests": requests, "prompt_tokens": prompt_tokens}
    record = {"settings": settings, "clients": rows}
    (RESULTS / "timeline.json").write_text(json.dumps(record, indent=1) + "\n")


def measure(url: str, requests: int, clients: int, prompt_tokens: int) -> dict[str, float]:
    """The figures of so many clients, in milliseconds. Asks for timelines only at the end."""
    with httpx.Client(base_url=url, timeout=60) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]

        def one_client(number: int) -> list[Answer]:
            rng = random.Random(number)
            with closing(
                StampedConnection(client.base_url.host, client.base_url.port)
            ) as connection:
                answers = []
                for _ in range(WARM_UP + requests // clients):
                    prompt = [rng.randrange(300, 3000) for _ in range(prompt_tokens)]
                    body = {"model": model, "prompt": prompt, "max_tokens": OUTPUT_TOKENS}
                    answers.append(ask(connection, body | STREAM))
                return answers[WARM_UP:]

        with ThreadPoolExecutor(clients) as threads:
            answers = [one for group in threads.map(one_client, range(clients)) for one in group]
        waits = [
            compare(client.get(f"/admin/requests/{one.answer_id}").json(), one) for one in answers
        ]
    return {"clients": clients, **figures(waits)}


def ask(connection: StampedConnection, body: dict[str, Any]) -> Answer:
    """Send a request and read its answer to the end."""
    content, first, arrived, read = json.dumps(body).encode(), b"", 0.0, 0.0
    sent = time.time()
    connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    while line := answer.readline():
        if line.startswith(b"data: {") and not first:
            first, arrived, read = line, connection.sock.arrived, time.time()
    return Answer(json.loads(first.removeprefix(b"data: "))["id"], sent, arrived, read)


def compare(request: dict[str, Any], answer: Answer) -> Wait:
    """The client's account of a request and the router's."""
    (sequence,) = request["sequences"]
    received, seconds = sequence["received"], sequence["time_to_first_token"]
    end = seconds + ROUNDING
    stages = [s["seconds"] for s in sequence["stages"] if s["start"] + s["seconds"] <= end]
    before, after = received - answer.sent, answer.arrived - received - seconds
    late = answer.read - answer.arrived
    return Wait(answer.arrived - answer.sent, sum(stages), before, after, late)


def figures(waits: list[Wait]) -> dict[str, float]:
    """Percentiles in milliseconds, and the share of requests whose difference is tolerable."""
    within = [abs(w.client - w.stages) <= max(TOLERANCE, SHARE * w.client) for w in waits]
    rows = {
        "unaccounted": [w.client - w.stages for w in waits],
        "before": [w.before for w in waits],
        "after": [w.after for w in waits],
        "late": [w.late for w in waits],
    }
    result = {"requests": len(waits), "within": sum(within) / len(waits)}
    result["time_to_first_token_p50"] = statistics.median(w.client for w in waits) * 1e3
    for name, values in rows.items():
        cuts = statistics.quantiles(values, n=100)
        result |= {f"{name}_p{p}": cuts[p - 1] * 1e3 for p in PERCENTILES}
    return result


def show(rows: list[dict[str, float]]) -> None:
    """Print a column for each number of clients."""
    table = Table("times in ms", *(f"{row['clients']:g} clients" for row in rows))
    for name in list(rows[0])[1:]:
        table.add_row(name, *(f"{row[name]:.3f}" for row in rows))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
