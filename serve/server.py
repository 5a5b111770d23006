"""Runs the application under uvicorn until a signal; what was accepted is finished first."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import uvicorn

from export.engine import Engine
from export.errors import EngineError
from serve import logs
from serve.app import application
from serve.hosted import Hosted
from serve.keys import read_keys
from serve.limits import Limits

_LOG = logging.getLogger("serve")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Settings:
    """How a server is run.

    Attributes:
        engines: name -> folder.
        host, port: where it listens.
        keys: a file of API keys; needed wherever others can reach the server.
        target, threads, trusted: of the engines, see `export.engine.Engine.open`.
        limits: what it accepts.
    """

    engines: Mapping[str, Path]
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Path | None = None
    target: str | None = None
    threads: int | None = None
    trusted: bool = False
    limits: Limits = field(default_factory=Limits)


def serve(settings: Settings, told: Callable[[str], None]) -> None:
    """Open the engines, listen, and serve until SIGTERM or SIGINT.

    Args:
        settings: how.
        told: receives one sentence when the server is ready.

    Raises:
        EngineError: an engine, the keys or the address cannot be used, or others could reach it without a key.
    """
    local = _is_loopback(settings.host)
    if not local and settings.keys is None:
        raise EngineError(f"others can reach {settings.host}: give the keys they must send, as --keys FILE")
    keys: Sequence[str] = read_keys(settings.keys) if settings.keys is not None else ()
    logs.configure()
    with _listening(settings.host, settings.port) as listener:
        engines = {name: _hosted(settings, name, folder) for name, folder in settings.engines.items()}
        app = application(engines, settings.limits, keys, LOOPBACK if local and not keys else ("*",))
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="on",
            proxy_headers=False,
            limit_concurrency=settings.limits.connections,
        )
        address = listener.getsockname()
        listener.listen(config.backlog)
        told(f"serving {', '.join(engines)} at http://{settings.host}:{address[1]}")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # uvicorn raises again, once all is done, what it was stopped by
        uvicorn.Server(config).run(sockets=[listener])


def _hosted(settings: Settings, name: str, folder: Path) -> Hosted:
    engine = Engine.open(folder, settings.target, settings.threads, trusted=settings.trusted)
    hosted = Hosted(name, engine, settings.limits.batch)
    _LOG.info("engine", extra={"engine": name, "target": engine.target, "batches": hosted.sizes})
    return hosted


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _listening(host: str, port: int) -> socket.socket:
    """A socket bound now, so that an address in use is said before engines are opened."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as failed:
            listener = failed.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            failed.pop_all()
    except OSError as error:
        raise EngineError(f"{host}:{port} cannot be listened at: {error.strerror or error}") from error
    return listener
