"""The ground truth against autograd and Monte Carlo, the figures on known inputs, each command."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import toy
from conftest import script
from losses import Perturbation
from model import UserError

ROOT = Path(toy.__file__).parent
NOISE_LEVELS = [(0.9999**0.5, 0.01), (0.8**0.5, 0.2**0.5), (0.01, 0.9999**0.5)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def level(sqrt_a, s):
    """A noise level as log_density and score take it: two tensors (1, 1)."""
    return torch.tensor([[sqrt_a]], dtype=torch.float64), torch.tensor([[s]], dtype=torch.float64)


def plane_score(truth, x, sqrt_a, s):
    """The closed form: a difference of Gaussians over one of error functions, -u / s^2 across."""
    u = x.double() @ truth.frame.double()
    normal = torch.distributions.Normal(0.0, 1.0)
    plus, minus = (u[:, :2] + sqrt_a) / s, (u[:, :2] - sqrt_a) / s
    mass = normal.cdf(plus) - normal.cdf(minus)
    inside = (normal.log_prob(plus).exp() - normal.log_prob(minus).exp()) / (s * mass)
    return torch.cat([inside, -u[:, 2:] / s**2], 1) @ truth.frame.T.double()


def mixture_score(truth, x, sqrt_a, s):
    """The closed form: the posterior's mean over the modes of (sqrt_a mu - x) / variance."""
    variance = sqrt_a**2 * 0.01 + s**2
    offset = sqrt_a * toy.MODE_MEANS - x.double()[:, None]
    weights = toy.MODE_WEIGHTS * (-offset.square().sum(2) / (2 * variance)).exp()
    return (weights[:, :, None] * offset).sum(1) / weights.sum(1, keepdim=True) / variance


@pytest.mark.parametrize("name, closed_form", [("plane", plane_score), ("mixture", mixture_score)])
@pytest.mark.parametrize("sqrt_a, s", NOISE_LEVELS)
def test_score_is_the_closed_form(name, closed_form, sqrt_a, s):
    truth = toy.TRUTHS[name](3)
    x0 = truth.draw(200, generator())
    x = sqrt_a * x0 + s * torch.randn(x0.shape, generator=generator(1))
    score = truth.score(x, *level(sqrt_a, s))
    assert torch.allclose(score.double(), closed_form(truth, x, sqrt_a, s), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", toy.TRUTHS)
def test_score_far_from_the_data(name):
    """There a naive Phi(a) - Phi(b), or a sum of exponentials, is 0 / 0."""
    truth = toy.TRUTHS[name](3)
    x = 3 + truth.draw(200, generator())
    score = truth.score(x, *level(0.9999**0.5, 0.01))
    assert score.isfinite().all()
    # it points back to the data
    assert ((score * x).sum(1) < -500).all()


@pytest.mark.parametrize("name", toy.TRUTHS)
def test_density_and_score_against_monte_carlo(name):
    truth, sqrt_a, s = toy.TRUTHS[name](1), 0.8**0.5, 0.2**0.5
    d = len(truth.frame)
    x0 = truth.draw(200_000, generator()).double()
    x = truth.draw(8, generator(1)).double() + 0.3
    log_p = -(x[:, None] - sqrt_a * x0).square().sum(2) / (2 * s**2)
    estimate = log_p.logsumexp(1) - math.log(len(x0)) - d / 2 * math.log(2 * math.pi * s**2)
    assert torch.allclose(truth.log_density(x, *level(sqrt_a, s)), estimate, atol=0.03)
    # E[x0 | x] under the posterior, then Tweedie
    mean = log_p.softmax(1) @ x0
    score = (sqrt_a * mean - x) / s**2
    assert torch.allclose(truth.score(x, *level(sqrt_a, s)).double(), score, atol=0.03 / s)


def test_the_plane_is_oblique_and_its_own_for_each_seed():
    frames = [toy.plane(seed).frame for seed in range(20)]
    for frame in frames:
        assert torch.allclose(frame @ frame.T, torch.eye(3), atol=1e-6)
        assert frame[:, 2].abs().max() <= toy.OBLIQUE
    assert len({tuple(frame[:, 2].tolist()) for frame in frames}) == 20


def test_the_plane_is_a_square_of_the_right_spread():
    truth = toy.plane(5)
    u = truth.draw(50_000, generator()) @ truth.frame
    figures = toy.plane_figures(u, seed=0)
    assert u[:, 2].abs().max() < 1e-5 and u[:, :2].abs().max() <= 1.00001
    assert figures["in_plane_std_ratio"] == pytest.approx(1, abs=0.01)
    assert figures["sliced_wasserstein"] < 0.02


def test_plane_figures_of_a_known_offset_and_shrink():
    u = 2 * torch.rand(20_000, 2, generator=generator()) - 1
    x = torch.cat([0.5 * u, torch.full((20_000, 1), 0.3)], 1)
    figures = toy.plane_figures(x, seed=0)
    assert figures["off_plane_rms"] == pytest.approx(0.3, abs=1e-6)
    assert figures["in_plane_std_ratio"] == pytest.approx(0.5, abs=0.01)


def test_sliced_wasserstein_of_a_shift():
    x = torch.randn(1000, 3, generator=generator())
    assert toy.sliced_wasserstein(x, x[torch.randperm(1000)]) == 0
    # a shift by v moves each projection by p.v, and E (p.v)^2 = |v|^2 / d
    shift = torch.tensor([3.0, 0.0, 0.0])
    assert toy.sliced_wasserstein(x, x + shift, projections=4000) == pytest.approx(
        3 / 3**0.5, rel=0.03)


def test_mixture_figures_of_one_mode_and_of_the_truth():
    centre = toy.MODE_MEANS[:1].float().repeat(100, 1)
    figures = toy.mixture_figures(centre)
    # all mass on the mode of weight .4: total variation .6; density there .4 / (2 pi .01)
    assert figures["mass_error"] == pytest.approx(0.6, abs=1e-6)
    assert figures["nll"] == pytest.approx(-math.log(0.4 / (2 * math.pi * 0.01)), abs=1e-4)
    assert figures["spurious_mass"] == 0
    assert toy.mixture_figures(torch.zeros(10, 2))["spurious_mass"] == 1

    # separate modes: entropy = that of the weights + that of a Gaussian
    w = toy.MODE_WEIGHTS
    entropy = -(w * w.log()).sum() + 1 + math.log(2 * math.pi * 0.01)
    figures = toy.mixture_figures(toy.mixture(0).draw(100_000, generator()))
    assert figures["nll"] == pytest.approx(entropy.item(), abs=0.02)
    assert figures["mass_error"] < 0.01 and figures["spurious_mass"] < 0.001


def test_subspace_figures_of_a_known_leak():
    basis, mean = torch.eye(10)[:, :2], torch.full((10,), 0.5)
    clean = torch.zeros(40_000, 10)
    clean[:, :2] = torch.randn(40_000, 2, generator=generator())
    clean += mean
    x = clean.clone()
    x[:, 2] += 0.5 * torch.randn(40_000, generator=generator(1))
    figures = toy.subspace_figures(x, mean, basis, clean)
    assert figures["outside_share"] == pytest.approx(0.25 / 2.25, rel=0.03)
    assert figures["variance_ratio"] == pytest.approx(1, abs=1e-5)
    assert figures["max_angle"] < 1

    turned = mean + (clean - mean)[:, [2, 1, 0, *range(3, 10)]]  # one axis of two turned out
    figures = toy.subspace_figures(turned, mean, basis, clean)
    assert figures["max_angle"] == pytest.approx(90, abs=0.1)
    assert figures["mean_angle"] == pytest.approx(45, abs=0.1)


def test_images_lie_in_the_subspace_of_largest_variance():
    x, mean, basis = toy.image_subspace(None, 16)
    assert torch.allclose(basis.T @ basis, torch.eye(16), atol=1e-4)
    pixels = torch.from_numpy(np.array(toy.shapes(6000, 16, 1, 0))).float().flatten(1) / 127.5 - 1
    variances = torch.linalg.eigvalsh(pixels[:4000].T.cov()).flip(0)
    # all of the variance that any 16 directions can hold, and the data has no more
    assert x[:4000].var(0).sum() == pytest.approx(variances[:16].sum().item(), rel=1e-3)
    assert toy.subspace_figures(x, mean, basis, x)["outside_share"] < 1e-6


def test_copied_share():
    training = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    x = torch.tensor([[0.9, 0.0], [1.1, 0.0], [4.0, 0.1]])  # distances 0.9:3.1, 1.1:2.9, 0.1:4
    assert toy.copied_share(x, training) == pytest.approx(2 / 3)


def test_against_truth_of_the_exact_net_and_of_zero():
    truth = toy.plane(0)
    best = toy.against_truth(toy.Exact(truth), truth, 0)
    assert max(best["score_error"]) == 0
    # at the lowest level only the normal direction is known to be 0: two coordinates are left
    assert best["reconstruction_rms"][0] == pytest.approx(2**0.5 * 0.078, rel=0.05)
    zero = toy.Linear(torch.zeros(3, 3))
    figures = toy.against_truth(zero, truth, 0)
    assert figures["score_error"] == pytest.approx([1] * 4)
    # D(x_t) = x_t / sqrt(a), so its distance to x0 is s / sqrt(a) |eps|, rms sqrt(3)
    a = toy.DIFFUSION.alpha_bar[list(toy.LEVELS)]
    expected = (3 * (1 - a) / a).sqrt().tolist()
    assert figures["reconstruction_rms"] == pytest.approx(expected, rel=0.03)


def test_exact_score_samples_the_truth():
    net = toy.Exact(toy.mixture(0))
    figures = toy.mixture_figures(toy.generate(net, (1000, 2), 250, 0))
    assert figures["spurious_mass"] < 0.005 and figures["mass_error"] < 0.06


def test_corruption_is_frozen_and_of_the_stated_size():
    x0 = torch.zeros(20_000, 3)
    noisy = toy.corrupt(x0, (0.9, 0.2, 0.0), 1, 2)
    hit = (noisy != 0).any(1)
    assert hit.double().mean() == pytest.approx(0.9, abs=1e-4)
    assert noisy[hit].std().item() == pytest.approx(0.2, rel=0.02)
    assert torch.equal(noisy, toy.corrupt(x0, (0.9, 0.2, 0.0), 1, 2))
    outliers = toy.corrupt(x0, (0.0, 0.0, 0.1), 1, 2)
    hit = (outliers != 0).any(1)
    assert hit.double().mean() == pytest.approx(0.1, abs=1e-4)
    assert outliers[hit].std().item() == pytest.approx(2 / 3**0.5, rel=0.03)


def test_linear_optimum_is_the_closed_form_for_random_omega():
    """k* = s / (s^2 + a v / (1 + c)), c = E[lam_t r^2 / 3] = lam E[beta] / (sqrt(3) s)."""
    v, cfg = torch.tensor([0.5, 0.05]), Perturbation()
    torch.manual_seed(0)
    for t in (60, 400):
        K, _, _ = toy.linear_optimum(toy.RULES["random"], v.diag(), t, cfg, draws=2000)
        a = toy.DIFFUSION.alpha_bar[t].item()
        s = (1 - a) ** 0.5
        c = 0.3 * (8 / 255 + 1) / 2 / (3**0.5 * s)
        assert torch.allclose(K.diag(), s / (s**2 + a * v / (1 + c)), rtol=0.02)
        assert K[0, 1].abs() < 0.02


def test_ascent_finds_the_noise_and_the_residual_the_signal():
    V = torch.tensor([0.37, 0.036]).diag()
    share = {}
    for name, rule in toy.RULES.items():
        torch.manual_seed(0)
        _, M, _ = toy.linear_optimum(rule, V, 60, Perturbation(), draws=500)
        share[name] = (M[1, 1] / M.trace()).item()
    assert share["random"] == pytest.approx(0.5, abs=0.03)
    assert share["l2 x3"] > 0.99 > share["l2 x1"] > 0.8
    # blind along the axes: every corner of the box is as good
    assert share["sign x10"] == pytest.approx(0.5, abs=0.01)
    assert share["residual l2 x3"] < 0.2


SETTINGS = SimpleNamespace(samples=600, sample_steps=20, shown=None, steps=300, reading="sigma",
                           lam=0.3, images=None, rank=16)


def test_attack_moves_a_network_further_than_chance():
    # eps_theta = K x with an oblique direction: nothing is denoised along it, all across it
    direction = F.normalize(torch.tensor([[1.0, 2.0, 2.0]]), dim=1)
    net = toy.Linear(torch.eye(3) - 0.9 * direction.T @ direction)
    run = toy.Run("plane", toy.CLEAN, "dsm", 0.0, 0)
    moved = {row["attack"]: row["moved_wasserstein"] for row in toy.attack(net, run, SETTINGS)[0]}
    assert list(moved) == list(toy.ATTACKS) and moved["none"] == 0 < moved["none, other noise"]
    assert moved["pgd l2"] > 1.2 * moved["random l2"]
    assert moved["pgd linf"] > 1.2 * moved["random linf"]


def test_diverged_samples_are_bad_ones():
    for k in (-1e6, math.nan):
        x = toy.generate(toy.Linear(k * torch.eye(3)), (10, 3), 20, 0)
        assert toy.plane_figures(x, 0)["off_plane_rms"] > 1000


def test_training_points_are_corrupted_as_the_run_says():
    run = toy.Run("plane", (0.9, 0.2, 0.0), "dsm", 0.0, 3)
    off_plane = toy.training_points(run, SETTINGS) @ toy.plane(3).frame[:, 2]
    assert off_plane.std().item() == pytest.approx(0.2 * 0.9**0.5, rel=0.03)
    run = toy.Run("subspace", (0.0, 0.0, 1.0), "dsm", 0.0, 3)
    images = toy.training_points(run, SETTINGS)
    assert images.abs().max() <= 1 and images.std().item() == pytest.approx(3**-0.5, rel=0.01)


def test_modes_and_weights_do_what_they_are_for():
    """Short training on the noisy plane: adversarial cleans more than random, more than none."""
    off_plane = {}
    for mode, lam in (("dsm", 0.0), ("random", 0.3), ("adv", 0.3), ("adv", 0.01)):
        run = toy.Run("plane", (0.9, 0.2, 0.0), mode, lam, 1)
        net = toy.train(run, toy.training_points(run, SETTINGS), SETTINGS)
        x = toy.generate(net, (600, 3), 50, 1)
        off_plane[mode, lam] = toy.plane_figures(x @ toy.plane(1).frame, 1)["off_plane_rms"]
    assert off_plane["adv", 0.3] < 0.6 * off_plane["random", 0.3]
    assert off_plane["random", 0.3] < 0.85 * off_plane["dsm", 0.0]
    assert off_plane["adv", 0.3] < 0.7 * off_plane["adv", 0.01]


def test_why_knows_signal_from_noise():
    frame = toy.plane(0).frame
    # C = I - s K: at the second level s = .2, signal .9 and noise .3
    K = frame @ torch.tensor([0.1, 0.1, 0.7]).diag() @ frame.T / toy.DIFFUSION.s[60]
    rows, _ = toy.why(toy.Linear(K), toy.Run("plane", (0.9, 0.2, 0.0), "adv", 0.3, 0), SETTINGS)
    assert rows[0]["signal_gain"][1] == pytest.approx(0.9, abs=1e-4)
    assert rows[0]["noise_gain"][1] == pytest.approx(0.3, abs=1e-4)
    rows, _ = toy.why(toy.Linear(K), toy.Run("plane", (0.9, 0.2, 0.0), "dsm", 0.0, 0), SETTINGS)
    rows = {row["mode"]: row for row in rows}
    assert rows["dsm"]["signal_gain"][1] > 0.85 > 0.5 > rows["dsm"]["noise_gain"][1]
    assert rows["l2 x3"]["mlp_omega_off_plane"][1] > 0.9 > 0.1 > (
        rows["residual l2 x3"]["mlp_omega_off_plane"][1])
    assert rows["sign x1"]["omega_on_noise"][1] > 0.8
    assert rows["sign x3, not turned"]["omega_on_noise"][1] == pytest.approx(0.5, abs=0.01)


def test_memorize_of_the_exact_score():
    run = toy.Run("mixture", toy.CLEAN, "exact", 0.0, 0, 8)
    rows, _ = toy.memorize(toy.Exact(toy.mixture(0)), run, SETTINGS)
    assert rows[0]["heldout_error_ratio"] == pytest.approx([1.0] * 4)
    # it never saw the 8 points: as near to them as fresh draws are
    assert rows[0]["copied_share"] == pytest.approx(rows[0]["fresh_draws_share"], abs=0.06)
    assert 0 < rows[0]["fresh_draws_share"] < 0.5


def test_table_means_and_spread():
    rows = [{"experiment": "e", "corruption": "clean", "mode": "adv", "seed": seed,
             "x": value, "list": [value, 1.0]} for seed, value in enumerate((1.0, 3.0))]
    line = toy.table(rows).splitlines()[2]
    assert line == "| clean | adv | 2.000 +- 1.414 | 2.00 / 1.00 +- 1.41 |"


def test_frontier_weighs_the_gain_of_each_seed():
    rows = [{"data": "plane", "corruption": "outliers p 0.1", "seed": seed, "mode": mode,
             "forward_units": cost, "off_plane_rms": scale * left, "in_plane_std_ratio": 1.0}
            for seed, scale in ((0, 1), (1, 3))
            for mode, cost, left in (("dsm", 3, 0.5), ("adv_share", 4.5, 0.2), ("adv", 8, 0.1))]
    cells = toy.frontier_cells(rows)
    assert [row["gain"] for row in rows] == pytest.approx([0, 0.75, 1] * 2)
    layers = cells["what should go:\n0 is best", "plane, outliers"][0]
    (curve,) = [content for kind, content, colour in layers if kind == "dots"]
    # costs to the right, what is left upwards, on the scale of the means' largest, .5 * 2
    assert curve[:, 0] == pytest.approx(1.7 * np.array([3, 4.5, 8]) / 13 - 0.85)
    assert curve[:, 1] == pytest.approx(1.7 * np.array([1, 0.4, 0.2]) / 1.25 - 0.85)
    del rows[0]
    toy.frontier_cells(rows)  # a seed without its dsm has no gain, and no error


def test_picture_has_every_cell_and_survives_divergence(tmp_path):
    dots = np.random.default_rng(0).uniform(-0.1, 0.1, (500, 2))
    dots[:3] = [[np.nan, 1e30], [-np.inf, 0.5], [-1e9, 1e9]]
    cells = {(row, column): ([("dots", dots, toy.BLUE), ("lines", dots[None, :9], toy.RED)],
                             "caption")
             for row in "ab" for column in "xyz"}
    toy.draw(tmp_path / "p.png", "title", cells)
    image = Image.open(tmp_path / "p.png").convert("RGB")
    head = 46  # a title of one line, and the columns'
    assert image.size == (toy.LEFT + 3 * (toy.PANEL + toy.GAP),
                          head + 2 * (toy.PANEL + toy.CAPTION + toy.GAP))
    centre = image.getpixel((toy.LEFT + toy.PANEL // 2, head + toy.PANEL // 2))
    assert centre[2] > 150 > centre[0]


EXPECTED = {"plane": {"plane", "plane_lambda"}, "mixture": {"mixture"}, "subspace": {"subspace"},
            "memorize": {"memorize"}, "attack": {"attack"}, "why": {"why"},
            "frontier": {"frontier"}}


@pytest.mark.parametrize("experiment", EXPECTED)
def test_each_experiment_runs(experiment, tmp_path):
    modes = "random,adv" if experiment == "plane" else "adv"
    result = script("toy.py", experiment, "--quick", "--steps", 3, "--workers", 1, "--modes", modes,
                     "--seed", 1, "--out", tmp_path / "o")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"output {tmp_path / 'o'}")
    rows = json.loads((tmp_path / "o" / "toy.json").read_text())
    assert {row["experiment"] for row in rows} == EXPECTED[experiment]
    assert {row["seed"] for row in rows} == {1}
    for name in EXPECTED[experiment]:
        assert Image.open(tmp_path / "o" / f"{name}.png").size[0] > 300
        assert f"\n{name};" in result.stdout
    if experiment == "plane":
        assert {"exact", "random", "adv"} == {row["mode"] for row in rows}
        assert {(row["training_steps"], row["reading"]) for row in rows} == {(3, "sigma")}
        assert {"off_plane_rms", "in_plane_std_ratio", "sliced_wasserstein"} <= rows[0].keys()


@pytest.mark.parametrize("flags, word", [
    (["nowhere"], "nowhere"),
    (["plane", "--modes", "adv,best"], "best"),
    (["plane", "--noise_p", "0.9"], "noise_std"),
    (["frontier", "--outlier_p", "0.1"], "corruptions of its own"),
    (["plane", "--noise_p", "1.5", "--noise_std", "0.2"], "1.5"),
    (["subspace", "--images", "no/such/folder"], "no/such/folder"),
    (["plane", "--out", str(ROOT / "toy.py")], "toy.py"),
    (["plane", "--seed", "99999999999999999999"], "--seed"),
])
def test_mistakes_end_in_one_line(flags, word, capsys):
    with pytest.raises(SystemExit) as end:
        toy.run_cli(lambda: toy.main(flags))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and word in error


def test_too_few_images_of_ones_own(tmp_path):
    Image.new("L", (16, 16)).save(tmp_path / "one.png")
    with pytest.raises(UserError, match="1 images, 1000 are needed"):
        toy.main(["subspace", "--images", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_mode_named_twice_is_one_mode():
    assert toy.parse_args(["--modes", "adv,dsm,adv"]).modes == ["adv", "dsm"]


def test_a_mistake_on_the_command_line():
    result = script("toy.py", "--steps", "0")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "--steps" in result.stderr
