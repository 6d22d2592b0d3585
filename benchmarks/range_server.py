"""A web server on this machine that answers byte ranges, with an added latency and counters.

benchmarks/remote.py and tests/test_remote.py use it. It serves one folder to this machine only.
"""

import multiprocessing
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np

from dclr.data.decoder_process import shared_array


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD like a web server for files: ranges, sizes, and an ETag from a file's size and time."""

    server: "RangeServer"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise the body waits for the acknowledgement of the header

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.count(requests=1)
        time.sleep(self.server.latency_s)
        file = self.server.root / unquote(urlsplit(self.path).path).lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        status, size = file.stat(), file.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(wanted[1]), int(wanted[2] or size - 1)) if wanted else (0, size - 1)
        if wanted and first >= size:
            self.send_error(416)
            return
        last = min(last, size - 1)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("ETag", f'"{size}-{status.st_mtime_ns}"')
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if self.command == "HEAD":
            return
        with file.open("rb") as content:
            content.seek(first)
            self.wfile.write(content.read(last - first + 1))
        self.server.count(sent=last - first + 1)

    def log_message(self, *args: object) -> None:
        """Print nothing."""


class RangeServer(ThreadingHTTPServer):
    """The server of one folder. `latency_s`: seconds that an answer waits before its first byte."""

    daemon_threads = True

    def __init__(self, root: Path, handler: type[Handler] = Handler, latency_s: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.root, self.latency_s = root, latency_s
        self._counting, self._counters = threading.Lock(), shared_array(2, np.int64)

    def count(self, requests: int = 0, sent: int = 0) -> None:
        with self._counting:
            self._counters += (requests, sent)

    @property
    def requests(self) -> int:
        """The number of requests so far."""
        return int(self._counters[0])

    @property
    def bytes_sent(self) -> int:
        """The bytes of all bodies so far."""
        return int(self._counters[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serve(root: Path, handler: type[Handler] = Handler, latency_s: float = 0.0) -> Iterator[RangeServer]:
    """Serve a folder inside the context, in a thread of this process."""
    with RangeServer(root, handler, latency_s) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def serve_in_process(root: Path, latency_s: float) -> Iterator[RangeServer]:
    """Serve a folder inside the context, in a process of its own, which does not wait for this process."""
    with RangeServer(root, latency_s=latency_s) as server:
        process = multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True)
        process.start()
        try:
            yield server
        finally:
            process.terminate()
            process.join()
