"""Environment variables: their defaults, and the one module that reads them."""

import re
from pathlib import Path

import pytest

import cplib
from cplib.settings import setting


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_unset_or_empty_has_its_default(monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("CPLIB_CHECKPOINT_SECONDS", value)
    assert setting("CPLIB_CHECKPOINT_SECONDS") == "30"
    monkeypatch.setenv("CPLIB_CHECKPOINT_SECONDS", "5")
    assert setting("CPLIB_CHECKPOINT_SECONDS") == "5"


def test_a_variable_that_is_not_documented_is_not_read(monkeypatch):
    monkeypatch.setenv("CPLIB_NONSENSE", "1")
    with pytest.raises(KeyError):
        setting("CPLIB_NONSENSE")


def test_no_other_module_reads_the_environment():
    reading = re.compile(r"environ\.get|getenv|environ\[[^\]]+\](?! =)")
    modules = Path(cplib.__file__).parent.rglob("*.py")
    texts = {path.name: path.read_text(encoding="utf-8") for path in modules}
    assert [name for name, text in texts.items() if reading.search(text)] == ["settings.py"]
