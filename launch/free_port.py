"""Prints a free TCP port, so that two runs on one machine do not meet."""

import socket

with socket.socket() as sock:
    sock.bind(("127.0.0.1", 0))
    print(sock.getsockname()[1])
