"""The baselines that the paper lacks, and the corruptions that try them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TINY
from losses import MODES, Diffusion, Perturbation
from sample import UserError, image_noise, noise_estimate, sample
from train import CLEAN, NOISY, OUTLIER, Corruption, own_noise, shapes, training_images

DIFFUSION = Diffusion()


def best_gain(mode, x0, t, eps, *noise):
    """k of the eps_theta = k x that minimises an objective, which is quadratic in k."""

    def loss(k):
        torch.manual_seed(0)
        return MODES[mode].loss(lambda x, _: k * x, DIFFUSION, x0, t, eps,
                                Perturbation(ip_gamma=0.5), *noise)[0].item()

    low, middle, high = loss(-1), loss(0), loss(1)
    return (low - high) / (2 * (low + high - 2 * middle))


@pytest.mark.parametrize("t", [60, 150, 400])
def test_minimisers_on_gaussian_data(t):
    """Clean data N(0, v), 60 % of it with noise of std .2: eps_theta = k x has a closed form."""
    torch.manual_seed(0)
    n, v, gamma, noisy = 400_000, 0.25, 0.5, 0.6
    a = DIFFUSION.alpha_bar[t].item()
    s = (1 - a) ** 0.5
    noise = 0.2 * (torch.rand(n) < noisy) * (0.2 < s / a**0.5)
    x0 = v**0.5 * torch.randn(n, 1) + noise[:, None] * torch.randn(n, 1)
    times, eps = torch.full((n,), t), torch.randn(n, 1)
    seen = v + noisy * 0.2**2 * (0.2 < s / a**0.5)
    truth = {"dsm": s / (a * seen + s * s), "ip": s / (a * seen + s * s * (1 + gamma**2)),
             "aware": s / (a * v + s * s)}
    for mode, k in truth.items():
        found = best_gain(mode, x0, times, eps, *([noise] if mode == "aware" else []))
        assert found == pytest.approx(k, rel=0.01), mode


def test_aware_is_dsm_without_noise_and_silent_below_it():
    x0, eps, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([5, 100, 900])
    gain = torch.tensor(0.7, requires_grad=True)

    def net(x, _):
        return gain * x

    plain, _ = MODES["dsm"].loss(net, DIFFUSION, x0, t, eps, Perturbation())
    told, _ = MODES["aware"].loss(net, DIFFUSION, x0, t, eps, Perturbation(), torch.zeros(3))
    assert torch.equal(plain, told)
    loss, _ = MODES["aware"].loss(net, DIFFUSION, x0, t, eps, Perturbation(),
                                  torch.full((3,), 1000.0))
    loss.backward()
    assert loss == 0 and gain.grad == 0


def test_the_estimate_tells_noisy_images_and_not_correlated_noise():
    images = shapes(200, 16, 3, 0)
    kinds = np.where(np.arange(200) < 100, NOISY, CLEAN).astype(np.uint8)
    index = np.arange(200)
    white = Corruption(kinds, 0, 0.2)
    noise = own_noise(images, index, white)
    assert noise[:100].min() > 0.1 > noise[100:].max()
    assert torch.equal(noise[::7], own_noise(images, index[::7], white))
    smooth = white._replace(noise_blur=1.0)
    assert own_noise(images, index, smooth)[:100].max() < 0.1
    # Its std is the same, image for image.
    clean = training_images(images, index, Corruption(np.zeros(200, np.uint8), 0))
    for spoil in (white, smooth):
        added = (training_images(images, index, spoil) - clean).std((1, 2, 3))
        assert (added[:100] / 0.2 - 1).abs().max() < 0.2 and added[100:].max() == 0


def test_outliers_may_be_images_of_another_set(tmp_path, in_process, capsys):
    images, kinds = shapes(20, 8, 3, 0), np.full(20, OUTLIER, np.uint8)
    strangers = np.stack([np.full((3, 8, 8), 255 * k, np.uint8) for k in (0, 1)])
    x = training_images(images, np.arange(20), Corruption(kinds, 0, strangers=strangers))
    assert set(x.unique().tolist()) == {-1, 1}
    for k in range(2):
        Image.fromarray(strangers[k].transpose(1, 2, 0)).save(tmp_path / f"{k}.png")
    flags = ["--steps", 1, "--mode", "dsm", "--noise_p", 0, "--noise_std", 0, "--outlier_p", 0.5]
    in_process("train", *TINY, *flags, "--outlier_dir", tmp_path, "--out", tmp_path / "run")
    assert "5,000 outliers" in capsys.readouterr().out
    with pytest.raises(UserError, match="--outlier_p"):
        in_process("train", *TINY, "--outlier_dir", tmp_path, "--out", tmp_path / "other")


def test_filter_and_aware_as_a_user_runs_them(tmp_path, in_process, capsys):
    for mode in ("dsm", "aware", "ip"):
        in_process("train", *TINY, "--steps", 2, "--mode", mode, "--filter", 0.1, "--limit", 500,
                   "--out", tmp_path / mode)
        assert "takes 50 as clean" in capsys.readouterr().out
    # What is trained on is what is left: without noise.
    seen = np.asarray(Image.open(tmp_path / "dsm/data.png")).astype(np.float32)
    tile = torch.from_numpy(seen[2:50:3, 2:50:3].transpose(2, 0, 1).copy())[None] / 127.5 - 1
    assert noise_estimate(tile)[0] < 0.02
    # A resumed run goes on with the same images.
    in_process("train", "--resume", "--steps", 3, "--out", tmp_path / "dsm")
    assert "takes 50 as clean" in capsys.readouterr().out
    with pytest.raises(UserError, match="--filter 1e-09 leaves no image"):
        in_process("train", *TINY, "--noise_p", 1, "--filter", 1e-9, "--limit", 50,
                   "--out", tmp_path / "none")
    with pytest.raises(UserError, match="aware needs --filter"):
        in_process("train", *TINY, "--mode", "aware", "--out", tmp_path / "none")


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_truncated_sampling_ends_with_the_denoised_estimate(sampler):
    """A model of data that are one image plus noise of std .2 draws that noise, unless stopped."""
    image, seen = torch.linspace(-0.5, 0.5, 64).view(1, 1, 8, 8), []

    def net(x, t):
        seen.append(t[0].item())
        sqrt_a, s = DIFFUSION.at(t, x)
        return s * (x - sqrt_a * image) / (sqrt_a.square() * 0.2**2 + s.square())

    def spread(stop):
        seen.clear()
        noise = image_noise(0, range(50), (1, 8, 8), "cpu")
        return (sample(net, DIFFUSION, noise, sampler, 250, clip=False, stop=stop) - image).std()

    assert spread(0) == pytest.approx(0.2, rel=0.1) and seen[-1] == 0
    # At s / sqrt(a) = S the estimate keeps .2 / sqrt(.2^2 + S^2) of it.
    assert spread(0.6) == pytest.approx(0.2**2 / (0.2**2 + 0.6**2) ** 0.5, rel=0.1)
    last = DIFFUSION.alpha_bar[seen[-1]].item()
    assert ((1 - last) / last) ** 0.5 < 0.6 and len(seen) < 250


def test_quality_of_several_runs_side_by_side(run, tmp_path, in_process, capsys):
    flags = ["--num", 10, "--steps", 2, "--features", "pixels", "--reference_num", 10]
    in_process("evaluate", "quality", run, run, *flags, "--json", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    first, second = found["rows"]
    assert first == second and first["samples"] == str(run)
    assert [own["num"] for own in found["provenance"]["sets"]] == [10, 10]
    assert capsys.readouterr().out.count(str(run)) >= 2
    in_process("evaluate", "quality", run, *flags, "--json", tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["fid"] == first["fid"]


def test_the_alarm_looks_at_the_images_that_were_trained_on(tmp_path, in_process):
    in_process("train", *TINY, "--steps", 1, "--limit", 40, "--filter", 0.1, "--out", tmp_path)
    in_process("evaluate", "overfit", tmp_path, "--num", 40, "--json", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["provenance"]["num"] == 4 and found["rows"][0]["ratio"] > 0
