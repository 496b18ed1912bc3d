# SPDX-License-Identifier: GPL-2.0-only
"""A client of phosd that does what criu never would: messages of gpu-tracker/abi/phosd.proto,
encoded by hand, so that the tests do not share the code they test."""
import array
import contextlib
import os
import select
import socket
import threading

PROTOCOL = 3
LIMIT = 30  # seconds; only ever reached by a failure


def varint(value):
    out = bytearray()
    while value > 0x7f:
        out.append(value & 0x7f | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field, value):
    return varint(field << 3) + varint(value)


def text(field, value):
    return varint(field << 3 | 2) + varint(len(value)) + value


def fields(data):
    """(number, value) of each field; only the wire types that phosd.proto leads to."""
    at = 0

    def read_varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7f) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = read_varint()
        if key & 7 == 0:
            yield key >> 3, read_varint()
        elif key & 7 == 2:
            size = read_varint()
            yield key >> 3, data[at:at + size]
            at += size
        else:
            raise ValueError(f'wire type {key & 7}')


class Reply:
    def __init__(self, data):
        found = dict(fields(data))
        self.ok = bool(found[1])
        self.error = found.get(2, b'').decode()


class Client:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(LIMIT)
        self.socket.connect(path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data, fds=()):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', fds))] if fds else []
        self.socket.sendmsg([data], rights)

    def receive_bytes(self):
        return self.socket.recv(1 << 18)

    def receive(self):
        return Reply(self.receive_bytes())

    def ask(self, op, argument, fds=()):
        self.send(text(op, argument), fds)
        return self.receive()

    def hello(self, images, stage=0, protocol=PROTOCOL):
        fd = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return self.ask(1, number(1, protocol) + number(2, stage), [fd])
        finally:
            os.close(fd)

    def inspect(self, pid):
        return self.ask(2, number(1, pid))

    def send_lock(self, timeout_ms):
        self.send(text(9, number(1, timeout_ms)))

    def lock(self, timeout_ms):
        self.send_lock(timeout_ms)
        return self.receive()

    def undo(self, pid, found=0):
        return self.ask(4, number(1, pid) + number(3, found))

    def finish(self, success):
        return self.ask(8, number(1, int(success)))


@contextlib.contextmanager
def fake_phosd(path, answer, clients=1):
    """Calls answer(connected socket) for each client; then nobody listens, but the name stays. With
    no clients the first is left waiting until then."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen()
    listener.settimeout(LIMIT)

    def serve():
        with listener:
            select.select([listener], [], [], LIMIT)
            accepted = [listener.accept()[0] for _ in range(clients)]
        for client in accepted:
            with client:
                answer(client)
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def refuse(error):
    """For fake_phosd: says no to the hello."""
    def answer(client):
        client.recv(1 << 18)
        client.send(number(1, 0) + text(2, error.encode()))
    return answer
