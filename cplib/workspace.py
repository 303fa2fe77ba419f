"""Where a notebook works: a profile, its data, its results, and the device, found in one place."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from cplib import data, runs, sweep
from cplib.config import BASELINES, PROFILES, Profile, Run
from cplib.demo import make_demo
from cplib.model import weights_file
from cplib.synthetic import Anomaly

ROOT = Path(__file__).resolve().parents[1]


class UsageError(ValueError):
    """Something asked for that is not there; the message is one line that names it."""


@dataclass(frozen=True)
class Workspace:
    """A profile with its categories, seeds, folders and device: what every notebook starts from."""

    profile: Profile
    categories: tuple[str, ...]
    seeds: int | None  # as asked for; None: the profile's
    data: Path | None
    results: Path
    device: str
    weights: Path | None
    budget: float | None  # seconds
    engine: str = "local"

    def runs(self, methods: tuple[str, ...] | None = None) -> list[Run]:
        """The profile's runs for the categories and seeds at hand."""
        return self.profile.runs(methods, self.categories, self.seeds)

    def patch_runs(self) -> list[Run]:
        """The runs of the patch model (Table 2)."""
        return self.profile.patch_runs(self.categories, self.seeds)

    def ablation_runs(self, methods: tuple[str, ...]) -> list[Run]:
        """The runs of Tables 4 to 6: where a profile names categories for them, only those."""
        few = [c for c in self.categories if c in self.profile.ablation]
        return self.profile.runs(methods, few or self.categories, self.seeds)

    def finetune_runs(self) -> list[Run]:
        """The runs of Table 3: its backbone untrained, from ImageNet, and finetuned (A.4)."""
        few = tuple(c for c in self.categories if c in self.profile.ablation)
        methods, seeds = (*BASELINES, "cutpaste_3way"), self.seeds or self.profile.other_seeds
        return self.profile.runs(methods, few or self.categories, seeds, **self.profile.finetune)

    @property
    def anomaly(self) -> Anomaly:
        """How Table 6's anomalies are painted; digits are MNIST's where $CPLIB_MNIST is set."""
        digits = {"digits": "mnist"} if os.environ.get("CPLIB_MNIST") else {}
        return Anomaly(**(self.profile.anomaly | digits))

    @property
    def places(self) -> dict:
        """Results, data, weights and device, as the functions of ``cplib.runs`` name them."""
        return {
            "results": self.results,
            "data_root": self.data,
            "weights": self.weights,
            "device": self.device,
        }

    def missing(self, planned: list[Run]) -> list[Run]:
        """Those of the planned runs that are not in the results yet.

        UsageError where those that are there were measured on other pictures than ``data``'s.
        """
        absent = sweep.missing(planned, self.results)
        there = {(r.category, r.size): r for r in planned if r not in set(absent)}
        for run in there.values() if self.data else ():
            stored = runs.read(runs.run_folder(run, self.results))[1]["data"]["test"]
            if stored != data.fingerprint(self.load(run.category, "test", run.size)):
                raise UsageError(
                    f"{self.results} holds runs on other pictures of {run.category!r}: "
                    "name another folder with --results"
                )
        return absent

    def execute(self, todo: list[Run], **options) -> list[sweep.Outcome]:
        """Execute runs with this workspace's data, device and budget."""
        if todo and self.data is None:
            raise UsageError(f"{len(todo)} runs need data: set MVTEC_ROOT or pass --data DIR")
        options |= {"budget": self.budget, "engine": self.engine}
        return sweep.execute_all(todo, **self.places, **options)

    def collect(self, planned: list[Run]) -> pd.DataFrame:
        """The finished ones among the planned runs, a row each."""
        table = runs.collect(self.results)
        return table[table["id"].isin([run.id for run in planned])].reset_index(drop=True)

    def load(self, category: str, split: str, size: int = 256) -> data.Images:
        """One category's pictures."""
        if self.data is None:
            raise UsageError("no data set at hand: set MVTEC_ROOT or pass --data DIR")
        return data.load(self.data, category, split, size)

    def protocol(self, run: Run | None = None, seeds: str = "") -> str:
        """How the numbers were measured, in a line: stands beside every table."""
        run = run or self.profile.run("cutpaste_3way", self.categories[0])
        others = self.seeds or self.profile.other_seeds
        seeds = seeds or f"{self.seeds or self.profile.seeds} (CutPaste-3way), {others} (others)"
        crops = f" in {run.crop}-px crops" if run.crop and runs.trained(run) else ""
        crops += f", scored in {run.window}-px windows every {run.stride} px" if run.window else ""
        net = "" if run.backbone == "resnet18" else f"{run.backbone} "
        return (
            f"Profile {self.profile.name}: {run.size} px{crops}, {net}{self._updates(run)} "
            f"{run.sources} source pictures each; seeds: {seeds}.{self._features(run)}"
        )

    def _features(self, run: Run) -> str:
        """Which network the ImageNet features beside a run's are of, if it is another one."""
        other = self.profile.pretrained_backbone
        own = other == run.backbone or run.backbone != Run.backbone  # Table 3 has its own
        return "" if own else f" ImageNet features: {other}'s."

    def _updates(self, run: Run) -> str:
        start = "random weights"
        if run.init == "imagenet":
            file = self._weights_name(run)
            start = f"ImageNet weights{f' ({file})' if file else ''}"
            start += ", BatchNorm frozen" if run.freeze_batchnorm else ""
        head = f"{run.head_updates} updates of the head alone at {run.head_learning_rate:g}, then "
        head = head if run.head_updates else ""
        rate = f"learning rate {run.learning_rate:g}"
        return f"from {start}: {head}{run.updates} updates at {rate},"

    def _weights_name(self, run: Run) -> str:
        """The file of ImageNet weights that the run started from, or would start from here."""
        if runs.run_folder(run, self.results).exists():
            weights = runs.read(runs.run_folder(run, self.results))[1]["weights"]
            return weights["file"] if weights else ""
        file = weights_file(run.backbone, self.weights)
        return file.name if file else ""


def open_workspace(
    profile: str = "demo",
    *,
    data_root: str = "",
    categories: str = "",
    seeds: int = 0,
    results: str = "",
    device: str = "auto",
    weights: str = "",
    budget: str = "",
    engine: str = "local",
    say: Callable[[str], None] = print,
) -> Workspace:
    """Find everything that a profile needs; an empty option means the profile's own.

    The demo set is made where it is missing. MVTec AD is looked for in ``data_root``, then in
    $MVTEC_ROOT; without it what needs no pictures still works. ``categories`` is a list with
    commas, ``budget`` a time such as "45m". Results go to the profile's folder in $CPLIB_RESULTS,
    else in results/. Raises UsageError for what is unknown or not there.
    """
    if profile not in PROFILES:
        raise UsageError(f"unknown profile {profile!r}: one of {', '.join(PROFILES)}")
    if seeds < 0:
        raise UsageError(f"the number of seeds cannot be negative: {seeds}")
    chosen = PROFILES[profile]
    home = Path(os.environ.get("CPLIB_RESULTS") or ROOT / "results")
    folder = (Path(results) if results else home / profile).expanduser()
    root = _data(chosen, data_root, say)
    weights = weights or os.environ.get("CPLIB_WEIGHTS", "")
    if weights and not Path(weights).expanduser().is_dir():
        raise UsageError(f"no such folder of weights: {weights}")
    return Workspace(
        profile=chosen,
        categories=_categories(chosen, categories, root),
        seeds=seeds or None,
        data=root,
        results=_writable(folder),
        device=find_device(device),
        weights=Path(weights).expanduser().resolve() if weights else None,
        budget=parse_budget(budget),
        engine=engine,
    )


def _data(profile: Profile, data_root: str, say: Callable[[str], None]) -> Path | None:
    if data_root or (profile.dataset != "demo" and os.environ.get("MVTEC_ROOT")):
        root = Path(data_root or os.environ["MVTEC_ROOT"]).expanduser().resolve()
        if not root.is_dir():
            raise UsageError(f"no such data folder: {root}")
        return root
    if profile.dataset != "demo":
        return None
    root = ROOT / "data" / "demo"
    if not root.exists():
        say(f"making the demo data set in {root}")
    return make_demo(root)


def _categories(profile: Profile, wanted: str, root: Path | None) -> tuple[str, ...]:
    """The categories named, else the profile's at hand, $CPLIB_MAX_CATEGORIES of them at most."""
    names = tuple(c.strip() for c in wanted.split(",") if c.strip())
    if root is None:
        unknown = [c for c in names if c not in profile.categories]
        there = list(profile.categories)
    else:
        there = data.categories(root)
        unknown = [c for c in names if c not in there]
    if unknown:
        raise UsageError(f"unknown category {unknown[0]!r}: one of {', '.join(there)}")
    at_hand = tuple(c for c in profile.categories if c in there) or tuple(there)
    limit = os.environ.get("CPLIB_MAX_CATEGORIES")
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
