"""Heartbeats between ranks, over sockets of their own, and how a group exits together.

A thread on each rank sends rank 0 a heartbeat every second. Rank 0 checks all ranks for failures, the other ranks check
rank 0. A process that exits without a message is noticed at once, by its closed connection. The first request to exit
is granted, by rank 0 alone; one rank reports it for all, and every process exits with the same code, whatever its main
thread is doing. Messages are JSON. A connection is accepted if its first line has the token that rank 0 broadcast to
the process group.
"""

from __future__ import annotations

import hmac
import json
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clipwright.pipeline.core.errors import ClipwrightError
from clipwright.pipeline.train.supervision.failures import Peer, find_failure, find_rank0_failure
from clipwright.pipeline.train.supervision.progress import PROGRESS

HEARTBEAT_SECONDS = 1.0
LEAVE_SECONDS = 3.0  # limit of rank 0's wait for the other ranks to exit
MAX_LINE_BYTES = 65536
STOP_SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)


@dataclass(frozen=True)
class GroupExit:
    """How the group exits: the rank that reports it, the exit code of all, and `ClipwrightError.to_dict()` if any."""

    reporter: int
    code: int
    error: dict[str, str] | None = None

    @classmethod
    def with_error(cls, reporter: int, error: ClipwrightError) -> GroupExit:
        return cls(reporter, error.exit_code, error.to_dict())

    def to_error(self) -> ClipwrightError | None:
        return None if self.error is None else ClipwrightError.from_dict(self.error)


class Connection:
    """JSON objects over a socket, one per line; sending never blocks."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._received = b""
        self._is_full = False
        sock.setblocking(False)

    def send(self, **message: Any) -> None:
        if self._is_full:
            return
        data = json.dumps(message).encode() + b"\n"
        try:
            self._is_full = self.sock.send(data) < len(data)
        except BlockingIOError:
            self._is_full = True  # the other side has not read for long and will be found silent
        except OSError:
            pass  # `read` will return None

    def read(self) -> list[dict[str, Any]] | None:
        """Returns the objects received since; None if the connection is closed or sends something else."""
        try:
            data = self.sock.recv(MAX_LINE_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        if not data or len(self._received) >= MAX_LINE_BYTES:
            return None
        if not all(isinstance(message, dict) for message in messages):
            return None
        return messages


class Heartbeat(threading.Thread):
    """The heartbeat thread of one rank.

    on_signal: called with a stop signal's number once any rank has received one. exit_process: called when the group
    exits.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        on_signal: Callable[[int], None],
        exit_process: Callable[[GroupExit], None],
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.rank, self.world_size, self.timeout_seconds = rank, world_size, timeout_seconds
        self._on_signal, self._exit_process = on_signal, exit_process
        # Checks this rank alone, once per second.
        self.find_own_failure: Callable[[], GroupExit | None] = lambda: None
        self.group_exit: GroupExit | None = None  # granted by rank 0
        self.finished = threading.Event()  # the thread is done: no message will arrive any more
        self.peers: dict[int, Peer] = {}
        self._exit_request: GroupExit | None = None  # of this rank's main thread
        self._sign_off_requested = False  # by the main thread
        self._signed_off = False  # the other ranks have been informed
        self._is_stopping = False
        self._own_signal: int | None = None  # that this rank has received
        self.is_connected = False  # all ranks are
        self._token = ""
        self._connections: dict[int, Connection] = {}
        self._connected_ranks: list[int] = []  # as of rank 0's newest heartbeat
        self._selector = selectors.DefaultSelector()
        self._wakeup_reader, self._wakeup_writer = socket.socketpair()
        self._wakeup_reader.setblocking(False)
        self._wakeup_writer.setblocking(False)
        self._selector.register(self._wakeup_reader, selectors.EVENT_READ, self._on_wakeup)

    # Called by the main thread

    def listen(self) -> tuple[str, int, str]:
        """Opens the server, on rank 0; returns its host name, its port, and the token for the other ranks."""
        server = socket.create_server(("", 0), backlog=self.world_size)
        server.setblocking(False)
        self._token = os.urandom(16).hex()
        self.peers = {rank: Peer(rank) for rank in range(self.world_size)}
        self.peers[0].host = socket.gethostname()
        self._selector.register(server, selectors.EVENT_READ, lambda: self._accept(server))
        return self.peers[0].host, server.getsockname()[1], self._token

    def connect(self, address: str, host: str, port: int, token: str) -> None:
        """Connects to rank 0, on the other ranks. address: where rank 0 is reached; host: its name in messages."""
        connection = Connection(socket.create_connection((address, port), timeout=30))
        connection.send(token=token, rank=self.rank, host=socket.gethostname())
        self.peers = {0: Peer(0, host)}
        self._connections[0] = connection
        self._selector.register(connection.sock, selectors.EVENT_READ, lambda: self._receive(connection, 0))

    def start(self) -> None:
        signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
        super().start()

    def set_connected(self) -> None:
        """All ranks are connected: a signal that has arrived before is handled now."""
        self.is_connected = True
        self._wakeup_writer.send(b"\0")

    def request_exit(self, group_exit: GroupExit) -> None:
        """Asks for the group to exit; of all ranks' requests the first is granted."""
        self._exit_request = group_exit
        self._wakeup_writer.send(b"\0")

    def sign_off(self, seconds: float) -> None:
        """Informs the other ranks that this one has finished; waits at most `seconds` for that (rank 0: for theirs)."""
        signal.set_wakeup_fd(-1)
        self._sign_off_requested = True
        self._wakeup_writer.send(b"\0")
        self.finished.wait(seconds)

    # Called by the heartbeat thread

    def run(self) -> None:
        due = time.monotonic()
        while not (self._signed_off and self._all_others_left()):
            for key, _ in self._selector.select(max(0.0, due - time.monotonic())):
                key.data()
            late_seconds = time.monotonic() - due
            if late_seconds >= 0:
                if late_seconds > HEARTBEAT_SECONDS:  # this process was paused and received nothing meanwhile
                    for peer in self.peers.values():
                        peer.discount_pause(late_seconds)
                due = time.monotonic() + HEARTBEAT_SECONDS
                self._send_heartbeat()
            if self.group_exit is not None:
                self._exit(self.group_exit)
                break
        for connection in self._connections.values():
            connection.sock.close()
        self.finished.set()

    def _all_others_left(self) -> bool:
        return not any(peer.state == "connected" for rank, peer in self.peers.items() if rank != self.rank)

    def _on_wakeup(self) -> None:
        """Handles a signal, which arrives here even if the main thread is blocked, or a request of the main thread."""
        signals = self._wakeup_reader.recv(4096)
        for number in STOP_SIGNALS:
            if number in signals:
                self._own_signal = self._own_signal or number
        if self._own_signal is not None:
            self._stop(self._own_signal, from_main_thread=True)
        if self._exit_request is not None:
            self._propose_exit(self._exit_request)
        if self._sign_off_requested:
            self._signed_off = True
            for connection in self._connections.values():
                connection.send(sign_off=True)

    def _accept(self, server: socket.socket) -> None:
        connection = Connection(server.accept()[0])
        self._selector.register(connection.sock, selectors.EVENT_READ, lambda: self._handshake(connection))

    def _handshake(self, connection: Connection) -> None:
        """Reads the first line of a connection: the token, and the rank and host of the other side."""
        messages = connection.read()
        if messages == []:
            return
        self._selector.unregister(connection.sock)
        hello = messages[0] if messages else {}
        rank = hello.get("rank")
        if not hmac.compare_digest(str(hello.get("token")), self._token) or rank not in self.peers:
            connection.sock.close()
            return
        self._connections[rank] = connection
        self.peers[rank].host = str(hello.get("host"))
        self.peers[rank].last_heard = time.monotonic()
        self._selector.register(connection.sock, selectors.EVENT_READ, lambda: self._receive(connection, rank))
        for message in messages[1:] if messages else []:
            self._handle(message, rank)

    def _receive(self, connection: Connection, rank: int) -> None:
        messages = connection.read()
        for message in messages or []:
            self._handle(message, rank)
        if messages is None:
            self._selector.unregister(connection.sock)
            connection.sock.close()
            self._connections.pop(rank, None)
            if self.peers[rank].state == "connected":
                self.peers[rank].state = "disconnected"
                self._check_peers()

    def _handle(self, message: dict[str, Any], rank: int) -> None:
        peer = self.peers[rank]
        peer.last_heard = time.monotonic()
        if "report" in message:
            peer.update(message["report"])
        if "connected_ranks" in message:
            self._connected_ranks = message["connected_ranks"]
        if "signal" in message:
            self._stop(message["signal"], from_main_thread=False)
        if "exit" in message:
            group_exit = GroupExit(**message["exit"])
            if self.rank == 0:
                self._propose_exit(group_exit)
            else:
                self.group_exit = self.group_exit or group_exit
        if "sign_off" in message:
            peer.state = "finished"
            if self.rank == 0:
                self._connections[rank].send(sign_off=True)

    def _stop(self, number: int, *, from_main_thread: bool) -> None:
        """A rank has received a stop signal: forwards it to all ranks, and to this rank's main thread.

        Before the ranks are connected it stays with this rank, and is forwarded once they are.
        """
        if self._is_stopping:
            return
        self._is_stopping = self.is_connected or not from_main_thread
        self._on_signal(number)
        if from_main_thread or self.rank == 0:
            for connection in self._connections.values():
                connection.send(signal=number)

    def _propose_exit(self, group_exit: GroupExit) -> None:
        """On rank 0, grants the first request; on the other ranks, sends it to rank 0."""
        if self.rank == 0 or 0 not in self._connections:
            self.group_exit = self.group_exit or group_exit
        else:
            self._send_exit(self._connections[0], group_exit)

    def _send_exit(self, connection: Connection, group_exit: GroupExit) -> None:
        connection.send(exit={"reporter": group_exit.reporter, "code": group_exit.code, "error": group_exit.error})

    def _send_heartbeat(self) -> None:
        own_failure = self.find_own_failure()
        if own_failure is not None:
            self._propose_exit(own_failure)
        if not self.peers:  # the ranks are not connected yet
            return
        report = PROGRESS.report()
        if self.rank == 0:
            self.peers[0].last_heard = time.monotonic()
            self.peers[0].update(report)
            connected_ranks = [rank for rank, peer in self.peers.items() if peer.state == "connected"]
            for connection in self._connections.values():
                connection.send(report=report, connected_ranks=connected_ranks)
        elif 0 in self._connections:
            self._connections[0].send(report=report)
        self._check_peers()

    def _check_peers(self) -> None:
        if self.group_exit is not None:
            return
        now = time.monotonic()
        if self.rank == 0:
            error = find_failure(list(self.peers.values()), now, self.timeout_seconds)
            reporter = 0
        else:
            error = find_rank0_failure(self.peers[0], now, self.timeout_seconds)
            # Rank 0 cannot report its own failure: the first of the others does.
            reporter = min((rank for rank in self._connected_ranks if rank != 0), default=self.rank)
        if error is not None:
            self.group_exit = GroupExit.with_error(reporter, error)

    def _exit(self, group_exit: GroupExit) -> None:
        """Informs the other ranks, waits for them to exit, then exits this process."""
        if self.rank == 0:
            for connection in self._connections.values():
                self._send_exit(connection, group_exit)
            deadline = time.monotonic() + LEAVE_SECONDS
            while self._connections and time.monotonic() < deadline:
                for key, _ in self._selector.select(0.1):
                    key.data()
        elif group_exit.reporter != self.rank and 0 not in self._connections:
            time.sleep(1.0)  # the rank that reports in place of rank 0 does so first
        self._exit_process(group_exit)
