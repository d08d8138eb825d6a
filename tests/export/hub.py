"""A hub on loopback: what `huggingface_hub` asks of one when it makes a repository and uploads a folder."""

from __future__ import annotations

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """repositories: name -> {path: bytes}; private: name -> bool. refuse: a status with which every call is answered."""

    def __init__(self, token: str):
        self.token, self.refuse = token, 0
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.address = ""


@contextmanager
def serving(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *words):
            pass

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def answer(self, value, status: int = 200) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            self.answer({"error": "not here"}, 404)

        def do_PUT(self):
            hub.objects[self.path.rsplit("/", 1)[-1]] = self.body()
            self.answer({})

        def do_POST(self):
            body = self.body()
            if hub.refuse or self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.answer({"error": "no right to write here"}, hub.refuse or 401)
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                hub.repositories.setdefault(name, {})
                hub.private[name] = asked.get("visibility") == "private" or asked.get("private") is True
                return self.answer({"url": f"{hub.address}/{name}", "name": name})
            if self.path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if "/preupload/" in self.path:
                modes = [(f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular") for f in json.loads(body)["files"]]
                return self.answer({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]})
            if self.path.endswith("/info/lfs/objects/batch"):
                found = json.loads(body)["objects"]
                upload = [{**o, "actions": {"upload": {"href": f"{hub.address}/lfs/{o['oid']}"}}} for o in found]
                return self.answer({"transfer": "basic", "objects": upload})
            if "/commit/" in self.path:
                name = self.path.removeprefix("/api/models/").split("/commit/")[0]
                for line in map(json.loads, body.decode().splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        hub.repositories[name][value["path"]] = hub.objects[value["oid"]]
                return self.answer({"commitUrl": f"{hub.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40, "pullRequestUrl": None})
            return self.answer({"error": self.path}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
