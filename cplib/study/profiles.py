"""The profiles of ``profiles.toml``: which runs a table takes, under which protocol."""

import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

from cplib.datasets import DATASETS
from cplib.run import BASELINES, Run

METHOD = "cutpaste_3way"
TABLE1 = ("rotation", "cutout", "scar", "cutpaste", "cutpaste_scar", METHOD)
# The patch model trains on crops of 64 px (4.2) and scores windows of 32 px at stride 4 (A.5).
PATCH = {"crop": 64, "whole": 0.0, "window": 32, "stride": 4}
# The head alone for 10 "epochs", then all layers for 64, 24 images a batch (A.4).
FINETUNE = {
    "backbone": "efficientnet_b4",
    "init": "imagenet",
    "freeze_batchnorm": True,
    "optimizer": "sgd",
    "warmup": 0.0,
    "crop": 0,
    "whole": 0.0,
    "head_batchnorm": True,
    "head_updates": 2560,
    "updates": 16_384,
    "sources": 8,
    "learning_rate": 1e-4,
    "curve": 0,
}


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What one setting at a time is changed to: Tables 7 and 8, then what the paper leaves open.

    Of the latter the deepest head and the strongest jitter are the authors' earlier code's.
    """

    categories: tuple[str, ...] = ()  # empty: all
    seeds: int = 1
    protocol: dict = field(default_factory=dict)  # fields that differ from the profile's
    learning_rate: tuple[float, ...] = (10 / 3, 1, 1 / 3, 1 / 10)  # times the protocol's own
    updates: tuple[float, ...] = (0.5, 0.75, 1, 1.25, 1.5)  # times the protocol's own
    patch_jitter: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3)
    max_area: tuple[float, ...] = (0.1, 0.15, 0.2, 0.3)  # of the patch, a share of the image
    open_categories: tuple[str, ...] = ("screw", "transistor")  # of what follows
    head: tuple[tuple[int, ...], ...] = ((), (512, 128), (512,) * 8 + (128,))
    translate: tuple[float, ...] = (0.0, 0.125, 0.25)
    jitter: tuple[tuple[float, ...], ...] = (
        (0.0, 0.0, 0.0, 0.0),
        (0.1, 0.1, 0.1, 0.0),
        (0.125, 0.4, 0.4, 0.0),
    )


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A named set of runs: which categories, methods and seeds, under which protocol."""

    name: str
    about: str  # what is measured, in words for a title
    dataset: str
    small: bool = False  # a notebook may execute what it finds missing: minutes on any machine
    seeds: int  # of cutpaste_3way, the method that the ensemble is made of
    other_seeds: int  # of every other method
    categories: tuple[str, ...] = ()  # empty: the data set's
    protocol: dict = field(default_factory=dict)  # fields of Run that differ from the paper's
    ablation: tuple[str, ...] = ()  # categories of Tables 3 to 6; empty: all
    patch: dict = field(default_factory=dict)  # fields of the patch model that differ from PATCH
    finetune: dict = field(default_factory=dict)  # fields of Table 3 that differ from FINETUNE
    pretrained_backbone: str = "resnet18"
    sensitivity: Sensitivity = Sensitivity()
    anomalies: int = 40  # images painted of each kind in Table 6, at least
    cut_short: int = 0  # updates of the paper's schedule that stand beside (notebook 09); 0: none
    four_times: tuple[str, ...] = ()  # categories also trained four times as long
    wide_windows: tuple[str, ...] = ()  # categories also scored by windows of crop size (Table 2)

    def run(self, method: str, category: str, seed: int = 0, **changes) -> Run:
        """One run under this profile's protocol; a baseline keeps only what it depends on."""
        run = Run(
            method=method,
            category=category,
            seed=seed,
            dataset=self.dataset,
            **(self.protocol | changes),
        )
        if method not in BASELINES:
            # Four classes in the batch that two take (A.1: 64 images): half the sources.
            sources = max(1, run.sources // 2) if method == "rotation" else run.sources
            return replace(run, sources=sources, curve=run.curve * (method == METHOD))
        bare = Run(
            method=method,
            category=category,
            seed=seed,
            dataset=run.dataset,
            size=run.size,
            updates=0,
            l2_normalise=run.l2_normalise,
            reg_covar=run.reg_covar,
            window=run.window,
            stride=run.stride,
            gaussians=run.gaussians,
            heat_std=run.heat_std,
        )
        if method == "pretrained":
            backbone = changes.get("backbone", self.pretrained_backbone)
            return replace(bare, init="imagenet", backbone=backbone)
        return replace(bare, backbone=run.backbone)

    def runs(
        self, methods, categories, seeds: int | None = None, *, least: int = 0, **changes
    ) -> list[Run]:
        """The runs of the methods and categories.

        With ``seeds`` of each or the profile's own number, and never fewer than ``least``.
        """
        return [
            self.run(method, category, seed, **changes)
            for category in categories
            for method in methods
            for seed in range(self._seeds(method, seeds, least))
        ]

    def _seeds(self, method: str, seeds: int | None, least: int) -> int:
        if method == "pretrained":  # the same features whatever the seed
            return 1
        return max(least, seeds or (self.seeds if method == METHOD else self.other_seeds))

    def patch_runs(self, categories, least: int = 0) -> list[Run]:
        """The patch model's runs (Table 2), and the baselines scored on the same windows."""
        fields = PATCH | self.patch | {"curve": 0, "least": least}
        runs = self.runs((*BASELINES, METHOD), categories, self.other_seeds, **fields)
        return [run for run in runs if run.method == METHOD or run.seed == 0]

    def finetune_runs(self, categories, least: int = 0) -> list[Run]:
        """The runs of Table 3: its backbone untrained, from ImageNet, and finetuned (A.4)."""
        fields = FINETUNE | self.finetune | {"least": least}
        return self.runs((*BASELINES, METHOD), categories, self.other_seeds, **fields)

    def other_schedules(self, categories) -> list[Run]:
        """Runs whose curves stand beside the profile's own, one seed.

        The paper's schedule cut to ``cut_short`` updates, and the own one four times as long.
        """
        fields = {"dataset": self.dataset, "updates": self.cut_short, "curve": 4}
        paper = [Run(method=METHOD, category=c, **fields) for c in categories if self.cut_short]
        own = self.runs((METHOD,), [c for c in categories if c in self.four_times], 1)
        return paper + [replace(run, updates=4 * run.updates) for run in own]


def _profiles() -> dict[str, Profile]:
    """The profiles by name; TypeError for an entry that ``Profile`` does not have."""
    found = {}
    for name, entries in tomllib.loads(
        Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    ).items():
        entries = found[entries.pop("like")] | entries if "like" in entries else entries
        found[name] = entries
    return {name: _profile(name, **entries) for name, entries in found.items()}


def _profile(name: str, sensitivity: dict | None = None, categories=(), **entries) -> Profile:
    return Profile(
        name=name,
        categories=tuple(categories) or DATASETS[entries["dataset"]].categories,
        sensitivity=Sensitivity(**_tuples(sensitivity or {})),
        **_tuples(entries),
    )


def _tuples(value):
    """The same with a tuple in place of each list."""
    if isinstance(value, dict):
        return {key: _tuples(v) for key, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


PROFILES = _profiles()
