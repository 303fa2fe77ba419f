"""The network: features, levels, frozen BatchNorm, ImageNet weights; finetuning of Table 3."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import skimage.data
import timm
import torch
import torchvision
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor

from cplib import datasets, model, train
from cplib.model import PretextNet, build, embed, levels, weights_digest, weights_file
from cplib.run import Run
from cplib.study.measures import level7
from cplib.study.profiles import PROFILES

RESNET, B4, LITE = "resnet18", "efficientnet_b4", "efficientnet_lite0"
CATS = range(281, 288)  # domestic and big cats among ImageNet's classes
CHANNELS = {
    B4: [48, 24, 32, 56, 112, 160, 272, 448, 1792],
    LITE: [32, 16, 24, 40, 80, 112, 192, 320, 1280],
}
BOTH = pytest.mark.parametrize("backbone", [B4, LITE])
SMALL = {"dataset": "demo", "size": 64, "sources": 2, "precision": "fp32"}
FINETUNED = {"init": "imagenet", "freeze_batchnorm": True, "head_updates": 1, "updates": 2}
START = Run(method="cutpaste_3way", category="brick", learning_rate=0.01, **SMALL, **FINETUNED)
START_RANDOM = replace(START, init="random", freeze_batchnorm=False)


def images(n=3, size=64):
    """Random images, uint8."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with made-up ImageNet weights, BatchNorm statistics, too."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(99)
        for backbone in (RESNET, B4):
            net = torchvision.models.get_model(backbone)
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.uniform_(-0.1, 0.1)
                    module.running_var.uniform_(0.5, 1)
            torch.save(net.state_dict(), folder / f"{backbone}-made-up.pth")
    return folder


@pytest.fixture
def frozen(weights):
    return PretextNet(2, init="imagenet", freeze_batchnorm=True, weights=weights)


def state(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def changed(net, before):
    return {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}


# Features and logits


@pytest.mark.parametrize(
    ("backbone", "width", "pixels"),
    [(RESNET, 512, model.PIXELS), (LITE, 1280, model.LITE0_PIXELS)],
)
def test_logits_are_the_head_on_the_encoders_features_of_normalised_pixels(backbone, width, pixels):
    net, x = PretextNet(3, backbone=backbone).eval(), images().float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in pixels)
    assert net.features(x).shape == (3, width)
    torch.testing.assert_close(net.features(x), net.encoder((x - mean) / std))
    assert net(x).shape == (3, 3)
    assert torch.equal(net(x), net.head(net.features(x)))


@pytest.mark.parametrize("head", [(), (64,), (32, 32, 32)])
def test_the_head_has_the_hidden_widths_asked_for(head):
    linear = [m for m in PretextNet(2, head=head).head if isinstance(m, nn.Linear)]
    assert [m.in_features for m in linear] == [512, *head]
    assert [m.out_features for m in linear] == [*head, 2]
    plain = PretextNet(2, head=head, head_batchnorm=False).head
    assert [type(m).__name__ for m in plain] == ["Linear", "ReLU"] * len(head) + ["Linear"]
    assert all(m.bias is not None for m in plain[::2])


def test_an_embedding_is_the_plain_forward_whatever_the_batch_and_leaves_no_trace(monkeypatch):
    net, pixels = PretextNet(2), images(7, 32)
    before = state(net)
    monkeypatch.setattr(model, "EMBED_BATCH", 3)
    found = embed(net, pixels)
    assert changed(net, before) == set()
    with torch.no_grad():
        expected = net.eval().features(pixels.float() / 255)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found.dtype, found.requires_grad) == (torch.float32, False)


def test_batches_get_smaller_where_the_memory_is_full_and_one_row_is_the_least():
    sizes, x = [], torch.arange(11.0)

    def work(part, most=3):
        sizes.append(len(part))
        if len(part) > most:
            raise torch.OutOfMemoryError
        return 2 * part

    assert torch.equal(model.in_batches(work, x, 8), 2 * x)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        model.in_batches(lambda part: work(part, 0), x, 8)


def test_features_are_taken_in_full_precision_with_cudnn_left_on(monkeypatch):
    seen, net = [], PretextNet(2)

    def spied(x, level):
        seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
        return x

    monkeypatch.setattr(net, "features", spied)
    embed(net, images(1))
    assert seen == [(True, False)]
    assert torch.backends.cudnn.allow_tf32


def test_a_network_depends_on_its_seed_and_on_nothing_else():
    torch.manual_seed(1)
    one, global_state = build(START_RANDOM), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), global_state)
    torch.manual_seed(2)
    assert changed(build(START_RANDOM), state(one)) == set()
    other = changed(build(replace(START_RANDOM, seed=1)), state(one))
    assert {"encoder.conv1.weight", "head.0.weight"} <= other


def test_a_run_builds_the_network_of_its_fields(weights):
    net = build(replace(START, head=(16,), head_batchnorm=False), weights)
    assert len(net.frozen) == 20
    assert [net.head[0].out_features, net.head[-1].out_features] == [16, 3]
    expected = PretextNet(2, init="imagenet", weights=weights).encoder
    assert changed(net.encoder, state(expected)) == set()
    assert build(replace(START_RANDOM, method="untrained")).head[-1].out_features == 2


# BatchNorm


def test_batchnorm_adapts_in_training_mode_unless_it_is_frozen(frozen):
    for net in (PretextNet(2), frozen):
        before = state(net)
        assert all(m.training for m in net.modules() if m not in net.frozen)
        net.eval().train()
        net(images().float() / 255)
        running = {k for k in before if "running" in k or "num_batches" in k}
        held = {k for k in running if k.startswith("encoder.") and net is frozen}
        assert changed(net, before) == running - held


# Weights


@pytest.mark.parametrize(("backbone", "dropped"), [(RESNET, "fc."), (B4, "classifier.1.")])
def test_imagenet_weights_are_exactly_those_of_the_file(weights, backbone, dropped):
    net = PretextNet(2, backbone=backbone, init="imagenet", weights=weights)
    stored = torch.load(weights / f"{backbone}-made-up.pth", weights_only=True)
    held = net.encoder.state_dict()
    assert stored.keys() - held.keys() == {f"{dropped}weight", f"{dropped}bias"}
    assert all(torch.equal(v, stored[k]) for k, v in held.items())
    assert net.frozen == []


def test_weights_are_looked_for_where_is_said_then_in_the_environment_then_at_torchs(
    weights, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("CPLIB_WEIGHTS", str(tmp_path))
    assert weights_file(RESNET) is None
    downloads = tmp_path / "torch/hub/checkpoints"
    downloads.mkdir(parents=True)
    for folder in (downloads, tmp_path):
        (folder / "resnet18-f37072fd.pth").write_bytes(b"abc")
        assert weights_file(RESNET) == folder / "resnet18-f37072fd.pth"
    assert weights_digest(weights_file(RESNET)).startswith("ba7816bf8f01cfea414140de5dae2223")
    assert weights_file(RESNET, weights) == weights / "resnet18-made-up.pth"


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


def test_the_packaged_weights_recognise_a_cat():
    cat = (
        torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1)[None, :, :, 75:375].float() / 255
    )
    cat = F.interpolate(cat, (224, 224), mode="bilinear", antialias=True)
    stored = torch.load(weights_file(LITE), weights_only=True)
    net = PretextNet(2, backbone=LITE, init="imagenet").eval()
    with torch.inference_mode():
        logits = F.linear(net.features(cat), stored["_fc.weight"], stored["_fc.bias"])
    assert logits.argmax().item() in CATS
    assert logits.softmax(1)[0, list(CATS)].sum() > 0.5


# Levels (4.3)


@BOTH
def test_an_efficientnet_has_nine_levels_and_the_last_pooled_is_its_feature(backbone):
    net = PretextNet(2, backbone=backbone).eval()
    assert len(levels(net.encoder)) == 9
    found = [embed(net, images(1), level=level) for level in range(1, 10)]
    assert [z.shape[1] for z in found] == CHANNELS[backbone]
    torch.testing.assert_close(found[-1], embed(net, images(1)))
    with pytest.raises(ValueError, match="only an EfficientNet"):
        embed(PretextNet(2), images(1), level=7)


def test_level_7_of_b4_is_that_of_torchvisions_network(weights):
    net = PretextNet(2, backbone=B4, init="imagenet", weights=weights)
    theirs = torchvision.models.efficientnet_b4()
    theirs.load_state_dict(torch.load(weights / "efficientnet_b4-made-up.pth", weights_only=True))
    nodes = {"features.6": "level7", "flatten": "pooled"}
    theirs = create_feature_extractor(theirs.eval(), nodes)
    preset = torchvision.models.EfficientNet_B4_Weights.IMAGENET1K_V1.transforms()
    x = torchvision.transforms.functional.normalize(images() / 255, preset.mean, preset.std)
    with torch.no_grad():
        expected = theirs(x)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(embed(net, images(), level=7), expected["level7"].mean((2, 3)))
    close(embed(net, images()), expected["pooled"])


def test_level_7_of_lite0_is_that_of_timms_network():
    net = PretextNet(2, backbone=LITE, init="imagenet")
    theirs = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    theirs.load_state_dict(net.encoder.state_dict())
    kept = {}
    theirs.blocks[5].register_forward_hook(lambda m, i, out: kept.update(level7=out))
    with torch.no_grad():
        pooled = theirs((images().float() - 127) / 128)
    close = partial(torch.testing.assert_close, rtol=0.02, atol=0.02)  # 0.498 is not quite 127/255
    close(embed(net, images(), level=7), kept["level7"].mean((2, 3)))
    close(embed(net, images()), pooled)


def test_the_score_of_level_7_is_a_library_gaussians(demo_root):
    run = PROFILES["smoke"].run("pretrained", "sieve", protocol="finetune")
    net = build(run)
    normal, test = (datasets.load(demo_root, "sieve", s, run.size) for s in ("train", "test"))
    found = level7(run, net, normal, test)
    z, z_test = (embed(net, s.pixels, level=7).double().numpy() for s in (normal, test))
    density = GaussianMixture(1, reg_covar=run.reg_covar).fit(z)
    expected = 100 * roc_auc_score(test.labels, -density.score_samples(z_test))
    assert found["image_auroc"] == pytest.approx(expected, abs=1e-6)


# Finetuning in two phases (A.4)


@BOTH
def test_the_encoder_stays_as_it_is_for_the_head_and_then_moves_but_for_batchnorm(
    weights, backbone
):
    run = replace(START, backbone=backbone)
    start = build(run, weights)
    before = state(start.encoder)
    net, _ = train.fit(replace(run, updates=0), images(), weights=weights)
    assert changed(net.encoder, before) == set()
    assert not torch.equal(net.head[0].weight, start.head[0].weight)
    net, _ = train.fit(run, images(), weights=weights)
    norms = {n for n, m in net.encoder.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) > 40
    assert changed(net.encoder, before) == {k for k in before if k.rpartition(".")[0] not in norms}


def test_b4_drops_layers_in_the_second_phase_and_not_while_the_head_is_trained_alone(weights):
    losses = {0: set(), 1: set()}
    for head_updates, found in losses.items():
        rates = {"learning_rate": 0, "head_learning_rate": 0}  # the network stays as it is
        run = replace(START, backbone=B4, head_updates=head_updates, **rates)
        net = build(run, weights)
        for seed in range(3):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                generator = torch.Generator().manual_seed(0)
                scaler = train.grad_scaler(run, "cpu")
                optimizer = train.optimiser(run, net)
                loss, _ = train.step(run, net, optimizer, images(), generator, scaler)
            found.add(loss.item())
    assert len(losses[1]) == 1
    assert len(losses[0]) == 3


def test_a_run_of_b4_resumes_exactly_and_neither_reads_nor_moves_the_global_random_state(
    weights, tmp_path
):
    run, file = replace(START, backbone=B4), tmp_path / "checkpoint.safetensors"
    whole, _ = train.fit(run, images(), weights=weights)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    stopped = partial(train.fit, run, images(), weights=weights, checkpoint=file, deadline=0)
    for _ in range(2):
        with pytest.raises(train.OutOfTime):
            stopped()
    assert changed(stopped()[0], state(whole)) == set()
    assert torch.equal(torch.get_rng_state(), before)
