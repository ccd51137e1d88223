"""One connection between the driver and a rank: a pair of ZeroMQ sockets, and whether the other end is still alive.

ZeroMQ's own thread pings and answers, whatever Python is doing, so that a stopped process is told from a busy one.
"""

from __future__ import annotations

from types import TracebackType

import zmq
from zmq.utils.monitor import recv_monitor_message

from rowcast.cluster.wire import MAX_MESSAGE_BYTES, Message, decode, encode

_PINGS = 3
"""In the time after which silence counts as death."""


class Link:
    """One end. Used by one thread, but for `watch`, which may be another's."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self.watch = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    @staticmethod
    def bind(address: str, silence_s: float) -> Link:
        """The driver's end. `address`: ipc://PATH, or tcp://HOST:* for any port."""
        socket = _socket()
        pause_ms = max(1, round(silence_s * 1000 / (_PINGS + 1)))
        socket.setsockopt(zmq.HEARTBEAT_IVL, pause_ms)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _PINGS * pause_ms)
        link = Link(socket)
        socket.bind(address)
        return link

    @staticmethod
    def connect(address: str) -> Link:
        """A rank's end."""
        link = Link(_socket())
        link.socket.connect(address)
        return link

    @property
    def address(self) -> str:
        """Where it is bound."""
        return str(self.socket.getsockopt_string(zmq.LAST_ENDPOINT))

    def send(self, message: Message) -> None:
        """Does not wait for the other end. Raises ConnectionError where that has gone."""
        self.send_bytes(encode(message))

    def send_bytes(self, data: bytes) -> None:
        """A message that is encoded already."""
        try:
            self.socket.send(data, zmq.NOBLOCK)
        except zmq.Again as error:
            raise ConnectionError("there is nobody at the other end") from error

    def receive(self, timeout_s: float | None = None) -> Message:
        """The next message; waits for it. Raises TimeoutError, and WireError for what is none."""
        if timeout_s is not None and not self.socket.poll(round(timeout_s * 1000)):
            raise TimeoutError(f"no message came within {timeout_s:g} s")
        return decode(self.socket.recv())

    def lost(self) -> bool:
        """Whether the other end has gone, or has not answered pings, since the last call. Does not wait."""
        found = False
        while self.watch.poll(0):
            recv_monitor_message(self.watch)
            found = True
        return found

    def close(self) -> None:
        """At once: what was sent a moment ago still goes out, for a second. May be called twice."""
        if not self.socket.closed:
            self.socket.disable_monitor()
            self.socket.close(linger=1000)

    def __enter__(self) -> Link:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _socket() -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    return socket
