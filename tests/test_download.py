"""The download of MVTec AD, against a server on this machine that misbehaves in every way."""

import hashlib
import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pooch.downloaders
import pytest
from PIL import Image

from cplib.apps import download as module
from cplib.apps.cli import main
from cplib.apps.download import download
from cplib.datasets import DataError, categories, load

NAMES = ("train/good/000.png", "test/good/000.png", "test/bent/000.png")


def member(name, content=b"", kind=tarfile.REGTYPE, link=""):
    """A header and its content, as tarfile writes them."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, content


def packed(*members):
    """A .tar.xz of members, in bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:xz", preset=0) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def image(seed):
    """A PNG of noise: as good as incompressible, so that the archive can be cut anywhere."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


IMAGES = [member(f"nut/{name}", image(i)) for i, name in enumerate(NAMES)]
WHOLE = packed(*IMAGES, member("license.txt", b"CC"))


@pytest.fixture
def server(monkeypatch):
    """A server of ``content``, asked impatiently; ``steps`` says how each request is answered."""
    state = SimpleNamespace(steps=[], ranges=[], release=threading.Event())

    def serve(content):
        state.content = content
        monkeypatch.setattr(module, "SHA256", hashlib.sha256(content).hexdigest())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.ranges.append(self.headers.get("Range"))
            answer(self, state, **(state.steps.pop(0) if state.steps else {}))

        log_message = Mock()

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(module, "ADDRESS", f"http://127.0.0.1:{http.server_port}/set.tar.xz")
    monkeypatch.setattr(module, "GIGABYTES", 1e-6)
    monkeypatch.setattr(module, "PAUSE", 0.001)
    monkeypatch.setattr(pooch.downloaders, "DEFAULT_TIMEOUT", 0.3)
    state.serve = serve
    serve(WHOLE)
    yield state
    state.release.set()
    http.shutdown()
    http.server_close()
    thread.join()


def answer(handler, state, *, status=None, deaf=False, send=None, length=0, stall=False, at=None):
    """One reply: ``send`` bytes at most of what was asked for, its length off by ``length``."""
    asked = handler.headers.get("Range")
    start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and not deaf else 0
    if status is None and start >= len(state.content):
        status = 416
    if status:
        handler.send_error(status)
        return
    body = state.content[start if at is None else at :]
    handler.send_response(206 if start else 200)
    handler.send_header("Content-Length", str(len(body) + length))
    handler.end_headers()
    handler.wfile.write(body[:send])
    if stall:
        state.release.wait(10)


def fetched(tmp_path):
    return download(tmp_path / "set", accept_licence=True)


def assert_whole(tmp_path):
    """The data set is there and nothing else."""
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert categories(tmp_path / "set") == ["nut"]
    for info, content in IMAGES:
        assert (tmp_path / "set" / info.name).read_bytes() == content


def refusal(tmp_path):
    """The one line with which the download is refused; no data set is left."""
    with pytest.raises(DataError) as caught:
        fetched(tmp_path)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"set.tar.xz.part", "outside"}
    return str(caught.value)


def test_a_whole_archive_is_fetched_once_unpacked_and_removed(server, tmp_path, capsys):
    assert fetched(tmp_path) == tmp_path / "set"
    assert_whole(tmp_path)
    assert len(load(tmp_path / "set", "nut", "test", 8)) == 2
    fetched(tmp_path)
    assert server.ranges == [None]
    assert "holds nut already" in capsys.readouterr().out


def test_a_connection_that_breaks_or_stalls_is_resumed_where_it_broke(server, tmp_path):
    server.steps = [{"send": 2048}, {"send": 4096, "stall": True}, {"status": 503}, {"send": 1024}]
    fetched(tmp_path)
    assert_whole(tmp_path)
    assert server.ranges == [None, *(f"bytes={n}-" for n in (2048, 6144, 6144, 7168))]


def test_a_second_call_resumes_where_the_first_gave_up(server, tmp_path):
    server.steps = [{"send": 4096}, *[{"status": 500}] * 4]
    assert "500" in refusal(tmp_path)
    assert len(server.ranges) == module.ATTEMPTS
    fetched(tmp_path)
    assert_whole(tmp_path)
    assert server.ranges[-1] == "bytes=4096-"


def test_a_call_cut_off_after_the_last_byte_only_checks_and_unpacks(server, tmp_path):
    (tmp_path / "set.tar.xz.part").write_bytes(WHOLE)
    (tmp_path / ".set.unpacking" / "rust" / "train" / "good").mkdir(parents=True)
    fetched(tmp_path)
    assert_whole(tmp_path)


LIES = {
    "too short": [{"length": -1000, "send": len(WHOLE) - 1000}],
    "another range": [{"send": 4096}, {"at": 5000}],
    "no range": [{"send": 4096}, {"deaf": True}],
}


@pytest.mark.parametrize("lie", LIES)
def test_bytes_in_the_wrong_place_are_found_by_the_hash(server, tmp_path, lie):
    server.steps = LIES[lie]
    line = refusal(tmp_path)
    for part in (f"not {module.SHA256}", module.PAGE, "<category>/{train/good"):
        assert part in line
    assert list(tmp_path.iterdir()) == []
    fetched(tmp_path)
    assert_whole(tmp_path)


@pytest.mark.parametrize("status", [403, 404, 416])
def test_an_address_that_is_gone_is_asked_once_and_names_the_page(server, tmp_path, status):
    server.steps = [{"status": status}]
    line = refusal(tmp_path)
    for part in (module.ADDRESS, str(status), module.PAGE, "<category>/{train/good"):
        assert part in line
    assert len(server.ranges) == 1


# Archives that are not what they should be, although their hash is believed


HOSTILE = {
    "cut early": WHOLE[:1],
    "cut late": WHOLE[:-100],
    "flipped bit": WHOLE[:20_000] + bytes([WHOLE[20_000] ^ 1]) + WHOLE[20_001:],
    "something else": packed(member("thesis.txt", b"x")),
    "parent": packed(*IMAGES, member("../outside", b"x")),
    "link": packed(*IMAGES, member("nut/link", kind=tarfile.SYMTYPE, link="../../outside")),
    "hard link": packed(*IMAGES, member("nut/link", kind=tarfile.LNKTYPE, link="../outside")),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_archive_that_is_broken_or_leads_out_leaves_nothing(server, tmp_path, kind):
    (tmp_path / "outside").write_text("mine")
    server.serve(HOSTILE[kind])
    assert "expected a whole archive" in refusal(tmp_path)
    assert (tmp_path / "outside").read_text() == "mine"


def test_neither_an_absolute_path_nor_a_link_leads_out_of_the_folder(server, tmp_path):
    outside = tmp_path / "outside"
    link = member("nut/link", kind=tarfile.SYMTYPE, link="..")
    server.serve(packed(*IMAGES, member(str(outside), b"x"), link, member("nut/link/outside")))
    fetched(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


# The folder, the space and the licence


def test_an_empty_folder_is_taken_and_other_things_or_too_little_space_are_refused_unfetched(
    server, tmp_path, monkeypatch
):
    (tmp_path / "set").mkdir()
    fetched(tmp_path)
    assert_whole(tmp_path)
    letter = tmp_path / "other" / "letter.txt"
    letter.parent.mkdir()
    letter.write_text("dear")
    with pytest.raises(DataError, match="expected a new or empty folder"):
        download(letter.parent, accept_licence=True)
    with pytest.raises(DataError, match=r"letter\.txt: Not a directory"):
        download(letter, accept_licence=True)
    monkeypatch.setattr(module, "GIGABYTES", 1e9)
    with pytest.raises(DataError, match="GB free; expected 2000000000.0 GB"):
        download(tmp_path / "large", accept_licence=True)
    assert len(server.ranges) == 1


def test_without_the_licence_nothing_is_fetched_and_it_is_asked_for_once(
    server, tmp_path, monkeypatch
):
    keyboard = Mock(side_effect=["", "maybe", EOFError, NotImplementedError, "y"])
    monkeypatch.setattr("builtins.input", keyboard)
    for _ in range(4):  # the last two: no keyboard, and a notebook without one
        with pytest.raises(DataError, match="licence not accepted.*--accept-licence"):
            download(tmp_path / "set")
    assert server.ranges == []
    server.steps = [{"send": 1024}, {"status": 404}]
    with pytest.raises(DataError, match="404"):
        download(tmp_path / "set")
    download(tmp_path / "set")
    assert_whole(tmp_path)
    assert module.LICENCE in keyboard.call_args.args[0]


def test_the_command_fails_in_one_line_resumes_and_can_be_stopped(
    server, tmp_path, monkeypatch, capsys
):
    def status():
        with pytest.raises(SystemExit) as stopped:
            main(["download", str(tmp_path / "set"), "--accept-licence"])
        return stopped.value.code

    server.steps = [{"status": 404}]
    assert status() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert module.PAGE in line
    with monkeypatch.context() as patch:
        patch.setattr(module, "fetch", Mock(side_effect=KeyboardInterrupt))
        assert status() == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert status() == 0
    assert_whole(tmp_path)
