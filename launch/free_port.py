"""Prints a free TCP port, so that two runs on one machine do not meet; given one, names another if it is taken."""

import socket
import sys


def is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch: a run that has just ended holds nothing
        try:
            sock.bind(("", port))
        except OSError:
            return False
        return True


if len(sys.argv) > 1:
    wanted = int(sys.argv[1])
    if not is_free(wanted):
        other = next(port for port in (*range(wanted + 1, 65536), *range(1024, wanted)) if is_free(port))
        sys.exit(f"MASTER_PORT: {wanted} is taken on {socket.gethostname()}; {other} is free: MASTER_PORT={other}")
else:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        print(sock.getsockname()[1])
