"""The profiles: which runs a table takes, under which protocol."""

from dataclasses import replace

import pytest

from cplib.datasets import DATASETS, MVTEC
from cplib.run import BASELINES, Run
from cplib.study.profiles import METHOD, PROFILES, TABLE1

PAPER, QUICK = PROFILES["paper"], PROFILES["quick"]
EVERY = pytest.mark.parametrize("name", PROFILES)


def test_the_paper_profile_is_the_papers_protocol():
    assert (PAPER.categories, PAPER.seeds, PAPER.other_seeds) == (MVTEC.categories, 5, 5)
    for method in TABLE1[1:]:
        expected = Run(method=method, category="bottle", seed=3)
        assert PAPER.run(method, "bottle", 3) == expected


def test_the_paper_profile_scores_windows_by_the_letter_of_the_appendix():
    patch = PAPER.run(METHOD, "bottle", protocol="patch")
    assert (patch.crop, patch.window, patch.stride) == (64, 32, 4)
    assert patch == replace(PAPER.run(METHOD, "bottle"), crop=64, window=32)
    assert all(PAPER.run(m, "bottle", protocol="patch").window == 32 for m in BASELINES)


def test_the_paper_profile_finetunes_by_the_letter_of_the_appendix():
    methods = (*BASELINES, METHOD)
    untrained, pretrained, run = (PAPER.run(m, "tile", protocol="finetune") for m in methods)
    assert (run.backbone, run.init, run.freeze_batchnorm) == ("efficientnet_b4", "imagenet", True)
    assert (run.head_updates, run.updates) == (10 * 256, 64 * 256)
    assert (run.head_learning_rate, run.learning_rate, 3 * run.sources) == (0.03, 1e-4, 24)
    assert run == replace(run, size=256, momentum=0.9, weight_decay=3e-5, optimizer="sgd", crop=0)
    assert (untrained.backbone, untrained.init) == (run.backbone, "random")
    assert (pretrained.backbone, pretrained.init) == (run.backbone, "imagenet")


@EVERY
def test_finetuning_does_not_take_what_a_profile_changed_for_training_from_scratch(name):
    profile = PROFILES[name]
    run = profile.run(METHOD, profile.categories[0], protocol="finetune")
    assert (run.optimizer, run.warmup, run.crop, run.curve) == ("sgd", 0, 0, 0)
    assert (run.head_batchnorm, run.freeze_batchnorm, run.init) == (True, True, "imagenet")
    assert run.size == profile.finetune.get("size", 256)


def test_the_demo_takes_its_patch_model_from_the_networks_of_table_1():
    image, patch = (PROFILES["demo"].run(METHOD, "sieve", protocol=p) for p in ("image", "patch"))
    assert (image.window, patch.window) == (0, 32)
    assert patch.training_id == image.training_id


@EVERY
def test_the_runs_of_a_profile_are_distinct_and_cover_it(name):
    profile = PROFILES[name]
    methods = (*BASELINES, *TABLE1)
    planned = profile.runs(methods, profile.categories)
    assert len({run.id for run in planned}) == len(planned)
    assert {(r.category, r.method) for r in planned} == {
        (category, method) for category in profile.categories for method in methods
    }
    assert {run.dataset for run in planned} == {profile.dataset}
    assert set(profile.categories) <= set(DATASETS[profile.dataset].categories)
    seeds = {method: {r.seed for r in planned if r.method == method} for method in methods}
    assert seeds["pretrained"] == {0}  # the same features whatever the seed
    assert seeds[METHOD] == set(range(profile.seeds))
    assert seeds["untrained"] == seeds["cutout"] == set(range(profile.other_seeds))


def test_a_baseline_keeps_only_what_it_depends_on():
    one = QUICK.run("untrained", "tile", learning_rate=0.1, patch_jitter=0.5)
    assert one == QUICK.run("untrained", "tile")
    assert one == Run(method="untrained", category="tile", updates=0)
    pretrained = Run(method="pretrained", category="tile", updates=0, init="imagenet")
    assert QUICK.run("pretrained", "tile") == pretrained
    names = [PROFILES["demo"].run(method, "brick").backbone for method in (*BASELINES, METHOD)]
    assert names == ["resnet18_quarter", "efficientnet_lite0", "resnet18_quarter"]
    scored = {"size": 128, "window": 32, "stride": 8, "l2_normalise": True, "reg_covar": 1e-3}
    assert QUICK.run("untrained", "tile", **scored) == replace(one, **scored)


def test_rotations_batch_has_as_many_images_as_the_others():
    rotation, cutpaste = (PAPER.run(method, "tile") for method in ("rotation", "cutpaste"))
    assert rotation.sources * rotation.classes == cutpaste.sources * cutpaste.classes == 64


def test_the_eighth_is_the_papers_protocol_with_an_eighth_of_its_updates():
    eighth = PROFILES["eighth"]
    run = Run(method=METHOD, category="screw", updates=65_536 // 8, sources=32, curve=8)
    assert eighth.runs((METHOD,), ("screw",)) == [run]
    patch = eighth.run(METHOD, "screw", protocol="patch")
    assert patch == replace(run, curve=0, crop=64, window=32)


def test_only_cutpaste_3way_notes_its_auroc_on_the_way():
    assert QUICK.run(METHOD, "tile").curve == QUICK.protocol["curve"] > 0
    assert QUICK.run("cutpaste", "tile").curve == 0
