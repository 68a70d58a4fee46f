"""A small Hugging Face Hub on loopback that keeps repositories on disk and speaks LFS with the client.

repositories/NAMESPACE/NAME/{private,refs/BRANCH,commits/OID}    a commit is the JSON of its files and its message
blobs/SHA256                                                     the content of every file
"""

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKENS = {"hf_token_of_ann": "ann", "hf_token_of_bob": "bob"}
REPO = r"(?P<repo>[\w.-]+/[\w.-]+?)"


class RefusalError(Exception):
    """An error response: an HTTP status and the Hub's error code."""

    def __init__(self, status, code="", message=""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Hub:
    """The server.

    `requests` has the request lines so far. `faults` maps (method, path pattern) to what goes wrong, once: a status,
    "short" for half of the content as if it were all, or "cut" for a connection lost halfway.
    """

    def __init__(self, address=("127.0.0.1", 0)):
        self.root = None
        self.bind(address)

    def bind(self, address):
        self.connections = set()
        self.server = ThreadingHTTPServer(address, Handler)
        self.server.hub = self
        self.address = self.server.server_address
        self.url = "http://{}:{}".format(*self.address)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def open(self, root):
        """Begin with an empty Hub whose files are kept in the folder `root`."""
        self.root, self.requests, self.faults = root, [], {}
        (root / "blobs").mkdir(parents=True)

    def stop(self):
        self.server.shutdown()
        for connection in list(self.connections):
            with suppress(OSError):  # the client may be gone
                connection.shutdown(socket.SHUT_RDWR)
        self.server.server_close()

    def start(self):
        self.bind(self.address)

    def folder(self, repo):
        return self.root / "repositories" / repo

    def create(self, repo, private=False):
        folder = self.folder(repo)
        for name in ("refs", "commits"):
            (folder / name).mkdir(parents=True)
        (folder / "private").write_text(json.dumps(private))
        self.commit(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def commit(self, repo, branch, changes, message):
        """Commit files, given as bytes or by SHA-256, to a branch."""
        folder = self.folder(repo)
        ref = folder / "refs" / branch
        before = json.loads((folder / "commits" / ref.read_text()).read_text()) if ref.exists() else {"files": {}}
        files = before["files"] | {
            path: self.store(content) if isinstance(content, bytes) else content for path, content in changes.items()
        }
        text = json.dumps({"files": files, "message": message, "parent": ref.read_text() if ref.exists() else None})
        oid = hashlib.sha1(text.encode()).hexdigest()
        (folder / "commits" / oid).write_text(text)
        ref.write_text(oid)
        return oid

    def store(self, content):
        sha256 = hashlib.sha256(content).hexdigest()
        (self.root / "blobs" / sha256).write_bytes(content)
        return sha256

    def content(self, sha256):
        return (self.root / "blobs" / sha256).read_bytes()

    def resolve(self, repo, revision="main"):
        """The commit that a branch or commit name refers to, and its files."""
        folder = self.folder(repo)
        ref = folder / "refs" / revision
        oid = ref.read_text() if ref.is_file() else revision
        if not (folder / "commits" / oid).exists():
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, json.loads((folder / "commits" / oid).read_text())["files"]

    def commits(self, repo, branch="main"):
        """The messages of a branch's commits, oldest first."""
        folder, messages = self.folder(repo), []
        oid = (folder / "refs" / branch).read_text()
        while oid:
            commit = json.loads((folder / "commits" / oid).read_text())
            messages.insert(0, commit["message"])
            oid = commit["parent"]
        return messages

    def files(self, repo, revision="main"):
        return {path: self.content(sha256) for path, sha256 in self.resolve(repo, revision)[1].items()}


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path):
    return path.endswith((".safetensors", ".png"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.server.hub.connections.add(self.connection)

    def finish(self):
        super().finish()
        self.server.hub.connections.discard(self.connection)

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self):
        path = urlsplit(self.path).path
        self.hub = self.server.hub
        self.hub.requests.append(f"{self.command} {unquote(path)}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.user = TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        faults = [key for key in self.hub.faults if key[0] == self.command and re.search(key[1], path)]
        self.fault = self.hub.faults.pop(faults[0]) if faults else None
        try:
            if isinstance(self.fault, int):
                raise RefusalError(self.fault, message="something broke")
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    return action(self, **{name: unquote(part) for name, part in match.groupdict("main").items()})
            raise RefusalError(501, message=f"this Hub does not know {self.command} {path}")
        except RefusalError as refusal:
            self.answer(
                refusal.status, {"error": refusal.message}, X_Error_Code=refusal.code, X_Error_Message=refusal.message
            )

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815, the names http.server calls

    def log_in(self):
        if self.user is None:
            raise RefusalError(401, message="Invalid credentials in Authorization header")

    def check(self, repo, write=False):
        """Refuse a user who may not see the repository or, with `write`, may not write to it."""
        folder = self.hub.folder(repo)
        owned = self.user == repo.split("/")[0]
        if not folder.exists() or (json.loads((folder / "private").read_text()) and not owned):
            raise RefusalError(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and not owned:
            self.log_in()
            raise RefusalError(403, message="You don't have the rights to write to this repository")

    def harnesses(self):
        self.answer(200, {"harnesses": []})

    def whoami(self):
        self.log_in()
        self.answer(200, {"type": "user", "name": self.user})

    def create(self):
        self.log_in()
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.user
        repo = f"{owner}/{asked['name']}"
        if owner != self.user:
            raise RefusalError(
                403, message=f"You don't have the rights to create a model under the namespace {owner!r}"
            )
        if self.hub.folder(repo).exists():
            return self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"})
        self.hub.create(repo, private=asked.get("visibility") == "private" or asked.get("private") is True)
        return self.answer(200, {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo})

    def info(self, repo, revision):
        self.check(repo)
        oid, files = self.hub.resolve(repo, revision)
        private = json.loads((self.hub.folder(repo) / "private").read_text())
        siblings = [{"rfilename": path} for path in files]
        self.answer(200, {"id": repo, "modelId": repo, "sha": oid, "private": private, "siblings": siblings})

    def branch(self, repo, branch):
        self.check(repo, write=True)
        ref = self.hub.folder(repo) / "refs" / branch
        if ref.exists():
            raise RefusalError(409, message=f"Reference already exists: {branch}")
        ref.parent.mkdir(exist_ok=True)
        ref.write_text(self.hub.resolve(repo)[0])
        self.answer(200, {})

    def validate_yaml(self):
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, repo, revision):
        self.check(repo, write=True)
        there = self.hub.resolve(repo, revision)[1]
        files = []
        for file in json.loads(self.body)["files"]:
            path, oid = file["path"], there.get(file["path"])
            if oid and not is_lfs(path):
                oid = git_oid(self.hub.content(oid))
            mode = "lfs" if is_lfs(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def lfs_batch(self, repo):
        self.check(repo, write=True)
        objects = []
        for item in json.loads(self.body)["objects"]:
            if not (self.hub.root / "blobs" / item["oid"]).exists():
                upload = {"href": f"{self.hub.url}/lfs/{item['oid']}"}
                item["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/{repo}/verify"}}
            objects.append(item)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusalError(400, message="The content is another")
        self.hub.store(self.body)
        self.answer(200)

    def lfs_verify(self, repo):
        item = json.loads(self.body)
        self.check(repo, write=True)
        if len(self.hub.content(item["oid"])) != item["size"]:
            raise RefusalError(400, message="The size is another")
        self.answer(200)

    def commit(self, repo, revision):
        self.check(repo, write=True)
        self.hub.resolve(repo, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        changes = {}
        for line in lines[1:]:
            value = line["value"]
            changes[value["path"]] = base64.b64decode(value["content"]) if line["key"] == "file" else value["oid"]
        oid = self.hub.commit(repo, revision, changes, lines[0]["value"]["summary"])
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid})

    def file(self, repo, revision, path):
        self.check(repo)
        oid, files = self.hub.resolve(repo, revision)
        if path not in files:
            raise RefusalError(404, "EntryNotFound", "Entry not found")
        content = self.hub.content(files[path])
        headers = dict(X_Repo_Commit=oid, ETag=f'"{files[path] if is_lfs(path) else git_oid(content)}"')
        if is_lfs(path):
            headers |= dict(X_Linked_Size=len(content), X_Linked_Etag=headers["ETag"])
        if self.command == "GET" and self.fault == "short":
            content = content[: len(content) // 2]
        if wanted := self.headers.get("Range"):
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
            range_ = f"bytes {first}-{len(content) - 1}/{len(content)}"
            return self.answer(206, content[first:], Content_Range=range_, **headers)
        if self.command == "GET" and self.fault == "cut":
            headers["Content_Length"] = len(content)
            self.close_connection = True
            content = content[: len(content) // 2]
        self.answer(200, content, **headers)
        return None


ROUTES = [
    ("GET", "/api/agent-harnesses", Handler.harnesses),
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?", Handler.info),
    ("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)", Handler.branch),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("POST", rf"/{REPO}/verify", Handler.lfs_verify),
    ("GET HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.file),
]
