"""Runs the application on a socket until a signal asks it to stop."""

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from model.errors import ConfigError
from model.serving.app import Served, build_app

_MOST_CONNECTIONS = 2048


class Server(uvicorn.Server):
    """A server that says when it is ready, and ends quietly at a signal.

    Args:
        served: what is served.
        grace_s: after a signal what still runs is given up after so many seconds.
        ready: called when requests are taken.
    """

    def __init__(self, served: Served, *, grace_s: float, ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            build_app(served),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_graceful_shutdown=max(1, round(grace_s)),
        )
        super().__init__(config)
        self._served = served
        self._ready = ready

    def run_on(self, listening: socket.socket) -> None:
        """Serve until SIGTERM or Ctrl-C; then finish what runs."""
        try:
            asyncio.run(self.serve(sockets=[listening]))
        finally:
            self._served.engine.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take requests."""
        self._served.engine.start()
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish what runs; a second Ctrl-C does not."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self._served.engine.refuse("the server is stopping")
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections; port 0 = any free one.

    Raises:
        ConfigError: the address cannot be taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port} cannot be listened on ({error.strerror or error}); "
            "choose another port, or an address of this machine"
        ) from error


def address(listening: socket.socket) -> str:
    """Where clients find it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
