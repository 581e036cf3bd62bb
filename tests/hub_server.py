"""A hub on loopback: the endpoints that huggingface_hub uses to create, fill, tag and read dataset repositories.

Large files are kept by a second server, as the real hub does: it is reached by addresses that the first one gives, and
must never see the token. They get there by the LFS protocol, or by Xet where the client has it: then in pieces, which
this server does not put together. `known` tells it the files that may arrive, and it takes one for uploaded when a
shard, the list of pieces of some files, names its hash. Paths and answers are those that huggingface_hub 2.4 sends and
reads.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

from tests.flaky_server import Server

TOKEN = "hf_" + "t0kenOfTheTest" * 2
XET_TOKEN = "short-lived"
LARGE = (".tar", ".parquet")  # as in the .gitattributes of a new repository
MOST_REGULAR = 10 << 20


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    """Files by path, of every commit; the last one is that of main."""
    messages: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def main(self) -> str:
        return list(self.commits)[-1]

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.main if revision == "main" else self.tags.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


@dataclass
class Hub:
    """`before(method, path)` is called with every request, and may wait or raise."""

    before: Callable[[str, str], None] = lambda _, __: None
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    """The large files that were sent, each as often as it was."""
    known: dict[str, bytes] = field(default_factory=dict)
    """By SHA-256: files that may arrive by Xet."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path, authorization; those of the storage begin with /storage, /v1 or /v2."""
    address: str = ""
    storage: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def environment(self, *, xet: bool = False) -> dict[str, str]:
        """Of a client that is logged in."""
        return {"HF_ENDPOINT": self.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": str(int(not xet))}


class Answer(Exception):
    def __init__(self, status: int, body: object = None, **headers: str) -> None:
        self.status, self.body, self.headers = status, body, headers


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE) or size > MOST_REGULAR


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def described(path: str, data: bytes) -> dict[str, object]:
    """A file, as trees show it."""
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
    if is_large(path, len(data)):
        entry |= {
            "oid": "0" * 40,
            "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130},
        }
    return entry


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        try:
            body = self.body()
            self.hub.requests.append((self.command, path, self.headers.get("Authorization")))
            self.hub.before(self.command, path)
            with self.hub.lock:
                try:
                    self.route(path, body)
                    answer = Answer(404, {"error": f"no such endpoint: {self.command} {path}"})
                except Answer as given:
                    answer = given
            self.send(answer)
        except OSError:
            self.close_connection = True  # the client left

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if len(data) < int(self.headers.get("Content-Length", 0)):
                raise ConnectionError("the client left")
            return data
        pieces = []
        while size := int(self.rfile.readline() or b"-1", 16):
            if size < 0:
                raise ConnectionError("the client left")
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def send(self, answer: Answer) -> None:
        data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, text in answer.headers.items():
            self.send_header(name.replace("_", "-"), text)
        if "Content_Length" not in answer.headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def file(self, data: bytes, **headers: str) -> Answer:
        """Bytes, or the range of them that is asked for."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return Answer(200, data, **headers)
        first, last = int(match[1]), int(match[2] or len(data) - 1)
        return Answer(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **headers)

    # -- endpoints ----------------------------------------------------------------------------------------------------

    def route(self, path: str, body: bytes) -> None:
        if match := re.fullmatch(r"/storage/([0-9a-f]{64})", path):
            self.of_storage(match[1], body)
        if path.startswith(("/v1/", "/v2/")):
            self.of_xet(path, body)
        signed_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(self.repository(match[1], signed_in), match[2], match[3])
        if path == "/api/agent-harnesses":
            raise Answer(404)
        if not signed_in:
            raise Answer(401, {"error": "Invalid username or password."}, X_Error_Message="Invalid credentials")
        if path == "/api/whoami-v2":
            raise Answer(200, {"type": "user", "name": "lab", "auth": {"accessToken": {"role": "write"}}, "orgs": []})
        if path == "/api/validate-yaml":
            raise Answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            self.create(json.loads(body))
        if match := re.fullmatch(r"/datasets/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.repository(match[1], signed_in)
            self.batch(json.loads(body))
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/([a-z-]+)/([^/]+)(?:/(.+))?)?", path):
            repository = self.repository(match[1], signed_in)
            self.of_repository(repository, match[2], match[3] or "main", match[4], body)

    def repository(self, name: str, signed_in: bool) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not signed_in):
            raise Answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return found

    def create(self, asked: dict[str, object]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        assert asked["type"] == "dataset"
        url = {"url": f"{self.hub.address}/datasets/{name}", "name": name, "id": "1"}
        if name in self.hub.repositories:
            raise Answer(409, url | {"error": "You already created this dataset repo"})
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private)
        raise Answer(200, url)

    def of_repository(
        self, repository: Repository, action: str | None, revision: str, path: str | None, body: bytes
    ) -> None:
        if action == "tag" and self.command == "DELETE":
            repository.tags.pop(revision)
            raise Answer(200, {})
        found = repository.files(revision)
        if found is None:
            raise Answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        commit, files = found
        if action in (None, "revision"):
            raise Answer(200, {"id": "1", "sha": commit, "private": repository.private, "siblings": []})
        if action == "xet-write-token":
            token = {"accessToken": XET_TOKEN, "casUrl": self.hub.storage, "exp": int(time.time()) + 3600}
            raise Answer(200, token)
        if action == "preupload":
            asked = json.loads(body)["files"]
            modes = [(file["path"], "lfs" if is_large(file["path"], file["size"]) else "regular") for file in asked]
            listed = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]
            raise Answer(200, {"files": listed})
        if action == "paths-info":
            names = parse_qs(body.decode())["paths"]
            raise Answer(200, [described(name, files[name]) for name in names if name in files])
        if action == "tree":
            inside = f"{path}/" if path else ""
            here = [name for name in files if name.startswith(inside) and "/" not in name[len(inside) :]]
            raise Answer(200, [described(name, files[name]) for name in here])
        if action == "commit":
            name = next(name for name, known in self.hub.repositories.items() if known is repository)
            self.commit(repository, f"datasets/{name}", commit, body)
        if action == "tag":
            tag = json.loads(body)["tag"]
            if tag in repository.tags:
                raise Answer(409, {"error": "Tag reference exists already"})
            repository.tags[tag] = commit
            raise Answer(200, {})

    def commit(self, repository: Repository, url: str, parent: str, body: bytes) -> None:
        files = dict(repository.commits[parent])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Answer(400, {"error": f"LFS pointer to {value['oid']}, which was not uploaded"})
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Answer(400, {"error": f"unknown operation {line['key']}"})
        identity = hashlib.sha1(parent.encode() + body).hexdigest()
        repository.commits[identity] = files
        raise Answer(200, {"commitOid": identity, "commitUrl": f"{self.hub.address}/{url}/commit/{identity}"})

    def batch(self, asked: dict[str, list[dict[str, object]]]) -> None:
        objects = []
        for item in asked["objects"]:
            actions = {"upload": {"href": f"{self.hub.storage}/storage/{item['oid']}"}}
            objects.append(item | ({} if item["oid"] in self.hub.large else {"actions": actions}))
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def of_storage(self, oid: str, body: bytes) -> None:
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                raise Answer(400, {"error": "other bytes than announced"})
            self.hub.large[oid] = body
            self.hub.uploads.append(oid)
            raise Answer(200, {})
        raise self.file(self.hub.large[oid])

    def of_xet(self, path: str, body: bytes) -> None:
        """Takes everything; only a shard matters. The newer forms of two requests are unknown here (404)."""
        if self.headers.get("Authorization") != f"Bearer {XET_TOKEN}":
            raise Answer(401)
        if path.startswith("/v1/shards"):
            for oid, data in self.hub.known.items():
                words = [bytes.fromhex(oid)[at : at + 8] for at in range(0, 32, 8)]
                if b"".join(words) in body or b"".join(word[::-1] for word in words) in body:
                    self.hub.large[oid] = data
                    self.hub.uploads.append(oid)
            raise Answer(200, {"result": 1})
        if path.startswith("/v1/xorbs"):
            raise Answer(200, {"was_inserted": True})
        raise Answer(200 if path == "/v1/telemetry" else 404, {})

    def resolve(self, repository: Repository, revision: str, path: str) -> None:
        found = repository.files(revision)
        if found is None or path not in found[1]:
            raise Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        data = found[1][path]
        headers = {"X_Repo_Commit": found[0]}
        if not is_large(path, len(data)):
            raise self.file(data, ETag=f'"{blob_id(data)}"', **headers)
        raise Answer(302, Location=f"{self.hub.storage}/storage/{hashlib.sha256(data).hexdigest()}", **headers)


@contextmanager
def hub_server(hub: Hub) -> Iterator[Hub]:
    servers = [Server(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub})) for _ in range(2)]
    hub.address, hub.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
