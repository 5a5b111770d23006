"""An application behind uvicorn in a thread, at a free port, for tests that ask over real sockets."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any


class Server:
    """Serves while it is entered."""

    def __init__(self, app: Any) -> None:
        import uvicorn

        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", ws="none")
        self._server = uvicorn.Server(config)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(64)
        self._address = self._socket.getsockname()
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._address[1]}"

    def __enter__(self) -> Server:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(60)

    def stop(self) -> None:
        """As a signal would."""
        self._server.should_exit = True

    def connection(self) -> socket.socket:
        return socket.create_connection(self._address, timeout=60)

    def raw(self, sent: bytes) -> bytes:
        """Send bytes, and read what comes until the server closes."""
        with self.connection() as connection:
            connection.sendall(sent)
            pieces = []
            while piece := connection.recv(65536):
                pieces.append(piece)
            return b"".join(pieces)
