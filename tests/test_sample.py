"""Samplers against ideal denoisers; images that depend on their seed alone; cleaning a folder."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import finish, fork
from losses import Diffusion
from sample import (UserError, clean_images, denoise_step, draw_images, image_noise, load_run,
                    noise_estimate, sample, step_pairs, to_uint8, with_expert)
from train import load_images

MEAN, VAR = 0.3, 0.25


def ideal(diffusion):
    """The exact eps of data N(MEAN, VAR): s (x - sqrt(a) MEAN) / (a VAR + s^2)."""

    def net(x, t):
        sqrt_a, s = diffusion.at(t, x)
        return s * (x - sqrt_a * MEAN) / (sqrt_a**2 * VAR + s**2)

    return net


@pytest.mark.parametrize("steps, spacing, ddim, ddpm", [
    (1000, "respaced", 0.994, 0.985), (100, "respaced", 0.944, 0.876),
    (20, "respaced", 0.741, 0.602), (100, "naive", 3.48, 3.09)])
def test_ideal_denoiser_of_a_gaussian(steps, spacing, ddim, ddpm):
    """The data's mean, and with fewer steps less of their variance. "naive" leaves noise."""
    n, d = 20_000, Diffusion()
    for sampler, share in (("ddim", ddim), ("ddpm", ddpm)):
        g = torch.Generator().manual_seed(steps)
        x = sample(ideal(d), d, lambda: torch.randn(n, 1, generator=g), sampler, steps, spacing,
                   clip=False)
        assert x.var().item() / VAR == pytest.approx(share, rel=4 * (2 / n) ** 0.5)
        assert abs(x.mean() - MEAN) < 4 * (x.var() / n) ** 0.5 or spacing == "naive"


def test_a_step_is_exact():
    d = Diffusion()
    x, eps, z = torch.randn(3, 5, 2, dtype=torch.float64)
    ddim, ddpm = (denoise_step(lambda x, t: eps, d, x, 700, 300, sampler, lambda: z, clip=False)
                  for sampler in ("ddim", "ddpm"))
    # In the variables x / sqrt(a) and s / sqrt(a) the ODE's slope is eps: a straight line.
    scale, sigma = d.alpha_bar.sqrt(), d.noise_level
    line = x / scale[700] + (sigma[300] - sigma[700]) * eps
    torch.testing.assert_close(ddim, line * scale[300], rtol=1e-4, atol=1e-4)
    # Bayes: of x_300, its own noise and that of the way to x_700 each say something.
    x0, alpha = x / scale[700] - sigma[700] * eps, d.alpha_bar[700] / d.alpha_bar[300]
    own, seen = 1 / (1 - d.alpha_bar[300]), alpha / (1 - alpha)
    mean = (own * scale[300] * x0 + seen * x / alpha.sqrt()) / (own + seen)
    torch.testing.assert_close(ddpm, mean + z / (own + seen).sqrt(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_clipping_comes_before_the_step(sampler):
    """A wild prediction moves the state towards the clipped image, not towards its own."""
    x = torch.zeros(3, 1, 4, 4)
    for value in (-1e4, 1e4):
        end, middle = (denoise_step(lambda x, t: x + value, Diffusion(), x, 50, prev, sampler,
                                    lambda: x) for prev in (-1, 40))
        assert torch.equal(end, torch.full_like(x, -np.sign(value)))
        assert middle.abs().max() < 1


def test_time_steps():
    every = list(zip(range(999, -1, -1), range(998, -2, -1)))
    assert step_pairs(Diffusion(), 1000) == step_pairs(Diffusion(), 1000, "naive") == every
    for steps in (2, 7, 300, 999):
        chosen, after = zip(*step_pairs(Diffusion(), steps))
        assert chosen[0] == 999 and chosen[-1] == 0 and (np.diff(chosen) < 0).all()
        assert after == (*chosen[1:], -1)
    assert step_pairs(Diffusion(), 1) == [(999, -1)] and step_pairs(Diffusion(1), 1) == [(0, -1)]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_truncated_sampling_ends_with_the_denoised_estimate(sampler):
    """A model of data that are one image plus noise of std .2 draws that noise, unless stopped."""
    diffusion, image, seen = Diffusion(), torch.linspace(-0.5, 0.5, 64), []

    def net(x, t):
        seen.append(t[0].item())
        sqrt_a, s = diffusion.at(t, x)
        return s * (x - sqrt_a * image) / (sqrt_a.square() * 0.2**2 + s.square())

    def spread(stop):
        seen.clear()
        noise = image_noise(0, range(50), (64,), "cpu")
        return (sample(net, diffusion, noise, sampler, 250, clip=False, stop=stop) - image).std()

    assert spread(0) == pytest.approx(0.2, rel=0.1) and seen[-1] == 0
    # At s / sqrt(a) = S the estimate keeps .2 / sqrt(.2^2 + S^2) of it.
    assert spread(0.6) == pytest.approx(0.2**2 / (0.2**2 + 0.6**2) ** 0.5, rel=0.1)
    last = diffusion.alpha_bar[seen[-1]].item()
    assert ((1 - last) / last) ** 0.5 < 0.6 and len(seen) < 250


def test_an_ideal_denoiser_cleans_each_image_from_its_own_noise_on():
    """Data that are one constant image: D(x) is that image, whatever the noise."""
    diffusion, clean, called = Diffusion(), torch.full((1, 1, 8, 8), 0.3), []

    def net(x, t):
        called.append(t)
        return diffusion.eps_from_x0(x, t, clean.expand_as(x))

    std = torch.tensor([0.1, 0.2, 0.8])
    noisy = clean + std.view(-1, 1, 1, 1) * torch.randn(3, 1, 8, 8)
    for sampler, steps in itertools.product(("ddim", "ddpm"), (1, 20)):
        called.clear()
        out = clean_images(net, diffusion, noisy, std, image_noise(0, range(3), (1, 8, 8), "cpu"),
                           sampler, steps)
        assert (out - clean).abs().max() < 1e-3 and len(called) == steps
        level = diffusion.s[called[0]] / diffusion.sqrt_a[called[0]]
        assert (level - std).abs().max() < 0.01 and (steps == 1 or not called[-1].any())


def test_the_noise_estimate_is_unbiased_on_noise_and_zero_on_flat_images():
    torch.manual_seed(0)
    x = 0.3 * torch.randn(4, 3, 64, 65)
    assert (noise_estimate(x) / 0.3 - 1).abs().max() < 0.05
    assert noise_estimate(torch.ones(2, 1, 9, 9)).tolist() == [0, 0]


def test_pixels_are_rounded_and_clamped():
    x = torch.tensor([-2.0, -1, -0.5, 0, 1, 3])
    assert to_uint8(x).tolist() == [0, 0, 64, 128, 255, 255]


def images(folder):
    return np.load(folder / "samples.npz")["arr_0"]


def test_images_do_not_depend_on_batch_or_world_size(run, tmp_path, in_process, monkeypatch):
    common = [run, "--sampler", "ddpm", "--steps", "3", "--num", "7", "--out"]
    for name, more in (("a", []), ("b", ["--batch_size", 2]), ("d", ["--seed", 1])):
        in_process("sample", *common, tmp_path / name, *more)
    (tmp_path / "e").mkdir()
    monkeypatch.chdir(tmp_path / "e")
    in_process("sample", *common, ".", "--raw")
    assert finish(fork(tmp_path / "log", "sample", *common, tmp_path / "c", ranks=2)) == [0, 0]
    a, b, c, d, e = (images(tmp_path / name) for name in "abcde")
    assert a.shape == (7, 16, 16, 3) and a.dtype == np.uint8 and len(np.unique(a)) > 50
    # The arithmetic may round otherwise in another batch, by one level of 255.
    assert max(abs(a.astype(int) - b).max(), abs(a.astype(int) - c).max()) <= 1
    assert (a != d).mean() > 0.2 and (a[1:] != d[:-1]).mean() > 0.2 and (a != e).any()
    assert np.array_equal(a[3], np.array(Image.open(tmp_path / "a" / "000003.png")))
    note = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert note.items() >= {"weights": "EMA", "sampler": "ddpm", "num": 7, "step": 3}.items()
    assert (tmp_path / "a.png").exists() and (tmp_path / "e.png").exists()


def test_restart_draws_the_missing_images_only(run, tmp_path, in_process, capsys, mistake):
    out = tmp_path / "s"
    draw = ["sample", run, "--steps", 2, "--out", out, "--num"]
    in_process(*draw, 6)
    first = images(out)
    for k in (1, 4):
        (out / f"{k:06d}.png").unlink()
    kept = (out / "000000.png").stat().st_mtime_ns
    in_process(*draw, 8)
    assert "4 of 8 images are there already" in capsys.readouterr().out
    assert kept == (out / "000000.png").stat().st_mtime_ns
    assert abs(images(out)[:6].astype(int) - first).max() <= 1 and len(images(out)) == 8
    # A damaged picture is named; the path's spelling is no matter.
    (out / "000002.png").write_bytes(b"half")
    assert "000002.png is damaged" in mistake(*draw, 8)
    (out / "000002.png").unlink()
    in_process("sample", run / "ckpt.pt", *draw[2:], 8)
    assert abs(images(out)[:6].astype(int) - first).max() <= 1

    # Other settings, or fewer images, would leave others beside them.
    assert "steps differ" in mistake(*draw, 8, "--steps", 3)
    assert len(list(out.glob("0*.png"))) == 8
    in_process(*draw, 5, "--steps", 3, "--overwrite")
    assert len(list(out.glob("0*.png"))) == 5
    assert "num differ" in mistake(*draw, 4, "--steps", 3)
    # Files that are not of sample.py are never replaced: in it, beside it, instead of it.
    (out / "mine.png").touch()
    in_process(*draw, 4, "--overwrite")
    assert {path.name for path in out.glob("*.png")} == {
        "mine.png", *(f"00000{k}.png" for k in range(4))}
    (tmp_path / "cat.png").touch()
    for place in (run, tmp_path / "cat"):
        assert "take another --out" in mistake("sample", run, "--out", place, "--overwrite")


def test_a_folder_is_cleaned_under_its_own_names(run, tmp_path, in_process, mistake, capsys):
    photos, out, rng = tmp_path / "photos", tmp_path / "out", np.random.default_rng(0)
    (photos / "sub").mkdir(parents=True)
    for name, std in (("a.jpg", 0), ("sub/b.png", 40)):
        pixels = (128 + std * rng.standard_normal((20, 20, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(photos / name)
    clean = ["sample", run, "--out", out, "--denoise", photos]
    in_process(*clean)
    text = capsys.readouterr().out
    assert "a.png: noise of std 0.000" in text and "sub/b.png: noise of std 0.2" in text
    assert Image.open(out / "sub/b.png").size == (16, 16)
    # An image without noise stays as it is, to the one step of the lowest level.
    before, after = (np.asarray(Image.open(file)).astype(int)[:16, :16]
                     for file in (photos / "a.jpg", out / "a.png"))
    assert abs(before - after).mean() < 4
    assert load_images("folder", 16, 3, out / "samples.npz", tmp_path).shape == (2, 3, 16, 16)
    # The command again does nothing; another noise is refused; the photos are never written to.
    in_process(*clean)
    assert "2 of 2 images are there" in capsys.readouterr().out
    assert "noise_std differ" in mistake(*clean, "--noise_std", 0.2)
    for place in (photos, photos / "clean"):
        assert "take another" in mistake(*clean, "--out", place, "--overwrite")
    in_process(*clean, "--noise_std", 0.2, "--overwrite")


def test_an_expert_takes_the_small_time_steps(run, tmp_path, in_process, mistake):
    saved, file = torch.load(run / "ckpt.pt", weights_only=True), tmp_path / "expert.pt"
    saved["ema"] = {key: value + 0.01 for key, value in saved["ema"].items()}
    for differs, word in (({"T": 500}, "its T is 500"), ({"predict": "v"}, "its predict is v"),
                          ({}, "")):
        torch.save({**saved, "config": {**saved["config"], "t_max": 0.1, **differs}}, file)
        if differs:
            assert word in mistake("sample", run, "--expert", file)
    plain, expert = load_run(run), load_run(file)
    both, x = with_expert(plain, file, "cpu"), torch.randn(2, 3, 16, 16)
    late, early = torch.tensor([99, 99]), torch.tensor([100, 100])
    assert torch.equal(both.net(x, late), expert.net(x, late))
    assert torch.equal(both.net(x, early), plain.net(x, early))
    mixed = both.net(x, torch.tensor([99, 100]))
    assert torch.equal(mixed, torch.stack([expert.net(x, late)[0], plain.net(x, early)[1]]))
    in_process("sample", run, "--expert", file, "--num", 2, "--steps", 2, "--out", tmp_path / "a")
    note = json.loads((tmp_path / "a/samples.json").read_text())
    assert note["expert_sha256"] == expert.origin["weights_sha256"]
    assert "one network" in mistake("sample", run, "--expert", file, "--export", tmp_path / "b")
    assert "not fine-tuned by" in mistake("sample", run, "--expert", run, "--out", tmp_path / "c")


@pytest.mark.parametrize("line, words", [
    ("no\nwhere" + 9 * f"/{99 * 'x'}", "no checkpoint at no where/x"),
    ("RUN --steps 1001", "T = 1000"),
    ("RUN --noise_std 0.2", "noise of the images to --denoise"),
    ("RUN --out FILE", "FILE"),
])
def test_a_mistake_ends_in_one_line(line, words, run, mistake):
    assert words in mistake("sample", *line.replace("RUN", str(run)).split(" "))


def test_what_is_not_finite_is_no_picture():
    with pytest.raises(UserError, match="not finite"):
        list(draw_images(lambda x, t: x * np.nan, Diffusion(), (1, 4, 4), range(2), steps=2))
