"""A local server with OpenAI's interface, which says what a test tells it to, and counts what it was asked."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server says."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    """Close the connection without a word."""


def answer(text: Any, *, model: str = "local-1", usage: Any = ..., reason: str = "stop") -> Reply:
    """A proper answer in both forms, chat and completions."""
    usage = {"prompt_tokens": 10, "completion_tokens": 5} if usage is ... else usage
    choice = {"message": {"role": "assistant", "content": text}, "text": text, "finish_reason": reason}
    return Reply(body={"id": "r1", "model": model, "choices": [choice], "usage": usage})


def prompt_of(body: dict[str, Any]) -> str:
    """What was asked."""
    return body["messages"][-1]["content"] if "messages" in body else body["prompt"]


@dataclass
class Server:
    """`reply` gets the request's body and how often its prompt came before (0: the first time)."""

    reply: Callable[[dict[str, Any], int], Reply]
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextlib.contextmanager
def serving(reply: Callable[[dict[str, Any], int], Reply]) -> Iterator[Server]:
    """A server on a free port of this machine."""
    server = Server(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one write for each response, else the network waits for the rest of it

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with server.lock:
                before = server.asked[prompt_of(body)]
                server.asked[prompt_of(body)] += 1
                server.bodies.append(body)
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
                server.paths.append(self.path)
            said = server.reply(body, before)
            if said.drop:
                self.close_connection = True
                return
            content = said.body if isinstance(said.body, bytes) else json.dumps(said.body).encode()
            with contextlib.suppress(OSError):  # the client gave up
                self.send_response(said.status)
                for name, value in {"Content-Length": str(len(content)), **said.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    class Queue(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64  # a connection beyond it waits a second for its next try

    http = Queue(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
