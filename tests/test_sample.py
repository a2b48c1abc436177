"""Samplers against the ideal denoiser of a Gaussian; images that depend on their seed alone."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import finish, fork
from losses import Diffusion
from sample import (UserError, denoise_step, draw_images, image_noise, sample, save_grid, seed_for,
                    timesteps, to_uint8)

MEAN, VAR = 0.3, 0.25


def ideal(diffusion):
    """The exact eps of data N(MEAN, VAR): s (x - sqrt(a) MEAN) / (a VAR + s^2)."""

    def net(x, t):
        sqrt_a, s = diffusion.at(t, x)
        return s * (x - sqrt_a * MEAN) / (sqrt_a**2 * VAR + s**2)

    return net


def exact_moments(sampler, steps, spacing="respaced"):
    """Mean and variance of the sampler's output, step by step: with `ideal` each is affine."""
    alpha_bar = Diffusion().alpha_bar.numpy()
    chosen = np.linspace(999, 0, steps).round().astype(int)
    mean, var = 0.0, 1.0
    for i, t in enumerate(chosen):
        prev = chosen[i + 1] if i + 1 < steps else -1
        prev = t - 1 if spacing == "naive" else prev
        a, a_prev = alpha_bar[t], alpha_bar[prev] if prev >= 0 else 1.0
        k = np.sqrt(a) * VAR / (a * VAR + 1 - a)
        b = MEAN * (1 - k * np.sqrt(a))
        if sampler == "ddim":
            # d/dx and offset of sqrt(a') x0hat + sqrt(1-a') (x - sqrt(a) x0hat) / sqrt(1-a)
            ratio = np.sqrt((1 - a_prev) / (1 - a))
            weight, keep, noise = np.sqrt(a_prev) - ratio * np.sqrt(a), ratio, 0.0
        else:
            # Bayes: x_prev given x_t and x0hat, from precisions
            alpha = a / a_prev
            noise = 1 / (alpha / (1 - alpha) + 1 / max(1 - a_prev, 1e-30))
            keep = noise * np.sqrt(alpha) / (1 - alpha)
            weight = noise * np.sqrt(a_prev) / max(1 - a_prev, 1e-30)
            if prev < 0:
                weight, keep, noise = 1.0, 0.0, 0.0
        gain = weight * k + keep
        mean, var = gain * mean + weight * b, gain**2 * var + noise
    return mean, var


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("steps, spacing, low, high", [
    (1000, "respaced", 0.97, 1.03), (100, "respaced", 0.8, 1), (20, "respaced", 0.5, 1),
    (100, "naive", 1.5, 9)])
def test_ideal_denoiser_of_a_gaussian(sampler, steps, spacing, low, high):
    """The data's mean; their variance at 1000 steps, with fewer less. "naive" leaves noise."""
    n, d = 20_000, Diffusion()
    g = torch.Generator().manual_seed(steps)
    x = sample(ideal(d), d, lambda: torch.randn(n, 1, generator=g), sampler, steps, spacing, False)
    mean, var = exact_moments(sampler, steps, spacing)
    assert abs(x.mean() - mean) < 4 * (var / n) ** 0.5
    assert x.var().item() == pytest.approx(var, rel=4 * (2 / n) ** 0.5)
    assert low < var / VAR < high and (spacing == "naive" or abs(mean - MEAN) < 0.002)


def test_with_all_steps_the_spacings_are_the_same():
    d = Diffusion()
    naive, respaced = (sample(ideal(d), d, lambda: torch.ones(2, 1), "ddim", 1000, spacing, False)
                       for spacing in ("naive", "respaced"))
    assert torch.equal(naive, respaced)


def test_ddim_step_is_the_exact_ode_step_of_constant_eps():
    """In the variables x / sqrt(a) and s / sqrt(a) the ODE's slope is eps: a straight line."""
    d = Diffusion()
    x, eps = torch.randn(5, 2), torch.randn(5, 2)
    y = denoise_step(lambda x, t: eps, d, x, 700, 300, "ddim", None, clip=False)
    scale = d.alpha_bar.sqrt()
    sigma = (1 - d.alpha_bar).sqrt() / scale
    line = x / scale[700] + (sigma[300] - sigma[700]) * eps
    torch.testing.assert_close(y, (line * scale[300]).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_clipping_comes_before_the_step(sampler):
    """A wild prediction moves the state towards the clipped image, not towards its own."""
    d = Diffusion()
    x = torch.zeros(3, 1, 4, 4)
    for value in (-1e4, 1e4):
        end = denoise_step(lambda x, t: torch.full_like(x, value), d, x, 50, -1, sampler, None)
        assert torch.equal(end, torch.full_like(x, -np.sign(value)))
        middle = denoise_step(lambda x, t: torch.full_like(x, value), d, x, 50, 40, sampler,
                              lambda: torch.zeros_like(x))
        assert middle.abs().max() < 1


def test_timesteps_and_hook():
    assert timesteps(1000, 1000) == list(range(999, -1, -1))
    for steps in (2, 7, 300, 999):
        chosen = timesteps(1000, steps)
        assert chosen[0] == 999 and chosen[-1] == 0 and (np.diff(chosen) < 0).all()
    assert timesteps(1000, 1) == [999] and timesteps(1, 1) == [0]
    with pytest.raises(ValueError, match="1001 sampling steps"):
        timesteps(1000, 1001)
    d, seen = Diffusion(), []

    def perturb(x, t):
        seen.append(t)
        return x + 100

    plain = sample(ideal(d), d, lambda: torch.zeros(1, 1), steps=5, clip=False)
    moved = sample(ideal(d), d, lambda: torch.zeros(1, 1), steps=5, clip=False, perturb=perturb)
    assert seen == timesteps(1000, 5) and moved > plain + 1


def test_noise_is_a_function_of_seed_and_index():
    whole = image_noise(3, range(6), (1, 2, 2), "cpu")
    part = image_noise(3, [4, 2], (1, 2, 2), "cpu")
    other = image_noise(4, [4, 2], (1, 2, 2), "cpu")
    for _ in range(3):
        a, b, c = whole(), part(), other()
        assert torch.equal(a[[4, 2]], b) and not torch.equal(b, c)
    assert seed_for(1, 2) != seed_for(2, 1) and 0 <= seed_for(3) < 2**63


def test_pictures(tmp_path):
    x = torch.tensor([-2.0, -1, -0.5, 0, 1, 3])
    assert to_uint8(x).tolist() == [0, 0, 64, 128, 255, 255]
    grey = np.arange(12 * 64, dtype=np.uint8).reshape(12, 1, 8, 8)
    save_grid(grey, tmp_path / "grid.png", columns=4)
    picture = np.array(Image.open(tmp_path / "grid.png"))
    assert picture.shape == (3 * 50 + 2, 4 * 50 + 2)
    assert (picture[2:8, 2:8] == grey[0, 0, 0, 0]).all()


def images(folder):
    return np.load(folder / "samples.npz")["arr_0"]


def test_images_do_not_depend_on_batch_or_world_size(run, tmp_path, in_process):
    common = [run, "--sampler", "ddpm", "--steps", "3", "--num", "7", "--out"]
    for name, more in (("a", []), ("b", ["--batch_size", 2]), ("d", ["--seed", 1]),
                       ("e", ["--raw"])):
        in_process("sample", *common, tmp_path / name, *more)
    assert finish(fork(tmp_path / "log", "sample", *common, tmp_path / "c", ranks=2)) == [0, 0]
    a, b, c, d, e = (images(tmp_path / name) for name in "abcde")
    assert a.shape == (7, 16, 16, 3) and a.dtype == np.uint8 and len(np.unique(a)) > 50
    # The arithmetic may round otherwise in another batch, by one level of 255.
    assert max(abs(a.astype(int) - b).max(), abs(a.astype(int) - c).max()) <= 1
    assert (a != d).mean() > 0.2 and (a != e).any()
    assert np.array_equal(a[3], np.array(Image.open(tmp_path / "a" / "000003.png")))
    note = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert [note[key] for key in ("weights", "sampler", "steps", "num", "step")] == [
        "EMA", "ddpm", 3, 7, 3]
    assert (tmp_path / "a.png").exists()


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
    # A damaged picture is removed by name, and drawn again; the path's spelling is no matter.
    (out / "000002.png").write_bytes(b"half")
    assert "000002.png was damaged" in mistake(*draw, 8)
    in_process("sample", run / "ckpt.pt", *draw[2:], 8)
    assert abs(images(out)[:6].astype(int) - first).max() <= 1

    # Other settings, or fewer images, would leave others beside them.
    assert "steps differ" in mistake(*draw, 8, "--steps", 3)
    assert len(list(out.glob("0*.png"))) == 8
    in_process(*draw, 5, "--steps", 3, "--overwrite")
    assert len(list(out.glob("0*.png"))) == 5
    assert "5 images there" in mistake(*draw, 4, "--steps", 3)


@pytest.mark.parametrize("theirs", ["out/samples.npz", "out.png"])
def test_files_of_others_are_not_replaced(theirs, run, tmp_path, mistake):
    (tmp_path / "out").mkdir()
    (tmp_path / theirs).write_bytes(b"mine")
    error = mistake("sample", run, "--num", 2, "--out", tmp_path / "out", "--overwrite")
    assert "take another --out" in error and (tmp_path / theirs).read_bytes() == b"mine"


@pytest.mark.parametrize("line, words", [
    ("nowhere", "no checkpoint at nowhere"),
    ("RUN --steps 1001", "T = 1000"),
    ("RUN --num 0", "--num"),
    ("RUN --sampler euler", "invalid choice"),
    ("RUN --device tpu9", "device tpu9"),
    ("RUN --out ", "the path is empty"),
    ("RUN --out LICENSE", "LICENSE"),
])
def test_a_mistake_ends_in_one_line(line, words, run, mistake):
    assert words in mistake("sample", *line.replace("RUN", str(run)).split(" "))


def test_what_is_not_finite_is_no_picture():
    with pytest.raises(UserError, match="not finite"):
        list(draw_images(lambda x, t: x * np.nan, Diffusion(), (1, 4, 4), range(2), steps=2))
