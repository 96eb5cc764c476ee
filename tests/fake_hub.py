"""A hub of our own on a port of this machine, which also fails in the ways hubs fail."""

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import mlx.core as mx
import pytest

INDEX = "model.safetensors.index.json"
COMMITS = {"main": "a" * 40, "stage1": "b" * 40}
JUNK = {
    "README.md": b"# A card",
    "pytorch_model.bin": b"pickled",
    "extra.safetensors": b"not in the index",
    "original/config.json": b"{}",
    "original/model.safetensors": b"another form",
    "training_args.bin": b"pickled",
}


@dataclass
class FakeHub:
    """A hub with one model, "olmo/tiny", on a port of this machine. Its attributes may be changed."""

    files: dict[str, dict[str, bytes]]  # by revision
    gated: str = ""  # "api": nothing may be read, "files": only the listing
    cut: dict[str, int] = field(default_factory=dict)  # by file: how often it breaks off halfway
    reset: bool = False  # break off by a reset, not an orderly end
    status: int | None = None  # answer everything with this
    code: str = ""  # what went wrong then, in the hub's words
    branches: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    refs: str | None = None  # what it says of them instead
    url: str = ""
    asked: list[str] = field(default_factory=list)  # paths of all requests
    got: list[str] = field(default_factory=list)  # files whose content was asked for
    ranges: list[str] = field(default_factory=list)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer as huggingface.co does, as far as snapshot_download and list_repo_refs look."""
        self.asked.append(request.path)
        path = request.path.partition("?")[0].strip("/")
        if self.status is not None:
            return self.refuse(request, self.status, self.code)
        parts = path.removeprefix("api/models/").split("/")
        if parts[:2] != ["olmo", "tiny"]:
            return self.refuse(request, 401 if path.startswith("api/models/") else 404, "RepoNotFound")
        parts += ["revision", "main"][len(parts) - 2 :]
        by_commit = {commit: revision for revision, commit in COMMITS.items()}
        revision = by_commit.get(parts[3], parts[3])
        if revision not in self.files:
            return self.refuse(request, 404, "RevisionNotFound")
        listed = path.startswith("api/")
        if self.gated == "api" or (self.gated and not listed):
            return self.refuse(request, 403, "GatedRepo")
        if listed:
            return self.tell(request, parts[2], revision)
        return self.send(request, revision, "/".join(parts[4:]))

    def tell(self, request: BaseHTTPRequestHandler, what: str, revision: str) -> None:
        files = self.files[revision]
        answer: Any
        if what == "refs":
            answer = self.list_refs()
        elif what == "tree":
            answer = [
                {"type": "file", "path": name, "size": len(data), "oid": etag(data)}
                for name, data in files.items()
            ]
        else:
            siblings = [{"rfilename": name} for name in files]
            answer = {"id": "olmo/tiny", "sha": COMMITS[revision], "siblings": siblings}
        body = (self.refs if what == "refs" and self.refs is not None else json.dumps(answer)).encode()
        reply(request, 200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        request.wfile.write(body)

    def list_refs(self) -> dict[str, list[Any]]:
        def refs(names: Sequence[str], where: str) -> list[dict[str, str]]:
            return [
                {"name": n, "ref": f"refs/{where}/{n}", "targetCommit": f"{i:040x}"}
                for i, n in enumerate(names)
            ]

        return {"branches": refs(self.branches, "heads"), "tags": refs(self.tags, "tags"), "converts": []}

    def send(self, request: BaseHTTPRequestHandler, revision: str, name: str) -> None:
        data = self.files[revision].get(name)
        if data is None:
            return self.refuse(request, 404, "EntryNotFound")
        headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": COMMITS[revision], "Accept-Ranges": "bytes"}
        if request.command == "HEAD":
            return reply(request, 200, {**headers, "Content-Length": str(len(data))})
        self.got.append(name)
        begin, end, status, last = 0, len(data), 200, ""
        if asked := request.headers.get("Range"):
            self.ranges.append(f"{name} {asked}")
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, status = int(first), 206
            end = min(int(last) + 1, len(data)) if last else len(data)
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        rest = data[begin:end]
        reply(request, status, {**headers, "Content-Length": str(len(rest))})
        if self.cut.get(name, 0) <= 0 or last:  # a header alone comes whole
            request.wfile.write(rest)
            return None
        self.cut[name] -= 1
        request.wfile.write(rest[: len(rest) // 2])
        request.wfile.flush()
        request.close_connection = True
        if self.reset:
            linger = struct.pack("ii", 1, 0)
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            request.connection.close()
        return None

    def refuse(self, request: BaseHTTPRequestHandler, status: int, code: str = "") -> None:
        reply(request, status, {"Content-Length": "0", **({"X-Error-Code": code} if code else {})})


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def reply(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.end_headers()


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small checkpoint's files, with a vocabulary that fits the demo's tokenizer."""
    from conftest import TINY, random_model, save_checkpoint  # which imports this module

    config = {**TINY, "vocab_size": 8192, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    tensors = random_model(config).tensors()
    folder = save_checkpoint(tmp_path_factory.mktemp("model"), config, tensors)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def stop_hub() -> list[Callable[[], None]]:
    """Holds what takes the hub down."""
    return []


@pytest.fixture
def hub(
    model_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_hub: list[Callable[[], None]],
) -> Iterator[FakeHub]:
    """A hub that huggingface_hub takes for the real one, with an empty cache and no waiting."""
    staged = {**model_files, "config.json": model_files["config.json"] + b" "}
    fake = FakeHub({"main": {**model_files, **JUNK}, "stage1": {**staged, **JUNK}})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def do_GET(self) -> None:
            fake.answer(self)

        def do_HEAD(self) -> None:
            fake.answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that went away

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"

    def stop() -> None:
        if thread.is_alive():
            server.shutdown()
            server.server_close()
            thread.join()
            huggingface_hub.close_session()  # with the connections that it keeps

    stop_hub.append(stop)
    constants = "huggingface_hub.constants."
    template = fake.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants + "ENDPOINT", fake.url)
    monkeypatch.setattr(constants + "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants + "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants + "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants + "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # it waits between its tries
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    yield fake
    stop()
    huggingface_hub.close_session()


def shard(files: dict[str, bytes], folder: Path) -> None:
    """Turn the single safetensors file among `files` into two, with an index."""
    path = folder / "whole.safetensors"
    path.write_bytes(files.pop("model.safetensors"))
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for n, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{n:05}-of-00002.safetensors"
        mx.save_safetensors(str(folder / file), {name: tensors[name] for name in part})
        files[file] = (folder / file).read_bytes()
        weight_map |= dict.fromkeys(part, file)
    files[INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
