"""A server with one repository of the Hugging Face hub, as its client asks for it."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40


class Handler(BaseHTTPRequestHandler):
    repository: str
    files: dict[str, bytes]
    fetched: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{self.repository}/revision/"):
            revision = path.rpartition("/")[2]
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": self.repository, "sha": COMMIT, "siblings": siblings, "tags": []}
            self.answer(json.dumps(info).encode() if revision in ("main", COMMIT) else None)
        elif path.startswith(f"/api/models/{self.repository}/tree/"):
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                for name, content in self.files.items()
            ]
            self.answer(json.dumps(entries).encode())
        elif path.startswith(f"/{self.repository}/resolve/"):
            name = path.split("/", 5)[5]
            self.answer(self.files.get(name))
            if self.command == "GET":
                self.fetched.append(name)
        else:
            self.answer(None)

    def answer(self, content: bytes | None) -> None:
        self.send_response(404 if content is None else 200)
        body = content or b""
        if content is None:
            kind = "RevisionNotFound" if self.repository in self.path else "RepoNotFound"
            self.send_header("X-Error-Code", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Keeps the output of tests quiet."""


@contextmanager
def serve_repository(repository: str, folder: Path, monkeypatch) -> Iterator[list[str]]:
    """Serves a folder as a repository to huggingface_hub; gives the names of what it fetches."""
    from huggingface_hub import constants

    fetched: list[str] = []
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    members = {"repository": repository, "files": files, "fetched": fetched}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), members))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    try:
        yield fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
