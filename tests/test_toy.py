"""The ground truth against integrals and Monte Carlo, the figures on known inputs, the command."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from scipy.stats import multivariate_normal

import toy

ARGS = SimpleNamespace(samples=600, sample_steps=20, shown=None, steps=80, reading="sigma")
CLEAN, NOISY, OUTLIERS = (0.0, 0.0, 0.0), (0.9, 0.2, 0.0), (0.0, 0.0, 0.1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def levels(t, n):
    """sqrt(a) and s of time step t, as log_density takes them: two tensors (n, 1)."""
    return [value.double() for value in toy.DIFFUSION.at(torch.full((n,), t), torch.zeros(n, 1))]


def linear(K):
    return lambda x, t: x @ K.T


def task(experiment, data, corruption=CLEAN, mode="dsm", **fields):
    cfg = toy.perturbation(mode, 0.3, ARGS)
    return toy.Task(experiment, data, corruption, mode, cfg, **{"seed": 0} | fields)


@pytest.mark.parametrize("name", toy.TRUTHS)
def test_density_integrates_to_one_and_is_that_of_the_diffused_draws(name):
    truth = toy.TRUTHS[name](3)
    d = len(truth.frame)
    line = torch.linspace(-4, 4, 65, dtype=torch.float64)
    x = torch.cartesian_prod(*[line] * d) @ truth.frame.double().T
    density = truth.log_density(x, *levels(150, len(x))).exp()
    assert density.sum().item() / 8**d == pytest.approx(1, abs=1e-3)

    x0 = truth.draw(100_000, generator()).double()
    x = truth.draw(8, generator(1)).double() + 0.3
    sqrt_a, s = levels(150, 8)
    log_p = -(x[:, None] - sqrt_a[0] * x0).square().sum(2) / (2 * s[0] ** 2)
    log_p = log_p.logsumexp(1) - math.log(len(x0)) - d / 2 * math.log(2 * math.pi * s[0] ** 2)
    assert torch.allclose(truth.log_density(x, sqrt_a, s), log_p, atol=0.03)

    # Far from the data, where a naive Phi(a) - Phi(b), or a sum of exponentials, is 0 / 0, the
    # exact eps still leads back.
    x = truth.draw(100, generator()) + 3
    for t in (0, 60, 999):
        eps = truth.exact_eps(x, torch.full((100,), t))
        assert eps.isfinite().all() and (eps * x).sum(1).mean() > 0


def test_exact_eps_samples_the_truth_and_figures_see_an_offset():
    mixture, plane = toy.mixture(0), toy.plane(0)
    figures = mixture.figures(toy.generate(mixture.exact_eps, (1000, 2), 250, 0))
    assert figures["spurious_mass"] < 0.005 and figures["mass_error"] < 0.06
    x = toy.generate(plane.exact_eps, (1000, 3), 250, 0)
    figures = plane.figures(x)
    assert figures["off_plane_rms"] < 1e-3 and figures["sliced_wasserstein"] < 0.06
    assert figures["in_plane_std_ratio"] == pytest.approx(1, abs=0.04)
    figures = plane.figures(x / 2 + 0.3 * plane.frame[:, 2])
    assert figures["off_plane_rms"] == pytest.approx(0.3, abs=1e-3)
    assert figures["in_plane_std_ratio"] == pytest.approx(0.5, abs=0.02)


def test_distances_of_known_sets():
    x = torch.randn(1000, 3, generator=generator())
    # A shift by v moves each projection by p.v, and E (p.v)^2 = |v|^2 / d.
    distance = toy.sliced_wasserstein(x, x.flip(0) + torch.tensor([3.0, 0, 0]), projections=1000)
    assert distance == pytest.approx(3 / 3**0.5, rel=0.05)
    training = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    x = torch.tensor([[0.9, 0.0], [1.1, 0.0], [4.0, 0.1]])  # distances 0.9:3.1, 1.1:2.9, 0.1:4
    assert toy.copied_share(x, training) == pytest.approx(2 / 3)


def test_mixture_figures_of_one_mode_and_of_the_truth():
    truth, w = toy.mixture(0), toy.MODE_WEIGHTS
    one_mode = toy.MODE_MEANS[:1].float().repeat(100, 1)
    assert truth.figures(one_mode)["mass_error"] == pytest.approx(0.6, abs=1e-6)
    assert truth.figures(torch.zeros(10, 2))["spurious_mass"] == 1
    # Separate modes: the entropy is that of the weights and that of a Gaussian
    entropy = -(w * w.log()).sum().item() + multivariate_normal([0, 0], 0.01).entropy()
    figures = truth.figures(truth.draw(100_000, generator()))
    assert figures["nll"] == pytest.approx(entropy, abs=0.02)
    assert figures["mass_error"] < 0.01 and figures["spurious_mass"] < 0.001


def test_subspace_of_the_images_and_figures_of_a_known_leak():
    x, figures = toy.image_subspace()
    pixels = torch.from_numpy(toy.shapes(6000, 16, 1, 0)).float().flatten(1) / 127.5 - 1
    most = torch.linalg.eigvalsh(pixels[:4000].T.cov())[-16:].sum().item()
    assert x[:4000].var(0).sum() == pytest.approx(most, rel=1e-3)

    outside = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[16]
    leak = x.var(0).sum().sqrt() / 2 * torch.randn(len(x), 1, generator=generator()) * outside
    found = figures(x + leak)
    assert found["outside_share"] == pytest.approx(0.25 / 1.25, rel=0.05)
    assert found["variance_ratio"] == pytest.approx(1, abs=1e-4)


def test_against_truth_of_a_network_of_zeros():
    figures = toy.against_truth(linear(torch.zeros(3, 3)), toy.plane(0), 0)
    assert figures["score_error"] == pytest.approx([1] * 4)
    # D(x_t) = x_t / sqrt(a), so its distance to x0 is s / sqrt(a) |eps|, rms sqrt(3)
    noise = 3**0.5 * toy.DIFFUSION.noise_level[list(toy.LEVELS)]
    assert figures["reconstruction_rms"] == pytest.approx(noise.tolist(), rel=0.03)


# An outlier is uniform in [-2, 2]; its distance to the clean point has that point's variance too
@pytest.mark.parametrize("corruption, share, std", [(NOISY, 0.9, 0.2),
                                                    (OUTLIERS, 0.1, (4 / 3 + 2 / 9) ** 0.5)])
def test_corruption_is_frozen_and_of_the_stated_size(corruption, share, std):
    clean, x, again = (toy.training_points(task("plane", "plane", *how, n=20_000))
                       for how in ((), (corruption,), (corruption, "adv")))
    hit = (x[0] != clean[0]).any(1)
    assert torch.equal(hit, x[1] > 0) and hit.double().mean() == pytest.approx(share, abs=1e-4)
    assert (x[0] - clean[0])[hit].std().item() == pytest.approx(std, rel=0.03)
    assert torch.equal(x[0], again[0])


def find(mode, moved=None):
    return toy.partial(toy.find_omega, toy.VARIANTS[mode][0], moved,
                       toy.perturbation(mode, 0.3, ARGS))


def test_linear_optimum_of_random_omega_is_the_closed_form():
    """k* = s / (s^2 + a v / (1 + c)), c = E[lam_t r^2 / 3] = lam E[beta] / (sqrt(3) s)."""
    v = torch.tensor([0.5, 0.05])
    torch.manual_seed(0)
    for t in (60, 400):
        K, _ = toy.linear_optimum(find("random"), v.diag(), t, draws=2000)
        a, s = toy.DIFFUSION.alpha_bar[t].item(), toy.DIFFUSION.s[t].item()
        c = 0.3 * (8 / 255 + 1) / 2 / (3**0.5 * s)
        assert torch.allclose(K, (s / (s**2 + a * v / (1 + c))).diag(), rtol=0.02, atol=0.02)


def test_the_ascent_finds_the_noise_and_the_residual_the_signal():
    share = {}
    for name, (mode, moved, _) in toy.RULES.items():
        torch.manual_seed(0)
        _, u = toy.linear_optimum(find(mode, moved), torch.tensor([0.37, 0.036]).diag(), 60)
        share[name] = (u[:, 1].square().sum() / u.square().sum()).item()
    assert share["random"] == pytest.approx(0.5, abs=0.1)
    assert share["l2 x3"] > 0.99 and share["residual, l2 x3"] < 0.2
    # Along the axes a sign step is blind: every corner of the box is as good
    assert share["sign x1 (paper)"] == pytest.approx(0.5, abs=0.1)


def test_directions_of_known_gains():
    frame = toy.plane(0).frame
    K = frame @ torch.tensor([0.1, 0.1, 0.7]).diag() @ frame.T / toy.DIFFUSION.s[60]
    u = (torch.tensor([3.0, 0.0, 4.0]) @ frame.T).expand(4, 10, 3)
    figures = toy.directions(frame, K.expand(4, 3, 3), u)
    # C = I - s K: at the second level s = .2 it lets .9 of the signal and .3 of the noise through
    assert figures["signal_gain"][1] == pytest.approx(0.9, abs=1e-4)
    assert figures["noise_gain"][1] == pytest.approx(0.3, abs=1e-4)
    assert figures["omega_on_noise"] == pytest.approx([16 / 25] * 4, abs=1e-4)


def test_modes_do_what_they_are_for():
    """Short training on the noisy plane: adversarial cleans more than random, more than none."""
    off_plane = {}
    for mode in ("dsm", "random", "adv", "adv_low"):
        net = toy.train(task("plane", "plane", NOISY, mode, seed=1), ARGS)
        x = toy.generate(net, (600, 3), 30, 1)
        off_plane[mode] = toy.plane(1).figures(x)["off_plane_rms"]
    assert off_plane["random"] < 0.85 * off_plane["dsm"]
    assert max(off_plane["adv"], off_plane["adv_low"]) < 0.6 * off_plane["random"]


def test_a_table_has_the_mean_and_the_std_over_seeds():
    rows = [{"experiment": "e", "corruption": "clean", "mode": "adv", "seed": seed,
             "x": value, "list": [value, 1.0]} for seed, value in enumerate((1.0, 3.0))]
    line = toy.markdown_table(rows).splitlines()[2]
    assert line == "| clean | adv | 2.000 +- 1.414 | 2.000 / 1.000 +- 1.414 |"


def test_every_experiment_leaves_its_files_whatever_the_workers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toy, "FEW", (8,))
    flags = ["--quick", "--steps", "2", "--seed", "1"]
    toy.main([*flags, "--modes", "adv", "--workers", "1", "--out", str(tmp_path)])
    rows, printed = json.loads((tmp_path / "toy.json").read_text()), capsys.readouterr().out
    assert {row["experiment"] for row in rows} == set(toy.EXPERIMENTS)
    for name in toy.EXPERIMENTS:
        assert Image.open(tmp_path / f"{name}.png").size[0] > 300 and f"\n{name};" in printed

    # Each network is trained once, and a mode without a weight for none.
    toy.main(["mixture", *flags, "--modes", "dsm,adv,adv", "--lam", "0.1,0.3", "--workers", "2",
              "--out", str(tmp_path / "two")])
    found = json.loads((tmp_path / "two" / "toy.json").read_text())
    assert [(row["mode"], row["lam"]) for row in found] == [("dsm", 0), ("adv", 0.1), ("adv", 0.3)]
    assert found[2] in rows and found[2]["seed"] == 1
    assert found[2]["forward_units"] == 8 and found[2]["training_steps"] == 2


@pytest.mark.parametrize("line, word", [
    ("plane --modes adv,best", "best"), ("plane --lam 0.3,-1", "-1"),
    ("plane --noise_p 0.9", "noise_std"), ("plane --out FILE", "FILE")])
def test_mistakes_end_in_one_line_before_the_work(line, word, mistake, monkeypatch):
    monkeypatch.setattr(toy, "measured", None)
    assert word in mistake("toy", *line.split(" "))
