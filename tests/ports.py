"""Ports for the servers that tests start."""

from __future__ import annotations

import itertools
import os
import socket

#: Below those that the kernel gives to connections, and some for each pytest worker: nobody takes a
#: port between its choice and the start of its server, or while its server is down.
#: Several pytest runs on one machine each need a FATHOM_TEST_PORTS of their own.
_FIRST = int(os.environ.get("FATHOM_TEST_PORTS", "20000"))
_OURS = itertools.count(_FIRST + 500 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]))


def free_port() -> int:
    """A port of this machine that nobody listens on, another one at each call."""
    for port in _OURS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("unreachable")
