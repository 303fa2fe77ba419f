"""The network: shapes, frozen BatchNorm, weights from files, features."""

from pathlib import Path

import pytest
import skimage.data
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from cplib import model
from cplib.config import Run
from cplib.model import PretextNet, embed, weights_digest, weights_file
from cplib.train import build

LITE = "efficientnet_lite0"
CATS = range(281, 288)  # domestic and big cats among ImageNet's classes


def pictures(n=4, size=32, seed=0):
    """Random pictures, uint8."""
    noise = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return (noise * 255).byte()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with made-up ImageNet weights of a ResNet-18."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(99)
        net = torchvision.models.resnet18()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
    torch.save(net.state_dict(), folder / "resnet18-made-up.pth")
    return folder


@pytest.fixture
def frozen(weights):
    return PretextNet(2, init="imagenet", freeze_batchnorm=True, weights=weights)


def statistics(net):
    return {k: v.clone() for k, v in net.state_dict().items() if "running" in k}


def drifted(net, before):
    return {k for k, v in statistics(net).items() if not torch.equal(v, before[k])}


@pytest.mark.parametrize(("backbone", "width"), [("resnet18", 512), (LITE, 1280)])
def test_features_and_logits_have_their_shapes(backbone, width):
    net, x = PretextNet(3, backbone=backbone), pictures().float() / 255
    assert net.features(x).shape == (4, width)
    assert net(x).shape == (4, 3)


@pytest.mark.parametrize("head", [(), (64,), (512, 128), (32, 32, 32)])
def test_the_head_has_the_hidden_widths_asked_for(head):
    linear = [m for m in PretextNet(2, head=head).head if isinstance(m, nn.Linear)]
    assert [m.in_features for m in linear] == [512, *head]
    assert [m.out_features for m in linear] == [*head, 2]


@pytest.mark.parametrize("backbone", model.PIXELS)
def test_features_are_the_encoder_on_normalised_pixels(backbone):
    net, x = PretextNet(2, backbone=backbone).eval(), pictures().float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in model.PIXELS[backbone])
    torch.testing.assert_close(net.features(x), net.encoder((x - mean) / std))


def test_logits_are_the_head_on_the_features():
    net, x = PretextNet(2).eval(), pictures().float() / 255
    assert torch.equal(net(x), net.head(net.features(x)))


def test_a_network_starts_in_training_mode():
    assert all(module.training for module in PretextNet(2).modules())


# BatchNorm


def test_batchnorm_adapts_in_training_mode():
    net = PretextNet(2)
    before = statistics(net)
    net(pictures().float() / 255)
    assert drifted(net, before) == set(before)


def test_frozen_batchnorm_does_not_drift_and_the_head_still_adapts(frozen):
    before = statistics(frozen)
    for mode in (False, True):
        frozen.train(mode)
        frozen(pictures().float() / 255)
    assert drifted(frozen, before) == {k for k in before if k.startswith("head.")}


def test_frozen_batchnorm_has_no_gradient_and_all_else_has(frozen):
    frozen(pictures().float() / 255).sum().backward()
    held = {id(p) for m in frozen.frozen for p in m.parameters()}
    assert len(held) == 40
    for name, parameter in frozen.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in held), name


def test_frozen_batchnorm_stays_as_it_is_when_a_run_is_trained(frozen):
    before = {k: v.clone() for k, v in frozen.encoder.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in frozen.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(frozen(pictures().float() / 255), torch.tensor([0, 1, 0, 1])).backward()
    optimizer.step()
    changed = {k for k, v in frozen.encoder.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if "conv" in k or k.endswith("downsample.0.weight")}


def test_nothing_is_frozen_unless_asked(weights):
    net = PretextNet(2, init="imagenet", weights=weights)
    assert net.frozen == []
    assert all(p.requires_grad for p in net.parameters())


# Weights


def test_imagenet_weights_are_exactly_those_of_the_file(weights):
    net = PretextNet(2, init="imagenet", weights=weights)
    stored = torch.load(next(weights.glob("*.pth")), weights_only=True)
    stored = {k: v for k, v in stored.items() if not k.startswith("fc.")}
    held = net.encoder.state_dict()
    assert held.keys() == stored.keys()
    assert all(torch.equal(held[k], stored[k]) for k in stored)


def test_the_folder_of_weights_may_be_named_by_the_environment(weights, monkeypatch):
    monkeypatch.setenv("CPLIB_WEIGHTS", str(weights))
    assert weights_file("resnet18") == weights / "resnet18-made-up.pth"


def test_the_folder_asked_for_wins_over_the_environment(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("CPLIB_WEIGHTS", str(tmp_path))
    (tmp_path / "resnet18.pth").touch()
    assert weights_file("resnet18", weights) == weights / "resnet18-made-up.pth"


def test_downloads_of_torchvision_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "resnet18-f37072fd.pth").touch()
    assert weights_file("resnet18") == folder / "resnet18-f37072fd.pth"


def test_no_weights_are_none(tmp_path):
    assert weights_file("resnet18", tmp_path) is None


def test_weights_of_the_installed_package_are_found():
    path = weights_file(LITE)
    assert path.suffix == ".pth"
    assert path.stat().st_size > 10e6


def test_the_digest_is_a_sha256_of_the_file(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert weights_digest(tmp_path / "abc") == expected


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_weights_that_carry_code_are_refused_and_the_code_does_not_run(tmp_path):
    trace = tmp_path / "ran"
    torch.save({"conv1.weight": Payload(trace)}, tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match="UnpicklingError"):
        PretextNet(2, init="imagenet", weights=tmp_path)
    assert not trace.exists()


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match="expected tensors of resnet18"):
        PretextNet(2, init="imagenet", weights=tmp_path)


def cat():
    """The photograph of a cat, its middle square, as the network takes it."""
    picture = torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1)[None].float() / 255
    side = min(picture.shape[2:])
    left = (picture.shape[3] - side) // 2
    picture = picture[..., :side, left : left + side]
    return F.interpolate(picture, (224, 224), mode="bilinear", antialias=True)


def test_the_packaged_weights_recognise_a_cat():
    state = torch.load(weights_file(LITE), weights_only=True)
    net = PretextNet(2, backbone=LITE, init="imagenet").eval()
    with torch.inference_mode():
        logits = F.linear(net.features(cat()), state["_fc.weight"], state["_fc.bias"])
    assert logits.argmax().item() in CATS
    assert logits.softmax(1)[0, list(CATS)].sum() > 0.5


# Seeds


def _run(**changes):
    return Run(method="cutpaste_3way", category="bottle", **changes)


def _same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_the_same_seed_builds_the_same_network():
    assert _same(build(_run(seed=3)), build(_run(seed=3)))


def test_another_seed_builds_another_network():
    one, other = build(_run(seed=3)), build(_run(seed=4))
    assert not torch.equal(one.encoder.conv1.weight, other.encoder.conv1.weight)
    assert not torch.equal(one.head[0].weight, other.head[0].weight)


def test_building_neither_reads_nor_moves_the_global_random_state():
    torch.manual_seed(1)
    one, state = build(_run()), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert _same(one, build(_run()))


@pytest.mark.parametrize(
    ("method", "classes"),
    [("cutpaste", 2), ("cutpaste_scar", 2), ("cutpaste_3way", 3), ("untrained", 2)],
)
def test_a_network_has_a_logit_for_each_class_of_its_method(method, classes):
    net = build(Run(method=method, category="bottle"))
    assert net.head[-1].out_features == classes


def test_a_run_builds_the_network_of_its_fields(weights):
    run = _run(init="imagenet", freeze_batchnorm=True, head=(16,))
    net = build(run, weights)
    assert len(net.frozen) == 20
    assert net.head[0].out_features == 16
    assert _same(net.encoder, PretextNet(2, init="imagenet", weights=weights).encoder)


# Features


@pytest.mark.parametrize("batch", [1, 3, 5, 32])
def test_embed_is_the_plain_forward_whatever_the_batch(batch):
    net, pixels = PretextNet(2), pictures(7)
    features = embed(net, pixels, batch=batch)
    with torch.no_grad():
        expected = net.eval().features(pixels.float() / 255)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert (features.dtype, features.device.type) == (torch.float32, "cpu")


def test_embed_leaves_no_gradient_and_no_trace_in_batchnorm():
    net = PretextNet(2)
    before = statistics(net)
    features = embed(net, pictures())
    assert not features.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    assert drifted(net, before) == set()


def test_embed_does_not_depend_on_the_other_pictures():
    net, pixels = PretextNet(2), pictures(6)
    torch.testing.assert_close(embed(net, pixels)[:2], embed(net, pixels[:2]), rtol=1e-4, atol=1e-5)


def test_unknown_names_are_refused():
    with pytest.raises(KeyError, match="resnet5"):
        PretextNet(2, backbone="resnet5")


def test_features_are_taken_in_full_precision_with_cudnn_left_on(monkeypatch):
    seen, net = [], PretextNet(2)
    features = net.features

    def spied(x, level=0):
        seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
        return features(x, level)

    monkeypatch.setattr(net, "features", spied)
    embed(net, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert seen == [(True, False)]
    assert torch.backends.cudnn.allow_tf32


def test_a_head_without_batchnorm_has_biases_instead():
    layers = [type(layer).__name__ for layer in PretextNet(3, head_batchnorm=False).head]
    assert layers == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert all(m.bias is not None for m in PretextNet(3, head_batchnorm=False).head[::2])
