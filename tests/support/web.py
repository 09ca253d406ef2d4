"""A web server of its own process for tests: byte ranges of the files below a folder, and faults on demand.

Also lists like S3 (`GET /BUCKET?list-type=2&prefix=P`), so that a client of object stores can be pointed at it.
Invariant: which request fails depends on how many came before, never on the clock; each is a line in the log.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape


class WebServer:
    """Serves `root` on a loopback port until `kill`; `start` brings it back on the same port.

    `faults` says which requests go wrong: {"error": 7} answers every 7th with 503, {"error": [2, 4]} the second to the fourth.
    "denied" answers 403; "cut" sends half of the body, "hang" sends half and waits; "rot" sends other bytes, "slow" the right ones
    a little later; "whole" knows no ranges.
    """

    def __init__(self, root: Path, faults: dict[str, int | list[int]] | None = None, log: Path | None = None) -> None:
        self.root, self.faults = root, faults or {}
        self.log = log or root.parent / f"{root.name}.requests"
        self.port = 0
        self.process: subprocess.Popen[str] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        arguments = [str(self.root), str(self.port), json.dumps(self.faults), str(self.log)]
        self.process = subprocess.Popen([sys.executable, "-S", __file__, *arguments], stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        """As a crash: every connection breaks, nobody listens."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def requests(self) -> list[dict]:
        """What was asked so far: method, path, range, fault, and how many requests were being answered."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def __enter__(self) -> "WebServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def handler(root: Path, fault: Callable[[], str | None], log: Callable[[dict], None]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        under_way: ClassVar[list[None]] = []

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            url = urlsplit(self.path)
            query = parse_qs(url.query)
            wrong = fault()
            asked = self.headers.get("Range") if wrong != "whole" else None
            self.under_way.append(None)
            log({"method": self.command, "path": self.path, "range": asked, "fault": wrong, "under_way": len(self.under_way)})
            time.sleep(0.05 if wrong == "slow" else 0)
            file = root / url.path.lstrip("/")
            if wrong in ("error", "denied"):
                self.reply(HTTPStatus.SERVICE_UNAVAILABLE if wrong == "error" else HTTPStatus.FORBIDDEN, b"no", body)
            elif "list-type" in query:
                self.reply(HTTPStatus.OK, listing(file, query.get("prefix", [""])[0]), body)
            elif not file.is_file():
                self.reply(HTTPStatus.NOT_FOUND, b"no such file", body)
            else:
                self.send_file(file, asked, body, wrong)
            self.under_way.pop()

        def send_file(self, file: Path, asked: str | None, body: bool, wrong: str | None) -> None:
            content = file.read_bytes()
            size, headers, status = len(content), {"Last-Modified": self.date_time_string(int(file.stat().st_mtime))}, HTTPStatus.OK
            if asked:
                first, last = asked.removeprefix("bytes=").split("-")
                if int(first) >= size:
                    self.reply(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", body, {"Content-Range": f"bytes */{size}"})
                    return
                end = min(size, int(last) + 1) if last else size
                content = content[int(first) : end]
                headers["Content-Range"], status = f"bytes {first}-{end - 1}/{size}", HTTPStatus.PARTIAL_CONTENT
            self.reply(status, content, body, headers, wrong)

        def reply(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None, wrong: str | None = None) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(content)), "Accept-Ranges": "bytes"}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                content = bytes(len(content)) if wrong == "rot" else content
                self.wfile.write(content[: len(content) // 2] if wrong in ("cut", "hang") else content)
            if wrong == "hang":
                time.sleep(3600)
            self.close_connection = wrong in ("cut", "hang")

        def log_message(self, *_: object) -> None:
            """Nothing to the terminal."""

    return Handler


def listing(bucket: Path, prefix: str) -> bytes:
    """Files right below the prefix, as S3 lists them."""
    files = sorted(f for f in (bucket / prefix).iterdir() if f.is_file())
    rows = "".join(
        f"<Contents><Key>{escape(f.relative_to(bucket).as_posix())}</Key><Size>{f.stat().st_size}</Size>"
        "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
        for f in files
    )
    return f'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>'.encode()


def serve(root: str, port: str, faults: str, log: str) -> None:
    numbers, plan = count(1), json.loads(faults)

    def fault() -> str | None:
        n = next(numbers)
        hit = (name for name, when in plan.items() if (n % when == 0 if isinstance(when, int) else when[0] <= n <= when[1]))
        return next(hit, None)

    ThreadingHTTPServer.request_queue_size = 128  # of two ranks' readers at once; what finds no place in it is late by a second
    with open(log, "a", buffering=1) as file:
        server = ThreadingHTTPServer(("127.0.0.1", int(port)), handler(Path(root), fault, lambda r: print(json.dumps(r), file=file)))
        print(server.server_port, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    serve(*sys.argv[1:])
