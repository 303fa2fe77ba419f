"""Hostile files: whatever is read gives a result or one clear line, and never runs."""

import ast
import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import cplib
from cplib import datasets
from cplib.apps.detector import RECORD, TENSORS, Detector, fit_detector
from cplib.model import _encoder, _load_imagenet
from cplib.run import Run
from cplib.study import store
from cplib.study.jobs import execute
from cplib.study.store import Places

UNTRAINED = Run(method="untrained", category="sieve", dataset="demo", size=32, updates=0)
quick = settings(
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def tried(name, call, *arguments):
    """What the call returns; None where it refuses in one line that holds the name."""
    try:
        return call(*arguments)
    except (ValueError, UserWarning) as error:
        assert len(str(error).splitlines()) == 1
        assert str(name) in str(error)
        return None


# Images


def encoded(mode, format, frames):
    """An image of random bytes, None where the format has no such image."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    image = image if mode == "RGB" else image.convert("L").convert(mode)
    more = {"save_all": True, "append_images": [image]} if frames > 1 else {}
    with contextlib.suppress(OSError, ValueError, KeyError):
        image.save(file, format, **more)
        return file.getvalue()


VALID = [
    content
    for mode in ("1", "LA", "P", "RGB", "CMYK", "I;16", "F")
    for format in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "EPS")
    for frames in (1, 2)
    if (content := encoded(mode, format, frames))
]


def spoil(draw, content, others=(b"",)):
    """The bytes, then cut, changed, repeated or spliced with others."""
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, min(len(content), 400)))
        some = draw(st.binary(min_size=1, max_size=8))
        kinds = {
            "set": content[:at] + some + content[at + len(some) :],
            "insert": content[:at] + some + content[at:],
            "repeat": content + content[at:],
            "splice": content[:at] + draw(st.sampled_from(others))[at:],
        }
        content = kinds[draw(st.sampled_from(sorted(kinds)))]
    return content


def category(tmp_path):
    """An empty folder for the training images of a category, made anew."""
    folder = tmp_path / "set" / "nut" / "train" / "good"
    shutil.rmtree(tmp_path / "set", ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def load(tmp_path):
    """The training images, by way of a cache in the same folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CPLIB_CACHE", str(tmp_path / "cache"))
        return datasets.load(tmp_path / "set", "nut", "train", 8)


@pytest.mark.filterwarnings("ignore")
@settings(quick, max_examples=80)
@given(st.data(), st.sampled_from(VALID), st.sampled_from(datasets.SUFFIXES))
def test_an_image_of_any_kind_loads_or_is_named(tmp_path, data, content, suffix):
    path = category(tmp_path) / f"a{suffix}"
    path.write_bytes(spoil(data.draw, content, VALID))
    pixels, read, problems = datasets.read_images([path], 8)
    assert len(pixels) == len(read) == 1 - len(problems)
    assert all(str(path) in line and len(line.splitlines()) == 1 for line in problems)
    if images := tried(path, load, tmp_path):
        assert (images.pixels.shape, images.pixels.dtype) == ((1, 3, 8, 8), torch.uint8)


def png(side, *chunks):
    """A PNG of a header and chunks, with their checksums."""
    header = (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    parts = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in (header, *chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BOMB = zlib.compress(bytes(80 * 2**20))
BOMBS = {
    "pixels": png(60_000, (b"IDAT", BOMB)),
    "text": png(8, (b"zTXt", b"Comment\0\0" + BOMB)),
    "colour profile": png(8, (b"iCCP", b"name\0\0" + BOMB)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_that_would_grow_is_refused(tmp_path, kind):
    path = category(tmp_path) / "a.png"
    path.write_bytes(BOMBS[kind])
    assert tried(path, load, tmp_path) is None


def test_a_name_that_no_table_can_hold_and_a_pipe_are_refused(tmp_path):
    for name in (b"\xff\xfe.png", b"two\nlines.png"):
        (category(tmp_path) / os.fsdecode(name)).touch()
        assert tried("UTF-8", load, tmp_path) is None
    path = category(tmp_path) / "a.png"
    os.mkfifo(path)  # read, it would be waited for
    assert tried(path, load, tmp_path) is None


# Records


@pytest.fixture(scope="module")
def record(tmp_path_factory, demo_root):
    """The files of a finished run: their names and bytes."""
    folder = execute(UNTRAINED, Places(tmp_path_factory.mktemp("results"), demo_root))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored(tmp_path, files):
    """The run's folder with these files in it, made anew."""
    folder = store.run_folder(UNTRAINED, tmp_path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return folder


def collected(tmp_path, files):
    """Whether the run is in the table; where it is not, a warning names its folder."""
    with warnings.catch_warnings(action="error"):
        table = tried(stored(tmp_path, files), store.frame, [UNTRAINED], Places(tmp_path))
    assert table is None or np.isreal(table["image_auroc"][0])
    return table is not None


numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 2**63])
plain = st.none() | st.booleans() | numbers | st.text(max_size=8)
values = st.recursive(plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v))


def changed(draw, content):
    """A record with an entry of any kind, or JSON of any kind, or a damaged record."""
    kind = draw(st.sampled_from(["entry", "json", "damaged"]))
    if kind == "damaged":
        return spoil(draw, content)
    record, value = json.loads(content), draw(values)
    target = record["run"] if "run" in record and draw(st.booleans()) else record
    target[draw(st.sampled_from([*sorted(target), "id", "new"]))] = value
    return json.dumps(value if kind == "json" else record).encode()


def test_a_record_as_it_is_written_is_collected_but_none_that_cannot_be(tmp_path, record):
    assert collected(tmp_path, record)
    for content in (b"[" * 100_000, b"1" * 10_000, "{}".encode("utf-16"), b'{"version": 99}'):
        assert not collected(tmp_path, record | {"run.json": content})


@settings(quick, max_examples=60)
@given(st.data(), st.sampled_from(["run.json", "metrics.json"]))
def test_a_record_of_any_kind_is_collected_or_left_out(tmp_path, record, data, file):
    collected(tmp_path, record | {file: changed(data.draw, record[file])})


@quick
@given(values.map(json.dumps).map(str.encode) | st.sampled_from([b"", b"{", b"\xff", b"[" * 10**5]))
def test_what_is_kept_beside_a_run_is_read_or_named(tmp_path, record, content):
    file = stored(tmp_path, record | {"some.json": content}) / "some.json"
    found = tried(file, store.read_record, file)
    whole = content.startswith(b"{") and content != b"{"
    assert found is None if not whole else json.dumps(found).encode() == content


@quick
@given(st.data())
def test_damaged_scores_are_read_or_named(tmp_path, record, data):
    content = spoil(data.draw, record["scores.csv"], [record["scores.csv"][5:], b"\n,nan\n"])
    folder = stored(tmp_path, record | {"scores.csv": content})
    table = tried(folder, store.read_scores, folder)
    if table is not None:
        assert list(table) == ["file", "kind", "label", "score"]
        assert np.isfinite(table["score"]).all()
        assert set(table["label"]) <= {0, 1}
    whole = record["scores.csv"]
    for wrong in (b"", whole.replace(b",0,", b",2,"), whole.replace(b"001", b"000")):
        (folder / "scores.csv").write_bytes(wrong)
        assert tried(folder, store.read_scores, folder) is None


# Detectors


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """The files of a saved detector: their names and bytes."""
    folder = tmp_path_factory.mktemp("results") / "own"
    pixels = torch.arange(4 * 3 * 32 * 32).reshape(4, 3, 32, 32).mul(7919).byte()
    fit_detector(UNTRAINED, pixels, places=Places(folder.parent), folder=folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loaded(tmp_path, files):
    """Whether these files are a detector; where they are not, one line names the folder."""
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return tried(tmp_path, Detector.load, tmp_path) is not None


@settings(quick, max_examples=10)
@given(st.data())
def test_a_record_of_any_kind_makes_a_detector_or_one_line(tmp_path, detector, data):
    content = changed(data.draw, detector[RECORD])
    assert loaded(tmp_path, detector | {RECORD: content}) or content != detector[RECORD]


def test_tensors_that_are_cut_or_damaged_are_refused(tmp_path, detector):
    whole = detector[TENSORS]
    for at in (0, len(whole) // 2, len(whole) - 1):
        flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        assert not loaded(tmp_path, detector | {TENSORS: whole[:at]})
        assert not loaded(tmp_path, detector | {TENSORS: flipped})


# Code in files


class Payload:
    """What a hostile file holds: unpickled, it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def evil(tmp_path):
    """Files with code in them, in the ways that torch, NumPy and Python have written theirs.

    What the code would make must not be there when the test is over.
    """
    marker, scratch = tmp_path / "code was run", tmp_path / "scratch.npy"
    payload = Payload(marker)
    contents = [pickle.dumps(payload, protocol) for protocol in (0, 5)]
    for zipped in (True, False):
        torch.save({"fc.weight": payload}, scratch, _use_new_zipfile_serialization=zipped)
        contents.append(scratch.read_bytes())
    np.save(scratch, np.array([payload], object), allow_pickle=True)
    contents += [scratch.read_bytes(), f"__import__('os').mkdir({str(marker)!r})".encode()]
    yield contents
    assert not marker.exists()
    pickle.loads(contents[0])
    assert marker.is_dir()  # it would have run


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_imagenet_weights_or_a_runs_network_is_not_run(tmp_path, evil):
    run = Run(method="cutpaste", category="sieve", dataset="demo", size=32, updates=1)
    path, encoder = tmp_path / "resnet18-evil.pth", _encoder("resnet18")[0]
    file = store.checkpoint_file(run, tmp_path)
    file.parent.mkdir(parents=True)
    for content in evil:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path}: expected tensors of resnet18.*$"):
            _load_imagenet(encoder, "resnet18", tmp_path)
        file.write_bytes(content)
        assert tried(file, store.load_network, run, Places(tmp_path)) is None


def test_code_in_a_record_or_a_detector_is_not_run(tmp_path, record, detector, evil):
    for content in evil:
        assert not collected(tmp_path, record | {"run.json": content})
        assert not collected(tmp_path, record | {"metrics.json": content})
        assert not loaded(tmp_path, detector | {RECORD: content})
        assert not loaded(tmp_path, detector | {TENSORS: content})
        digest = {"sha256": hashlib.sha256(content).hexdigest()}
        believed = json.dumps(json.loads(detector[RECORD]) | digest).encode()
        assert not loaded(tmp_path, {TENSORS: content, RECORD: believed})


def test_code_in_an_image_or_in_the_cache_is_not_run(tmp_path, evil):
    path = category(tmp_path) / "a.png"
    for content in evil:
        path.write_bytes(content)
        assert tried(path, load, tmp_path) is None
    path.write_bytes(VALID[0])
    first = load(tmp_path)
    (entry,) = (tmp_path / "cache").iterdir()
    for content in evil:
        entry.write_bytes(content)
        assert torch.equal(load(tmp_path).pixels, first.pixels)


def test_no_module_calls_what_would_run_a_file():
    sources = list(Path(cplib.__file__).parent.rglob("*.py"))
    assert len(sources) > 20
    for source in sources:
        nodes = ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        for call in (node for node in nodes if isinstance(node, ast.Call)):
            name, place = ast.unparse(call.func), f"{source}: {ast.unparse(call)}"
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert name not in ("eval", "exec", "compile", "__import__", "os.system"), place
            assert not name.endswith((".read_pickle", "hub.load", "jit.load", "joblib.load")), place
            assert not name.startswith(("pickle.", "marshal.", "shelve.", "dill.", "yaml.")), place
            assert not {"shell", "allow_pickle"} & set(keywords), place
            assert name != "torch.load" or keywords["weights_only"] == "True", place
