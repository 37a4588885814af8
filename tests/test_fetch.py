"""Fetching from a real server on this machine that misbehaves on purpose, and from stand-ins of two libraries."""

import hashlib
import json
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from formats import fetch as fetching
from formats.fetch import FIRST_SEEN, Wanted, fetch, fetch_latest
from utils.errors import InputError

CONTENT = b"weights" * 1000
SIZE = len(CONTENT)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Every path is another misbehaviour."""

    def log_message(self, *args):
        pass

    def answer(self, content=CONTENT, length=None, status=200, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.server.asked.append(self.path)
        kind = self.path.strip("/").partition("/")[0]
        if kind == "stops":
            self.answer(CONTENT[:100], length=len(CONTENT))
        elif kind == "hangs":
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.flush()
            time.sleep(3)
        elif kind == "endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(100_000):
                self.wfile.write(b"x" * 10_000)
        elif kind == "circle":
            self.answer(b"", status=302, Location="/circle/again")
        elif kind == "moved":
            self.answer(b"", status=301, Location="/good/file.th")
        elif kind == "file":
            self.answer(b"", status=302, Location="file:///etc/hostname")
        elif kind == "quota":
            self.answer(b"\n<!DOCTYPE html><title>Quota exceeded</title>")
        elif kind == "missing":
            self.answer(b"no", status=404)
        elif kind == "other":
            self.answer(b"W" + CONTENT[1:])
        elif kind == "empty":
            self.answer(b"")
        else:
            self.answer()


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.asked, server.daemon_threads, server.block_on_close = [], True, False
    server.handle_error = lambda *args: None  # a client that left early
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def address(server):
    server.asked.clear()
    return f"http://127.0.0.1:{server.server_port}"


def wanted(tmp_path, *sources, sha256=DIGEST, size=SIZE):
    return Wanted(tmp_path / "cache" / "net" / "file.th", sources, sha256, size)


def left(tmp_path):
    return sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock")


def test_a_file_is_fetched_once(address, server, tmp_path, capsys):
    for _ in range(2):
        path = fetch(wanted(tmp_path, f"{address}/good/file.th"), tmp_path / "cache")
        assert path.read_bytes() == CONTENT
    assert server.asked == ["/good/file.th"] and left(tmp_path) == ["file.th"]
    assert capsys.readouterr().out.count("fetched http") == 1


def test_redirects_are_followed(address, tmp_path):
    assert fetch(wanted(tmp_path, f"{address}/moved"), tmp_path / "cache").read_bytes() == CONTENT


def test_mirrors_are_tried_in_order(address, server, tmp_path):
    sources = [f"{address}/{kind}/file.th" for kind in ("missing", "other", "good", "never")]
    assert fetch(wanted(tmp_path, *sources), tmp_path / "cache").read_bytes() == CONTENT
    assert [path.split("/")[1] for path in server.asked] == ["missing", "other", "good"]
    assert left(tmp_path) == ["file.th"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "404"),
        ("stops", "100 bytes read|IncompleteRead|100 bytes, expected 7000"),
        ("hangs", "[Tt]imed? ?out"),
        ("endless", "sends more bytes than the file should have"),
        ("circle", "redirects"),
        ("file", "No connection adapters|schema|adapter"),
        ("quota", "is a web page, not the file"),
        ("empty", "0 bytes, expected 7000"),
        ("other", f"its sha256 is [0-9a-f]{{64}}, expected {DIGEST}"),
    ],
)
def test_a_server_that_misbehaves(address, tmp_path, monkeypatch, kind, message):
    monkeypatch.setattr(fetching, "TIMEOUT", 0.5)
    with pytest.raises(InputError, match=message) as error:
        fetch(wanted(tmp_path, f"{address}/{kind}/file.th"), tmp_path / "cache")
    assert "\n" not in str(error.value) and f"put it by hand at {tmp_path}/cache/net/file.th" in str(error.value)
    assert left(tmp_path) == []


def test_a_size_that_an_index_invents_is_no_limit(address, tmp_path, monkeypatch):
    part = tmp_path / "part"
    with pytest.raises(InputError, match="sends more bytes"):
        fetching._fetch_anew(Wanted(part, (f"{address}/endless/file.th",), DIGEST, 10**18), limit=100)
    assert left(tmp_path) == []


def test_nobody_answers(tmp_path):
    with pytest.raises(InputError, match=r"cannot fetch file\.th: http://127\.0\.0\.1:9/"):
        fetch(wanted(tmp_path, "http://127.0.0.1:9/file.th"), tmp_path / "cache")


@pytest.mark.parametrize("source", ["ftp://host/file.th", "file:///etc/hostname", "mailto:nobody"])
def test_other_kinds_of_address(tmp_path, source):
    with pytest.raises(InputError, match="not an address of a known kind"):
        fetch(wanted(tmp_path, source), tmp_path / "cache")


def test_a_file_put_there_by_hand_is_taken_if_it_is_the_right_one(tmp_path):
    file = wanted(tmp_path, "http://127.0.0.1:9/")
    file.target.parent.mkdir(parents=True)
    file.target.write_bytes(CONTENT)
    assert fetch(file, tmp_path / "cache") == file.target
    file.target.write_bytes(b"W" + CONTENT[1:])
    with pytest.raises(InputError, match="its sha256 is"):
        fetch(file, tmp_path / "cache")
    assert file.target.exists()  # it is the user's


def test_what_has_no_published_sha256_is_recorded(address, tmp_path, capsys):
    file = wanted(tmp_path, f"{address}/good/file.th", sha256=None, size=None)
    fetch(file, tmp_path / "cache")
    assert f"recorded and compared from now on: {DIGEST}" in capsys.readouterr().out
    assert json.loads((tmp_path / "cache" / FIRST_SEEN).read_text())["net/file.th"]["sha256"] == DIGEST
    fetch(file, tmp_path / "cache")
    assert "recorded" not in capsys.readouterr().out
    file.target.write_bytes(b"another")
    with pytest.raises(InputError, match=f"but was {DIGEST} when it was first seen"):
        fetch(file, tmp_path / "cache")


def test_the_latest_copy_or_the_last_one(address, server, tmp_path, capsys):
    target = tmp_path / "index.json"
    fetch_latest(f"{address}/good", target, 10_000)
    target.write_bytes(b"older")
    assert fetch_latest(f"{address}/good", target, 10_000).read_bytes() == CONTENT
    assert fetch_latest(f"{address}/missing", target, 10_000).read_bytes() == CONTENT
    assert "taking the copy that was fetched before" in capsys.readouterr().out
    with pytest.raises(InputError, match="sends more bytes"):
        fetch_latest(f"{address}/good", tmp_path / "other.json", 100)


def test_a_full_disk_is_no_fault_of_the_source(address, tmp_path, monkeypatch):
    def full(file, chunk):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetching._Limited, "write", full)
    with pytest.raises(OSError, match="No space left"):
        fetch(wanted(tmp_path, f"{address}/good/file.th"), tmp_path / "cache")
    assert left(tmp_path) == []


def test_drive_and_hub(tmp_path, monkeypatch):
    calls = []

    def download(id, output, resume, timeout):
        calls.append((id, resume))
        Path(output).write_bytes(CONTENT)
        return output

    def hf_hub_download(repository, name, local_dir):
        calls.append((repository, name))
        Path(local_dir, "downloaded").write_bytes(CONTENT)
        return f"{local_dir}/downloaded"

    monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download=download))
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=hf_hub_download))
    for number, source in enumerate(("drive:1AbC", "hf:someone/networks/folder/file.th")):
        assert fetch(wanted(tmp_path / str(number), source), tmp_path / str(number) / "cache").read_bytes() == CONTENT
        assert left(tmp_path / str(number)) == ["file.th"]
    assert calls == [("1AbC", True), ("someone/networks", "folder/file.th")]
    for place in ("someone/networks", "someone/networks/../../file.th"):
        with pytest.raises(InputError, match="expected hf:owner/repository/file"):
            fetch(wanted(tmp_path / "2", f"hf:{place}"), tmp_path / "2" / "cache")


def test_a_library_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(InputError, match="this address needs the package gdown: pip install gdown"):
        fetch(wanted(tmp_path, "drive:1AbC"), tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "function", "arguments"),
    [
        ("gdown", "download", {"id", "output", "resume", "timeout"}),
        ("huggingface_hub", "hf_hub_download", {"repo_id", "filename", "local_dir"}),
    ],
)
def test_the_libraries_take_these_arguments(name, function, arguments):
    import inspect

    library = pytest.importorskip(name)
    assert arguments <= inspect.signature(getattr(library, function)).parameters.keys()


def test_a_doi_leads_to_an_address(address, tmp_path, monkeypatch):
    import pooch.downloaders

    def doi_to_repository(doi, **options):
        assert doi == "10.5281/zenodo.1" and options["timeout"] == fetching.TIMEOUT
        return types.SimpleNamespace(download_url=lambda name: f"{address}/good/{name}")

    monkeypatch.setattr(pooch.downloaders, "doi_to_repository", doi_to_repository)
    found = fetch(wanted(tmp_path, "doi:10.5281/zenodo.1/file.th"), tmp_path / "cache")
    assert found.read_bytes() == CONTENT
