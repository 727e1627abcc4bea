"""A server that speaks OpenAI's protocol over TCP and does, request by request, what a script says.

By default it answers with tasks that parse: which ones depends on the prompt alone, so the same request has the same
answer whoever asks and whenever. A step of the script is a dict; its keys are the options of `Handler.act`.
"""

import hashlib
import http.server
import json
import random
import re
import socket
import struct
import threading
import time

VERBS = "Describe Compare List Explain Rewrite Summarise Translate Classify Estimate Plan Defend Question".split()
SYLLABLES = "ba ke li mo nu ra se ti vo xu pa de gi jo ku la me ni po ru".split()


def make_word(draw):
    return "".join(draw.choice(SYLLABLES) for _ in range(3))


def make_tasks(draw, count):
    """`count` tasks that no quality rule and hardly any duplicate check throws out."""
    tasks = []
    for _ in range(count):
        words = " ".join(make_word(draw) for _ in range(7))
        text = " ".join(make_word(draw) for _ in range(3))
        tasks.append(
            (f"{draw.choice(VERBS)} {words}.", text if draw.random() < 0.5 else "<noinput>", f"Answer: {text}.")
        )
    return tasks


def render_tasks(tasks, first):
    """Tasks as a model goes on from the prompt's last line, "`first`. Instruction:"."""
    blocks = [
        f"{i}. Instruction: {a}\n{i}. Input:\n{b}\n{i}. Output:\n{c}\n" for i, (a, b, c) in enumerate(tasks, first)
    ]
    return "###\n".join(blocks).removeprefix(f"{first}. Instruction:")


def usual_answer(prompt, count=8, is_json=False):
    """The answer to a prompt; a fifth of its tasks repeats one of the others."""
    draw = random.Random(hashlib.sha256(prompt.encode()).digest())
    tasks = make_tasks(draw, count)
    if count > 4:
        tasks[count // 2] = tasks[0]
    if is_json:
        fields = ("instruction", "input", "output")
        rows = [dict(zip(fields, (a, b.replace("<noinput>", ""), c), strict=True)) for a, b, c in tasks]
        return json.dumps({"tasks": rows})
    first = int(re.findall(r"^(\d+)\. Instruction:", prompt, re.MULTILINE)[-1])
    return render_tasks(tasks, first)


def completion(text, finish_reason="stop", model="scripted", usage=(100, 200), endpoint="chat", **changes):
    """The JSON of a good answer, as a dict; `changes` replace its keys."""
    choice = {"index": 0, "finish_reason": finish_reason}
    choice |= {"text": text} if endpoint == "text" else {"message": {"role": "assistant", "content": text}}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": model, "choices": [choice]}
    if usage:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return body | changes


def stream(body, is_cut=False):
    """A completion as server-sent events: the text in three pieces, the reason of its end, the usage."""
    choice = body["choices"][0]
    text, pieces = choice.get("text") or choice["message"]["content"], []
    for part in (text[:10], text[10:20], text[20:]):
        pieces.append({"index": 0, "finish_reason": None, "text": part, "delta": {"content": part}})
    pieces.append({"index": 0, "finish_reason": choice["finish_reason"], "text": "", "delta": {}})
    events = [{**body, "choices": [piece], "usage": None} for piece in pieces] + [{**body, "choices": []}]
    lines = [f"data: {json.dumps(event)}\n\n" for event in events[: 2 if is_cut else None]]
    return "".join([*lines, "" if is_cut else "data: [DONE]\n\n"]).encode()


def refusal(message, code=None, param=None, kind=None):
    """The JSON of an error."""
    return {"error": {"message": message, "code": code, "param": param, "type": kind}}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.take(self, body)

    def act(
        self, request, status=200, headers=(), body=None, raw=None, text=None, delay=0, fault=None, count=8, **more
    ):
        """One step: `raw` bytes, or a JSON `body`, or an answer with `text`; `more` goes to `completion`.

        `fault` is hang, drip (a byte every 20 ms), reset, truncated, or cut (a stream without its end).
        """
        time.sleep(delay)
        self.close_connection = fault is not None
        if fault == "hang":
            self.server.closing.wait(30)
            return
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return  # and the connection is closed, without a farewell
        if raw is None:
            if body is None:
                if text is None:
                    text = usual_answer(request["prompt"], count, "response_format" in request)
                body = completion(text, endpoint=request["endpoint"], **more)
            raw = json.dumps(body).encode()
            if request.get("stream") and status == 200:
                raw, headers = stream(body, fault == "cut"), {"Content-Type": "text/event-stream"}
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **dict(headers)}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw) + (fault == "truncated") * 100))
        self.end_headers()
        if fault == "drip":
            for i in range(len(raw)):
                if self.server.closing.wait(0.02):
                    return
                self.wfile.write(raw[i : i + 1])
                self.wfile.flush()
        else:
            self.wfile.write(raw)


class Server(http.server.ThreadingHTTPServer):
    """`script` maps the number of a request, in the order of arrival, to its step; `default` is for all others.

    `requests` keeps what was asked for: the JSON, with `prompt`, `endpoint`, `authorization`, `api_key`, `path` and
    `when` they came.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, script=None, **default):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.default = script or {}, default
        self.requests, self.closing, self.lock = [], threading.Event(), threading.Lock()
        self.step_of = None  # a function of the request that returns its step, before the script is asked
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def take(self, handler, body):
        endpoint = "chat" if handler.path.partition("?")[0].endswith("/chat/completions") else "text"
        prompt = body["messages"][0]["content"] if endpoint == "chat" else body["prompt"]
        request = {**body, "prompt": prompt, "endpoint": endpoint, "authorization": handler.headers["Authorization"]}
        request |= {"path": handler.path, "api_key": handler.headers["api-key"], "when": time.monotonic()}
        with self.lock:
            number = len(self.requests)
            self.requests.append(request)
        step = self.step_of(request) if self.step_of else None
        step = self.script.get(number, self.default) if step is None else step
        try:
            handler.act(request, **step)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client was killed, or has lost its patience

    def handle_error(self, request, client_address):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.closing.set()
        self.shutdown()
        self.server_close()
