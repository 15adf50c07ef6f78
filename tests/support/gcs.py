"""As much of Google Cloud Storage's JSON API as gcsfs and TensorStore use, in this process and in memory.

https://cloud.google.com/storage/docs/json_api. Objects have generations and writes may be conditional on them, which
TensorStore's databases rely on. Permissions, quotas and batches of deletions are not imitated.
"""

import json
import re
import subprocess
import threading
import time
import urllib.parse
import uuid
from collections.abc import Iterable, Mapping
from http import server
from typing import Any, Self

from support.processes import run_program


class FakeGcs(server.ThreadingHTTPServer):
    """A context manager; `address` is what clients take in place of https://storage.googleapis.com."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, bucket: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bucket, self.lock = bucket, threading.RLock()
        self.objects: dict[str, tuple[bytes, int, float]] = {}  # name -> (bytes, generation, seconds since the epoch)
        self.uploads: dict[str, tuple[str, str | None, bytes]] = {}  # id -> (name, condition, bytes so far)
        self.generation = 0
        self.address = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """Clients that end close their connections in the middle of an answer."""

    def put(self, name: str, data: bytes, condition: str | None = None) -> dict[str, str] | None:
        """The object as its metadata, or None where its generation is not `condition` (0: there is none)."""
        with self.lock:
            there = self.objects[name][1] if name in self.objects else 0
            if condition is not None and int(condition) != there:
                return None
            self.generation += 1
            self.objects[name] = data, self.generation, time.time()
            return self.describe(name)

    def describe(self, name: str) -> dict[str, str]:
        data, generation, written = self.objects[name]
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(written))
        return {
            "kind": "storage#object",
            "bucket": self.bucket,
            "name": name,
            "id": f"{self.bucket}/{name}/{generation}",
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(data)),
            "timeCreated": date,
            "updated": date,
            "contentType": "application/octet-stream",
        }

    def listing(self, query: Mapping[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, end = query.get("startOffset", ""), query.get("endOffset", "")
        items, prefixes = [], set()
        with self.lock:
            for name in sorted(self.objects):
                if not name.startswith(prefix) or name < start or (end and name >= end):
                    continue
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    items.append(self.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class _Handler(server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True  # an answer in one piece: else each waits for an acknowledgement
    server: FakeGcs

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, code: int, body: Any = b"", headers: Iterable[tuple[str, str]] = ()) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for key, value in headers:
            self.send_header(key, value)
        if code == 304:
            self.end_headers()
            return
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def fail(self, code: int, message: str) -> None:
        self.answer(code, {"error": {"code": code, "message": message}})

    def parts(self) -> tuple[str, str, dict[str, str]]:
        """What is asked for: "b" or "o", or nothing known; the object's name; the query."""
        url = urllib.parse.urlsplit(self.path)
        found = re.fullmatch(r"(?:/download|/upload)?/storage/v1/b/([^/]+)(/o(?:/(.+))?)?", url.path)
        query = {key: values[-1] for key, values in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
        if not found or found[1] != self.server.bucket:
            return "", "", query
        return "o" if found[2] else "b", urllib.parse.unquote(found[3] or ""), query

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        kind, name, query = self.parts()
        if not kind:
            return self.fail(404, "no such bucket")
        if kind == "b":
            return self.answer(200, {"kind": "storage#bucket", "id": self.server.bucket, "name": self.server.bucket})
        if not name:
            return self.answer(200, self.server.listing(query))
        with self.server.lock:
            if name not in self.server.objects:
                return self.fail(404, "no such object")
            data, generation, _ = self.server.objects[name]
            described = self.server.describe(name)
        if query.get("ifGenerationNotMatch") == str(generation):
            return self.answer(304)
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return self.fail(412, "another generation")
        if query.get("alt") != "media":
            return self.answer(200, described)
        headers = [("x-goog-generation", str(generation)), ("x-goog-stored-content-length", str(len(data)))]
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not span:
            return self.answer(200, data, headers)
        first = int(span[1]) if span[1] else max(0, len(data) - int(span[2]))
        last = min(int(span[2]), len(data) - 1) if span[1] and span[2] else len(data) - 1
        if first >= len(data):
            return self.fail(416, "beyond the end")
        headers.append(("Content-Range", f"bytes {first}-{last}/{len(data)}"))
        return self.answer(206, data[first : last + 1], headers)

    def do_POST(self) -> None:
        kind, name, query = self.parts()
        data = self.body()
        if not kind:
            return self.fail(404, "no such bucket")
        if "upload_id" in query:
            return self.go_on(query["upload_id"], data)
        condition, upload = query.get("ifGenerationMatch"), query.get("uploadType")
        if upload == "media":
            return self.stored(query["name"], data, condition)
        if upload == "multipart":
            found = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
            assert found
            mark = found[1].encode()
            first, second = (
                part.split(b"\r\n\r\n" if b"\r\n\r\n" in part else b"\n\n", 1)[1]
                for part in data.split(b"--" + mark)[1:3]
            )
            end = b"\r\n" if second.endswith(b"\r\n") else b"\n"
            return self.stored(json.loads(first)["name"], second.removesuffix(end), condition)
        if upload == "resumable":
            id_ = uuid.uuid4().hex
            name = query.get("name") or json.loads(data)["name"]
            self.server.uploads[id_] = name, condition, b""
            return self.answer(
                200,
                b"",
                [
                    (
                        "Location",
                        f"{self.server.address}/upload/storage/v1/b/{self.server.bucket}"
                        f"/o?uploadType=resumable&upload_id={id_}",
                    )
                ],
            )
        return self.fail(501, f"not imitated: {self.path}")

    def do_PUT(self) -> None:
        self.do_POST()

    def do_DELETE(self) -> None:
        _, name, _ = self.parts()
        with self.server.lock:
            if self.server.objects.pop(name, None) is None:
                return self.fail(404, "no such object")
        return self.answer(204)

    def go_on(self, id_: str, data: bytes) -> None:
        name, condition, before = self.server.uploads[id_]
        self.server.uploads[id_] = name, condition, before + data
        if self.headers.get("Content-Range", "/0").endswith("/*"):
            return self.answer(308, b"", [("Range", f"bytes=0-{len(before + data) - 1}")])
        return self.stored(name, before + data, condition)

    def stored(self, name: str, data: bytes, condition: str | None) -> None:
        described = self.server.put(name, data, condition)
        return self.fail(412, "another generation") if described is None else self.answer(200, described)


# So that nothing looks for a Google machine, whose credentials would be asked for over the network.
ALONE: dict[str, Any] = {
    "NO_GCE_CHECK": "true",
    "GCE_METADATA_ROOT": "127.0.0.1:9",
    "GCE_METADATA_HOST": "127.0.0.1:9",
    "GCE_METADATA_IP": "127.0.0.1:9",
    "GCE_METADATA_TIMEOUT": "1",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
}


def run_with_gcs(address: str, module: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """`run_program` in a process to which the server at `address` is Google's."""
    return run_program(
        module, *arguments, check=False, **ALONE, STORAGE_EMULATOR_HOST=address, TENSORSTORE_GCS_HTTP_URL=address
    )
