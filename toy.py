"""The claims of adversarial diffusion training where the truth is known.

    python toy.py                       every experiment, one seed: minutes on two cores
    python toy.py --quick               the same in little, under a minute
    python toy.py plane --seeds 3       one of them, mean and standard deviation over three seeds
    python toy.py plane --noise_p 0.9 --noise_std 0.2 --modes dsm,adv

plane     a square on an oblique plane in 3-D: who leaves the plane, who shrinks the square?
          With it plane_lambda, the same at several weights lambda.
mixture   five unequal Gaussians in 2-D: mode shares, and mass where no mode is
subspace  images projected on their first principal components, as flat vectors
memorize  few training points: copies among the samples, and the error on held-out points
attack    perturbed sampling trajectories, beside random perturbations of the same norm
why       which directions the perturbation picks, and what that does to linear-Gaussian data

Corruptions, frozen per training point: noise on 90 % of them (std .1, .2), 10 % outliers (uniform
in [-2, 2] per coordinate; in [-1, 1] for images). The flags narrow them to one. The mode `exact`
is the true score of the clean data in the same sampler: the best attainable.
Writes OUT/toy.json, a list of rows, and OUT/<experiment>.png.
"""

import argparse
import json
import math
import os
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from losses import (MODES, READINGS, Diffusion, Perturbation, ascend, radius_and_weight,
                    random_omega)
from model import UserError, run_cli, timestep_embedding
from sample import Parser, duration, number, sample, timesteps, write_atomically
from train import NOISY, OUTLIER, choose_corruption, load_images, shapes

DIFFUSION = Diffusion()
# Noise levels of the figures that are lists: s = .08, .20, .46 and .90
LEVELS = (20, 60, 150, 400)
# name: (objective in losses.MODES, the ascent's settings, title)
VARIANTS = {
    "dsm": ("dsm", {}, "dsm: plain DDPM"),
    "random": ("random", {}, "random equivariance"),
    "adv": ("adv", {}, "adversarial (paper)"),
    "adv_l2": ("adv", {"ascent_norm": "l2"}, "adversarial, l2, 1 step"),
    "adv_l2x3": ("adv", {"ascent_norm": "l2", "ascent_steps": 3}, "adversarial, l2, 3 steps"),
    "invariant": ("invariant", {}, "invariance"),
}
TITLES = {"exact": "exact score", **{mode: variant[2] for mode, variant in VARIANTS.items()}}
HELD_OUT = 500

# ---------- Ground truth


class Truth(NamedTuple):
    """Clean data with a closed form; sqrt_a and s are the noise level's, floats or (B, 1).

    frame: (d, d), orthonormal; x @ frame are coordinates in the truth's own axes.
    draw: (n, generator) -> x0 (n, d).
    log_density: (x (B, d), sqrt_a, s) -> log p_t(x) of the diffused clean data, float64 (B,).
    score: same arguments -> its gradient in x, float32 (B, d).
    """

    frame: torch.Tensor
    draw: Callable
    log_density: Callable
    score: Callable


def plane(seed):
    """Uniform square [-1, 1]^2 on a plane through 0 in 3-D, its orientation drawn from the seed.

    In its frame u, the third axis normal to the plane, p_t is a product:
        p(u_i) = [Phi((u_i + sqrt_a) / s) - Phi((u_i - sqrt_a) / s)] / (2 sqrt_a),  i = 1, 2
        p(u_3) = N(0, s^2)
    """
    frame = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))).Q
    log_root_2pi = math.log(2 * math.pi) / 2

    def draw(n, generator):
        return (2 * torch.rand(n, 2, generator=generator) - 1) @ frame[:, :2].T

    def edges(x, sqrt_a, s):
        # Both edges seen from -|u|: Phi is precise in its left tail, and 1 in the right one
        u = x.double() @ frame.double()
        far, near = (-u[:, :2].abs() - sqrt_a) / s, (-u[:, :2].abs() + sqrt_a) / s
        log_far, log_near = torch.special.log_ndtr(far), torch.special.log_ndtr(near)
        return u, far, near, log_near + torch.log1p(-(log_far - log_near).exp())

    def log_density(x, sqrt_a, s):
        u, _, _, log_mass = edges(x, sqrt_a, s)
        sqrt_a, s = (torch.as_tensor(v, dtype=torch.float64) for v in (sqrt_a, s))
        normal = -(u[:, 2:] / s).square() / 2 - s.log() - log_root_2pi
        return (log_mass - (2 * sqrt_a).log()).sum(1) + normal.squeeze(1)

    def score(x, sqrt_a, s):
        u, far, near, log_mass = edges(x, sqrt_a, s)
        near, far = ((-z.square() / 2 - log_root_2pi - log_mass).exp() for z in (near, far))
        inside = -u[:, :2].sign() * (near - far) / s
        return (torch.cat([inside, -u[:, 2:] / s**2], 1) @ frame.T.double()).float()

    return Truth(frame, draw, log_density, score)


MODE_WEIGHTS = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05], dtype=torch.float64)
MODE_ANGLES = torch.arange(5, dtype=torch.float64) * 2 * math.pi / 5
MODE_MEANS = torch.stack([MODE_ANGLES.sin(), MODE_ANGLES.cos()], 1)
MODE_STD = 0.1


def mixture(seed):
    """Five Gaussians of std .1 on the unit circle, weights .4 to .05; the same for every seed.

        p_t(x) = sum_k w_k N(x; sqrt_a mu_k, (a std^2 + s^2) I)
    """

    def draw(n, generator):
        k = torch.multinomial(MODE_WEIGHTS, n, replacement=True, generator=generator)
        return MODE_MEANS[k].float() + MODE_STD * torch.randn(n, 2, generator=generator)

    def terms(x, sqrt_a, s):
        sqrt_a, s = (torch.as_tensor(v, dtype=torch.float64) for v in (sqrt_a, s))
        variance = sqrt_a**2 * MODE_STD**2 + s**2
        offset = x.double()[:, None] - sqrt_a[..., None] * MODE_MEANS
        log_p = -offset.square().sum(2) / (2 * variance) - (2 * math.pi * variance).log()
        return MODE_WEIGHTS.log() + log_p, offset, variance

    def log_density(x, sqrt_a, s):
        return terms(x, sqrt_a, s)[0].logsumexp(1)

    def score(x, sqrt_a, s):
        log_p, offset, variance = terms(x, sqrt_a, s)
        return -((log_p.softmax(1)[:, :, None] * offset).sum(1) / variance).float()

    return Truth(torch.eye(2), draw, log_density, score)


TRUTHS = {"plane": plane, "mixture": mixture}


@lru_cache(maxsize=1)
def image_subspace(folder, rank):
    """Images on their first `rank` principal components: (x (N, D) in that subspace, mean, basis).

    folder: of images, or None for the embedded shapes; grey, 16x16, flat, on the [-1, 1] scale.
    basis (D, rank), orthonormal; the subspace goes through the mean. UserError if too few.
    """
    pixels = load_images("folder", 16, 1, folder) if folder else shapes(6000, 16, 1, 0)
    if len(pixels) < 2 * HELD_OUT:
        raise UserError(f"--images {folder}: {len(pixels)} images, {2 * HELD_OUT} are needed")
    x = torch.from_numpy(np.array(pixels)).float().flatten(1) / 127.5 - 1
    mean = x.mean(0)
    basis = torch.linalg.svd(x[:4000] - mean, full_matrices=False).Vh[:rank].T
    return mean + (x - mean) @ basis @ basis.T, mean, basis


def corrupt(x0, corruption, seed, reach):
    """Training points as the network sees them; corruption = (noise_p, noise_std, outlier_p).

    Noise is N(0, noise_std^2) per element, an outlier is uniform in [-reach, reach] per element.
    """
    noise_p, noise_std, outlier_p = corruption
    kinds = torch.from_numpy(choose_corruption(len(x0), noise_p, outlier_p, seed))[:, None]
    g = torch.Generator().manual_seed(seed + 1)
    noise = noise_std * torch.randn(x0.shape, generator=g)
    outliers = reach * (2 * torch.rand(x0.shape, generator=g) - 1)
    return torch.where(kinds == OUTLIER, outliers, x0 + noise * (kinds == NOISY))


def describe(corruption):
    """(.9, .2, 0) -> "noise p 0.9 std 0.2"."""
    noise_p, noise_std, outlier_p = corruption
    parts = [f"noise p {noise_p} std {noise_std}"] * (noise_p > 0)
    parts += [f"outliers p {outlier_p}"] * (outlier_p > 0)
    return " + ".join(parts) or "clean"


# ---------- Networks


class MLP(nn.Module):
    """(x (B, d), t (B,)) -> eps (B, d): three residual layers and a gain g(t) on the input."""

    def __init__(self, d, width=128):
        super().__init__()
        self.register_buffer("times", timestep_embedding(torch.arange(DIFFUSION.T), 32))
        self.emb = nn.Linear(32, width)
        self.gain = nn.Linear(width, 1)
        self.first = nn.Linear(d, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.last = nn.Linear(width, d)

    def forward(self, x, t):
        emb, h = self.emb(self.times[t]), self.first(x)
        for layer in self.layers:
            h = h + layer(F.silu(h + emb))
        # Noise passes by the bottleneck of the layers, or width < d could not predict it
        return self.last(F.silu(h)) + self.gain(F.silu(emb)) * x


class Exact(nn.Module):
    """The network that training on clean data aims at: eps = -s score_t(x)."""

    def __init__(self, truth):
        super().__init__()
        self.truth = truth

    def forward(self, x, t):
        sqrt_a, s = DIFFUSION.at(t, x)
        return -s * self.truth.score(x, sqrt_a, s)


class Residual(nn.Module):
    """eps_theta(x, t) - x / s = -(sqrt(a) / s) D(x): what `losses.ascend` moves on it is D.

    Moving x by s omega changes it by eps_theta(x + s omega) - eps_theta(x) - omega.
    """

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x, t) - x / DIFFUSION.at(t, x)[1]


class Linear(nn.Module):
    """eps_theta(x, t) = K_t x, K (levels, d, d) at the time steps `levels`."""

    def __init__(self, K, levels):
        super().__init__()
        self.K = K
        self.row = torch.zeros(DIFFUSION.T, dtype=torch.long)
        self.row[levels] = torch.arange(len(levels))

    def forward(self, x, t):
        return (self.K[self.row[t]] @ x[:, :, None]).squeeze(2)


def train(run, x0, args, batch):
    """An MLP on x0 (N, d) for args.steps steps of Adam, whose rate falls from .004 along a cosine.

    The falling rate stands for an EMA: the last steps hardly move the figures.
    """
    objective, ascent, _ = VARIANTS[run.mode]
    cfg = Perturbation(reading=args.reading, lam=run.lam, **ascent)
    torch.manual_seed(run.seed)
    net = MLP(x0.shape[1])
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = 0.002 * (1 + math.cos(math.pi * step / args.steps))
        index, t = torch.randint(len(x0), (batch,)), torch.randint(DIFFUSION.T, (batch,))
        eps = torch.randn(batch, x0.shape[1])
        loss, _ = MODES[objective](net, DIFFUSION, x0[index], t, eps, cfg)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.eval().requires_grad_(False)


def generate(net, shape, steps, seed, perturb=None, sampler="ddpm"):
    """Samples of `shape` (n, d) in `steps` steps, unclipped: points have no natural range."""
    g = torch.Generator().manual_seed(seed)
    x = sample(net, DIFFUSION, lambda: torch.randn(shape, generator=g), sampler, steps,
               clip=False, perturb=perturb)
    # Where sampling diverges, figures should be large, not undefined
    return x.nan_to_num().clamp(-1e4, 1e4)


def denoised(net, x0, level, seed):
    """x0 (B, d) diffused to time step `level`: (x_t, t, predicted eps, denoised D(x_t))."""
    t = torch.full((len(x0),), level)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed + level))
    x_t = DIFFUSION.diffuse(x0, t, eps)
    with torch.no_grad():
        predicted = net(x_t, t)
    return x_t, t, predicted, DIFFUSION.x0_from_eps(x_t, t, predicted)


# ---------- Figures


def rms(x):
    """Root mean square length of the rows of x (B, d)."""
    return x.double().square().sum(1).mean().sqrt().item()


def sliced_wasserstein(x, y, projections=128):
    """Sliced 2-Wasserstein distance of two sets of n points (n, d), in the data's units.

        sqrt(mean over unit vectors p of the mean of (sorted x.p - sorted y.p)^2)
    """
    p = torch.randn(x.shape[1], projections, generator=torch.Generator().manual_seed(0))
    p = F.normalize(p, dim=0)
    return ((x @ p).sort(0).values - (y @ p).sort(0).values).square().mean().sqrt().item()


def against_truth(net, truth, seed, n=2000):
    """Errors on fresh clean data at each of LEVELS.

    score_error: |eps_theta - eps*| / |eps*| in the mean square, eps* = -s times the exact score.
    reconstruction_rms: rms distance of D(x_t) to x0.
    """
    x0 = truth.draw(n, torch.Generator().manual_seed(seed + 2))
    figures = {"score_error": [], "reconstruction_rms": []}
    for level in LEVELS:
        x_t, t, predicted, D = denoised(net, x0, level, seed)
        best = Exact(truth)(x_t, t)
        figures["score_error"].append(rms(predicted - best) / rms(best))
        figures["reconstruction_rms"].append(rms(D - x0))
    return figures


def plane_figures(u, seed):
    """Figures of points in the plane's frame, u (n, 3): distance to it, spread in it, mismatch."""
    clean = 2 * torch.rand(len(u), 2, generator=torch.Generator().manual_seed(seed + 3)) - 1
    return {
        "off_plane_rms": rms(u[:, 2:]),
        # a uniform coordinate on [-1, 1] has std 1 / sqrt(3)
        "in_plane_std_ratio": u[:, :2].std(0).mean().item() * math.sqrt(3),
        "sliced_wasserstein": sliced_wasserstein(u, F.pad(clean, (0, 1))),
    }


def mixture_figures(x):
    """Figures of points x (n, 2) under the true mixture.

    mass_error: total variation between the modes' shares of x (nearest mean) and their weights.
    spurious_mass: share of x beyond 4 std of every mode.
    nll: mean of -log p(x), nats; that of the true data is its entropy, see `exact`.
    """
    distance = torch.cdist(x.double(), MODE_MEANS)
    shares = distance.argmin(1).bincount(minlength=5) / len(x)
    return {
        "mass_error": (shares - MODE_WEIGHTS).abs().sum().item() / 2,
        "spurious_mass": (distance.amin(1) > 4 * MODE_STD).double().mean().item(),
        "nll": -mixture(0).log_density(x, 1.0, 0.0).mean().item(),
    }


def subspace_figures(x, mean, basis, clean):
    """Figures of samples x (n, D) against the subspace through `mean` spanned by `basis` (D, K).

    outside_share: the part of the energy |x - mean|^2 that lies outside it.
    mean_angle, max_angle: principal angles, degrees, to the span of x's own K first components.
    variance_ratio: variance of x inside the subspace over that of the data `clean` (N, D).
    """
    inside = (x - mean) @ basis
    outside = x - mean - inside @ basis.T
    own = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:basis.shape[1]]
    angles = torch.linalg.svdvals(own @ basis).clamp(max=1).acos().rad2deg()
    return {
        "outside_share": (outside.square().sum() / (x - mean).square().sum()).item(),
        "mean_angle": angles.mean().item(),
        "max_angle": angles.max().item(),
        "variance_ratio": (inside.var(0).sum() / ((clean - mean) @ basis).var(0).sum()).item(),
    }


def copied_share(x, points):
    """Share of x (n, d) nearer to a training point than 1/3 of the distance to the second one."""
    nearest = torch.cdist(x, points).topk(2, dim=1, largest=False).values
    return (nearest[:, 0] < nearest[:, 1] / 3).double().mean().item()


# ---------- Experiments: (net, run, args) -> (rows of figures, cells of the picture)
#
# A cell is (layers, caption) at (row title, column title); its coordinates are [-1, 1]^2.

BLUE, RED, GREY, BLACK = (40, 90, 200), (205, 45, 35), (180, 180, 180), (40, 40, 40)


def on_paper(truth, x):
    """Points (..., d) in drawing units: the plane seen edge-on, the mixture as it is."""
    axes = [0, len(truth.frame) - 1]
    return ((x @ truth.frame)[..., axes] / 1.5).numpy()


def outline(data):
    """The truth as a layer: the plane edge-on, or the modes' circles at 2 std."""
    if data == "plane":
        return "lines", [np.array([[-1, 0], [1, 0]]) / 1.5], RED
    angle = np.linspace(0, 2 * np.pi, 40)
    circle = 2 * MODE_STD * np.stack([np.cos(angle), np.sin(angle)], 1)
    return "lines", [(mean + circle) / 1.5 for mean in MODE_MEANS.numpy()], RED


def score_field(net, truth, data):
    """Lines from points x at s = .2 to their denoised D(x) = (x + s^2 score) / sqrt(a)."""
    line = torch.linspace(-1.3, 1.3, 13 if data == "plane" else 9)
    heights = torch.tensor([-0.5, 0.5]) if data == "plane" else line
    u = F.pad(torch.cartesian_prod(line, heights), (0, len(truth.frame) - 2))
    if data == "plane":
        u = u[:, [0, 2, 1]]
    x, t = u @ truth.frame.T, torch.full((len(u),), LEVELS[1])
    with torch.no_grad():
        D = DIFFUSION.x0_from_eps(x, t, net(x, t))
    return on_paper(truth, torch.stack([x, D], 1))


def points(net, run, args):
    """`plane` and `mixture`: samples, sampling paths and score field against the exact ones."""
    truth = TRUTHS[run.data](run.seed)
    x = generate(net, (args.samples, len(truth.frame)), args.sample_steps, run.seed)
    if run.data == "plane":
        row = plane_figures(x @ truth.frame, run.seed)
        caption = ("off-plane {off_plane_rms:.3f}, std {in_plane_std_ratio:.2f}\n"
                   "Wasserstein {sliced_wasserstein:.3f}").format(**row)
    else:
        row = mixture_figures(x)
        caption = ("mode shares off {mass_error:.3f}\n"
                   "spurious {spurious_mass:.3f}, NLL {nll:.2f}").format(**row)
    row |= against_truth(net, truth, run.seed)

    column, name = TITLES[run.mode], describe(run.corruption)
    layers = [("dots", on_paper(truth, x[:1500]), BLUE), outline(run.data)]
    cells = {(f"samples, trained on\n{name}", column): (layers, caption)}
    if run.corruption == args.shown:
        states = []
        end = generate(net, (40, len(truth.frame)), 100, run.seed,
                       lambda x, t: states.append(x) or x, "ddim")
        paths = on_paper(truth, torch.stack([*states, end], 1))
        cells[f"sampling paths (DDIM),\n{name}", column] = (
            [("lines", paths, GREY), ("dots", paths[:, -1], BLUE), outline(run.data)], "")
        exact, field = (score_field(f, truth, run.data) for f in (Exact(truth), net))
        cells[f"score at s = .2, as steps\nx to D(x) (grey: exact),\n{name}", column] = (
            [("lines", exact, GREY), ("lines", field, BLUE), ("dots", field[:, 1], BLUE),
             outline(run.data)], "relative score error {:.2f}".format(row["score_error"][1]))
    return [row], cells


def plane_lambda(net, run, args):
    """The plane again at several weights: is adv selective, or only stronger?"""
    truth = plane(run.seed)
    x = generate(net, (args.samples, 3), args.sample_steps, run.seed)
    row = {"lam": run.lam, **plane_figures(x @ truth.frame, run.seed)}
    layers = [("dots", on_paper(truth, x[:1500]), BLUE), outline("plane")]
    caption = "off-plane {off_plane_rms:.3f}\nstd kept {in_plane_std_ratio:.2f}".format(**row)
    return [row], {(TITLES[run.mode], f"lambda {run.lam}"): (layers, caption)}


def subspace(net, run, args):
    """Images of a linear subspace, flat: do the samples stay in it, and keep its variance?"""
    data, mean, basis = image_subspace(args.images, args.rank)
    held_out = data[-HELD_OUT:]
    x = generate(net, (args.samples // 4, data.shape[1]), args.sample_steps, run.seed)
    row = {**subspace_figures(x, mean, basis, data), "psnr": []}
    for level in LEVELS:
        D = denoised(net, held_out, level, run.seed)[3]
        row["psnr"].append(10 * math.log10(4 / (D - held_out).square().mean().item()))

    def contact(images):
        tiles = images[:16].view(4, 4, 16, 16).permute(0, 2, 1, 3).reshape(64, 64)
        return [("image", ((tiles.clamp(-1, 1) + 1) * 127.5).byte().numpy(), None)]

    title = f"trained on\n{describe(run.corruption)}"
    caption = ("energy outside {outside_share:.3f}\n"
               "variance inside {variance_ratio:.2f}").format(**row)
    return [row], {(title, "training data"): (contact(training_points(run, args)), ""),
                   (title, TITLES[run.mode]): (contact(x), caption)}


def memorize(net, run, args):
    """Few training points: copies among the samples, and denoising error on fresh points."""
    truth, seen = mixture(run.seed), training_points(run, args)
    x = generate(net, (args.samples, 2), args.sample_steps, run.seed)
    fresh = truth.draw(args.samples, torch.Generator().manual_seed(run.seed + 4))
    row = {"n": run.n, "copied_share": copied_share(x, seen),
           "fresh_draws_share": copied_share(fresh, seen), "heldout_error_ratio": []}
    for level in LEVELS:
        error, best = (rms(denoised(f, fresh, level, run.seed)[3] - fresh)
                       for f in (net, Exact(truth)))
        row["heldout_error_ratio"].append(error / best)
    layers = [("dots", on_paper(truth, x[:1500]), BLUE), ("dots", on_paper(truth, seen), RED)]
    caption = ("copies {copied_share:.2f} (fresh {fresh_draws_share:.2f})\n"
               "error on fresh x {heldout_error_ratio[1]:.2f}").format(**row)
    return [row], {(f"{run.n} training points\n(red)", TITLES[run.mode]): (layers, caption)}


# The inner objective of each perturbation: (norm, ascent steps, does it move D instead of eps)
RULES = {
    "random": None,
    "sign x1": ("linf", 1, False), "sign x3": ("linf", 3, False), "sign x10": ("linf", 10, False),
    "l2 x1": ("l2", 1, False), "l2 x3": ("l2", 3, False), "l2 x10": ("l2", 10, False),
    "residual l2 x3": ("l2", 3, True),
}


def perturbation(rule, net, x, t, r):
    """omega (B, d) of half-width r (B, 1) at x by one of RULES, through `losses.ascend`."""
    omega = random_omega(r, x)
    if rule is None:
        return omega
    norm, steps, residual = rule
    target = Residual(net) if residual else net
    with torch.no_grad():
        clean = target(x, t)
    cfg = Perturbation(ascent_norm=norm, ascent_steps=steps)
    return ascend(omega, target, x, DIFFUSION.at(t, x)[1], t, r, clean, cfg)


def attack(net, run, args):
    """White-box perturbation of sampling: on every fifth step, x <- x + s_t omega.

    omega moves the denoised estimate most, |omega| <= .5 per element (linf) or .5 sqrt(d) (l2),
    by five ascent steps from a random start; `random` has the same norm and no gradient.
    """
    truth, d = TRUTHS[run.data](run.seed), len(TRUTHS[run.data](run.seed).frame)
    rows, cells, untouched = [], {}, None
    for name in ("none", "random linf", "pgd linf", "random l2", "pgd l2"):
        kind, _, norm = name.partition(" ")
        calls = []

        def hook(x, t):
            calls.append(t)
            if kind == "none" or len(calls) % 5:
                return x
            batch_t, r = torch.full((len(x),), t), torch.full((len(x), 1), 0.5)
            if kind == "pgd":
                omega = perturbation((norm, 5, True), net, x, batch_t, r)
            elif norm == "linf":
                omega = r * torch.randn_like(x).sign()
            else:
                omega = r * math.sqrt(d) * F.normalize(torch.randn_like(x))
            return x + DIFFUSION.at(batch_t, x)[1] * omega

        torch.manual_seed(run.seed)
        x = generate(net, (args.samples // 3, d), args.sample_steps, run.seed, hook)
        untouched = x if untouched is None else untouched
        if run.data == "plane":
            damage, value = "off_plane_rms", rms((x @ truth.frame)[:, 2:])
        else:
            damage, value = "spurious_mass", mixture_figures(x)["spurious_mass"]
        moved = sliced_wasserstein(x, untouched)
        rows.append({"data": run.data, "attack": name, damage: value,
                     "wasserstein_to_unattacked": moved})
        if run.corruption == args.shown and norm != "linf":
            cells[f"{run.data}\nattack: {name}", TITLES[run.mode]] = (
                [("dots", on_paper(truth, x), BLUE), outline(run.data)],
                f"{damage.replace('_', ' ')} {value:.3f}\nmoved by {moved:.3f}")
    return rows, cells


def linear_optimum(rule, V, levels, cfg, draws=32, rounds=30):
    """The linear network that the regularised objective converges to on data N(0, V).

    With M = E[lam_t omega omega^T] the minimiser is
        K = s (I + M) (a V + s^2 I + s^2 M)^-1
    and M depends on K through the ascent: alternate, averaging M over the rounds.
    Returns (Linear, M (levels, d, d), last omega (levels, draws, d) over its half-width r).
    """
    eye = torch.eye(len(V))
    t = torch.tensor(levels).repeat_interleave(draws)
    x = torch.zeros(len(t), len(V))  # the net is linear: J is the same at every x
    sqrt_a, s = DIFFUSION.at(t, x)
    a_level, s_level = sqrt_a[::draws, :, None] ** 2, s[::draws, :, None]
    M = torch.zeros(len(levels), *V.shape)
    for i in range(rounds):
        K = s_level * (eye + M) @ torch.linalg.inv(a_level * V + s_level**2 * (eye + M))
        net = Linear(K, levels)
        r, lam_t = radius_and_weight(s, cfg)
        omega = perturbation(rule, net, x, t, r)
        outer = lam_t[:, :, None] * omega[:, :, None] * omega[:, None, :]
        M = M + 2 / (i + 2) * (outer.view(len(levels), draws, *V.shape).mean(1) - M)
    return net, M, (omega / r).view(len(levels), draws, -1)


def gain_cell(signal, noise):
    """A cell with two curves over LEVELS: the gains (0 to 1) of C on signal and on noise."""
    layers = [("lines", [np.array([[-0.8, 0.9], [-0.8, -0.8], [0.9, -0.8]])], GREY),
              ("text", [(-0.3, 0.85, "signal"), (-0.75, -0.4, "noise")], BLACK)]
    for part, colour in ((signal, BLUE), (noise, RED)):
        curve = np.array([(-0.8 + 0.5 * i, 1.6 * gain - 0.8) for i, gain in enumerate(part)])
        layers += [("lines", [curve], colour), ("dots", curve, colour)]
    return layers, "gain of C, 0 to 1,\nat s = .08, .20, .46, .90"


def why(net, run, args):
    """Where omega points, and what follows: exact on linear-Gaussian data, measured on an MLP.

    Data N(0, V) in 2-D: signal of variance 1/3 along one direction, noise of p sigma^2 along
    both, the basis turned by 30 degrees. The MLP is dsm's on the noisy plane.
    C = sqrt(a) dD/dx: what the denoiser D lets through, its gain along the data's directions.
    """
    variance = torch.tensor([1 / 3, 0.0]) + max(run.corruption[0] * run.corruption[1] ** 2, 1e-4)
    g = torch.Generator().manual_seed(run.seed)
    data = torch.randn(args.samples // 2, 2, generator=g) * variance.sqrt()
    levels = timesteps(DIFFUSION.T, args.sample_steps)
    shown = min(range(len(levels)), key=lambda i: abs(levels[i] - LEVELS[1]))
    cfg = Perturbation(reading=args.reading, lam=run.lam)
    frame = plane(run.seed).frame
    seen = training_points(run, args)[:1000]
    states = [denoised(net, seen, level, run.seed)[:2] for level in LEVELS]
    titles = ("samples of the best\nlinear network\n(grey: its data)",
              "its omega, s = .2\n(red: the noise's\ndirection)",
              "omega on the dsm MLP,\nnoisy plane, s = .2\n(red: across the plane)")

    gains = {"linear_gain_signal": [], "linear_gain_noise": [],
             "mlp_gain_signal": [], "mlp_gain_noise": []}
    for x_t, t in states:
        a = DIFFUSION.alpha_bar[t[0]].item()
        jacobian = torch.func.vmap(torch.func.jacrev(lambda x, t: net(x[None], t[None])[0]))(x_t, t)
        C = (frame.T @ (torch.eye(3) - (1 - a) ** 0.5 * jacobian.mean(0)) @ frame).diag()
        measured = [*(a * variance / (a * variance + 1 - a)), C[:2].mean(), C[2]]
        for part, gain in zip(gains.values(), measured):
            part.append(gain.item())
    curves = list(gains.values())
    rows = [{"mode": "C of dsm", **gains}]
    cells = {(titles[0], "what dsm lets through"): gain_cell(*curves[:2]),
             (titles[2], "what dsm lets through"): gain_cell(*curves[2:])}

    across = ("lines", [np.array([[0, -0.95], [0, 0.95]])], RED)
    for name, rule in [*RULES.items(), ("sign x3, not turned", RULES["sign x3"])]:
        torch.manual_seed(run.seed)
        turn = math.radians(30 if name in RULES else 0)
        axes = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        linear, M, omega = linear_optimum(rule, axes @ variance.diag() @ axes.T, levels, cfg)
        x = generate(linear, data.shape, args.sample_steps, run.seed) @ axes
        kept = (x.std(0) / variance.sqrt()).tolist()
        weight = (axes.T @ M[shown] @ axes).diag()
        row = {"mode": name, "linear_noise_std_kept": kept[1], "linear_signal_std_kept": kept[0],
               "linear_omega_on_noise": (weight[1] / weight.sum()).item()}
        rows.append(row)
        cells[titles[0], name] = (
            [("dots", data.numpy() / 1.8, GREY), ("dots", x.numpy() / 1.8, BLUE)],
            f"std kept: noise {kept[1]:.2f}\nsignal {kept[0]:.2f}")
        cells[titles[1], name] = ([("dots", (omega[shown] @ axes).numpy() / 2, BLUE), across],
                                  f"on noise {row['linear_omega_on_noise']:.0%}")
        if name not in RULES:
            continue
        row["mlp_omega_off_plane"] = []
        for x_t, t in states:
            r, _ = radius_and_weight(DIFFUSION.at(t, x_t)[1], cfg)
            u = perturbation(rule, net, x_t, t, r) / r @ frame
            row["mlp_omega_off_plane"].append((u[:, 2].square().sum() / u.square().sum()).item())
            if t[0] == LEVELS[1]:
                cells[titles[2], name] = (
                    [("dots", u[:400, [0, 2]].numpy() / 2, BLUE), across],
                    f"across the plane {row['mlp_omega_off_plane'][-1]:.0%}")
    return rows, dict(sorted(cells.items(), key=lambda cell: titles.index(cell[0][0])))


# ---------- Pictures and tables

PANEL, LEFT, TOP, GAP, CAPTION = 170, 150, 62, 8, 32


def lambda_curve(rows):
    """A cell with std kept against off-plane distance, a line per mode, a dot per lambda."""
    layers = [("lines", [np.array([[-0.85, 0.9], [-0.85, -0.8], [0.95, -0.8]])], GREY),
              ("text", [(-0.8, 0.98, "std kept, .4 to 1.1"),
                        (-0.5, -0.8, "off-plane, 0 to .2")], BLACK)]
    for i, (mode, colour) in enumerate((("random", RED), ("adv", BLUE))):
        curve = [(-0.85 + 9 * row["off_plane_rms"], 2.4 * row["in_plane_std_ratio"] - 1.76)
                 for row in rows if row["mode"] == mode]
        if curve:
            layers += [("lines", [np.array(curve)], colour), ("dots", np.array(curve), colour),
                       ("text", [(0.2, -0.2 - 0.2 * i, mode)], colour)]
    return layers, "best: left and high\n(off-plane 0, kept 1)"


def panel(layers):
    """Layers (kind, content, colour) -> a PIL image of PANEL pixels; drawn twice as large."""
    size = 2 * PANEL
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)

    def pixels(xy):
        # Diverged samples lie far outside, where Pillow's integers would overflow
        return ((np.array([1, -1]) * np.nan_to_num(xy).clip(-9, 9) + 1) * size / 2).tolist()

    for kind, content, colour in layers:
        if kind == "image":
            image.paste(Image.fromarray(content).resize((size, size), Image.NEAREST))
        elif kind == "dots":
            for x, y in pixels(content):
                pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        elif kind == "lines":
            for line in content:
                pen.line([tuple(point) for point in pixels(line)], fill=colour, width=2)
        else:
            for x, y, text in content:
                pen.text(pixels([x, y]), text, fill=colour, font=ImageFont.load_default(22))
    pen.rectangle((0, 0, size - 1, size - 1), outline=GREY, width=2)
    return image.resize((PANEL, PANEL), Image.LANCZOS)


def draw(path, title, cells):
    """Write the cells {(row title, column title): (layers, caption)} as one PNG."""
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    width, height = PANEL + GAP, PANEL + CAPTION + GAP
    sheet = Image.new("RGB", (LEFT + len(columns) * width, TOP + len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    small, middle, large = (ImageFont.load_default(size) for size in (12, 14, 16))
    pen.text((8, 4), textwrap.fill(title, sheet.width // 9), fill="black", font=large)
    for j, column in enumerate(columns):
        pen.text((LEFT + j * width, TOP - 20), column, fill="black", font=middle)
    for i, row in enumerate(rows):
        pen.text((8, TOP + i * height + 8), row, fill="black", font=small)
    for (row, column), (layers, caption) in cells.items():
        left, top = LEFT + columns.index(column) * width, TOP + rows.index(row) * height
        sheet.paste(panel(layers), (left, top))
        pen.text((left + 2, top + PANEL + 1), caption, fill="black", font=small)
    # 64 colours are plenty, and a third of the bytes
    sheet = sheet.quantize(64, dither=Image.Dither.NONE)
    write_atomically(path, lambda temporary: sheet.save(temporary, "PNG", optimize=True))


def table(rows):
    """Rows of one experiment as a markdown table: mean +- std over the seeds."""
    keys = [key for key in ("data", "corruption", "n", "lam", "attack", "mode") if key in rows[0]]
    names = [name for name in dict.fromkeys(name for row in rows for name in row)
             if name not in keys + ["experiment", "seed"]]
    groups = {}
    for row in rows:
        groups.setdefault(tuple(str(row[key]) for key in keys), []).append(row)

    def cell(name, group):
        if name not in group[0]:
            return ""
        values = np.array([row[name] for row in group], dtype=float)
        if values.ndim > 1:
            return " / ".join(f"{value:.2f}" for value in values.mean(0))
        spread = f" +- {values.std(ddof=1):.3f}" if len(group) > 1 else ""
        return f"{values.mean():.3f}{spread}"

    lines = [keys + names] + [[*key, *(cell(name, group) for name in names)]
                              for key, group in groups.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


# ---------- Command line

# name: (its function, the title of its picture)
EXPERIMENTS = {
    "plane": (points, "A square in 3-D seen edge-on: samples (blue) should lie on the red line and "
                      "fill it. std: of the samples within the plane, over the true one."),
    "plane_lambda": (plane_lambda, "The weight lambda growing: does a mode flatten the cloud "
                                   "(off-plane to 0) or shrink the square (std kept below 1)?"),
    "mixture": (points, "Five Gaussians, red circles at 2 std: samples (blue) should be in them."),
    "subspace": (subspace, "Images of a linear subspace: samples of each mode, all from the same "
                           "noise. Best: no energy outside, variance 1."),
    "memorize": (memorize, "Few training points (red): samples (blue) that sit on them are copies. "
                           "Error on fresh x: of denoising at s = .2, over the least possible."),
    "attack": (attack, "Sampling while every fifth state is pushed by half a standard deviation of "
                       "its noise: at random, or where it moves the denoised estimate most (pgd)."),
    "why": (why, "Why adversarially train: where does each rule turn omega, and what does the "
                 "penalty there remove from the samples? Wanted: noise near 0, signal near 1."),
}
CORRUPTIONS = [(0.0, 0.0, 0.0), (0.9, 0.1, 0.0), (0.9, 0.2, 0.0), (0.0, 0.0, 0.1)]


class Run(NamedTuple):
    """One network to train: on n points of `data`, corrupted, with a mode and a weight."""

    data: str
    corruption: tuple
    mode: str
    lam: float
    seed: int
    n: int = 10_000


def training_points(run, args):
    """The run's training set (n, d), a function of the run alone."""
    if run.data == "subspace":
        clean = image_subspace(args.images, args.rank)[0][:-HELD_OUT]
        return corrupt(clean, run.corruption, run.seed, reach=1)
    x0 = TRUTHS[run.data](run.seed).draw(run.n, torch.Generator().manual_seed(run.seed))
    return corrupt(x0, run.corruption, run.seed, reach=2)


def plan(args):
    """{Run: names of the experiments that look at it}; experiments share networks."""
    runs = {}

    def want(name, data, corruption, mode, lam, seed, *n):
        if args.experiment in (name, name.partition("_")[0], "all"):
            runs.setdefault(Run(data, corruption, mode, lam, seed, *n), []).append(name)

    for seed in range(args.seed, args.seed + args.seeds):
        for corruption in args.corruptions:
            for mode in ["exact"] + args.modes:
                # the plane alone takes every ascent, on it they are compared
                common = mode != "adv_l2" or args.modes != list(VARIANTS)
                attacked = corruption in (args.corruptions[0], args.shown)
                want("plane", "plane", corruption, mode, args.lam, seed)
                if common:
                    want("mixture", "mixture", corruption, mode, args.lam, seed)
                if common and attacked:
                    want("attack", "plane", corruption, mode, args.lam, seed)
                    want("attack", "mixture", corruption, mode, args.lam, seed)
                if common and mode != "exact":
                    want("subspace", "subspace", corruption, mode, args.lam, seed)
        for mode in [m for m in ("exact", "dsm", "random", "adv", "adv_l2x3")
                     if m in ["exact"] + args.modes]:
            for n in args.few:
                want("memorize", "mixture", CORRUPTIONS[0], mode, args.lam, seed, n)
        for mode in [m for m in ("random", "adv") if m in args.modes]:
            for lam in args.lambdas:
                want("plane_lambda", "plane", args.shown, mode, lam, seed)
        want("why", "plane", args.shown, "dsm", args.lam, seed)
    return runs


def work(run, names, args):
    """Train a run's network and measure it: [(experiment, rows, cells)]. Runs in any process."""
    torch.set_num_threads(1)
    if run.mode == "exact":
        net = Exact(TRUTHS[run.data](run.seed))
    else:
        net = train(run, training_points(run, args), args, 128 if run.data == "subspace" else 256)
    head = {"corruption": describe(run.corruption), "mode": run.mode, "seed": run.seed}
    results = []
    for name in names:
        rows, cells = EXPERIMENTS[name][0](net, run, args)
        results.append((name, [{"experiment": name, **head, **row} for row in rows], cells))
    return results


def modes(text):
    """An argparse type: "dsm,adv" -> ["dsm", "adv"]."""
    chosen = text.split(",")
    if not set(chosen) <= set(VARIANTS):
        raise argparse.ArgumentTypeError(f"{text!r}: modes are {','.join(VARIANTS)}")
    return chosen


def parse_args(argv=None):
    """The command line; UserError where it is wrong."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("experiment", nargs="?", default="all",
                   choices=["plane", "mixture", "subspace", "memorize", "attack", "why", "all"])
    p.add_argument("--modes", type=modes, default=list(VARIANTS),
                   help=f"with commas between, of {','.join(VARIANTS)} (all; adv_l2 on plane only)")
    p.add_argument("--noise_p", type=number(float, 0, 1), help="share of noisy training points")
    p.add_argument("--noise_std", type=number(float, 0), help="standard deviation of their noise")
    p.add_argument("--outlier_p", type=number(float, 0, 1), help="share of outliers")
    p.add_argument("--reading", choices=list(READINGS), default=Perturbation.reading,
                   help=f"how the radius follows the noise schedule ({Perturbation.reading})")
    p.add_argument("--lam", type=number(float, 0), default=Perturbation.lam,
                   help=f"weight lambda ({Perturbation.lam})")
    p.add_argument("--images", help="subspace: folder of your own images (the embedded shapes)")
    p.add_argument("--rank", type=number(int, 1, 256), default=16, help="subspace: dimension (16)")
    p.add_argument("--steps", type=number(int, 1), help="training steps (1000; 300 if --quick)")
    p.add_argument("--seed", type=number(int, 0), default=0, help="the first seed (0)")
    p.add_argument("--seeds", type=number(int, 1), default=1, help="how many seeds (1)")
    p.add_argument("--quick", action="store_true",
                   help="short training, few samples, one corruption, no l2 ascent")
    p.add_argument("--workers", type=number(int, 1), default=os.cpu_count(),
                   help="processes side by side, one thread each (one a core)")
    p.add_argument("--out", type=Path, default=Path("out/toy"), help="output folder (out/toy)")
    args = p.parse_args(argv)

    if (args.noise_p is None) != (args.noise_std is None):
        raise UserError("--noise_p and --noise_std go together: give both")
    args.corruptions = CORRUPTIONS[2:3] if args.quick else CORRUPTIONS
    if args.noise_p is not None or args.outlier_p is not None:
        args.corruptions = [(args.noise_p or 0.0, args.noise_std or 0.0, args.outlier_p or 0.0)]
    # The corruption whose sampling paths, fields, attacks and lambdas are shown
    args.shown = args.corruptions[min(2, len(args.corruptions) - 1)]
    if args.quick and args.modes == list(VARIANTS):
        args.modes = ["dsm", "random", "adv", "invariant"]
    args.steps = args.steps or (300 if args.quick else 1000)
    args.samples, args.sample_steps = (600, 50) if args.quick else (3000, 250)
    args.few = (8,) if args.quick else (8, 32, 128)
    args.lambdas = (0.3, 1.0) if args.quick else (0.1, 0.3, 1.0, 3.0)
    return args


def main(argv=None):
    """Entry point; see the module's docstring."""
    args = parse_args(argv)
    print(f"output {args.out}", flush=True)
    runs = plan(args)
    if any(run.data == "subspace" for run in runs):
        image_subspace(args.images, args.rank)  # a bad folder is told before the work
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}") from error
    begun = time.perf_counter()
    done = {}

    def report(run, results):
        done[run] = results
        spent = time.perf_counter() - begun
        print(f"{len(done)}/{len(runs)}  {run.data}, {describe(run.corruption)}, {run.mode}, lambda"
              f" {run.lam}, n {run.n:,}, seed {run.seed}  {spent / len(done):.1f} s/network  "
              f"ETA {duration(spent / len(done) * (len(runs) - len(done)))}", flush=True)

    if args.workers == 1:
        for run, names in runs.items():
            report(run, work(run, names, args))
    else:
        with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
            futures = {pool.submit(work, run, names, args): run for run, names in runs.items()}
            for future in as_completed(futures):
                report(futures[future], future.result())

    rows, cells = {}, {}
    for run in sorted(runs, key=lambda run: run.lam):  # else as planned, not as finished
        for name, found, drawn in done[run]:
            rows.setdefault(name, []).extend(found)
            if run.seed == args.seed:
                cells.setdefault(name, {}).update(drawn)
    for name in [name for name in EXPERIMENTS if name in rows]:
        print(f"\n{name}; lists are at t = {' / '.join(map(str, LEVELS))}\n{table(rows[name])}")
        if name == "plane_lambda":
            first = [row for row in rows[name] if row["seed"] == args.seed]
            cells[name][TITLES[first[-1]["mode"]], "off-plane, std"] = lambda_curve(first)
        draw(args.out / f"{name}.png", EXPERIMENTS[name][1], cells[name])
    text = json.dumps([row for found in rows.values() for row in found], indent=1)
    write_atomically(args.out / "toy.json", lambda temporary: temporary.write_text(text + "\n"))
    print(f"\n{sum(map(len, rows.values()))} rows in {args.out / 'toy.json'}, a picture of each "
          f"experiment beside it, {duration(time.perf_counter() - begun)}")


if __name__ == "__main__":
    run_cli(main)
