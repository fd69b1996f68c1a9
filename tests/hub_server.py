# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Local server with the part of the Hub's HTTP interface that its real clients use: repositories with branches, tags and
commits in memory. Any request can be made to fail.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN, USER = "hf_test", "tester"
LOST = -1  # as a status: perform the request, but close the connection without an answer
DATE = "2026-01-01T00:00:00.000Z"


class HubError(Exception):
    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


def blob_id(content: bytes) -> str:
    """Return the Git object id of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repo:
    """Repository: each commit is a whole tree, {path: content}; branches and tags refer to commits."""

    def __init__(self, private: bool = False):
        self.commits, self.branches, self.tags, self.private = {}, {}, {}, private
        self.commit("main", {})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        parent = self.branches.get(branch, "")
        content = "".join(f"{path} {blob_id(files[path])}\n" for path in sorted(files))
        sha = hashlib.sha1(f"{parent} {len(self.commits)}\n{content}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision, self.tags.get(revision, revision))
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


class Hub(ThreadingHTTPServer):
    """
    Attributes:
        repos: {"models/user/name": Repo}; datasets and spaces alike.
        fail: function of (method, path) that returns the status of a failing request, `LOST`, or `None`.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.fail: Callable[[str, str], int | None] = lambda method, path: None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, place: str, folder: Path) -> str:
        """Make a repository from a folder, without a client, and return its commit."""
        repo = self.repos.setdefault(place, Repo())
        found = [path for path in folder.rglob("*") if path.is_file()]
        return repo.commit("main", {path.relative_to(folder).as_posix(): path.read_bytes() for path in found})

    def environment(self, home, token: str = TOKEN) -> dict[str, str]:
        """Return the environment in which a process uses this server as the Hub; libraries read it at import."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()  # poll interval for shutdown
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits 40 ms for the acknowledgement of the headers
    server: Hub

    def log_message(self, *_):
        pass

    def handle_request(self):
        split = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.lost = False
        try:
            status = self.server.fail(self.command, unquote(split.path))
            self.lost = status == LOST
            if status is not None and not self.lost:
                raise HubError(status, "", "The server was told to fail.")
            if self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
                raise HubError(401, "", "Invalid credentials in Authorization header")
            parts = [unquote(part) for part in split.path.strip("/").split("/")]
            with self.server.lock:
                self.route(parts, parse_qs(split.query), body)
        except HubError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self.answer({"error": str(error)}, error.status, headers)

    do_GET = do_HEAD = do_POST = handle_request

    def answer(self, content, status: int = 200, headers: dict | None = None):
        if self.lost:
            self.close_connection = True
            return
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json"} | (headers or {})
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def route(self, parts: list[str], query: dict, body: bytes):
        match parts:
            case ["api", "whoami-v2"]:
                self.answer({"name": USER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
            case ["api", "validate-yaml"]:
                self.validate(json.loads(body)["content"])
            case ["api", "repos", "create"]:
                self.create(json.loads(body))
            case ["api", kind, user, name, *rest]:
                self.api(kind, f"{user}/{name}", rest, query, body)
            case [("datasets" | "spaces") as kind, user, name, "resolve", revision, *path]:
                self.resolve(kind, f"{user}/{name}", revision, "/".join(path))
            case [user, name, "resolve", revision, *path]:
                self.resolve("models", f"{user}/{name}", revision, "/".join(path))
            case _:
                raise HubError(404, "", f"No such place: {self.path}")

    def repo(self, kind: str, name: str) -> Repo:
        if f"{kind}/{name}" not in self.server.repos:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return self.server.repos[f"{kind}/{name}"]

    def validate(self, card: str):
        """Check that the YAML block of a card is a mapping with a license as text."""
        block = card.split("---\n")[1] if card.startswith("---\n") else "{}"
        data = yaml.safe_load(block) or {}
        if not isinstance(data, dict) or not isinstance(data.get("license", ""), str):
            self.answer({"errors": [{"message": "license must be a string"}], "warnings": []}, 400)
        else:
            self.answer({"errors": [], "warnings": []})

    def create(self, payload: dict):
        if self.headers.get("Authorization") is None:
            raise HubError(401, "", "Invalid credentials in Authorization header")
        kind = f"{payload.get('type') or 'model'}s"
        name = f"{payload.get('organization') or USER}/{payload['name']}"
        if f"{kind}/{name}" in self.server.repos:
            return self.answer({"error": "You already created this repo", "url": self.page(kind, name)}, 409)
        self.server.repos[f"{kind}/{name}"] = Repo(payload.get("visibility") == "private")
        self.answer({"name": name, "id": name, "url": self.page(kind, name)})

    def page(self, kind: str, name: str) -> str:
        return f"{self.server.url}/{name if kind == 'models' else f'{kind}/{name}'}"

    def api(self, kind: str, name: str, rest: list[str], query: dict, body: bytes):
        repo = self.repo(kind, name)
        if self.command == "POST" and rest[0] != "paths-info" and self.headers.get("Authorization") is None:
            raise HubError(401, "", "Invalid credentials in Authorization header")
        match rest:
            case [] | ["revision", _]:
                sha = repo.resolve(rest[1] if rest else "main")
                siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
                facts = {"id": name, "sha": sha, "siblings": siblings, "private": repo.private, "tags": []}
                self.answer(facts | {"downloads": 0, "likes": 0, "lastModified": DATE, "createdAt": DATE})
            case ["refs"]:
                refs = {"heads": repo.branches, "tags": repo.tags}
                heads, tags = (
                    [{"name": ref, "ref": f"refs/{of}/{ref}", "targetCommit": sha} for ref, sha in named.items()]
                    for of, named in refs.items()
                )
                self.answer({"branches": heads, "tags": tags, "converts": []})
            case ["tree", revision, *path]:
                self.tree(repo.commits[repo.resolve(revision)], "/".join(path), query.get("recursive") == ["true"])
            case ["paths-info", revision]:
                wanted = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
                files = repo.commits[repo.resolve(revision)]
                self.answer([entry for path in wanted for entry in self.entries(files, path) if entry["path"] == path])
            case ["preupload", revision]:
                files = repo.commits[repo.resolve(revision)]
                self.answer({"files": [self.upload(files, one["path"]) for one in json.loads(body)["files"]]})
            case ["commit", branch]:
                sha = self.commit(repo, branch, body)
                self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.page(kind, name)}/commit/{sha}"})
            case ["branch", branch]:
                if branch in repo.branches:
                    raise HubError(409, "", f"Reference already exists: {branch}")
                repo.branches[branch] = repo.resolve((json.loads(body or b"{}")).get("startingPoint", "main"))
                self.answer({})
            case ["tag", revision]:
                tag = json.loads(body)["tag"]
                if tag in repo.tags:
                    raise HubError(409, "", f"Tag already exists: {tag}")
                repo.tags[tag] = repo.resolve(revision)
                self.answer({})
            case _:
                raise HubError(404, "", f"No such place: {self.path}")

    @staticmethod
    def upload(files: dict[str, bytes], path: str) -> dict:
        oid = blob_id(files[path]) if path in files else None
        return {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": oid}

    @staticmethod
    def entries(files: dict[str, bytes], under: str) -> list[dict]:
        """Return files and folders at or below a path."""
        below = [path for path in sorted(files) if not under or path == under or path.startswith(f"{under}/")]
        folders = {path.rsplit("/", depth)[0] for path in below for depth in range(1, path.count("/") + 1)}
        commit = {"lastCommit": {"id": "0" * 40, "title": "", "date": DATE}}
        described = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path, **commit} for path in folders]
        for path in below:
            facts = {"type": "file", "oid": blob_id(files[path]), "size": len(files[path]), "path": path}
            described.append(facts | commit)
        return sorted(described, key=lambda entry: entry["path"])

    def tree(self, files: dict[str, bytes], under: str, recursive: bool):
        entries = [entry for entry in self.entries(files, under) if entry["path"] != under]
        if under and not entries:
            raise HubError(404, "EntryNotFound", f"{under} does not exist")
        depth = under.count("/") + (1 if under else 0)
        self.answer([entry for entry in entries if recursive or entry["path"].count("/") == depth])

    @staticmethod
    def commit(repo: Repo, branch: str, body: bytes) -> str:
        if branch not in repo.branches:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        lines = [json.loads(line) for line in body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != repo.branches[branch]:
            raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[repo.branches[branch]])
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "file":
                files[path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[path]
            else:
                raise HubError(400, "", f"Unknown operation {line['key']}")
        return repo.commit(branch, files)

    def resolve(self, kind: str, name: str, revision: str, path: str):
        repo = self.repo(kind, name)
        sha = repo.resolve(revision)
        if path not in repo.commits[sha]:
            raise HubError(404, "EntryNotFound", f"{path} does not exist")
        content = repo.commits[sha][path]
        self.answer(content, headers={"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": sha})
