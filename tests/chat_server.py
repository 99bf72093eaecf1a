"""A server on loopback that speaks the chat-completions and batch protocols, with faults to order.

In a test: `with serving(latency=0.01) as server: ... server.base_url ... server.stats()`.
As a process: `python tests/chat_server.py latency=0.2 seconds=60`, which prints its URL, and ends
with its parent or after so many seconds; `serving_process(...)` starts it that way.
"""

import asyncio
import collections
import contextlib
import dataclasses
import email.utils
import hashlib
import http.client
import itertools
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

from aiohttp import web

STATUS_FAULTS = {
    "429": (429, "rate_limit_exceeded", "too fast"),
    "429_seconds": (429, "rate_limit_exceeded", "too fast"),
    "429_date": (429, "rate_limit_exceeded", "too fast"),
    "429_reset": (429, "rate_limit_exceeded", "too fast"),
    "quota": (429, "insufficient_quota", "You exceeded your current quota"),
    "500": (500, None, "internal"),
    "503": (503, None, "overloaded"),
    "529": (529, None, "overloaded"),
    "401": (401, "invalid_api_key", "Incorrect API key provided"),
    "403": (403, None, "not allowed"),
    "404": (404, "model_not_found", "The model does not exist"),
    "400": (400, "bad_thing", "something else is wrong"),
    "too_long": (400, "context_length_exceeded", "maximum context length is 8 tokens"),
    "filtered": (400, "content_filter", "the prompt was filtered"),
}
OTHER_FAULTS = (
    "hang",  # never answers
    "disconnect",  # closes without a byte
    "garbage",  # no HTTP
    "reset_headers",  # resets after the headers,
    "reset_body",  # in the body,
    "reset_end",  # and after it
    "redirect",
    "bad_envelope",  # not JSON
    "no_choices",
    "truncated",  # finish_reason length
    "fenced",  # ```json
    "refusal",
    "filtered_answer",  # finish_reason content_filter
    "wrong_count",
    "null_content",
)
FAULTS = (*STATUS_FAULTS, *OTHER_FAULTS)
LOST = ("reset_headers", "reset_body", "reset_end", "bad_envelope", "no_choices")


@dataclasses.dataclass
class Settings:
    """What a server does; every field can be switched while it runs."""

    latency: float = 0.0  # seconds of an answer; faults with a status come at once
    seed: int = 0
    faults: dict[str, float] = dataclasses.field(default_factory=dict)  # probabilities
    next: list[str] = dataclasses.field(default_factory=list)  # faults ("" is none) that come first
    retry_after: float = 0.05  # seconds, of 429_seconds (rounded up), 429_date and 429_reset
    down: bool = False  # 503 to everything
    key: str | None = None  # other keys are answered with 401
    echo_key: bool = False  # errors repeat the Authorization header
    refused_fields: list[str] = dataclasses.field(default_factory=list)  # 400 names the field
    refused_silently: list[str] = dataclasses.field(default_factory=list)  # 400 does not
    refused_status: int = 400
    usage: bool = True
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    window_seconds: float = 60.0  # so much of a minute's limit holds in any such window
    batch_seconds: float = 0.0  # until a batch is completed
    batch_outcome: str = "completed"  # or expired (half is answered), failed, cancelled
    batch_missing: int = 0  # lines left out,
    batch_duplicates: int = 0  # repeated,
    batch_errors: int = 0  # moved to the error file,
    batch_unknown: int = 0  # and added under foreign ids
    batch_lost: int = 0  # creations of which nothing is told, after they were done
    batch_requests: int = 50_000  # allowed in a file
    batch_bytes: int = 200_000_000
    file_pause: float = 0.0  # seconds before an upload or a creation is answered
    kept_prompts: int = 10_000


def key_of(messages):
    """What the statistics call a request: a checksum of its messages, given as a list or JSON."""
    messages = json.loads(messages) if isinstance(messages, str) else messages
    return hashlib.sha256(json.dumps(messages, separators=(",", ":")).encode()).hexdigest()


def fill(messages, number):
    """Fills the slots that a prompt describes, each with one of the words offered for it."""
    del number
    try:
        task = json.loads(messages[min(1, len(messages) - 1)]["content"])
        words = {
            slot["slot"]: (slot["words"] or [slot["original"]])[
                zlib.crc32(f"{task['query']} {slot['slot']} {len(messages)}".encode())
                % max(len(slot["words"]), 1)
            ]
            for slot in task["slots"]
        }
        levels = [[words[slot] for slot in level["slots"]] for level in task["levels"]]
    except (ValueError, KeyError, TypeError, IndexError):
        return "{}"
    return json.dumps({"levels": levels})


class ChatServer:
    """Answers on an event loop; `serving` runs one in a thread."""

    def __init__(self, settings, answer=fill, clock=time.monotonic):
        self.answer = answer
        self.clock = clock  # of the limits
        self.defaults = settings
        self.reset()

    def reset(self):
        self.settings = dataclasses.replace(self.defaults)
        self.random = random.Random(self.settings.seed)
        self.queue = collections.deque(self.settings.next)
        self.counts = collections.Counter()
        self.received, self.billed = collections.Counter(), collections.Counter()
        self.answered = collections.Counter()
        self.fault_counts = collections.Counter()
        self.in_flight = self.max_in_flight = 0
        self.times = []  # of the first request that was not refused, and of the last answer
        self.prompts = collections.deque(maxlen=self.settings.kept_prompts)
        self.headers = {}
        self.window = collections.deque()  # (time, tokens) of what the limits let through
        self.window_tokens = 0
        self.files, self.batches = {}, {}
        self.numbers = itertools.count()

    def set(self, **changes):
        self.settings = dataclasses.replace(self.settings, **changes)
        if "next" in changes:
            self.queue = collections.deque(changes["next"])
        if "seed" in changes:
            self.random = random.Random(self.settings.seed)

    def stats(self):
        return {
            **{
                name: self.counts[name]
                for name in ("received", "answered", "billed", "limited", "tokens")
            },
            "seconds": self.times[1] - self.times[0] if self.times else 0.0,
            **{name: self.counts[name] for name in ("files", "batches", "listings")},
            "max_in_flight": self.max_in_flight,
            "faults": dict(self.fault_counts),
            "received_by_key": dict(self.received),
            "answered_by_key": dict(self.answered),
            "billed_by_key": dict(self.billed),
            "headers": self.headers,
        }

    async def handle(self, request):
        path, settings = request.path, self.settings
        if path == "/stats":
            return web.json_response(self.stats())
        if path == "/prompts":
            return web.json_response(list(self.prompts))
        if path == "/faults":
            self.set(**await request.json())
            return web.json_response({})
        if path == "/reset":
            self.reset()
            return web.json_response({})
        self.headers = dict(request.headers)
        if settings.key and request.headers.get("Authorization") != f"Bearer {settings.key}":
            await request.read()
            return self.error(request, *STATUS_FAULTS["401"])
        if settings.down:
            await request.read()
            return self.error(request, *STATUS_FAULTS["503"])
        if path == "/v1/chat/completions" and request.method == "POST":
            self.in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.in_flight)
            try:
                return await self.chat(request)
            finally:
                self.in_flight -= 1
        if path.startswith(("/v1/files", "/v1/batches")):
            return await self.batch(request)
        return self.error(request, 404, None, "no such path")

    # -- chat completions --------------------------------------------------------------------

    async def chat(self, request):
        settings = self.settings
        body = json.loads(await request.read())
        key = key_of(body["messages"])
        self.counts["received"] += 1
        self.received[key] += 1
        self.prompts.append(body["messages"])
        refused = self.refused(request, body)
        if refused:
            return refused
        fault = self.queue.popleft() if self.queue else self.draw()
        if fault:
            assert fault in FAULTS, fault
            self.fault_counts[fault] += 1
        if fault in STATUS_FAULTS:
            return self.error(request, *STATUS_FAULTS[fault], headers=self.waits(fault))
        if fault == "redirect":
            host = f"http://localhost:{request.url.port}/elsewhere"
            return web.Response(status=307, headers={"Location": host})
        if fault in ("hang", "disconnect"):
            while fault == "hang" and request.transport and not request.transport.is_closing():
                await asyncio.sleep(0.02)
            return cut(request)
        if fault == "garbage":
            request.transport.write(b"nonsense\r\n\r\n")
            request.transport.close()
            return web.Response()
        completion = self.completion(body, fault)
        headers = self.limited(completion["usage"]["total_tokens"])
        if "retry-after" in headers:
            self.counts["limited"] += 1
            return self.error(request, *STATUS_FAULTS["429"], headers=headers)
        self.bill(key)
        self.counts["tokens"] += completion["usage"]["total_tokens"]
        self.times = self.times or [time.monotonic()] * 2
        if settings.latency:
            await asyncio.sleep(settings.latency)
        self.times[1] = time.monotonic()
        if not settings.usage:
            del completion["usage"]
        data = json.dumps(completion).encode()
        if fault == "bad_envelope":
            data = data[: len(data) // 2]
        if fault and fault.startswith("reset"):
            return await reset_in(request, data, fault)
        if fault not in LOST:
            self.counts["answered"] += 1
            self.answered[key] += 1
        return web.Response(body=data, content_type="application/json", headers=headers)

    def bill(self, key):
        self.counts["billed"] += 1
        self.billed[key] += 1

    def draw(self):
        if not self.settings.faults:
            return None
        value = self.random.random()
        for fault, share in self.settings.faults.items():
            value -= share
            if value < 0:
                return fault
        return None

    def refused(self, request, body):
        form = (body.get("response_format") or {}).get("type")
        present = {*body, form}
        settings = self.settings
        for field in settings.refused_fields:
            if field in present:
                message = f"Unsupported parameter: '{field}' is not supported with this model."
                return self.error(request, settings.refused_status, "unsupported", message)
        if present & {*settings.refused_silently}:
            return self.error(request, settings.refused_status, None, "bad request")
        return None

    def waits(self, fault):
        seconds = self.settings.retry_after
        if fault == "429_seconds":
            return {"Retry-After": f"{seconds:g}"}
        if fault == "429_date":
            when = email.utils.formatdate(time.time() + seconds, usegmt=True)
            return {"Retry-After": when}
        if fault == "429_reset":
            return {
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": f"{seconds * 1000:g}ms",
            }
        return {}

    def limited(self, tokens):
        """Headers of the limits; with retry-after, the request is over them."""
        settings = self.settings
        if settings.requests_per_minute is None and settings.tokens_per_minute is None:
            return {}
        now, span = self.clock(), settings.window_seconds
        while self.window and self.window[0][0] <= now - span:
            self.window_tokens -= self.window.popleft()[1]
        wait = reset = self.window[0][0] + span - now if self.window else 0.0
        over = False
        headers = {}
        for name, per_minute, used, cost in (
            ("requests", settings.requests_per_minute, len(self.window), 1),
            ("tokens", settings.tokens_per_minute, self.window_tokens, tokens),
        ):
            if per_minute is not None:
                limit = per_minute * span / 60
                over |= used + cost > limit and used > 0
                headers[f"x-ratelimit-limit-{name}"] = f"{limit:g}"
                headers[f"x-ratelimit-remaining-{name}"] = f"{max(limit - used - cost, 0):.0f}"
                headers[f"x-ratelimit-reset-{name}"] = f"{reset * 1000:.0f}ms"
        if over:
            milliseconds = {"retry-after-ms": f"{wait * 1000:.0f}"}
            return headers | milliseconds | {"retry-after": f"{int(wait) + 1}"}
        self.window.append((now, tokens))
        self.window_tokens += tokens
        return headers

    def completion(self, body, fault=None):
        number = next(self.numbers)
        content, reason, refusal = self.answer(body["messages"], number), "stop", None
        if fault == "truncated":
            content, reason = content[: len(content) // 2], "length"
        elif fault == "fenced":
            content = f"```json\n{content}\n```"
        elif fault == "refusal":
            content, refusal = None, "I cannot help with that."
        elif fault == "filtered_answer":
            content, reason = None, "content_filter"
        elif fault == "null_content":
            content = None
        elif fault == "wrong_count":
            content = content.replace('"]', '", "surplus"]', 1)
        prompt = sum(len(message["content"]) for message in body["messages"]) // 4
        tokens = len(content or "") // 4 + 1
        message = {"role": "assistant", "content": content, "refusal": refusal}
        completion = {
            "id": f"chatcmpl-{number}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": f"{body['model']}-2026",
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        }
        if fault == "no_choices":
            completion["choices"] = []
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
        }
        return completion | {"usage": usage}

    def error(self, request, status, code, message, headers=None):
        if self.settings.echo_key:
            message += f": {request.headers.get('Authorization')}"
        detail = {"message": message, "type": "error", "param": None, "code": code}
        return web.json_response({"error": detail}, status=status, headers=headers)

    # -- batches -----------------------------------------------------------------------------

    async def batch(self, request):
        parts = request.path.split("/")[2:]
        pause = self.settings.file_pause if request.method == "POST" else 0
        match request.method, parts:
            case "POST", ["files"]:
                response = await self.upload(request)
            case "GET", ["files", name, "content"] if name in self.files:
                response = web.Response(body=self.files[name])
            case "POST", ["batches"]:
                response = self.create(request, await request.json())
            case "GET", ["batches"]:
                response = self.listing(request)
            case "GET", ["batches", name] if name in self.batches:
                response = web.json_response(self.state(name))
            case "POST", ["batches", name, "cancel"] if name in self.batches:
                self.batches[name]["outcome"] = "cancelled"
                response = web.json_response(self.state(name))
            case _:
                response = self.error(request, 404, None, "no such thing")
        if pause:
            await asyncio.sleep(pause)
        if (request.method, parts) == ("POST", ["batches"]) and self.settings.batch_lost:
            self.set(batch_lost=self.settings.batch_lost - 1)
            return cut(request)
        return response

    async def upload(self, request):
        fields = {}
        async for part in await request.multipart():
            content = bytearray()  # piece by piece, because whole parts may have one megabyte
            while piece := await part.read_chunk(1 << 20):
                content += piece
            fields[part.name] = bytes(content)
        if len(fields["file"]) > self.settings.batch_bytes:
            return self.error(request, 413, None, "file too large")
        assert fields["purpose"] == b"batch", fields["purpose"]
        self.counts["files"] += 1
        return web.json_response(self.store(fields["file"]) | {"purpose": "batch"})

    def store(self, data):
        name = f"file-{len(self.files)}"
        self.files[name] = data
        return {"id": name, "object": "file", "bytes": len(data), "created_at": 0, "filename": name}

    def create(self, request, order):
        if order["input_file_id"] not in self.files:
            return self.error(request, 404, None, "no such file")
        assert order["endpoint"] == "/v1/chat/completions", order
        assert order["completion_window"] == "24h", order
        self.counts["batches"] += 1
        name = f"batch_{len(self.batches)}"
        lines = [json.loads(line) for line in self.files[order["input_file_id"]].splitlines()]
        batch = self.batches[name] = {
            "created": time.monotonic(),
            "seconds": self.settings.batch_seconds,
            "outcome": self.settings.batch_outcome,
            "order": order,
            "total": len(lines),
            "problem": None,
        }
        ids = [line["custom_id"] for line in lines]
        if len(lines) > self.settings.batch_requests:
            batch |= {"outcome": "failed", "problem": "more requests than allowed"}
        elif len(set(ids)) < len(ids):
            batch |= {"outcome": "failed", "problem": "duplicate custom_id"}
        elif batch["outcome"] == "failed":
            batch["problem"] = "out of order"
        if batch["outcome"] != "failed":
            self.work(batch, lines)
        return web.json_response(self.state(name))

    def work(self, batch, lines):
        settings, outcome = self.settings, batch["outcome"]
        answered = len(lines) // 2 if outcome in ("expired", "cancelled") else len(lines)
        answered -= settings.batch_errors
        outputs, errors = [], []
        for place, line in enumerate(lines):
            result = {"id": f"batch_req_{place}", "custom_id": line["custom_id"], "error": None}
            if place < answered:
                body = line["body"]
                self.bill(key_of(body["messages"]))
                self.prompts.append(body["messages"])
                fault = self.queue.popleft() if self.queue else self.draw()
                result["response"] = {"status_code": 200, "body": self.completion(body, fault)}
                if fault in STATUS_FAULTS:
                    status, code, message = STATUS_FAULTS[fault]
                    error = {"error": {"message": message, "code": code}}
                    result["response"] = {"status_code": status, "body": error}
                outputs.append(result)
            else:
                code = f"batch_{outcome}" if outcome != "completed" else "server_error"
                result |= {"response": None, "error": {"code": code, "message": "not done"}}
                errors.append(result)
        outputs = outputs[settings.batch_missing :]
        outputs += outputs[: settings.batch_duplicates]
        outputs += [
            dict(outputs[0], custom_id=f"unknown-{n}") for n in range(settings.batch_unknown)
        ]
        self.random.shuffle(outputs)
        for kind, results in (("output", outputs), ("error", errors)):
            if results:
                text = "".join(json.dumps(result) + "\n" for result in results)
                batch[kind] = self.store(text.encode())["id"]

    def state(self, name):
        batch = self.batches[name]
        age = time.monotonic() - batch["created"]
        done = age >= batch["seconds"]
        status = batch["outcome"] if done else "in_progress"
        if age < batch["seconds"] / 4:
            status = "validating"
        total = batch["total"]
        problem = {"code": "invalid", "message": batch["problem"], "line": 1, "param": None}
        return {
            "id": name,
            "object": "batch",
            "created_at": 0,
            **batch["order"],
            "status": status,
            "output_file_id": batch.get("output") if done else None,
            "error_file_id": batch.get("error") if done else None,
            "errors": {"object": "list", "data": [problem]} if batch["problem"] and done else None,
            "request_counts": {"total": total, "completed": total if done else 0, "failed": 0},
        }

    def listing(self, request):
        self.counts["listings"] += 1
        limit = int(request.query.get("limit", 20))
        names = list(reversed(self.batches))
        start = names.index(request.query["after"]) + 1 if "after" in request.query else 0
        page = [self.state(name) for name in names[start : start + limit]]
        more = start + limit < len(names)
        return web.json_response({"object": "list", "data": page, "has_more": more})


def cut(request):
    """Closes the connection at once, with a reset."""
    if request.transport:
        linger = struct.pack("ii", 1, 0)
        raw = request.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        request.transport.abort()
    return web.Response()


async def reset_in(request, data, fault):
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    response.content_length = len(data)
    await response.prepare(request)
    sent = {"reset_headers": 0, "reset_body": len(data) // 2, "reset_end": len(data)}[fault]
    if sent:
        await response.write(data[:sent])
    await asyncio.sleep(0.01)  # so that what was sent has left
    cut(request)
    return response


async def run(server, ready, stop):
    """Serves on a free port of loopback until `stop` is set."""
    low = web.Server(server.handle)
    listener = await asyncio.get_running_loop().create_server(low, "127.0.0.1", 0, backlog=1024)
    ready(listener.sockets[0].getsockname()[1])
    await stop.wait()
    listener.close()
    await low.shutdown(0)


class Running:
    """A server that runs, as its clients and its tests see it."""

    def __init__(self, port):
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.base_url = f"{self.url}/v1"

    def _ask(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            response = connection.getresponse()
            data = response.read()
        assert response.status == 200, data
        return json.loads(data)

    def set(self, **changes):
        self._ask("POST", "/faults", json.dumps(changes))

    def reset(self):
        """Forgets statistics, files and batches; the settings are those of the start again."""
        self._ask("POST", "/reset")

    def stats(self):
        return self._ask("GET", "/stats")

    def prompts(self):
        """The messages of every request, in order of arrival; the last `kept_prompts` of them."""
        return self._ask("GET", "/prompts")


@contextlib.contextmanager
def serving(answer=fill, **settings):
    """A server in a thread of this process; `answer(messages, number)` gives the contents."""
    server = ChatServer(Settings(**settings), answer)
    started, ports, stops = threading.Event(), [], []

    async def serve():
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        stops.append(lambda: loop.call_soon_threadsafe(stop.set))
        await run(server, ready, stop)

    def ready(port):
        ports.append(port)
        started.set()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    try:
        assert started.wait(30)
        yield Running(ports[0])
    finally:
        stops[0]()
        thread.join()


@contextlib.contextmanager
def serving_process(seconds=300, **settings):
    """A server in a process of its own."""
    arguments = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    command = [sys.executable, __file__, f"seconds={seconds}", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield Running(int(process.stdout.readline().rsplit(":", 1)[1]))
    finally:
        process.kill()
        process.communicate()


def main():
    pairs = (argument.split("=", 1) for argument in sys.argv[1:])
    settings = {name: json.loads(value) for name, value in pairs}
    seconds = settings.pop("seconds", 300)
    parent, end = os.getppid(), time.monotonic() + seconds

    def announce(port):
        sys.stdout.write(f"http://127.0.0.1:{port}\n")
        sys.stdout.flush()

    async def serve():
        stop = asyncio.Event()

        async def watch():
            while time.monotonic() < end and os.getppid() == parent:
                await asyncio.sleep(0.5)
            stop.set()

        watching = asyncio.create_task(watch())
        server = ChatServer(Settings(**settings))
        await run(server, announce, stop)
        await watching

    asyncio.run(serve())


if __name__ == "__main__":
    main()
