"""A server in a thread, and clients that misbehave."""

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from model.serve import check, load, parse, used_heads
from model.serving.running import Server, address, listen

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'villain' %}{{ raise_exception('no villains') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class RunningServer:
    """Where a server is, and a client of it."""

    def __init__(self, url: str, host: str, port: int, key: str) -> None:
        self.url = url
        self.host, self.port = host, port
        self.client: Any = openai.OpenAI(
            base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120
        )

    def raw(self, request: bytes) -> socket.socket:
        """A connection over which some bytes were sent."""
        connection = socket.create_connection((self.host, self.port), timeout=120)
        connection.sendall(request)
        return connection

    def post(self, path: str, body: bytes, *headers: str) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON that a body gets."""
        lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
        lines += ["Connection: close"]
        with self.raw("\r\n".join([*lines, "", ""]).encode() + body) as connection:
            return answer_of(connection)

    def metric(self, name: str) -> float:
        """A value of /metrics; the sum over its labels."""
        request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        with self.raw(request) as connection:
            text = read_all(connection).decode()
        found = re.findall(rf"^headway_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert found, name
        return sum(map(float, found))


def read_all(connection: socket.socket) -> bytes:
    """Everything up to the end."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def answer_of(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of an answer that ends the connection."""
    head, _, body = read_all(connection).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
    return int(first.split()[1]), headers, json.loads(body)


@contextmanager
def running(export: Path, *arguments: str) -> Iterator[RunningServer]:
    """A server of an export with these options."""
    options = parse([str(export), "--port", "0", *arguments], "serve")
    check(options)
    served, _ = load(options, used_heads(options))
    ready = threading.Event()
    with listen(options.host, options.port) as listening:
        host, port = listening.getsockname()
        server = Server(served, grace_s=10, ready=ready.set)
        thread = threading.Thread(target=server.run_on, args=(listening,))
        thread.start()
        try:
            assert ready.wait(60)
            yield RunningServer(address(listening), host, port, options.api_key or "none")
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
