"""Each rank's sign of life, over sockets of its own: who is where, who is ill, and one word at which all leave.

A thread of each rank tells rank 0 every second where the rank is; rank 0's judges, and the others' judge rank 0. A
process that ends without a word is known at once, by its closed connection. What ends a group is decided once, by the
first that says it; one rank speaks for all, and every process leaves with the same exit code, whatever its main thread
is in. Messages are JSON, and a connection counts from its first line, which must hold what the group was told.
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
from clipwright.pipeline.train.supervision.failures import Peer, judge, rank0_failure
from clipwright.pipeline.train.supervision.progress import PROGRESS

BEAT = 1.0  # seconds between signs of life
LEAVE = 3.0  # seconds that who speaks last waits for the others to have left
LONGEST = 65536  # bytes of a line


@dataclass(frozen=True)
class End:
    """How the group ends: which rank says so, the exit code of all, and the error's parts, if it is one of ours."""

    by: int
    code: int
    error: tuple[str, ...] | None = None

    def raised(self) -> ClipwrightError | None:
        if self.error is None:
            return None
        code, what, where, found, fix = self.error
        return ClipwrightError(code, what, where=where, found=found, fix=fix)


class Link:
    """JSON objects over a socket, one a line; sending never waits."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self._in, self._full = sock, b"", False
        sock.setblocking(False)

    def send(self, **message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        try:
            self._full = self._full or self.sock.send(data) < len(data)
        except BlockingIOError:
            self._full = True  # it has not read for long: what it does not get, it does not miss
        except OSError:
            pass  # reading will tell

    def read(self) -> list[dict[str, Any]] | None:
        """The objects that came, or None when the other side has gone or sends something else."""
        try:
            data = self.sock.recv(LONGEST)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._in = (self._in + data).split(b"\n")
        try:
            found = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return found if data and len(self._in) < LONGEST and all(isinstance(one, dict) for one in found) else None


class Heartbeat(threading.Thread):
    """The thread of one rank. `stop` is called when any rank was told to stop, `leave` with the group's end."""

    def __init__(
        self, rank: int, size: int, timeout_seconds: float, stop: Callable[[int], None], leave: Callable[[End], None]
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.rank, self.size, self.timeout_seconds = rank, size, timeout_seconds
        self._stop_main, self._leave_process = stop, leave
        self.end: End | None = None  # decided
        self.over = threading.Event()  # nothing is to be heard any more
        self._wish: End | None = None  # this rank's, as long as nothing is decided
        self._stopping = False
        self._done = self._bye = False  # the main thread wants no more; the others were told so
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()
        for one in (self._woken, self._wake):
            one.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, self._wakes)
        self._links: dict[int, Link] = {}
        self.peers: dict[int, Peer] = {}
        self._living: list[int] = []  # as rank 0 said last
        self.check: Callable[[], End | None] = lambda: None  # of this rank alone, once a second

    # The main thread's side

    def listen(self) -> tuple[str, int, str]:
        """Rank 0's: the name of its host, and the port and the word by which the others join."""
        server = socket.create_server(("", 0), backlog=self.size)
        server.setblocking(False)
        self._token = os.urandom(16).hex()
        self.peers = {rank: Peer(rank) for rank in range(self.size)}
        self.peers[0].host = socket.gethostname()
        self._selector.register(server, selectors.EVENT_READ, lambda: self._accept(server))
        return self.peers[0].host, server.getsockname()[1], self._token

    def join_first(self, address: str, host: str, port: int, token: str) -> None:
        """Any other rank's: rank 0 is reached at `address`."""
        link = Link(socket.create_connection((address, port), timeout=30))
        link.send(token=token, rank=self.rank, host=socket.gethostname())
        self.peers, self._links[0] = {0: Peer(0, host)}, link
        self._selector.register(link.sock, selectors.EVENT_READ, lambda: self._hear(link, 0))

    def start(self) -> None:
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        super().start()

    def request_exit(self, end: End) -> None:
        """The group should end; the first request_exit of all ranks is granted."""
        self._wish = end
        self._wake.send(b"\0")

    def sign_off(self, seconds: float) -> None:
        """This rank is done. Waits until the others know; rank 0 until they are, too."""
        signal.set_wakeup_fd(-1)
        self._done = True
        self._wake.send(b"\0")
        self.over.wait(seconds)

    # The thread's side

    def run(self) -> None:
        due = time.monotonic()
        while not (self._bye and self._alone()):
            for key, _ in self._selector.select(max(0.0, due - time.monotonic())):
                key.data()
            if (late := time.monotonic() - due) >= 0:
                if late > BEAT:  # this process did not run, and what the others said meanwhile was not heard
                    for peer in self.peers.values():
                        peer.discount_pause(late)
                due = time.monotonic() + BEAT
                self._beats()
            if self.end is not None:
                self._ends(self.end)
                break
        for link in self._links.values():
            link.sock.close()
        self.over.set()

    def _alone(self) -> bool:
        """Whether nobody is left to listen to."""
        return not any(peer.state == "here" for rank, peer in self.peers.items() if rank != self.rank)

    def _wakes(self) -> None:
        """A signal, known here even while the main thread hears nothing, or a word from the main thread."""
        numbers = self._woken.recv(4096)
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            if number in numbers:
                self._stops(number, ours=True)
        if self._wish is not None:
            self._decide(self._wish)
        if self._done:
            self._bye = True
            for link in self._links.values():
                link.send(sign_off=True)

    def _accept(self, server: socket.socket) -> None:
        link = Link(server.accept()[0])
        self._selector.register(link.sock, selectors.EVENT_READ, lambda: self._greet(link))

    def _greet(self, link: Link) -> None:
        """The first words on a connection: which rank it is of."""
        said = link.read()
        if said == []:
            return
        self._selector.unregister(link.sock)
        hello = said[0] if said else {}
        rank = hello.get("rank")
        if not hmac.compare_digest(str(hello.get("token")), self._token) or rank not in self.peers:
            link.sock.close()
            return
        self._links[rank] = link
        self.peers[rank].host, self.peers[rank].heard = str(hello.get("host")), time.monotonic()
        self._selector.register(link.sock, selectors.EVENT_READ, lambda: self._hear(link, rank))
        for message in said[1:] if said else []:
            self._take(message, rank)

    def _hear(self, link: Link, rank: int) -> None:
        messages = link.read()
        for message in messages or []:
            self._take(message, rank)
        if messages is None:
            self._selector.unregister(link.sock)
            link.sock.close()
            self._links.pop(rank, None)
            if self.peers[rank].state == "here":
                self.peers[rank].state = "gone"
                self._judge()

    def _take(self, message: dict[str, Any], rank: int) -> None:
        peer = self.peers[rank]
        peer.heard = time.monotonic()
        if "beat" in message:
            peer.beats(message["beat"])
        if "living" in message:
            self._living = message["living"]
        if "stop" in message:
            self._stops(message["stop"], ours=False)
        if "end" in message:
            by, code, error = message["end"]
            end = End(by, code, error and tuple(error))
            if self.rank == 0:
                self._decide(end)
            else:
                self.end = self.end or end
        if "sign_off" in message:
            peer.state = "left"
            if self.rank == 0:
                self._links[rank].send(sign_off=True)

    def _stops(self, number: int, *, ours: bool) -> None:
        """Somebody was told to stop: everybody is."""
        if not self._stopping:
            self._stopping = True
            self._stop_main(number)
            for link in self._links.values() if ours or self.rank == 0 else []:
                link.send(stop=number)

    def _decide(self, end: End) -> None:
        """Rank 0 grants the first request_exit, the others ask it to."""
        if self.rank == 0 or 0 not in self._links:
            self.end = self.end or end
        else:
            self._links[0].send(end=[end.by, end.code, end.error])

    def _beats(self) -> None:
        beat = PROGRESS.told()
        if not self.peers:  # the group has not met
            return
        if self.rank == 0:
            self.peers[0].heard = time.monotonic()
            self.peers[0].beats(beat)
            living = [rank for rank, peer in self.peers.items() if peer.state == "here"]
            for link in self._links.values():
                link.send(beat=beat, living=living)
        elif 0 in self._links:
            self._links[0].send(beat=beat)
        self._judge()
        if (end := self.check()) is not None:
            self._decide(end)

    def _judge(self) -> None:
        if self.end is not None:
            return
        now = time.monotonic()
        if self.rank == 0:
            error, by = judge(list(self.peers.values()), now, self.timeout_seconds), 0
        else:
            error = rank0_failure(self.peers[0], now, self.timeout_seconds)
            by = min((rank for rank in self._living if rank != 0), default=self.rank)
        if error is not None:
            self.end = End(by, error.exit_code, error.args)

    def _ends(self, end: End) -> None:
        """Tells the others, lets them leave, and leaves."""
        for link in self._links.values() if self.rank == 0 else []:
            link.send(end=[end.by, end.code, end.error])
        deadline = time.monotonic() + LEAVE
        while self.rank == 0 and self._links and time.monotonic() < deadline:
            for key, _ in self._selector.select(0.1):
                key.data()
        if self.rank != 0 and end.by != self.rank and 0 not in self._links:
            time.sleep(1.0)  # who speaks for rank 0 does so first
        self._leave_process(end)
