"""An OpenAI-compatible server on loopback whose answers pass the filters, and mean nothing."""

import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WORDS = (
    "moon tide lantern willow harbour ember thistle meadow raven copper glacier orchard saffron "
    "velvet canyon drizzle marble juniper anchor compass feather quartz timber violet whisper"
)


def answer(asked: dict) -> str:
    """Words drawn by seed and conversation; a verdict where few tokens are asked for."""
    if asked["max_tokens"] <= 6:
        return "poetic"
    drawn = random.Random(json.dumps([asked.get("seed"), asked["messages"]]))
    return f"The {' '.join(drawn.sample(WORDS.split(), 9))} sings."


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": answer(asked)}
        usage = {"prompt_tokens": 9, "completion_tokens": 11, "total_tokens": 20}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        made = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        body = json.dumps({**made, "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


def serve() -> ThreadingHTTPServer:
    """A server in a thread of its own, until `shutdown`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
