"""Hostile files: whatever is read gives a result or one clear line, and never runs."""

import ast
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from cplib import data, layouts, runs
from cplib.config import Run
from cplib.data import DataError
from cplib.detector import RECORD, TENSORS, Detector
from cplib.model import _encoder, _load_imagenet
from cplib.records import density_metrics
from cplib.runs import collect

SOURCES = sorted(Path(data.__file__).parent.glob("*.py"))
UNTRAINED = Run(
    method="untrained", category="gear", dataset="demo", size=32, updates=0, gaussians="shared"
)
quick = settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@contextmanager
def one_line(*named, of=ValueError):
    """What is raised is of this kind, in one line, and names these."""
    with pytest.raises(of) as caught:
        yield
    assert len(str(caught.value).splitlines()) == 1
    for name in named:
        assert str(name) in str(caught.value)


# Pictures


def noise(mode, size):
    """A picture of random bytes in a mode, (width, height)."""
    random = np.random.default_rng(0)
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 2**16, size[::-1], np.uint16))
    if mode in ("I", "F"):
        return Image.fromarray(random.integers(0, 99, size[::-1]).astype(mode.lower() + "4"))
    pixels = random.integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(mode, format, size, frames):
    """A picture's bytes, None where the format has no such picture."""
    picture = noise(mode, size)
    more = {"save_all": True, "append_images": [picture] * (frames - 1)} if frames > 1 else {}
    file = io.BytesIO()
    try:
        picture.save(file, format, **more)
    except (OSError, ValueError, KeyError):
        return None
    return file.getvalue()


MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")
CONTAINERS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "ICO", "PPM", "PCX", "PDF", "EPS")
VALID = [
    content
    for mode in MODES
    for format in CONTAINERS
    for size, frames in [((9, 7), 1), ((1, 1), 1), ((300, 1), 1), ((9, 7), 3)]
    if (content := encoded(mode, format, size, frames))
]


@st.composite
def damaged(draw):
    """A valid picture of any kind, then cut, changed, repeated or spliced with another."""
    content = draw(st.sampled_from(VALID))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, min(len(content), 200)))
        kind = draw(st.sampled_from(("cut", "set", "insert", "repeat", "splice")))
        some = draw(st.binary(min_size=1, max_size=8))
        content = {
            "cut": content[:at],
            "set": content[:at] + some + content[at + len(some) :],
            "insert": content[:at] + some + content[at:],
            "repeat": content + content[at:],
            "splice": content[:at] + draw(st.sampled_from(VALID))[at:],
        }[kind]
    return content


def category(tmp_path):
    """An empty folder for the training pictures of a category, made anew."""
    folder = tmp_path / "set" / "nut" / "train" / "good"
    shutil.rmtree(tmp_path / "set", ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def load(tmp_path, **options):
    return data.load(tmp_path / "set", "nut", "train", 8, cache=tmp_path / "cache", **options)


@pytest.mark.filterwarnings("ignore")
@quick
@given(damaged(), st.sampled_from(layouts.SUFFIXES))
def test_a_picture_of_any_kind_loads_or_is_named(tmp_path, content, suffix):
    path = category(tmp_path) / f"a{suffix}"
    path.write_bytes(content)
    pixels, read, problems = data.read([path], 8)
    assert len(pixels) == len(read) == 1 - len(problems)
    assert all(str(path) in line and len(line.splitlines()) == 1 for line in problems)
    try:
        images = load(tmp_path)
    except DataError as error:
        assert str(path) in str(error)
        assert len(str(error).splitlines()) == 1
    else:
        assert images.pixels.shape == (1, 3, 8, 8)
        assert images.pixels.dtype == torch.uint8


@pytest.mark.filterwarnings("ignore")
@quick
@given(damaged())
def test_a_mask_of_any_kind_loads_or_is_named(tmp_path, content):
    good = category(tmp_path)
    for kind in ("test/bent", "ground_truth/bent"):
        (good.parents[1] / kind).mkdir(parents=True)
    noise("RGB", (9, 7)).save(good.parents[1] / "test/bent/0.png")
    path = good.parents[1] / "ground_truth/bent/0_mask.png"
    path.write_bytes(content)
    try:
        images = data.load(tmp_path / "set", "nut", "test", 8, cache=tmp_path / "cache")
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert images.masks.shape == (1, 8, 8)


def test_pictures_that_are_whole_load_whatever_their_name_says(tmp_path):
    for format in ("PNG", "JPEG", "BMP", "TIFF", "WEBP"):
        noise("RGB", (9, 7)).save(category(tmp_path) / "a.png", format)
        assert load(tmp_path).pixels.float().std() > 10


def png(width, height, *chunks):
    """A PNG of a header and chunks, with their checksums."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    parts = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in (header, *chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BOMB = zlib.compress(bytes(300 * 2**20))
BOMBS = {
    "pixels": png(60_000, 60_000, (b"IDAT", BOMB)),
    "a side": png(2**31 - 1, 1, (b"IDAT", BOMB)),
    "both sides": png(2**31 - 1, 2**31 - 1, (b"IDAT", BOMB)),
    "nothing": png(0, 0, (b"IDAT", b"")),
    "text": png(8, 8, (b"zTXt", b"Comment\0\0" + BOMB)),
    "colour profile": png(8, 8, (b"iCCP", b"name\0\0" + BOMB)),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_that_would_grow_is_refused(tmp_path, kind):
    path = category(tmp_path) / "a.png"
    path.write_bytes(BOMBS[kind])
    with one_line(path, of=DataError):
        load(tmp_path)


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (4000, 3000)])
def test_tiny_thin_and_large_pictures_load(tmp_path, size):
    Image.new("RGB", size, "red").save(category(tmp_path) / "a.png")
    assert load(tmp_path).pixels[0, :, 4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("name", [b"\xff\xfe.png", b"two\nlines.png", b"\xe9t\xe9.png"])
def test_a_name_that_no_table_can_hold_is_refused(tmp_path, name):
    path = os.path.join(os.fsencode(category(tmp_path)), name)
    try:
        Path(os.fsdecode(path)).touch()
    except OSError:
        pytest.skip("no such names on this file system")
    with one_line("UTF-8", of=DataError):
        load(tmp_path)


@pytest.mark.parametrize("name", ["été.png", "图.png", "a\u202fb.png", 'a,"b".png', " .png"])
def test_any_other_name_is_kept(tmp_path, name):
    noise("RGB", (9, 7)).save(category(tmp_path) / name)
    assert load(tmp_path).names == (f"train/good/{name}",)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    path = category(tmp_path) / "a.png"
    os.mkfifo(path)
    with one_line(path, of=DataError):
        load(tmp_path)


# Records


@pytest.fixture(scope="module")
def record(tmp_path_factory, demo_root):
    """The files of a finished run: their names and bytes."""
    results = tmp_path_factory.mktemp("results")
    folder = runs.execute(UNTRAINED, data_root=demo_root, results=results)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored(tmp_path, files, name=UNTRAINED.id):
    """A results folder with this one run in it, made anew."""
    results = tmp_path / "results"
    shutil.rmtree(results, ignore_errors=True)
    folder = results / "runs" / name
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return results


def collected(results):
    """The table, and the folder's warning where it was left out."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        table = collect(results)
    assert len(table) + len(told) == 1
    for warning in told:
        assert str(results) in str(warning.message)
        assert len(str(warning.message).splitlines()) == 1
    return table


def test_a_record_as_it_is_written_is_collected(tmp_path, record):
    assert collected(stored(tmp_path, record))["id"].tolist() == [UNTRAINED.id]


bools = st.booleans()
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 2**63])
plain = st.none() | st.booleans() | numbers | st.text(max_size=8)
values = st.recursive(plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v))


@quick
@given(st.data())
def test_an_entry_of_any_kind_is_collected_or_left_out(tmp_path, record, draws):
    read = {name: json.loads(record[name]) for name in ("run.json", "metrics.json")}
    target = read[draws.draw(st.sampled_from(sorted(read)))]
    if "run" in target and draws.draw(bools):
        target = target["run"]
    key = draws.draw(st.sampled_from(sorted(target)) | st.sampled_from(["id", "seed", "new"]))
    if draws.draw(bools):
        target[key] = draws.draw(values)
    else:
        target.pop(key, None)
    try:
        name = Run.from_dict(read["run.json"]["run"]).id
        stored(tmp_path, {}, name)
    except (ValueError, TypeError, OverflowError, OSError, KeyError):
        name = UNTRAINED.id
    results = stored(tmp_path, record | {n: json.dumps(v).encode() for n, v in read.items()}, name)
    table = collected(results)
    assert table["id"].tolist() in ([], [name])
    for column in ("image_auroc", "train_seconds"):
        assert all(value is None or float(value) is not None for value in table[column])


@quick
@given(st.sampled_from(["run.json", "metrics.json"]), values)
@example("run.json", [])
@example("metrics.json", [1])
@example("metrics.json", {"method": 1})
def test_json_of_any_kind_is_collected_or_left_out(tmp_path, record, file, value):
    collected(stored(tmp_path, record | {file: json.dumps(value).encode()}))


@quick
@given(st.sampled_from(["run.json", "metrics.json"]), st.data())
def test_a_damaged_record_is_collected_or_left_out(tmp_path, record, file, draws):
    content = record[file]
    at = draws.draw(st.integers(0, len(content)))
    some = draws.draw(st.binary(max_size=4))
    end = draws.draw(st.sampled_from([at, at + len(some), len(content)]))
    collected(stored(tmp_path, record | {file: content[:at] + some + content[end:]}))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "cp037"])
def test_a_record_in_another_encoding_is_left_out(tmp_path, record, encoding):
    content = record["run.json"].decode().encode(encoding)
    assert len(collected(stored(tmp_path, record | {"run.json": content}))) == 0


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"version":' * 50_000, b"1" * 10_000])
def test_a_record_that_is_deep_or_long_is_left_out(tmp_path, record, content):
    assert len(collected(stored(tmp_path, record | {"run.json": content}))) == 0


def test_a_record_of_the_next_version_is_left_out(tmp_path, record):
    value = json.loads(record["run.json"]) | {"version": runs.RECORD_VERSION + 1}
    files = record | {"run.json": json.dumps(value).encode()}
    assert len(collected(stored(tmp_path, files))) == 0


@quick
@given(values | st.just({"fits": []}))
def test_a_record_beside_a_run_is_read_or_named(tmp_path, record, value):
    results = stored(tmp_path, record | {"density.json": json.dumps(value).encode()})
    if isinstance(value, dict):
        found = density_metrics(UNTRAINED, results=results, data_root=None)
        assert json.dumps(found) == json.dumps(json.loads(json.dumps(value)))
    else:
        with one_line(results / "runs" / UNTRAINED.id / "density.json"):
            density_metrics(UNTRAINED, results=results, data_root=None)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000])
def test_a_damaged_record_beside_a_run_is_named(tmp_path, record, content):
    results = stored(tmp_path, record | {"density.json": content})
    with one_line("density.json"):
        density_metrics(UNTRAINED, results=results, data_root=None)


@quick
@given(st.data())
def test_damaged_scores_are_read_or_named(tmp_path, record, draws):
    content = record["scores.csv"]
    at = draws.draw(st.integers(0, len(content)))
    some = draws.draw(st.binary(max_size=4) | st.sampled_from([b"\n", b",", b"nan", b'"']))
    end = draws.draw(st.sampled_from([at, at + len(some), len(content)]))
    results = stored(tmp_path, record | {"scores.csv": content[:at] + some + content[end:]})
    folder = results / "runs" / UNTRAINED.id
    try:
        table = runs.read_scores(folder)
    except ValueError as error:
        assert str(folder) in str(error)
        assert len(str(error).splitlines()) == 1
    else:
        assert list(table) == ["file", "kind", "label", "score"]
        assert np.isfinite(table["score"]).all()
        assert set(table["label"]) <= {0, 1}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "file,kind,label,score\n",
        "file,kind,label\na.png,good,0\n",
        "file,kind,label,score\na.png,good,2,0.1\n",
        "file,kind,label,score\na.png,good,0,nan\n",
        "file,kind,label,score\na.png,good,0,1\na.png,good,1,1\n",
        "file,kind,label,score\na.png,good,0,x\n",
    ],
)
def test_scores_that_are_none_are_named(tmp_path, record, content):
    folder = stored(tmp_path, record | {"scores.csv": content.encode()}) / "runs" / UNTRAINED.id
    with one_line(folder / "scores.csv"):
        runs.read_scores(folder)


def test_a_folder_that_is_a_file_or_lacks_its_files_is_left_out(tmp_path, record):
    results = stored(tmp_path, {"run.json": record["run.json"]})
    assert len(collected(results)) == 0
    shutil.rmtree(results / "runs" / UNTRAINED.id)
    (results / "runs" / UNTRAINED.id).touch()
    assert len(collected(results)) == 0


# Detectors


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """The files of a saved detector: their names and bytes."""
    folder = tmp_path_factory.mktemp("detector")
    pixels = torch.arange(4 * 3 * 32 * 32).reshape(4, 3, 32, 32).mul(7919).byte()
    Detector.fit(UNTRAINED, pixels).save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loaded(tmp_path, files):
    """The detector in these files, None where it is refused in one line that names the folder."""
    for name, content in files.items():
        path = tmp_path / name
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)
    try:
        return Detector.load(tmp_path)
    except ValueError as error:
        assert str(tmp_path) in str(error)
        assert len(str(error).splitlines()) == 1
        return None


def test_a_detector_as_it_is_saved_is_loaded(tmp_path, detector):
    assert loaded(tmp_path, detector).run.method == "untrained"


@settings(quick, max_examples=12)
@given(st.data())
def test_a_detectors_entry_of_any_kind_is_loaded_or_refused(tmp_path, detector, draws):
    record = json.loads(detector[RECORD])
    target = record[draws.draw(st.sampled_from(["run", "data"]))] if draws.draw(bools) else record
    target[draws.draw(st.sampled_from([*target, "new"]))] = draws.draw(values)
    loaded(tmp_path, detector | {RECORD: json.dumps(record).encode()})


@settings(quick, max_examples=12)
@given(st.sampled_from([RECORD, TENSORS]), st.data())
def test_a_damaged_detector_is_refused(tmp_path, detector, file, draws):
    content = detector[file]
    at = draws.draw(st.integers(0, len(content) - 1))
    content = content[:at] + draws.draw(
        st.sampled_from([b"", b"\xff", b"\xff" + content[at + 1 :]])
    )
    assert loaded(tmp_path, detector | {file: content}) is None


@settings(quick, max_examples=12)
@given(st.binary(max_size=200), st.integers(0, 3))
def test_tensors_that_are_none_are_refused_although_their_hash_is_right(
    tmp_path, detector, some, kept
):
    content = detector[TENSORS][: [0, 8, 300, 10**9][kept]] + some
    record = json.loads(detector[RECORD]) | {"sha256": hashlib.sha256(content).hexdigest()}
    same = content == detector[TENSORS]
    files = {TENSORS: content, RECORD: json.dumps(record).encode()}
    assert (loaded(tmp_path, files) is None) != same


def test_code_in_a_detector_is_not_run(tmp_path, detector, marker):
    for content in hostile(marker):
        record = json.loads(detector[RECORD]) | {"sha256": hashlib.sha256(content).hexdigest()}
        hashed = {TENSORS: content, RECORD: json.dumps(record).encode()}
        for files in (detector | {RECORD: content}, detector | {TENSORS: content}, hashed):
            assert loaded(tmp_path, files) is None


# Code in files


class Payload:
    """What a hostile file holds: unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """Where the payload would show; it must not exist when the test is over."""
    path = tmp_path / "code was run"
    yield path
    assert not path.exists()


def hostile(marker):
    """Files with code in them, in the ways that torch, NumPy and Python have written theirs."""
    payload, scratch = Payload(marker), marker.with_name("scratch")
    torch.save({"fc.weight": payload}, scratch)
    zipped = scratch.read_bytes()
    torch.save({"fc.weight": payload}, scratch, _use_new_zipfile_serialization=False)
    legacy = scratch.read_bytes()
    np.save(scratch.with_suffix(".npy"), np.array([payload], object), allow_pickle=True)
    yield from (pickle.dumps(payload, protocol) for protocol in range(6))
    yield from (zipped, legacy, scratch.with_suffix(".npy").read_bytes())
    yield f"__import__('os').mkdir({str(marker)!r})".encode()


def test_the_payload_would_run_where_it_is_let(tmp_path):
    pickle.loads(next(hostile(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


@pytest.fixture(scope="module")
def encoders():
    return {backbone: _encoder(backbone)[0] for backbone in ("resnet18", "efficientnet_lite0")}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_imagenet_weights_is_not_run(tmp_path, marker, encoders):
    path = tmp_path / "resnet18-evil.pth"
    for content in hostile(marker):
        path.write_bytes(content)
        with one_line(path, "resnet18"):
            _load_imagenet(encoders["resnet18"], "resnet18", tmp_path)


def test_code_in_a_runs_model_is_not_run(tmp_path, marker):
    run = Run(method="cutpaste", category="gear", dataset="demo", size=32, updates=1)
    file = runs.checkpoint_file(run, tmp_path)
    file.parent.mkdir(parents=True)
    for content in list(hostile(marker))[::3]:
        file.write_bytes(content)
        with one_line(file):
            runs.load_model(run, tmp_path)


def test_code_in_a_record_is_not_run(tmp_path, record, marker):
    for content in hostile(marker):
        for file in ("run.json", "metrics.json"):
            assert len(collected(stored(tmp_path, record | {file: content}))) == 0


def test_code_in_a_picture_and_in_the_cache_is_not_run(tmp_path, marker):
    path = category(tmp_path) / "a.png"
    for content in hostile(marker):
        path.write_bytes(content)
        with one_line(path, of=DataError):
            load(tmp_path)
    noise("RGB", (9, 7)).save(path)
    first = load(tmp_path)
    (entry,) = (tmp_path / "cache").iterdir()
    for content in hostile(marker):
        entry.write_bytes(content)
        assert torch.equal(load(tmp_path).pixels, first.pixels)


WEIGHTS = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("weights"),
    "a list": lambda path: torch.save([1, 2], path),
    "a tensor": lambda path: torch.save(torch.ones(2), path),
    "other names": lambda path: torch.save({"a": torch.ones(2)}, path),
    "names that are numbers": lambda path: torch.save({1: torch.ones(2)}, path),
    "values that are text": lambda path: torch.save({"conv1.weight": "x"}, path),
    "other shapes": lambda path: torch.save({"conv1.weight": torch.ones(2)}, path),
    "safetensors": lambda path: save_file({"conv1.weight": torch.ones(2)}, path),
    "a folder": lambda path: path.mkdir(),
    "another zip": lambda path: zipfile.ZipFile(path, "w").close(),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_lite0"])
def test_weights_of_any_other_kind_are_refused(tmp_path, kind, backbone, encoders):
    path = tmp_path / f"{backbone}.pth"
    WEIGHTS[kind](path)
    with one_line(path, backbone):
        _load_imagenet(encoders[backbone], backbone, tmp_path)


def test_weights_that_are_cut_are_refused(tmp_path, encoders):
    path = tmp_path / "resnet18.pth"
    torch.save({"conv1.weight": torch.ones(64, 3, 7, 7)}, path)
    whole = path.read_bytes()
    for kept in range(0, len(whole), len(whole) // 20):
        path.write_bytes(whole[:kept])
        with one_line(path):
            _load_imagenet(encoders["resnet18"], "resnet18", tmp_path)


def calls(source):
    """Every call in a module: its dotted name, and the keywords with their values."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_module_calls_what_would_run_a_file(source):
    for name, keywords in calls(source):
        assert name not in ("eval", "exec", "compile", "__import__", "os.system"), name
        assert not name.endswith((".read_pickle", ".hub.load", "jit.load", "joblib.load")), name
        assert not name.startswith(("pickle.", "marshal.", "shelve.", "dill.", "yaml.")), name
        assert keywords.get("shell") is None, name
        if name == "torch.load":
            assert keywords["weights_only"] == "True"
        if name == "np.load":
            assert "allow_pickle" not in keywords
