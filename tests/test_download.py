"""The download of MVTec AD, against a server on this machine that misbehaves in every way."""

import errno
import hashlib
import io
import socket
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from cplib import download as module
from cplib.__main__ import main
from cplib.data import DataError, categories, load
from cplib.download import MVTEC, Archive, download

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


def picture(seed):
    """A PNG of noise: as good as incompressible, so that the archive is cut in many places."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PICTURES = [
    member(f"{category}/{name}", picture(i))
    for category in ("bolt", "nut")
    for i, name in enumerate(NAMES)
]
WHOLE = packed(*PICTURES, member("license.txt", b"CC"))


@pytest.fixture
def server():
    """A server of ``content``; ``steps`` says how each request in turn is answered."""
    state = SimpleNamespace(content=WHOLE, steps=[], ranges=[], release=threading.Event())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.ranges.append(self.headers.get("Range"))
            step = state.steps.pop(0) if state.steps else {}
            answer(self, state, **step)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    state.address = f"http://127.0.0.1:{http.server_port}/set.tar.xz"
    yield state
    state.release.set()
    http.shutdown()
    http.server_close()
    thread.join()


def answer(
    handler, state, *, status=None, deaf=False, send=None, length=0, stall=False, at=None, type=""
):
    """One reply: ``send`` bytes at most of what was asked for, its length off by ``length``."""
    asked = handler.headers.get("Range")
    start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and not deaf else 0
    if status is None and start >= len(state.content):
        status = 416
    if status:
        return handler.send_error(status)
    body = state.content[start:]
    handler.send_response(206 if start else 200)
    if start:
        at = start if at is None else at
        handler.send_header("Content-Range", f"bytes {at}-{len(state.content) - 1}/*")
    if length is not None:
        handler.send_header("Content-Length", str(len(body) + length))
    handler.end_headers()
    handler.wfile.write(body[:send])
    handler.wfile.flush()
    if stall:
        state.release.wait(10)
    return None


@pytest.fixture
def archive(server):
    """The server's archive, asked for impatiently."""
    return archive_of(server.content, server.address)


def archive_of(content, address):
    return Archive(
        address=address,
        sha256=hashlib.sha256(content).hexdigest(),
        page="https://example.org/page",
        licence="CC BY-NC-SA 4.0",
        gigabytes=1e-6,
        timeout=0.3,
        attempts=2,
        pause=0.001,
    )


def fetched(archive, tmp_path):
    return download(tmp_path / "set", accept_licence=True, archive=archive)


def assert_whole(tmp_path):
    """The data set is there and nothing else."""
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert categories(tmp_path / "set") == ["bolt", "nut"]
    for category in ("bolt", "nut"):
        for i, name in enumerate(NAMES):
            assert (tmp_path / "set" / category / name).read_bytes() == picture(i)


def refusal(archive, tmp_path):
    """The one line with which the download is refused; no data set is left."""
    with pytest.raises(DataError) as caught:
        fetched(archive, tmp_path)
    assert "\n" not in str(caught.value)
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"set.tar.xz.part", "outside"}
    return str(caught.value)


# A server that behaves, and one that breaks off


def test_a_whole_download(server, archive, tmp_path, capsys):
    assert fetched(archive, tmp_path) == tmp_path / "set"
    assert_whole(tmp_path)
    assert server.ranges == [None]
    assert len(load(tmp_path / "set", "nut", "test", 8)) == 2
    told = capsys.readouterr()
    assert "download: 100%" in told.out
    assert "unpack: 100%" in told.out
    assert told.err == ""


def test_a_connection_that_breaks_is_resumed_where_it_broke(server, archive, tmp_path):
    cuts = [1000, 1, len(WHOLE) // 3]
    server.steps = [{"send": cut} for cut in cuts]
    fetched(archive, tmp_path)
    assert_whole(tmp_path)
    wanted = [f"bytes={sum(cuts[: i + 1])}-" for i in range(len(cuts))]
    assert server.ranges == [None, *wanted]


def test_more_breaks_than_attempts_do_no_harm_while_bytes_arrive(server, archive, tmp_path):
    server.steps = [{"send": 500}] * 12
    fetched(archive, tmp_path)
    assert_whole(tmp_path)


def test_a_server_that_ignores_ranges_is_asked_from_the_start(server, archive, tmp_path):
    server.steps = [{"send": 5000}, {"deaf": True, "send": 7000}, {"deaf": True}]
    fetched(archive, tmp_path)
    assert_whole(tmp_path)


def test_a_server_that_ignores_ranges_and_always_breaks_is_given_up(server, archive, tmp_path):
    server.steps = [{"deaf": True, "send": 5000}] * 9
    assert f"closed after 5000 of {len(WHOLE)} bytes" in refusal(archive, tmp_path)
    assert len(server.ranges) == 3


def test_a_server_that_stalls_is_asked_again(server, archive, tmp_path):
    server.steps = [{"send": 3000, "stall": True}]
    fetched(archive, tmp_path)
    assert_whole(tmp_path)
    assert server.ranges == [None, "bytes=3000-"]


def test_a_server_that_only_stalls_is_given_up(server, archive, tmp_path):
    server.steps = [{"send": 0, "stall": True}] * 9
    assert "timed out" in refusal(replace(archive, timeout=0.1), tmp_path)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_in_trouble_is_asked_again(server, archive, tmp_path, status):
    server.steps = [{"status": status}, {"send": 100}, {"status": status}]
    fetched(archive, tmp_path)
    assert_whole(tmp_path)


def test_a_second_call_goes_on_where_the_first_was_cut_off(server, archive, tmp_path):
    server.steps = [{"send": 4000}, {"status": 500}, {"status": 500}]
    assert "500" in refusal(archive, tmp_path)
    fetched(archive, tmp_path)
    assert_whole(tmp_path)
    assert server.ranges[-1] == "bytes=4000-"


def test_a_call_cut_off_after_the_last_byte_only_checks_and_unpacks(server, archive, tmp_path):
    (tmp_path / "set.tar.xz.part").write_bytes(WHOLE)
    (tmp_path / ".set.unpacking" / "rust" / "train" / "good").mkdir(parents=True)
    fetched(archive, tmp_path)
    assert_whole(tmp_path)


def test_what_is_there_is_not_fetched_again(server, archive, tmp_path, capsys):
    fetched(archive, tmp_path)
    fetched(archive, tmp_path)
    assert len(server.ranges) == 1
    assert "bolt, nut already" in capsys.readouterr().out


# A server that lies


def test_a_length_that_is_too_long_harms_nothing(server, archive, tmp_path):
    server.steps = [{"length": 1000}]
    fetched(archive, tmp_path)
    assert_whole(tmp_path)


def test_a_length_that_is_too_short_is_found_by_the_hash(server, archive, tmp_path):
    server.steps = [{"length": -1000, "send": len(WHOLE) - 1000}]
    assert archive.sha256 in refusal(archive, tmp_path)
    assert list(tmp_path.iterdir()) == []
    fetched(archive, tmp_path)
    assert_whole(tmp_path)


def test_no_length_at_all(server, archive, tmp_path):
    server.steps = [{"length": None}]
    fetched(archive, tmp_path)
    assert_whole(tmp_path)


@pytest.mark.parametrize("at", [4001, 10**15, "x", -3])
def test_another_range_than_was_asked_for_is_not_taken(server, archive, tmp_path, at):
    server.steps = [{"send": 4000}, *[{"at": at}] * 9]
    refusal(archive, tmp_path)
    assert (tmp_path / "set.tar.xz.part").stat().st_size == 4000


def test_another_file_behind_a_broken_one_is_found_by_the_hash(server, archive, tmp_path):
    (tmp_path / "set.tar.xz.part").write_bytes(b"page not found" * 9)
    assert archive.sha256 in refusal(archive, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_is_refused_and_removed(server, archive, tmp_path):
    server.content = b"<html>sign in</html>"
    line = refusal(archive, tmp_path)
    for part in ("20 bytes with SHA-256", archive.page, "<category>/{train/good"):
        assert part in line
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_not_the_servers_fault(server, archive, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(module, "_receive", Mock(side_effect=full))
    line = refusal(archive, tmp_path)
    assert "no space left" in line
    assert archive.page not in line
    assert module._receive.call_count == 1


# An address that is gone


@pytest.mark.parametrize("status", [403, 404, 410, 416])
def test_an_address_that_is_gone_names_the_page_and_the_layout(server, archive, tmp_path, status):
    server.steps = [{"status": status}]
    line = refusal(archive, tmp_path)
    for part in (archive.address, str(status), archive.page, "<category>/{train/good"):
        assert part in line
    assert len(server.ranges) == 1


def test_a_server_that_is_not_there(archive, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # never listens
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        assert "refused" in refusal(replace(archive, address=address), tmp_path)


# Archives that are not what they should be


def served(server, content):
    """The archive when the server has this, and its hash was believed."""
    server.content = content
    return archive_of(content, server.address)


@pytest.mark.parametrize("kept", [0, 1, 100, len(WHOLE) // 2, len(WHOLE) - 30, len(WHOLE) - 1])
def test_a_truncated_archive_leaves_nothing(server, tmp_path, kept):
    refusal(served(server, WHOLE[:kept]), tmp_path)


def test_a_flipped_bit_leaves_nothing(server, tmp_path):
    content = bytearray(WHOLE)
    content[len(WHOLE) // 2] ^= 1
    refusal(served(server, bytes(content)), tmp_path)


LEAVING = {
    "parent": [member("../outside", b"x")],
    "hidden parent": [member("nut/../../outside", b"x")],
    "link": [member("nut/link", kind=tarfile.SYMTYPE, link="../../outside")],
    "link, then through it": [
        member("nut/link", kind=tarfile.SYMTYPE, link=".."),
        member("nut/link/outside", b"x"),
    ],
    "hard link": [member("nut/link", kind=tarfile.LNKTYPE, link="../outside")],
    "device": [member("nut/device", kind=tarfile.CHRTYPE)],
    "pipe": [member("nut/pipe", kind=tarfile.FIFOTYPE)],
}


@pytest.mark.parametrize("name", LEAVING)
def test_members_that_leave_the_folder_are_refused(server, tmp_path, name):
    (tmp_path / "outside").write_text("mine")
    refusal(served(server, packed(*PICTURES, *LEAVING[name])), tmp_path)
    assert (tmp_path / "outside").read_text() == "mine"


def test_an_absolute_path_stays_in_the_folder(server, tmp_path):
    outside = tmp_path / "outside"
    fetched(served(server, packed(*PICTURES, member(str(outside), b"x"))), tmp_path)
    assert not outside.exists()


def test_an_archive_of_something_else_is_refused(server, tmp_path):
    line = refusal(served(server, packed(member("thesis.txt", b"x"))), tmp_path)
    assert "no category" in line


# The folder, the space and the licence


def test_an_empty_folder_is_taken_and_one_with_other_things_is_not(archive, tmp_path):
    (tmp_path / "set").mkdir()
    fetched(archive, tmp_path)
    assert_whole(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="other things; expected a new or empty folder"):
        download(tmp_path / "other", accept_licence=True, archive=archive)
    with pytest.raises(DataError, match="letter.txt"):
        download(tmp_path / "other" / "letter.txt", accept_licence=True, archive=archive)


def test_too_little_space_is_said_before_anything_is_fetched(server, archive, tmp_path):
    line = refusal(replace(archive, gigabytes=1e9), tmp_path)
    assert "2000000000.0 GB: half for the archive" in line
    assert server.ranges == []


@pytest.mark.parametrize("reply", ["n", "", "maybe"])
def test_without_the_licence_nothing_is_fetched(server, archive, tmp_path, monkeypatch, reply):
    monkeypatch.setattr("builtins.input", lambda question: reply)
    with pytest.raises(DataError, match="licence not accepted"):
        download(tmp_path / "set", archive=archive)
    assert server.ranges == []


def test_the_licence_is_asked_for_once(server, archive, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    server.steps = [{"send": 100}, {"status": 404}]
    with pytest.raises(DataError):
        download(tmp_path / "set", archive=archive)
    download(tmp_path / "set", archive=archive)
    assert_whole(tmp_path)
    assert len(asked) == 1
    assert archive.licence in asked[0]


@pytest.mark.parametrize("error", [EOFError, NotImplementedError])
def test_without_a_keyboard_the_option_is_named(archive, tmp_path, monkeypatch, error):
    def no_keyboard(question):
        raise error

    monkeypatch.setattr("builtins.input", no_keyboard)
    with pytest.raises(DataError, match="--accept-licence"):
        download(tmp_path / "set", archive=archive)


# The command


def test_the_command_fetches(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MVTEC", archive)
    assert main(["download", str(tmp_path / "set"), "--accept-licence"]) == 0
    assert_whole(tmp_path)


def test_the_command_fails_in_one_line(server, archive, tmp_path, monkeypatch, capsys):
    server.steps = [{"status": 404}]
    monkeypatch.setattr(module, "MVTEC", archive)
    assert main(["download", str(tmp_path / "set"), "--accept-licence"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert archive.page in line


def test_the_command_says_that_it_can_be_stopped(archive, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "fetch", stop)
    assert main(["download", str(tmp_path / "set"), "--accept-licence"]) == 130
    assert "goes on" in capsys.readouterr().err


def test_the_address_is_mvtecs_and_the_hash_is_one():
    assert MVTEC.address.startswith("https://")
    assert len(bytes.fromhex(MVTEC.sha256)) == 32
    assert "NC" in MVTEC.licence
