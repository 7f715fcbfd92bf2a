"""A hub on this machine that Hugging Face's own client talks to, for tests without a network.

It serves FOLDER/owner/name/... by as much of the hub's protocol as streaming a data set and
downloading a model need: which of them and which files there are, and ranges of their bytes.
What goes wrong with hubs can be asked for, as attributes of what local_hub() yields.
"""

import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import datasets
import huggingface_hub
import pytest

COMMIT = "c0ffee" * 6 + "abcd"
KIND = r"(?:/api)?(?:/datasets|/models)?"
QUESTION = re.compile(KIND + r"/([^/]+/[^/]+)(?:/(tree|resolve|revision)/[^/]+/?(.*))?")


class LocalHub(BaseHTTPRequestHandler):
    """A hub that is well; a test sets the attributes of the class to make it ill."""

    folder = None
    commit = COMMIT
    delay = 0.0  # seconds before each answer
    page = None  # (status, body) of an error page in place of every answer
    page_for_files = None  # the same, in place of files only
    gated = None  # the status that refuses the files
    cut = None  # a file ends after so many bytes of each answer, and the connection with it
    gone = False  # connections are closed without an answer
    asked = ()  # paths, if it is a list
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if isinstance(self.asked, list):
            self.asked.append(self.path)
        time.sleep(self.delay)
        if self.gone:
            self.close_connection = True
            return None
        if self.page:
            return self.answer(self.page[1], self.page[0], {"Content-Type": "text/html"})
        question = QUESTION.fullmatch(unquote(self.path.partition("?")[0]))
        root = self.folder / question[1] if question else None
        if not root or not root.is_dir():
            return self.answer({}, 404, {"X-Error-Code": "RepoNotFound"})

        place = root / (question[3] or "")
        if not place.exists():
            self.answer({}, 404, {"X-Error-Code": "EntryNotFound"})
        elif question[2] == "tree":
            self.answer([describe(root, found) for found in sorted(place.iterdir())])
        elif question[2] == "resolve" and self.page_for_files:
            status, page = self.page_for_files
            self.answer(page, status, {"Content-Type": "text/html"})
        elif question[2] == "resolve" and self.gated:
            self.answer({}, self.gated, {"X-Error-Code": "GatedRepo"})
        elif question[2] == "resolve":
            self.answer_range(place.read_bytes())
        else:
            files = [{"rfilename": found.name} for found in root.iterdir() if found.is_file()]
            siblings = files if self.path.startswith("/api/models/") else []
            self.answer({"id": question[1], "sha": self.commit, "tags": [], "siblings": siblings})

    do_HEAD = do_GET

    def answer(self, content, status=200, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        own = {"Content-Length": len(body), "X-Repo-Commit": self.commit}
        headers = own | (headers or {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut is not None and isinstance(content, bytes) and len(body) > self.cut:
            body = body[: self.cut]
            self.close_connection = True
        self.wfile.write(body)

    def answer_range(self, content):
        tag = hashlib.sha1(content).hexdigest()
        headers = {"ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.answer(content, 200, headers)
        first = int(wanted[1])
        part = content[first : int(wanted[2] or len(content)) + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        self.answer(part, 206, headers)

    def log_message(self, *_):
        """Keep quiet."""


def describe(root, place):
    kind = "directory" if place.is_dir() else "file"
    name = str(place.relative_to(root))
    return {"type": kind, "path": name, "oid": COMMIT, "size": place.stat().st_size}


@contextmanager
def local_hub(folder):
    """Let this process's client talk to a hub that serves `folder`, and keep its cache there.

    Yields the hub's class, whose attributes say how it behaves, and its `address`.
    """
    handler = type("Handler", (LocalHub,), {"folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(datasets.config, "HF_ENDPOINT", address)
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / ".cache"))
        handler.address = address
        yield handler
    server.shutdown()
    server.server_close()
