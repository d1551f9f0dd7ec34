"""Traffic other than a robot's, for measuring a link and for competing on it. Runs inside a namespace.

echo PORT                            answers each UDP packet with itself, until it is ended
ping HOST PORT COUNT INTERVAL_MS     prints [number, round trip in ms] of each that was answered, as JSON
sink PORT                            counts UDP packets up to half a second of silence, and prints the count
flood HOST PORT RATE_MBIT SECONDS    UDP at a steady rate
receive PORT                         takes TCP connections; for each line of input prints the bytes since the one before
send HOST PORT                       one TCP connection that is never short of data, until it is ended
"""

import json
import socket
import sys
import threading
import time

DATAGRAM_BYTES = 1472
"""With its headers, 1,500 bytes."""
SEGMENTS = 16
"""Datagrams that the kernel is handed at once when flooding."""
SILENCE_S = 0.5
UDP_SEGMENT = 103


def echo(port: str) -> None:
    with _udp(port) as server:
        while True:
            data, sender = server.recvfrom(DATAGRAM_BYTES)
            server.sendto(data, sender)


def ping(host: str, port: str, count: str, interval_ms: str) -> None:
    answered = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((host, int(port)))
        client.settimeout(SILENCE_S)

        def listen() -> None:
            try:
                while True:
                    number, sent = map(int, client.recv(DATAGRAM_BYTES).split())
                    answered.append((number, (time.perf_counter_ns() - sent) / 1e6))
            except TimeoutError:
                pass

        listener = threading.Thread(target=listen)
        listener.start()
        for number in range(int(count)):
            client.send(b"%d %d" % (number, time.perf_counter_ns()))
            time.sleep(float(interval_ms) / 1e3)
        listener.join()
    print(json.dumps(answered))


def sink(port: str) -> None:
    packets, first, last = 0, 0.0, 0.0
    with _udp(port) as server:
        print("ready", flush=True)
        try:
            while True:
                server.recv(DATAGRAM_BYTES)
                last = time.perf_counter()
                if not packets:
                    first = last
                    server.settimeout(SILENCE_S)
                packets += 1
        except TimeoutError:
            pass
    print(json.dumps({"packets": packets, "seconds": last - first}))


def flood(host: str, port: str, rate_mbit: str, seconds: str) -> None:
    interval_s = SEGMENTS * (DATAGRAM_BYTES + 28) * 8 / (float(rate_mbit) * 1e6)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, DATAGRAM_BYTES)
        data = bytes(SEGMENTS * DATAGRAM_BYTES)
        due = time.perf_counter()
        end = due + float(seconds)
        while due < end:
            time.sleep(max(0.0, due - time.perf_counter()))
            client.sendto(data, (host, int(port)))
            due += interval_s


def receive(port: str) -> None:
    total = 0

    def take(connection: socket.socket) -> None:
        nonlocal total
        while count := len(connection.recv(1 << 18)):
            total += count

    def accept(server: socket.socket) -> None:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=take, args=(connection,), daemon=True).start()

    with socket.create_server(("", int(port))) as server:
        threading.Thread(target=accept, args=(server,), daemon=True).start()
        print("ready", flush=True)
        told = 0
        for _ in sys.stdin:
            now = total
            print(now - told, flush=True)
            told = now


def send(host: str, port: str) -> None:
    with socket.create_connection((host, int(port))) as connection:
        data = bytes(1 << 18)
        while True:
            connection.sendall(data)


def _udp(port: str) -> socket.socket:
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    server.bind(("", int(port)))
    return server


if __name__ == "__main__":
    {program.__name__: program for program in (echo, ping, sink, flood, receive, send)}[sys.argv[1]](*sys.argv[2:])
