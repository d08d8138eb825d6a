"""A server on loopback with vLLM's routes over a tiny model: /v1/completions, and those that load and unload adapters."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from peft import PeftModel

from tests.families import tiny_model
from tests.generate.helpers import NumberTokenizer, plain_logits
from tunesmith.generate import LocalGenerator, Sampling

FIELDS = {
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "stop_token_ids", "return_token_ids", "seed", "logprobs", "echo",
}  # fmt: skip


class StubServer:
    """What the handler answers with. adapters: name -> folder. processed: log-probabilities after the temperature, as vLLM has on request.

    runtime_adapters: whether the two routes are there. failures: (status, headers, body) given first, one a request. requests: (route,
    headers, body) of all that came. sane: false gives answers that hold nothing.
    """

    def __init__(self, *, processed=False, runtime_adapters=True, failures=(), sane=True):
        self.processed, self.runtime_adapters, self.sane = processed, runtime_adapters, sane
        self.failures, self.requests, self.adapters = list(failures), [], {}
        self.url, self._lock = "", threading.Lock()

    def answer(self, route, headers, body):
        """(status, headers, object or text)."""
        with self._lock:
            self.requests.append((route, headers, body))
            if self.failures:
                return self.failures.pop(0)
            if route == "/v1/completions":
                return self._complete(body) if self.sane else (200, {}, {"choices": [{"text": "hello"}]})
            if route in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") and self.runtime_adapters:
                return self._load(body) if route == "/v1/load_lora_adapter" else self._unload(body)
            return 404, {}, {"detail": "Not Found"}

    def _load(self, body):
        name = body["lora_name"]
        if name in self.adapters:
            return error(400, f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set ...")
        try:
            PeftModel.from_pretrained(tiny_model("llama"), body["lora_path"])
        except ValueError:
            return error(404, f"Loading lora {name} failed: No adapter found for {body['lora_path']}")
        self.adapters[name] = body["lora_path"]
        return 200, {}, f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, body):
        if self.adapters.pop(body["lora_name"], None) is None:
            return error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        return 200, {}, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def _complete(self, body):
        assert set(body) <= FIELDS, set(body) - FIELDS
        if body["temperature"] > 2:  # as vLLM 0.32 words it
            return error(400, f"temperature must be in [0, 2], got {body['temperature']}.")
        if body["model"] != "base" and body["model"] not in self.adapters:
            return error(404, f"The model `{body['model']}` does not exist.")
        model = tiny_model("llama")
        if body["model"] != "base":
            model = PeftModel.from_pretrained(model, self.adapters[body["model"]]).eval()
        choice = echoed(model, body["prompt"]) if body.get("echo") else self._continued(model, body)
        return 200, {}, {"choices": [{"index": 0, "text": "", **choice}]}

    def _continued(self, model, body):
        sampling = Sampling(body["temperature"], body["top_p"], body["top_k"])
        ours = LocalGenerator(model, NumberTokenizer(), stop_ids=body["stop_token_ids"])
        (said,) = ours.generate([body["prompt"]], max_new_tokens=body["max_tokens"], sampling=sampling, seeds=[body.get("seed", 0)])
        choice = {"token_ids": said.token_ids, "finish_reason": said.finish_reason}
        if "logprobs" in body:
            temperature = (body["temperature"] or 1.0) if self.processed else 1.0
            logits = plain_logits(model, body["prompt"] + said.token_ids)[len(body["prompt"]) - 1 : -1] / temperature
            logs = logits.log_softmax(-1)
            chosen = logs[range(len(said.token_ids)), said.token_ids].tolist()
            choice["logprobs"] = {"token_logprobs": chosen, "top_logprobs": [likeliest(row, body["logprobs"]) for row in logs]}
        return choice


def likeliest(logprobs_V, count):
    """The likeliest tokens with their log-probabilities."""
    best = logprobs_V.topk(count)
    return {str(token): value for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)}


def echoed(model, ids):
    """The answer to a request that echoes its prompt."""
    logs = plain_logits(model, ids).log_softmax(-1)
    return {
        "token_ids": [],
        "finish_reason": "length",
        "logprobs": {"token_logprobs": [None, *logs[torch.arange(len(ids) - 1), ids[1:]].tolist()]},
    }


def error(status, message):
    """An error as vLLM words it."""
    return status, {}, {"error": {"message": message, "type": "NotFoundError", "code": status}}


@contextmanager
def serving(stub):
    """Serves the stub on a free port of loopback for the while."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, headers, content = stub.answer(self.path, dict(self.headers), body)
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
