"""Local OpenAI-compatible servers, and meaningless replies that pass the text filters."""

import json
import random
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WORDS = (
    "moon tide lantern willow harbour ember thistle meadow raven copper glacier orchard saffron "
    "velvet canyon drizzle marble juniper anchor compass feather quartz timber violet whisper"
)


def answer(request: dict) -> str:
    """Random words, determined by seed and messages; a verdict if few tokens are requested."""
    if request["max_tokens"] <= 6:
        return "poetic"
    generator = random.Random(json.dumps([request.get("seed"), request["messages"]]))
    return f"The {' '.join(generator.sample(WORDS.split(), 9))} sings."


def reply(request: dict) -> tuple[int, dict]:
    """Respond to every request with `answer`."""
    return 200, completion(answer(request))


def completion(text: str) -> dict:
    """A chat completion in the format of OpenAI's API."""
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
    """Start a server in a thread; it runs until `shutdown`.

    Args:
        reply: maps the JSON of a request to an HTTP status and the JSON of the response.

    Returns:
        The running server.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            status, response = reply(
                json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            )
            body = json.dumps(response).encode()
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
