"""The profiles of ``profiles.toml``: how many runs, of which categories, under which protocol."""

import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path

from cplib.datasets import DATASETS
from cplib.run import BASELINES, SCORING, Run

METHOD = "cutpaste_3way"
TABLE1 = ("rotation", "cutout", "scar", "cutpaste", "cutpaste_scar", METHOD)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A named set of runs. ``profiles.toml`` says what each of its protocols is."""

    name: str
    about: str  # what is measured, in words for a title
    dataset: str
    small: bool = False  # a notebook may execute what it finds missing: minutes on any machine
    seeds: int  # of cutpaste_3way in Table 1: the ensemble is made of them
    other_seeds: int  # of every other method, of the patch model and of Table 3
    categories: tuple[str, ...] = ()  # empty: the data set's
    protocol: dict = field(default_factory=dict)  # fields of Run that differ from the paper's
    patch: dict = field(default_factory=dict)  # what the patch model changes of ``protocol``
    finetune: dict = field(default_factory=dict)  # Table 3's; ``protocol`` is not part of it
    pretrained: dict = field(default_factory=dict)  # fields of Run of the ImageNet features
    sensitivity: dict = field(default_factory=dict)  # Tables 7 and 8, and the unstated choices
    anomalies: int = 40  # images painted of each kind in Table 6, at least
    extra: tuple[dict, ...] = ()  # rows that tables have in this profile alone: ``tables.Row``

    def fields(self, protocol: str) -> dict:
        """The fields of ``Run`` that a protocol changes; "paper" changes none."""
        return {
            "image": self.protocol,
            "patch": self.protocol | self.patch,
            "finetune": self.finetune,
            "sensitivity": self.protocol | self.sensitivity["protocol"],
            "paper": {},
        }[protocol]

    def run(
        self, method: str, category: str, seed: int = 0, protocol: str = "image", **changes
    ) -> Run:
        """One run under a protocol of this profile; a baseline keeps only what it depends on."""
        head = {"method": method, "category": category, "seed": seed, "dataset": self.dataset}
        run = Run(**head, **(self.fields(protocol) | changes))
        if method not in BASELINES:
            # Four classes in the batch that two take (A.1: 64 images): half the sources.
            sources = max(1, run.sources // 2) if method == "rotation" else run.sources
            return replace(run, sources=sources, curve=run.curve * (method == METHOD))
        kept = {name: getattr(run, name) for name in ("size", "backbone", *SCORING)}
        bare = Run(**head, **(kept | {"updates": 0, "curve": 0}))
        if method == "untrained":
            return bare
        own = {} if protocol == "finetune" else self.pretrained
        return replace(bare, init="imagenet", **{k: changes.get(k, v) for k, v in own.items()})

    def runs(self, methods, categories) -> list[Run]:
        """The image-level runs of methods and categories."""
        return [
            self.run(method, category, seed)
            for category in categories
            for method in methods
            for seed in range(self.seeds_of(method, "image"))
        ]

    def seeds_of(self, method: str, protocol: str, least: int = 0) -> int:
        """How many seeds a method has under a protocol, and never fewer than ``least``."""
        if method == "pretrained":  # the same features whatever the seed
            return 1
        if protocol == "sensitivity":
            return max(least, self.sensitivity["seeds"])
        ensemble = method == METHOD and protocol == "image"
        return max(least, self.seeds if ensemble else self.other_seeds)


def _profiles() -> dict[str, Profile]:
    """The profiles by name; TypeError for an entry that ``Profile`` or its study does not have."""
    text = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    entries = _tuples(tomllib.loads(text))
    defaults, found = entries.pop("defaults"), {}
    for name, own in entries.items():
        if unknown := {*own.get("sensitivity", ())} - {*defaults["sensitivity"]}:
            raise TypeError(f"profile {name}: unknown in its sensitivity: {', '.join(unknown)}")
        like = found[own.pop("like")] if "like" in own else defaults
        found[name] = like | own
        for part, values in defaults.items():
            found[name][part] = values | found[name][part]
    for values in found.values():
        values["categories"] = values.get("categories") or DATASETS[values["dataset"]].categories
    return {name: Profile(name=name, **values) for name, values in found.items()}


def _tuples(value):
    """The same with a tuple in place of each list."""
    if isinstance(value, dict):
        return {key: _tuples(v) for key, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


PROFILES = _profiles()
