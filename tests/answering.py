"""OpenAI-compatible servers on loopback, and answers that pass the filters and mean nothing."""

import json
import random
import threading
from collections.abc import Callable
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


def reply(asked: dict) -> tuple[int, dict]:
    """Always an answer."""
    return 200, completion(answer(asked))


def completion(text: str) -> dict:
    """A whole answer in OpenAI's form."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 11, "total_tokens": 20},
    }


def serve(reply: Callable[[dict], tuple[int, dict]]) -> ThreadingHTTPServer:
    """A server in a thread of its own, until `shutdown`.

    Args:
        reply: from the JSON of a request to the status and the JSON of its answer.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            status, said = reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
