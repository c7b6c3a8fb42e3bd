"""A hub for tests: what huggingface_hub asks for when it makes a repository, commits to it and downloads from it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

from . import ROOT


class FakeHub:
    """``branches[repo][branch]`` is a list of commits, each a dict from path to content.

    To who doesn't send the token that ``private[repo]`` names, there is no such repository.
    """

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, list[dict[str, bytes]]]] = {}
        self.private: dict[str, str] = {}
        self.requests: list[str] = []

    def sha(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for branch, commits in self.branches.get(repo, {}).items():
            for number, files in enumerate(commits):
                sha = hashlib.sha1(f"{repo} {branch} {number}".encode()).hexdigest()
                if revision == sha or (revision == branch and number == len(commits) - 1):
                    return sha, files
        return None


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def reply(self, body: object, status: int = 200, **headers: str) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            headers.setdefault("Content_Type", "application/json")
            headers["Content_Length"] = str(len(content))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def missing(self, what: str = "Repo") -> None:
            self.reply({"error": "not found"}, 404, X_Error_Code=f"{what}NotFound")

        def may_see(self, repo: str) -> bool:
            token = hub.private.get(repo)
            return token is None or self.headers.get("Authorization") == f"Bearer {token}"

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = unquote(urlparse(self.path).path)
            hub.requests.append(f"POST {path}")
            if path == "/api/repos/create":
                asked = json.loads(content)
                repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                hub.branches.setdefault(repo, {"main": [{}]})
                self.reply({"url": f"http://{self.headers['Host']}/{repo}", "name": repo})
            elif path == "/api/validate-yaml":
                self.reply({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(content)["files"]]
                self.reply({"files": [{**file, "shouldIgnore": False} for file in files]})
            elif "/branch/" in path:
                repo, branch = path.removeprefix("/api/models/").split("/branch/")
                hub.branches[repo].setdefault(branch, [dict(hub.branches[repo]["main"][-1])])
                self.reply({})
            elif "/commit/" in path:
                repo, branch = path.removeprefix("/api/models/").split("/commit/")
                files = dict(hub.branches[repo][branch][-1])
                for line in map(json.loads, content.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "deletedFile":
                        files.pop(line["value"]["path"])
                hub.branches[repo][branch].append(files)
                sha = hub.sha(repo, branch)[0]
                self.reply({"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{sha}", "commitOid": sha})
            else:
                self.missing()

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if path.startswith("/api/models/"):
                repo, _, revision = (
                    path.removeprefix("/api/models/").replace("/tree/", "/revision/").partition("/revision/")
                )
                found = hub.sha(repo, revision or "main")
                if found is None or not self.may_see(repo):
                    self.missing()
                    return
                if "/tree/" in path:
                    files = found[1].items()
                    self.reply([{"type": "file", "path": name, "size": len(x), "oid": "0"} for name, x in files])
                    return
                siblings = [{"rfilename": name} for name in found[1]]
                self.reply({"id": repo, "modelId": repo, "sha": found[0], "siblings": siblings, "tags": []})
                return
            repo, _, rest = path.strip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            found = hub.sha(repo, revision)
            if found is None or not self.may_see(repo) or name not in found[1]:
                self.missing("Entry" if found is not None and self.may_see(repo) else "Repo")
                return
            content = found[1][name]
            etag = hashlib.sha1(content).hexdigest()
            self.reply(content, ETag=f'"{etag}"', X_Repo_Commit=found[0], Content_Type="application/octet-stream")

        do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    return Handler


@contextmanager
def running() -> Iterator[tuple[FakeHub, str]]:
    """The hub and its address."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def for_scripts(home: Path) -> Iterator[tuple[Callable[..., str], FakeHub]]:
    """A function that runs a script with a hub of its own and returns what it prints, and the hub. ``home`` is where
    what was downloaded is kept; further arguments are environment variables."""
    with running() as (hub, address):
        environment = {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_of_a_test",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(ROOT),
        }
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            environment.pop(name, None)

        def run(code: str, **more: str) -> str:
            command = [sys.executable, "-c", code]
            done = subprocess.run(
                command, env={**environment, **more}, capture_output=True, text=True, check=False, timeout=300
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        yield run, hub
