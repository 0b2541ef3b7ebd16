"""A real Redis server for tests: of its own, on a free port of this machine, keeping nothing."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from ports import free_port

#: Patient, for tests on a busy machine. Without ``retry=null`` redis-py tries for seconds.
OPTIONS = "socket_connect_timeout=5,socket_timeout=5,retry=null"


class RedisServer:
    """Started on entering, stopped on leaving; both can also be asked for in between.

    Example:
        with RedisServer() as server:
            server.settings  # Feast's ``online_store``
            server.stop()
            server.start()  # on the same port, empty
    """

    def __init__(self, options: str = OPTIONS, password: str = "") -> None:
        self.port = free_port()
        self.settings = {
            "type": "redis",
            "connection_string": f"127.0.0.1:{self.port},{options}",
        }
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.mkdtemp(prefix="fathom-redis-")

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self, seconds: float = 10.0) -> None:
        """Start empty, and return when the server answers."""
        assert self._process is None, "it is running already"
        arguments = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "save": "",
            "appendonly": "no",
            "dir": self._folder,
            "daemonize": "no",
            "requirepass": self._password,
        }
        self._process = subprocess.Popen(
            ["redis-server", *(word for k, v in arguments.items() for word in (f"--{k}", v))],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + seconds
        while not self.ask("PING").startswith(("+PONG", "-NOAUTH")):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"redis-server did not start on port {self.port}")
            time.sleep(0.01)

    def stop(self) -> None:
        """Kill it, as a crash would: clients are not told."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    def wipe(self) -> None:
        """Remove all keys."""
        assert self.ask("FLUSHALL") == "+OK"

    def size(self) -> int:
        """How many keys there are."""
        return int(self.ask("DBSIZE").removeprefix(":"))

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Meanwhile it takes connections and answers none, like a machine that swaps."""
        assert self._process is not None, "it is not running"
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def ask(self, command: str) -> str:
        """First line of the answer to one command; empty when there is none."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(f"{command}\r\n".encode())
                return connection.makefile("r").readline().strip()
        except OSError:
            return ""
