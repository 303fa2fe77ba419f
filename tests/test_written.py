"""Files are written whole or not at all: on a full disk what was there stays."""

import contextlib
import resource
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from cplib.apps import notebooks, pages
from cplib.study.figures import save_figure
from cplib.study.report import save_markdown, write_csv


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 10 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


TABLE = pd.DataFrame({"method": ["cutpaste"], "mean": [90.0]})
WRITERS = {
    "figure": lambda folder: save_figure(plt.figure(), folder, "a"),
    "table": lambda folder: write_csv(folder / "tables" / "a.csv", TABLE),
    "text": lambda folder: save_markdown(folder, "a", "A note on this table.", [TABLE]),
    "pages": pages.write_pages,
    "minutes": lambda folder: notebooks.note_minutes(folder / "minutes.json", "02_train", 0.1),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_what_was_there(tmp_path, name):
    write = partial(WRITERS[name], tmp_path)
    write()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before
    with full_disk(), pytest.raises(OSError, match="cannot write"):
        write()
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    plt.close("all")


def test_minutes_that_cannot_be_read_are_noted_anew(tmp_path):
    file = tmp_path / "minutes.json"
    file.write_text("")
    with pytest.warns(UserWarning, match=str(file)):
        notebooks.note_minutes(file, "02_train", 0.1)
    assert '"02_train": 0.1' in file.read_text()
