"""Localisation: windows in the right order, exact upsampling, peaks where the defect is."""

import itertools

import numpy as np
import pytest
import torch

from cplib import localize
from cplib.localize import gradcam, level_features, positions, upsample, window_features
from cplib.metrics import peak_within
from cplib.model import PretextNet, levels


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(2)
    net = PretextNet(3).eval()
    for module in net.encoder.modules():  # as after training: BatchNorm is not the identity
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return net


def noise(n, h, w, seed=0):
    """Pictures of weak noise on grey, uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(118, 138, (n, 3, h, w), generator=generator, dtype=torch.uint8)


def state(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def unchanged(net, before):
    return all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_256_pixel_image_has_the_papers_positions():
    assert positions(256, 256, 64) == (49, 49)
    assert positions(256, 256, 32) == (57, 57)


@pytest.mark.parametrize("size", [(31, 64), (64, 31)])
def test_a_image_smaller_than_a_window_is_refused_by_its_size(net, size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} .*smaller than a 32-px window"):
        window_features(net, noise(1, *size), window=32)


@pytest.mark.parametrize(("height", "width"), [(64, 48), (48, 64)])
def test_every_feature_is_that_of_its_own_window(net, monkeypatch, height, width):
    pixels = noise(2, height, width)
    monkeypatch.setitem(localize.WINDOW_BATCH, "cpu", 3)
    found = window_features(net, pixels, window=32, stride=8)
    assert found.shape == (2, (height - 32) // 8 + 1, (width - 32) // 8 + 1, 512)
    for n, r, c in itertools.product(*map(range, found.shape[:3])):
        window = pixels[n : n + 1, :, 8 * r : 8 * r + 32, 8 * c : 8 * c + 32]
        with torch.no_grad():
            expected = net.features(window.float() / 255)[0]
        torch.testing.assert_close(found[n, r, c], expected, rtol=1e-3, atol=1e-4)


def test_the_features_of_levels_are_means_of_3x3_cells_of_their_maps_joined(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(localize, "LEVEL_BATCH", 2)
    net = PretextNet(2, backbone="efficientnet_lite0").eval()
    pixels = noise(3, 64, 96)
    found = level_features(net, pixels, (4, 5))
    maps, x = [], (pixels[2:].float() / 255 - net.pixel_mean) / net.pixel_std
    with torch.no_grad():
        for stage in levels(net.encoder)[:5]:
            x = stage(x)
            maps.append(x[0])
    fine, deep = (torch.nn.functional.pad(maps[i], (1, 1, 1, 1)) for i in (3, 4))
    assert found.shape == (3, 4, 6, len(fine) + len(deep))
    row, column = 1, 2  # of the deepest map, 16 px a place; two by two places of the finer one
    mean = [fine[:, r : r + 3, c : c + 3].mean((1, 2)) for r in (2, 3) for c in (4, 5)]
    expected = [sum(mean) / 4, deep[:, row : row + 3, column : column + 3].mean((1, 2))]
    torch.testing.assert_close(found[2, row, column], torch.cat(expected), rtol=1e-3, atol=1e-4)


def test_the_features_of_levels_are_those_of_evaluation_also_in_training_mode():
    net, pixels = PretextNet(2, backbone="efficientnet_lite0"), noise(2, 64, 64)
    before = state(net)
    found = level_features(net.train(), pixels, (4, 5))
    assert unchanged(net, before)
    assert torch.equal(found, level_features(net.eval(), pixels, (4, 5)))


def test_upsampling_spreads_each_score_over_its_window_by_one_kernel():
    maps = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0))
    patch, stride, std = 8, 4, 3.0
    heat = upsample(maps, (20, 16), window=patch, stride=stride, std=std)
    offset = np.arange(patch) - 3.5
    bell = np.exp(-(offset**2) / (2 * std**2))
    kernel = stride**2 * np.outer(bell, bell) / bell.sum() ** 2
    expected = np.zeros((2, 20, 16))
    for r, c in itertools.product(range(4), range(3)):
        part = maps[:, r, c].numpy()[:, None, None] * kernel
        expected[:, 4 * r : 4 * r + patch, 4 * c : 4 * c + patch] += part
    np.testing.assert_allclose(heat, expected, rtol=1e-4, atol=1e-6)


def test_a_flat_map_stays_flat_inside_and_fades_towards_the_border():
    heat = upsample(torch.ones(1, 30, 30), (151, 150), window=32, stride=4)[0]
    torch.testing.assert_close(heat[40:110, 40:110], torch.ones(70, 70), rtol=0.02, atol=0.02)
    assert heat[0, 0] < 0.1 < 0.9 < heat[30, 30]
    assert torch.equal(heat[148], heat[147])


def test_gradcam_is_its_formula_with_the_evidence_for_normal_and_leaves_the_network_alone(net):
    before, pixels = state(net), noise(9, 96, 64)
    maps = gradcam(net, pixels)
    assert unchanged(net, before)
    x = (pixels.float() / 255 - net.pixel_mean) / net.pixel_std
    deep = torch.nn.Sequential(*list(net.encoder.children())[:-2])(x)  # up to layer4
    logits = net.head(deep.mean((2, 3)))
    odds = logits[:, 1:].logsumexp(1) - logits[:, 0]
    weight = torch.autograd.grad(odds.sum(), deep)[0].mean((2, 3), keepdim=True)
    small = (weight * deep).sum(1, keepdim=True).detach()
    expected = torch.nn.functional.interpolate(small, (96, 64), mode="bilinear")[:, 0]
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-6)
    assert expected.min() < 0 < expected.max()


def test_the_peak_counts_on_the_mask_and_within_the_distance():
    masks = np.zeros((3, 40, 40), bool)
    masks[:2, 5:10, 5:10] = True
    heat = np.zeros((3, 40, 40))
    heat[0, 9, 25] = heat[1, 30, 30] = heat[2, 0, 0] = 1
    assert peak_within(masks, heat, 16) == 50
    assert peak_within(masks, heat, 15) == 0
    assert peak_within(masks[2:], heat[2:]) is None
