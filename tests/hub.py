"""The hub's protocol on this machine: repositories of bytes, their commits, and files by sha256, as its client asks."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator

import pytest
from huggingface_hub import constants


class Hub(http.server.ThreadingHTTPServer):
    """files: repository -> path -> content; commits: repository -> that of its main branch; gated: repositories that
    ask for a token; damaged: paths of which other bytes are sent; asked: what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, str] = {}
        self.gated, self.damaged, self.asked = set[str](), set[str](), list[str]()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, repository: str, path: str, content: bytes, commit: str = "5" * 40) -> None:
        """Upload a file: the main branch is at this commit then."""
        self.files.setdefault(repository, {})[path] = content
        self.commits[repository] = commit

    def sent(self, path: str) -> int:
        """How often the content of a file was asked for."""
        return sum(one.startswith("GET") and one.endswith(path) for one in self.asked)


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        of_file = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path)
        of_api = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+?)(/revision/main|/tree/\w+|)", path)
        of = of_file or of_api
        files = self.server.files.get(of[1], {}) if of else {}
        headers, found, status = {}, None, 404
        if of and of[1] in self.server.gated:
            headers, status = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}, 403
        elif not files:
            headers = {"X-Error-Code": "RepoNotFound"}
        elif of_file and of_file[2] not in ("main", self.server.commits[of_file[1]]):
            headers = {"X-Error-Code": "RevisionNotFound"}
        elif of_file and of_file[3] not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.server.commits[of_file[1]]}
        elif of_file:
            found, status = files[of_file[3]], 200
            headers = {"X-Repo-Commit": self.server.commits[of_file[1]], "X-Linked-Size": str(len(found))}
            headers["ETag"] = f'"{hashlib.sha256(found).hexdigest()}"'
            if of_file[3] in self.server.damaged:
                found = bytes(len(found))
        elif of_api:
            listed = [{"type": "file", "path": p, "size": len(files[p]), "oid": p} for p in files]
            about = {"id": of_api[1], "sha": self.server.commits[of_api[1]]}
            about["siblings"] = [{"rfilename": p} for p in files]
            found, status = json.dumps(listed if "tree" in of_api[2] else about).encode(), 200
            headers = {"Content-Type": "application/json"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(found or b""))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(found or b"")

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: str) -> Iterator[Hub]:
    """Such a hub, which the client asks from now on, with a cache of its own."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
        monkeypatch.setattr(constants, "ENDPOINT", server.address)  # both follow from HF_ENDPOINT at the import
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        try:
            yield server
        finally:
            server.shutdown()
