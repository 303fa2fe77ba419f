"""EfficientNets and their levels, finetuned in two phases (Table 3, section 4.3, A.4)."""

import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
import torchvision
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor

from cplib import data, model, records, runs, sweep, train
from cplib.config import BASELINES, PROFILES, Profile, Run
from cplib.model import PretextNet, embed, levels
from cplib.published import against_paper, published
from cplib.tables import FINETUNED, TABLES, all_runs
from cplib.workspace import open_workspace

TABLE = "table3_pretrained_vs_finetuned"
B4, LITE = "efficientnet_b4", "efficientnet_lite0"
CHANNELS = {
    B4: [48, 24, 32, 56, 112, 160, 272, 448, 1792],
    LITE: [32, 16, 24, 40, 80, 112, 192, 320, 1280],
}
BOTH = pytest.mark.parametrize("backbone", [B4, LITE])
START = Run(
    method="cutpaste_3way",
    category="brick",
    dataset="demo",
    size=64,
    sources=2,
    init="imagenet",
    freeze_batchnorm=True,
    head_updates=2,
    updates=2,
    learning_rate=0.01,
    precision="fp32",
)


def pictures(n=3, size=64):
    """Random pictures, uint8."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with made-up ImageNet weights of an EfficientNet-B4, BatchNorm statistics, too."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(99)
        net = torchvision.models.efficientnet_b4()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1)
    torch.save(net.state_dict(), folder / "efficientnet_b4-made-up.pth")
    return folder


@pytest.fixture
def start(weights):
    """A function: the network with its first weights, and the run, of a backbone."""
    return lambda backbone: (
        train.build(replace(START, backbone=backbone), weights),
        replace(START, backbone=backbone),
    )


def encoder_state(net):
    return {k: v.clone() for k, v in net.encoder.state_dict().items()}


def changed(net, before):
    return {k for k, v in net.encoder.state_dict().items() if not torch.equal(v, before[k])}


# Levels


@BOTH
def test_the_channels_of_the_nine_levels(backbone):
    net = PretextNet(2, backbone=backbone).eval()
    assert len(levels(net.encoder)) == 9
    assert [embed(net, pictures(1), level=i).shape[1] for i in range(1, 10)] == CHANNELS[backbone]


def test_level_7_of_b4_has_the_papers_272_channels_at_a_32nd_of_the_side():
    net = PretextNet(2, backbone=B4).eval()
    with torch.no_grad():
        maps = nn.Sequential(*levels(net.encoder)[:7])(torch.zeros(1, 3, 256, 256))
    assert maps.shape == (1, 272, 8, 8)


def test_level_7_of_b4_is_that_of_torchvisions_network(weights):
    net = PretextNet(2, backbone=B4, init="imagenet", weights=weights)
    theirs = torchvision.models.efficientnet_b4()
    theirs.load_state_dict(torch.load(weights / "efficientnet_b4-made-up.pth", weights_only=True))
    nodes = {"features.6": "level7", "flatten": "pooled"}
    theirs = create_feature_extractor(theirs.eval(), nodes)
    preset = torchvision.models.EfficientNet_B4_Weights.IMAGENET1K_V1.transforms()
    x = pictures().float() / 255
    x = torchvision.transforms.functional.normalize(x, preset.mean, preset.std)
    with torch.no_grad():
        expected = theirs(x)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(embed(net, pictures(), level=7), F.adaptive_avg_pool2d(expected["level7"], 1)[..., 0, 0])
    close(embed(net, pictures()), expected["pooled"])


def test_level_7_of_lite0_is_that_of_timms_network():
    net = PretextNet(2, backbone=LITE, init="imagenet")
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    theirs.load_state_dict(net.encoder.state_dict())
    kept = {}
    theirs.blocks[5].register_forward_hook(lambda m, i, out: kept.update(level7=out))
    with torch.no_grad():
        pooled = theirs((pictures().float() - 127) / 128)
    close = partial(torch.testing.assert_close, rtol=0.02, atol=0.02)  # 0.498 is not quite 127/255
    close(embed(net, pictures(), level=7), kept["level7"].mean((2, 3)))
    close(embed(net, pictures()), pooled)


@BOTH
def test_the_last_level_pooled_is_what_the_other_tables_score(backbone):
    net = PretextNet(2, backbone=backbone)
    torch.testing.assert_close(embed(net, pictures(), level=9), embed(net, pictures()))


def test_a_resnet_has_no_level_7_and_says_so():
    with pytest.raises(ValueError, match="only an EfficientNet"):
        embed(PretextNet(2), pictures(), level=7)


# Weights


@pytest.mark.parametrize("backbone", ["resnet18", B4])
def test_pixels_are_normalised_as_torchvisions_weights_were_trained(backbone):
    preset = torchvision.models.get_model_weights(backbone)["IMAGENET1K_V1"].transforms()
    assert model.PIXELS[backbone] == (tuple(preset.mean), tuple(preset.std))


def test_b4s_weights_are_exactly_those_of_the_file(weights):
    net = PretextNet(2, backbone=B4, init="imagenet", weights=weights)
    stored = torch.load(weights / "efficientnet_b4-made-up.pth", weights_only=True)
    held = net.encoder.state_dict()
    assert {k for k in stored if k not in held} == {"classifier.1.weight", "classifier.1.bias"}
    assert all(torch.equal(v, stored[k]) for k, v in held.items())


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@BOTH
def test_weights_that_carry_code_are_refused_and_the_code_does_not_run(tmp_path, backbone):
    trace = tmp_path / "ran"
    torch.save({"features.0.0.weight": Payload(trace)}, tmp_path / f"{backbone}.pth")
    with pytest.raises(ValueError, match=f"expected tensors of {backbone}"):
        PretextNet(2, backbone=backbone, init="imagenet", weights=tmp_path)
    assert not trace.exists()


def test_weights_that_are_nowhere_come_from_torchvisions_hub_with_its_hash(tmp_path, monkeypatch):
    asked = []

    def fetch(url, **options):
        asked.append((url, options))
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fetch)
    with pytest.raises(OSError, match="no network"):
        PretextNet(2, backbone=B4, init="imagenet", weights=tmp_path)
    ((url, options),) = asked
    assert Path(url).name.startswith("efficientnet_b4")
    assert (options["check_hash"], options["weights_only"]) == (True, True)


def test_the_record_of_a_run_names_b4s_weights_and_their_digest(demo_root, tmp_path, weights):
    run = replace(START, method="pretrained", backbone=B4, freeze_batchnorm=False)
    run = replace(run, head_updates=0, updates=0)
    folder = runs.execute(run, data_root=demo_root, results=tmp_path, weights=weights)
    file = weights / "efficientnet_b4-made-up.pth"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    record = json.loads((folder / "run.json").read_text())
    assert record["weights"] == {"file": file.name, "sha256": digest}
    assert record["run"]["backbone"] == B4


# The two phases


@BOTH
def test_the_encoder_stays_as_it_is_while_the_head_is_trained_alone(start, weights, backbone):
    before, run = start(backbone)
    net, _ = train.fit(replace(run, updates=0), pictures(), weights=weights)
    assert changed(net, encoder_state(before)) == set()
    assert not torch.equal(net.head[0].weight, before.head[0].weight)


@BOTH
def test_all_of_the_encoder_but_batchnorm_moves_in_the_second_phase(start, weights, backbone):
    before, run = start(backbone)
    net, _ = train.fit(run, pictures(), weights=weights)
    norms = (nn.BatchNorm2d,)
    frozen = {n for n, m in before.encoder.named_modules() if isinstance(m, norms)}
    assert len(frozen) > 40
    state = encoder_state(before)
    assert changed(net, state) == {k for k in state if k.rpartition(".")[0] not in frozen}


def test_b4_drops_layers_in_the_second_phase_and_not_while_the_head_is_trained_alone(start):
    losses = {True: set(), False: set()}
    for head_only in losses:
        for seed in range(3):
            net, run = start(B4)
            run = replace(run, head_updates=int(head_only))
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                generator = torch.Generator().manual_seed(0)
                optimizer = train.optimiser(run, net)
                scaler = train.grad_scaler(run, "cpu")
                out = train.step(run, net, optimizer, pictures(), generator, scaler)
            losses[head_only].add(out[0].item())
    assert len(losses[True]) == 1
    assert len(losses[False]) == 3


def test_a_run_of_b4_neither_reads_nor_moves_the_global_random_state(weights):
    run, nets = replace(START, backbone=B4, head_updates=1), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        nets.append(train.fit(run, pictures(), weights=weights)[0])
        assert torch.equal(torch.get_rng_state(), state)
    one, other = (net.state_dict() for net in nets)
    assert all(torch.equal(v, other[k]) for k, v in one.items())


def test_a_run_of_b4_stopped_after_every_update_ends_the_same(weights, tmp_path):
    run, file = replace(START, backbone=B4, head_updates=1), tmp_path / "checkpoint.safetensors"
    whole, _ = train.fit(run, pictures(), weights=weights)
    stopped = partial(train.fit, run, pictures(), weights=weights, checkpoint=file, deadline=0)
    for _ in range(2):
        with pytest.raises(train.OutOfTime):
            stopped()
    again = stopped()[0].state_dict()
    assert all(torch.equal(v, again[k]) for k, v in whole.state_dict().items())


# The table


def test_the_paper_profile_finetunes_by_the_letter_of_the_appendix():
    run = PROFILES["paper"].run("cutpaste_3way", "bottle", **PROFILES["paper"].finetune)
    assert (run.backbone, run.init, run.freeze_batchnorm) == (B4, "imagenet", True)
    assert (run.head_updates, run.updates) == (10 * 256, 64 * 256)
    assert (run.head_learning_rate, run.learning_rate, 3 * run.sources) == (0.03, 1e-4, 24)
    assert run == replace(run, size=256, momentum=0.9, weight_decay=3e-5, optimizer="sgd", crop=0)


def test_a_profile_by_default_finetunes_as_the_paper():
    profile = Profile(
        name="own", dataset="own", categories=("a",), methods=("cutpaste",), seeds=1, other_seeds=1
    )
    assert profile.finetune == PROFILES["paper"].finetune


@pytest.mark.parametrize("name", PROFILES)
def test_a_network_is_trained_once_for_both_rows(name, tmp_path):
    workspace = open_workspace(name, results=str(tmp_path))
    planned = workspace.finetune_runs()
    assert planned == TABLES[TABLE].planned(workspace)
    assert len(set(planned)) == len(planned)
    assert set(planned) <= set(all_runs(workspace))
    assert {run.method for run in planned} == {*BASELINES, "cutpaste_3way"}
    assert {run.backbone for run in planned} == {workspace.profile.finetune["backbone"]}
    assert {run.init for run in planned if run.method != "untrained"} == {"imagenet"}
    trained = [run for run in planned if runs.trained(run)]
    categories = {run.category for run in trained}
    assert len(trained) == workspace.profile.other_seeds * len(categories)
    assert categories == set(workspace.profile.ablation or workspace.categories)


def test_the_demo_shares_its_imagenet_features_with_table_1(tmp_path):
    workspace = open_workspace("demo", results=str(tmp_path))
    features = {run for run in workspace.finetune_runs() if run.method == "pretrained"}
    assert features <= set(workspace.runs())


def test_the_protocol_names_the_backbone_both_phases_and_the_seeds(tmp_path):
    workspace = open_workspace("demo", results=str(tmp_path))
    run = next(r for r in workspace.finetune_runs() if runs.trained(r))
    line = workspace.protocol(run, TABLES[TABLE].seeds(workspace))
    for part in (LITE, "40 updates of the head", "BatchNorm frozen", "rate 0.001,", "seeds: 1."):
        assert part in line


@pytest.fixture(scope="module")
def lite(demo_root, tmp_path_factory):
    """A finished run of ImageNet features of EfficientNet-Lite0, and the places."""
    run = PROFILES["smoke"].run("pretrained", "gear", **PROFILES["smoke"].finetune)
    places = {"results": tmp_path_factory.mktemp("results"), "data_root": demo_root}
    runs.execute(run, **places)
    return run, places


def test_the_score_of_a_level_is_a_library_gaussians_and_stands_beside_the_run(lite):
    run, places = lite
    found = records.level_metrics(run, 7, **places)
    net = train.build(run)
    normal, test = (data.load(places["data_root"], "gear", s, run.size) for s in ("train", "test"))
    z, z_test = (F.normalize(embed(net, s.pixels, level=7).double()) for s in (normal, test))
    density = GaussianMixture(1, reg_covar=run.reg_covar).fit(z.numpy())
    expected = 100 * roc_auc_score(test.labels, -density.score_samples(z_test.numpy()))
    assert found["image_auroc"] == pytest.approx(expected, abs=1e-6)
    own = json.loads((runs.run_folder(run, places["results"]) / "metrics.json").read_text())
    assert found["image_ap"] != own["image_ap"]
    assert records.level_metrics(run, 7, **(places | {"data_root": None})) == found


def test_a_level_that_cannot_be_scored_here_is_none(lite):
    run, places = lite
    assert records.level_metrics(run, 6, **(places | {"data_root": None})) is None
    assert records.level_metrics(replace(run, seed=9), 7, **places) is None


def test_every_row_but_the_baseline_stands_in_the_papers_table():
    assert set(published(TABLE)["method"]) == set(FINETUNED)
    assert TABLES[TABLE].rows == ("untrained", *FINETUNED)
    rows = pd.DataFrame(
        {"method": FINETUNED, "category": "bottle", "seed": 0, "image_auroc": [50.0] * 4}
    )
    table = against_paper(rows, TABLE, methods=TABLES[TABLE].rows)
    table = table[table["category"] == "bottle"].set_index("method")
    assert table.loc["level7_finetuned", ["mean", "published_mean"]].tolist() == [50, 100]
    assert table.loc["pool_pretrained", "published_mean"] == 99.8


def test_the_rate_of_one_backbone_says_nothing_of_another(monkeypatch, tmp_path):
    rate = {"device": "abacus", "images_per_second": 2.0, "backbone": LITE, "size": 64, "crop": 0}
    monkeypatch.setattr(sweep, "collect", lambda results: pd.DataFrame([rate]))
    hours = [
        sweep.estimate([replace(START, backbone=b)], tmp_path, "abacus")["hours"].iloc[0]
        for b in (LITE, B4)
    ]
    assert hours[0] == pytest.approx(4 * 2 * 3 / 2 / 3600)
    assert pd.isna(hours[1])
