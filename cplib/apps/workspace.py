"""``open_workspace``: what a notebook starts from."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from cplib import datasets
from cplib.settings import setting
from cplib.study.jobs import ENGINES
from cplib.study.profiles import PROFILES, Profile
from cplib.study.store import Places
from cplib.study.workspace import UsageError, Workspace

ROOT = Path(__file__).resolve().parents[2]


def open_workspace(
    profile: str = "demo", data: str = "", categories: str = "", device: str = "auto"
) -> Workspace:
    """Find everything that a profile needs; an empty option means the profile's own.

    ``categories`` and $CPLIB_SEEDS limit what is executed, not what tables show.

    The demo set is made where it is missing. MVTec AD is looked for in ``data``, then in
    $MVTEC_ROOT; without it what needs no images still works. ``categories`` is a list with commas.
    The rest is in the environment: $CPLIB_RESULTS (a folder of profiles), $CPLIB_WEIGHTS,
    $CPLIB_SEEDS, $CPLIB_BUDGET ("45m"), $CPLIB_ENGINE. Raises UsageError, one line, for what is
    unknown or not there.
    """
    if profile not in PROFILES:
        raise UsageError(f"unknown profile {profile!r}: one of {', '.join(PROFILES)}")
    root = _data(PROFILES[profile], data)
    chosen, other = PROFILES[profile], ""
    if root and (named := datasets.identify(root)) != chosen.dataset:  # tables of their own
        there = tuple(datasets.categories(root))
        chosen, other = replace(chosen, dataset=named, categories=there), f"-{named}"
    home = Path(setting("CPLIB_RESULTS") or ROOT / "results").expanduser()
    results = home / f"{profile}{other}"
    weights = setting("CPLIB_WEIGHTS")
    if weights and not Path(weights).expanduser().is_dir():
        raise UsageError(f"no such folder of weights: {weights}")
    weights = Path(weights).expanduser().resolve() if weights else None
    engine = setting("CPLIB_ENGINE")
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}: one of {', '.join(ENGINES)}")
    # The nodes of a Ray cluster may have GPUs where this machine has none.
    here = find_device("auto" if (engine, device) == ("ray", "cuda") else device)
    return Workspace(
        profile=chosen,
        categories=_categories(chosen, categories, root),
        places=Places(_writable(results), root, weights, here),
        seeds=_seeds(setting("CPLIB_SEEDS")),
        budget=parse_budget(setting("CPLIB_BUDGET")),
        engine=engine,
        device=here if device == "auto" else device,
    )


def _data(profile: Profile, data: str) -> Path | None:
    named = data or (setting("MVTEC_ROOT") if profile.dataset != "demo" else "")
    if named:
        root = Path(named).expanduser().resolve()
        if not root.is_dir():
            raise UsageError(f"no such data folder: {root}")
        return root
    if profile.dataset != "demo":
        return None
    from cplib.apps import demo  # here: it takes a second

    return demo.make_demo(ROOT / "data" / f"demo-{demo.VERSION}")


def _categories(profile: Profile, wanted: str, root: Path | None) -> tuple[str, ...]:
    """The categories named, else the profile's at hand, $CPLIB_MAX_CATEGORIES of them at most."""
    names = tuple(c.strip() for c in wanted.split(",") if c.strip())
    there = datasets.categories(root) if root else list(profile.categories)
    if unknown := [c for c in names if c not in there]:
        raise UsageError(f"unknown category {unknown[0]!r}: one of {', '.join(there)}")
    at_hand = tuple(c for c in profile.categories if c in there) or tuple(there)
    limit = setting("CPLIB_MAX_CATEGORIES")
    return names or at_hand[: int(limit) if limit else None]


def _writable(folder: Path) -> Path:
    """The results folder, made if need be and shown to take a file."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"cannot write results to {folder}: {error.strerror}") from error
    return folder.resolve()


def _seeds(text: str) -> int | None:
    if text and not (text.isdigit() and int(text) > 0):
        raise UsageError(f"not a number of seeds: {text!r}")
    return int(text) if text else None


def find_device(device: str) -> str:
    """The device that "auto", "cpu" or "cuda" stands for; UsageError where it is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}: one of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device here: use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def parse_budget(text: str) -> float | None:
    """Seconds from "90s", "45m" or "1.5h"; None from nothing."""
    if not text:
        return None
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1])
    try:
        seconds = float(text[:-1]) * unit
    except (TypeError, ValueError):
        seconds = -1
    if not 0 < seconds < float("inf"):
        raise UsageError(f"not a time: {text!r} (write 90s, 45m or 2h)")
    return seconds
