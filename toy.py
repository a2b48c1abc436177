"""The claims of adversarial diffusion training where the truth is known.

    python toy.py                       every experiment, one seed: minutes on two cores
    python toy.py --quick               the same in little, under a minute
    python toy.py plane --seeds 3       one of them, mean and standard deviation over three seeds
    python toy.py plane --noise_p 0.9 --noise_std 0.2 --modes dsm,adv

plane     a square on an oblique plane in 3-D: who leaves the plane, who shrinks the square?
          With it plane_lambda, the same at several weights lambda. Orientations within 26
          degrees of an axis, 30 % of all, are redrawn: see OBLIQUE.
mixture   five unequal Gaussians in 2-D: mode shares, and mass where no mode is
subspace  images projected on their first principal components, as flat vectors
memorize  few training points (of the first corruption): copies, and the error on fresh points
attack    perturbed sampling trajectories, beside random perturbations of the same norm
why       which directions the perturbation picks, and what the penalty then removes
frontier  what a training step costs against what it removes and keeps (not part of `all`)

Corruptions, frozen per training point: noise on 90 % of them (std .1, .2), 10 % outliers (uniform
in [-2, 2] per coordinate; in [-1, 1] for images). The flags narrow them to one. The mode `exact`
is the true score of the clean data in the same sampler: the best attainable. All modes see the
same batches. Writes OUT/toy.json, a list of rows, and OUT/<experiment>.png, of the first seed.
"""

import argparse
import json
import math
import signal
import textwrap
import time
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from losses import (MODES, READINGS, Denoiser, Diffusion, Perturbation, ascend, forward_units,
                    radius_and_weight, random_omega, trajectory_attack)
from model import UserError, run_cli, timestep_embedding
from sample import TOY, Parser, duration, mix, number, sample, timesteps, write_atomically
from train import NOISY, OUTLIER, choose_corruption, load_images, shapes

DIFFUSION = Diffusion()
# Noise levels of the figures that are lists: s = .08, .20, .46 and .90
LEVELS = (20, 60, 150, 400)
# The largest component of the plane's normal. Near an axis the paper's sign step goes blind: adv
# leaves .31 to .34 of dsm's distance to the plane at .93 to .97, .48 at 1; l2 x3 .14 to .16.
OBLIQUE = 0.9
# name: (objective in losses.MODES, the ascent's settings, title)
VARIANTS = {
    "exact": (None, {}, "exact score"),
    "dsm": ("dsm", {}, "dsm: plain DDPM"),
    "random": ("random", {}, "random equivariance"),
    "adv": ("adv", {}, "adversarial (paper)"),
    "adv_l2": ("adv", {"ascent_norm": "l2"}, "adversarial, l2, 1 step"),
    "adv_l2x3": ("adv", {"ascent_norm": "l2", "ascent_steps": 3}, "adversarial, l2, 3 steps"),
    "adv_share": ("adv", {"reg_share": 0.3}, "adversarial, 30 % of each batch"),
    "adv_low": ("adv", {"reg_share": 0.1, "reg_low": True}, "adversarial, lowest tenth of t"),
    "adv_l2_share": ("adv", {"ascent_norm": "l2", "reg_share": 0.3}, "l2, 30 % of each batch"),
    "invariant": ("invariant", {}, "invariance"),
}
HELD_OUT = 500
# Where `frontier` looks: (a figure of what should go, one of what should stay)
FRONTIER = {
    ("plane", (0.9, 0.2, 0.0)): ("off_plane_rms", "in_plane_std_ratio"),
    ("plane", (0.0, 0.0, 0.1)): ("off_plane_rms", "in_plane_std_ratio"),
    ("mixture", (0.9, 0.2, 0.0)): ("spurious_mass", "mass_error"),
    ("subspace", (0.9, 0.2, 0.0)): ("outside_share", "variance_ratio"),
}


def seeded(use, *numbers):
    """A random generator for one of the uses below, whole numbers both (such as the run's seed)."""
    return torch.Generator().manual_seed(mix(TOY, use, *numbers))


# No two uses of randomness share a stream; all modes share all of these
ORIENT, POINTS, SPOIL, BATCH, SAMPLES, LEVEL, TEST, FRESH, PROJECT, PUSH = range(10)


# ---------- Ground truth


class Truth(NamedTuple):
    """Clean data with a known density.

    frame: (d, d), orthonormal; x @ frame are coordinates in the truth's own axes.
    draw: (n, generator) -> x0 (n, d).
    log_density: (x (B, d) float64, sqrt_a, s) -> log p_t(x) (B,) of the diffused clean data;
        sqrt_a and s are the noise level's, tensors (B, 1).
    """

    frame: torch.Tensor
    draw: Callable
    log_density: Callable

    def score(self, x, sqrt_a, s):
        """Gradient of log p_t in x (B, d), exact: by autograd, in float64; float32 (B, d)."""
        total = torch.func.grad(lambda x: self.log_density(x, sqrt_a.double(), s.double()).sum())
        return total(x.double()).float()


def plane(seed):
    """Uniform square [-1, 1]^2 on an oblique plane through 0 in 3-D, oriented by the seed.

    Orientations whose normal has a component above OBLIQUE are redrawn.

    In its frame u, the third axis normal to the plane, p_t is a product:
        p(u_i) = [Phi((u_i + sqrt_a) / s) - Phi((u_i - sqrt_a) / s)] / (2 sqrt_a),  i = 1, 2
        p(u_3) = N(0, s^2)
    """
    g = seeded(ORIENT, seed)
    frame = torch.eye(3)
    while frame[:, 2].abs().max() > OBLIQUE:
        frame = torch.linalg.qr(torch.randn(3, 3, generator=g)).Q

    def draw(n, generator):
        return (2 * torch.rand(n, 2, generator=generator) - 1) @ frame[:, :2].T

    def log_density(x, sqrt_a, s):
        u = x @ frame.double() / s
        # Both edges seen from -|u|: Phi is precise in its left tail, and 1 in the right one
        near, far = (torch.special.log_ndtr(-u[:, :2].abs() + edge / s)
                     for edge in (sqrt_a, -sqrt_a))
        inside = near + torch.log1p(-(far - near).exp()) - (2 * sqrt_a).log()
        normal = -u[:, 2].square() / 2 - (s.squeeze(1) * math.sqrt(2 * math.pi)).log()
        return inside.sum(1) + normal

    return Truth(frame, draw, log_density)


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

    def log_density(x, sqrt_a, s):
        variance = (sqrt_a * MODE_STD).square() + s.square()
        distance = (x[:, None] - sqrt_a[:, :, None] * MODE_MEANS).square().sum(2)
        log_p = -distance / (2 * variance) - (2 * math.pi * variance).log()
        return (MODE_WEIGHTS.log() + log_p).logsumexp(1)

    return Truth(torch.eye(2), draw, log_density)


TRUTHS = {"plane": plane, "mixture": mixture}


@lru_cache(maxsize=1)
def image_subspace(folder, rank):
    """Images on their first `rank` principal components: (x (N, D) in that subspace, mean, basis).

    folder: of images, or None for the embedded shapes; grey, 16x16, flat, on the [-1, 1] scale.
    basis (D, rank), orthonormal, of the first 4000; the subspace goes through the mean.
    Raises UserError if there is no such folder or too few images in it.
    """
    if folder and not Path(folder).is_dir():
        raise UserError(f"--images {folder}: no such folder")
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
    g = seeded(SPOIL, seed)
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


class Linear(nn.Module):
    """eps_theta(x, t) = K x, K (d, d)."""

    def __init__(self, K):
        super().__init__()
        self.K = K

    def forward(self, x, t):
        return x @ self.K.T


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
    x0 = TRUTHS[run.data](run.seed).draw(run.n, seeded(POINTS, run.seed))
    return corrupt(x0, run.corruption, run.seed, reach=2)


def training_steps(run, args):
    """Twice as many on the plane, where the modes are compared most closely."""
    return args.steps or (2000 if run.data == "plane" else 1000)


def train(run, x0, args):
    """An MLP on x0 (N, d) by Adam, batch 256, at a rate that falls from .004 along a cosine.

    The falling rate stands for an EMA: the last steps hardly move the figures.
    """
    objective, ascent, _ = VARIANTS[run.mode]
    cfg = Perturbation(reading=args.reading, lam=run.lam, **ascent)
    steps = training_steps(run, args)
    torch.manual_seed(run.seed)
    net = MLP(x0.shape[1])
    g = seeded(BATCH, run.seed)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.002 * (1 + math.cos(math.pi * step / steps))
        index, t = (torch.randint(n, (256,), generator=g) for n in (len(x0), DIFFUSION.T))
        eps = torch.randn(256, x0.shape[1], generator=g)
        loss, _ = MODES[objective](net, DIFFUSION, x0[index], t, eps, cfg)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.eval().requires_grad_(False)


def generate(net, shape, steps, seed, perturb=None, sampler="ddpm"):
    """Samples of `shape` (n, d) in `steps` steps, unclipped: points have no natural range."""
    g = seeded(SAMPLES, seed)
    x = sample(net, DIFFUSION, lambda: torch.randn(shape, generator=g), sampler, steps,
               clip=False, perturb=perturb)
    # Where sampling diverges, figures should be large, not undefined
    return x.nan_to_num(nan=1e4).clamp(-1e4, 1e4)


def denoised(net, x0, level, seed):
    """x0 (B, d) diffused to time step `level`: (x_t, t, predicted eps, denoised D(x_t))."""
    t = torch.full((len(x0),), level)
    x_t = DIFFUSION.diffuse(x0, t, torch.randn(x0.shape, generator=seeded(LEVEL, seed, level)))
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
    p = F.normalize(torch.randn(x.shape[1], projections, generator=seeded(PROJECT)), dim=0)
    return ((x @ p).sort(0).values - (y @ p).sort(0).values).square().mean().sqrt().item()


def against_truth(net, truth, seed, n=2000):
    """Errors on fresh clean data at each of LEVELS.

    score_error: |eps_theta - eps*| / |eps*| in the mean square, eps* = -s times the exact score.
    reconstruction_rms: rms distance of D(x_t) to x0.
    """
    x0 = truth.draw(n, seeded(TEST, seed))
    figures = {"score_error": [], "reconstruction_rms": []}
    for level in LEVELS:
        x_t, t, predicted, D = denoised(net, x0, level, seed)
        best = Exact(truth)(x_t, t)
        figures["score_error"].append(rms(predicted - best) / rms(best))
        figures["reconstruction_rms"].append(rms(D - x0))
    return figures


def plane_figures(u, seed):
    """Figures of points in the plane's frame, u (n, 3): distance to it, spread in it, mismatch."""
    clean = 2 * torch.rand(len(u), 2, generator=seeded(FRESH, seed)) - 1
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
    clean = torch.ones(1, 1), torch.zeros(1, 1)
    return {
        "mass_error": (shares - MODE_WEIGHTS).abs().sum().item() / 2,
        "spurious_mass": (distance.amin(1) > 4 * MODE_STD).double().mean().item(),
        "nll": -mixture(0).log_density(x.double(), *clean).mean().item(),
    }


def subspace_figures(x, mean, basis, clean):
    """Figures of samples x (n, D) against the subspace through `mean` spanned by `basis` (D, K).

    outside_share: energy of x - mean outside the subspace, over all of it.
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


def caption(row, *names):
    """A line for each of the row's figures `names`; of a list, the second: s = .2."""
    values = [(name, row[name][1] if isinstance(row[name], list) else row[name]) for name in names]
    return "\n".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values)


def on_paper(truth, x):
    """Points (..., d) as drawn: the plane seen edge-on, the mixture as it is."""
    return ((x @ truth.frame)[..., [0, -1]] / 1.5).numpy()


def scene(data, truth, x):
    """Points x (n, d) over the truth: the plane edge-on, or the modes' circles at 2 std."""
    angle = np.linspace(0, 2 * np.pi, 40)
    circle = 2 * MODE_STD * np.stack([np.cos(angle), np.sin(angle)], 1)
    lines = MODE_MEANS.numpy()[:, None] + circle if data == "mixture" else [[[-1, 0], [1, 0]]]
    return [("dots", on_paper(truth, x[:1500]), BLUE), ("lines", np.array(lines) / 1.5, RED)]


def score_field(net, truth):
    """Lines from points x at s = .2 to their denoised D(x) = (x + s^2 score) / sqrt(a)."""
    line = torch.linspace(-1.3, 1.3, 9)
    u = torch.cartesian_prod(line, line if len(truth.frame) == 2 else line[[3, 5]])
    x, t = u @ truth.frame[:, [0, -1]].T, torch.full((len(u),), LEVELS[1])
    with torch.no_grad():
        D = DIFFUSION.x0_from_eps(x, t, net(x, t))
    return on_paper(truth, torch.stack([x, D], 1))


def points(net, run, args):
    """`plane` and `mixture`: samples, sampling paths and score field against the exact ones."""
    truth = TRUTHS[run.data](run.seed)
    x = generate(net, (args.samples, len(truth.frame)), args.sample_steps, run.seed)
    row = mixture_figures(x) if run.data == "mixture" else plane_figures(x @ truth.frame, run.seed)
    text = caption(row, *list(row)[:2])
    row |= against_truth(net, truth, run.seed)

    column, name = VARIANTS[run.mode][2], describe(run.corruption)
    cells = {(f"samples, trained on\n{name}", column): (scene(run.data, truth, x), text)}
    if run.corruption == args.shown:
        states = []
        end = generate(net, (40, len(truth.frame)), 100, run.seed,
                       lambda x, t: states.append(x) or x, "ddim")
        paths = on_paper(truth, torch.stack([*states, end], 1))
        cells[f"sampling paths (DDIM),\n{name}", column] = (
            [("lines", paths, GREY), *scene(run.data, truth, end)], "")
        exact, field = (score_field(f, truth) for f in (Exact(truth), net))
        cells[f"score at s = .2, as steps\nx to D(x) (grey: exact),\n{name}", column] = (
            [("lines", exact, GREY), ("lines", field, BLUE), *scene(run.data, truth, x[:0]),
             ("dots", field[:, 1], BLUE)], caption(row, "score_error"))
    return [row], cells


def plane_lambda(net, run, args):
    """The plane again at several weights: is adv selective, or only stronger?"""
    truth = plane(run.seed)
    x = generate(net, (args.samples, 3), args.sample_steps, run.seed)
    row = {"lam": run.lam, **plane_figures(x @ truth.frame, run.seed)}
    text = caption(row, "off_plane_rms", "in_plane_std_ratio")
    return [row], {(VARIANTS[run.mode][2], f"lambda {run.lam}"): (scene("plane", truth, x), text)}


def lambda_cell(rows):
    """plane_lambda's rows as a cell: std kept against off-plane distance, means over the seeds."""
    points = {}
    for row in rows:
        xy = row["off_plane_rms"], row["in_plane_std_ratio"]
        points.setdefault(row["mode"], {}).setdefault(row["lam"], []).append(xy)
    curves = {mode: np.array([np.mean(xy, 0) for xy in of_lam.values()])
              for mode, of_lam in points.items()}
    widest, highest = np.concatenate(list(curves.values())).max(0)
    highest = max(1, highest)
    layers = chart({mode: xy / (widest, highest) for mode, xy in curves.items()},
                   f"off-plane rms, 0 to {widest:.2f}", f"std ratio, 0 to {highest:.2f}")
    return {(VARIANTS[rows[-1]["mode"]][2], "over lambda"): (layers, "best: left and high")}


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
    return [row], {(title, "training data"): (contact(training_points(run, args)), ""),
                   (title, VARIANTS[run.mode][2]): (
                       contact(x), caption(row, "outside_share", "variance_ratio"))}


def memorize(net, run, args):
    """Few training points: copies among the samples, and denoising error on fresh points."""
    truth, seen = mixture(run.seed), training_points(run, args)
    x = generate(net, (args.samples, 2), args.sample_steps, run.seed)
    fresh = truth.draw(args.samples, seeded(FRESH, run.seed))
    error, best = (against_truth(f, truth, run.seed)["reconstruction_rms"]
                   for f in (net, Exact(truth)))
    row = {"n": run.n, "copied_share": copied_share(x, seen),
           "fresh_draws_share": copied_share(fresh, seen),
           "heldout_error_ratio": [e / b for e, b in zip(error, best)]}
    layers = [*scene("mixture", truth, x)[:1], ("dots", on_paper(truth, seen), RED)]
    return [row], {(f"{run.n} training points\n(red)", VARIANTS[run.mode][2]): (
        layers, caption(row, "copied_share", "heldout_error_ratio"))}


# name: (norm, ascent steps) of the push on every fifth state of a sampling trajectory
ATTACKS = {"none": None, "none, other noise": None, "random linf": ("linf", 0),
           "pgd linf": ("linf", 5), "random l2": ("l2", 0), "pgd l2": ("l2", 5)}


def attack(net, run, args):
    """White-box perturbation of sampling, at a budget of .5 s_t per element, and its control.

    moved_wasserstein: to the samples left alone, of the same noise. That of samples left alone
    from other noise is how far two draws are apart by chance.
    """
    truth = TRUTHS[run.data](run.seed)
    shape = (args.samples // 3, len(truth.frame))
    chosen = timesteps(DIFFUSION.T, args.sample_steps)[4::5]
    rows, cells, untouched = [], {}, None
    for name, settings in ATTACKS.items():
        g = seeded(PUSH, run.seed)
        hook = settings and trajectory_attack(
            Denoiser(net, DIFFUSION), DIFFUSION, chosen,
            lambda: torch.randn(shape, generator=g), settings[0], 0.5, settings[1])
        other = 1_000_000 * name.endswith("other noise")
        x = generate(net, shape, args.sample_steps, run.seed + other, hook)
        untouched = x if untouched is None else untouched
        damage = ({"spurious_mass": mixture_figures(x)["spurious_mass"]} if run.data == "mixture"
                  else {"off_plane_rms": rms((x @ truth.frame)[:, 2:])})
        row = {"data": run.data, "attack": name, **damage,
               "moved_wasserstein": sliced_wasserstein(x, untouched)}
        rows.append(row)
        if run.corruption == args.shown and name in ("none", "random l2", "pgd l2"):
            cells[f"{run.data}\nattack: {name}", VARIANTS[run.mode][2]] = (
                scene(run.data, truth, x), caption(row, *damage, "moved_wasserstein"))
    return rows, cells


# The inner objective of each perturbation: (norm, ascent steps, does it move D instead of eps)
RULES = {
    "random": ("linf", 0, False),
    "sign x1": ("linf", 1, False), "sign x3": ("linf", 3, False), "sign x10": ("linf", 10, False),
    "l2 x1": ("l2", 1, False), "l2 x3": ("l2", 3, False), "l2 x10": ("l2", 10, False),
    "residual l2 x3": ("l2", 3, True),
}


def perturbation(rule, net, x, t, r):
    """omega (B, d) of half-width r (B, 1) at x by one of RULES, through `losses.ascend`."""
    norm, steps, residual = rule
    view = Denoiser(net, DIFFUSION) if residual else net
    with torch.no_grad():
        clean = view(x, t)
    cfg = Perturbation(ascent_norm=norm, ascent_steps=steps)
    return ascend(random_omega(r, x), view, x, DIFFUSION.at(t, x)[1], t, r, clean, cfg)


def linear_optimum(rule, V, level, cfg, draws=64, rounds=30):
    """The linear network that the regularised objective converges to on data N(0, V), at one t.

    With M = E[lam_t omega omega^T] the minimiser is
        K = s (I + M) (a V + s^2 I + s^2 M)^-1
    and M depends on K through the ascent: alternate, averaging M over the rounds.
    Returns (K (d, d), M (d, d), last omega (draws, d) over its half-width r).
    """
    eye = torch.eye(len(V))
    t = torch.full((draws,), level)
    x = torch.zeros(draws, len(V))  # the net is linear: J is the same at every x
    sqrt_a, s = DIFFUSION.at(t, x)
    a_level, s_level = sqrt_a[0] ** 2, s[0]
    M = torch.zeros_like(V)
    for i in range(rounds):
        K = s_level * (eye + M) @ torch.linalg.inv(a_level * V + s_level**2 * (eye + M))
        r, lam_t = radius_and_weight(s, cfg)
        omega = perturbation(rule, Linear(K), x, t, r)
        M = M + 2 / (i + 2) * ((lam_t * omega).T @ omega / draws - M)
    return K, M, omega / r


def why(net, run, args):
    """Where omega points, and what follows: exact on linear-Gaussian data, measured on MLPs.

    Data N(0, V) in 2-D: signal of variance 1/3 along one direction, noise of p sigma^2 (at least
    1e-4) along both, the basis turned by 30 degrees. The MLPs are those of the plane.
    C = sqrt(a) dD/dx = I - s d eps_theta/dx: its gains along signal and noise are what the
    denoiser D lets through; the penalty is |C omega|^2. Lists are over LEVELS.
    """
    frame = plane(run.seed).frame
    seen = training_points(run, args)[:1000]
    states = [denoised(net, seen, level, run.seed)[:2] for level in LEVELS]
    titles = ("what the best linear\nnetwork lets through\n(grey: the best on\nclean data)",
              "what the MLP trained so\nlets through, noisy plane\n(grey: as above)",
              "omega on the linear one,\ns = .2 (red: the noise's\ndirection)",
              "omega on the dsm MLP,\ns = .2 (red: across the\nplane)")
    a = DIFFUSION.alpha_bar[list(LEVELS)]

    def gain(variance):
        """C of the dsm optimum on data of this variance, at each of LEVELS."""
        return (a * variance / (a * variance + 1 - a)).tolist()

    def gains_cell(signal, noise):
        curves = {name: list(zip((0.1, 0.35, 0.6, 0.85), part))
                  for name, part in (("noise", noise), ("signal", signal), ("", gain(1 / 3)))}
        return (chart(curves, "s: .08, .20, .46, .90", "gain, 0 to 1"),
                f"at s = .2: signal {signal[1]:.2f}\nnoise {noise[1]:.2f}")

    row = {"mode": f"{run.mode} MLP", "signal_gain": [], "noise_gain": []}
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x, t: net(x[None], t[None])[0]))
    for x_t, t in states:
        C = frame.T @ (torch.eye(3) - DIFFUSION.s[t[0]] * jacobian(x_t, t).mean(0)) @ frame
        row["signal_gain"].append(C.diag()[:2].mean().item())
        row["noise_gain"].append(C[2, 2].item())
    rule_of = {"adv": "sign x1", "adv_l2": "l2 x1", "adv_l2x3": "l2 x3"}
    cells = {(titles[1], rule_of.get(run.mode, run.mode)): gains_cell(*list(row.values())[1:])}
    if run.mode != "dsm":
        return [row], cells

    variance = torch.tensor([1 / 3, 0.0]) + max(run.corruption[0] * run.corruption[1] ** 2, 1e-4)
    cfg = Perturbation(reading=args.reading, lam=args.lam)
    across = ("lines", np.array([[[0, -0.95], [0, 0.95]]]), RED)
    plain = [gain(v) for v in variance]
    rows = [{"mode": "dsm", **dict(zip(("signal_gain", "noise_gain"), plain))}, row]
    cells = {(titles[0], "dsm"): gains_cell(*plain), **cells}
    for name, rule in [*RULES.items(), ("sign x3, not turned", RULES["sign x3"])]:
        torch.manual_seed(run.seed)
        turn = math.radians(30 if name in RULES else 0)
        axes = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        row = {"mode": name, "signal_gain": [], "noise_gain": [], "omega_on_noise": []}
        for level, (x_t, t) in zip(LEVELS, states):
            K, M, omega = linear_optimum(rule, axes @ variance.diag() @ axes.T, level, cfg)
            C = axes.T @ (torch.eye(2) - DIFFUSION.s[level] * K) @ axes
            weight = (axes.T @ M @ axes).diag()
            row["signal_gain"].append(C[0, 0].item())
            row["noise_gain"].append(C[1, 1].item())
            row["omega_on_noise"].append((weight[1] / weight.sum()).item())
            if level == LEVELS[1]:
                cells[titles[2], name] = ([("dots", (omega @ axes).numpy() / 2, BLUE), across],
                                          f"on noise {row['omega_on_noise'][-1]:.0%}")
            if name not in RULES:
                continue
            r, _ = radius_and_weight(DIFFUSION.at(t, x_t)[1], cfg)
            u = perturbation(rule, net, x_t, t, r) / r @ frame
            off = (u[:, 2].square().sum() / u.square().sum()).item()
            row.setdefault("mlp_omega_off_plane", []).append(off)
            if level == LEVELS[1]:
                cells[titles[3], name] = ([("dots", u[:400, [0, 2]].numpy() / 2, BLUE), across],
                                          f"off plane {off:.0%}")
        cells[titles[0], name] = gains_cell(row["signal_gain"], row["noise_gain"])
        rows.append(row)
    return rows, cells


# ---------- Pictures and tables

PANEL, LEFT, GAP, CAPTION = 170, 150, 8, 32
# What every row of toy.json says of how it was made, and no table repeats
SETTINGS = ("weight", "reading", "training_steps", "samples", "sample_steps")


def frontier(net, run, args):
    """What training in this mode removes and keeps, beside the compute of one step."""
    objective, ascent, _ = VARIANTS[run.mode]
    found = (subspace if run.data == "subspace" else points)(net, run, args)[0][0]
    row = {"data": run.data, "forward_units": forward_units(objective, Perturbation(**ascent))}
    return [row | {name: found[name] for name in FRONTIER[run.data, run.corruption]}], {}


def frontier_cells(rows):
    """frontier's rows as charts over the cost; adds to each row its share of adv's gain on dsm."""
    cells = {}
    families = {"random": ("dsm", "random"), "sign": ("dsm", "adv_low", "adv_share", "adv"),
                "l2": ("dsm", "adv_l2_share", "adv_l2", "adv_l2x3")}
    for (data, corruption), figures in FRONTIER.items():
        task = data, describe(corruption)
        chosen = [row for row in rows if (row["data"], row["corruption"]) == task]
        title = f"{data}, {'outliers' if corruption[2] else 'noise'}"
        for figure, kind in zip(figures, ("what should go:\n0 is best", "what should stay\n(mass "
                                          "error: 0)")):
            found = {}
            for row in chosen:
                found.setdefault(row["mode"], []).append((row["forward_units"], row[figure]))
            found = {mode: np.mean(xy, 0) for mode, xy in found.items()}
            top = 1.25 * max([*(y for _, y in found.values()), 1e-9])
            curves = {name: [found[mode] / (13, top) for mode in modes if mode in found]
                      for name, modes in families.items()}
            cells[kind, title] = (
                chart({name: xy for name, xy in curves.items() if len(xy) > 1},
                      "forward-units, 0 to 13", f"{figure}, 0 to {top:.2f}"), "")
        known = {(row["mode"], row["seed"]): row[figures[0]] for row in chosen}
        for row in chosen:
            plain, full = (known.get((mode, row["seed"])) for mode in ("dsm", "adv"))
            if None not in (plain, full):
                gained = plain - row[figures[0]]
                row["gain"] = gained / (plain - full) if plain != full else math.nan
    return cells


def chart(curves, x_label, y_label):
    """Layers of a small chart: {name: points (x, y) in [0, 1]^2}, drawn red, blue and grey."""
    layers = [("lines", np.array([[[-0.85, 0.9], [-0.85, -0.85], [0.95, -0.85]]]), GREY),
              ("text", [(-0.8, 0.98, y_label), (-0.7, -0.86, x_label)], BLACK)]
    for (name, xy), colour in zip(curves.items(), (RED, BLUE, GREY)):
        xy = 1.7 * np.array(xy) - 0.85
        layers += [("lines", xy[None], colour), ("dots", xy, colour),
                   ("text", [(*xy[len(xy) // 2] + [0.05, 0.17], name)], colour)]
    return layers


def panel(layers):
    """Layers (kind, content, colour) -> a PIL image of PANEL pixels; drawn twice as large."""
    size = 2 * PANEL
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)

    def pixels(xy, edge=9):
        # Far outside Pillow's integers would overflow; diverged dots are kept on the frame
        xy = np.nan_to_num(xy, nan=edge).clip(-edge, edge)
        return ((np.array([1, -1]) * xy + 1) * size / 2).tolist()

    for kind, content, colour in layers:
        if kind == "image":
            image.paste(Image.fromarray(content).resize((size, size), Image.NEAREST))
        elif kind == "dots":
            for x, y in pixels(content, edge=0.99):
                pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        elif kind == "lines":
            for line in pixels(content):
                pen.line([tuple(point) for point in line], fill=colour, width=2)
        else:
            for x, y, text in content:
                pen.text(pixels([x, y]), text, fill=colour, font=ImageFont.load_default(22))
    pen.rectangle((0, 0, size - 1, size - 1), outline=GREY, width=2)
    return image.resize((PANEL, PANEL), Image.LANCZOS)


def draw(path, title, cells):
    """Write the cells {(row title, column title): (layers, caption)} as one PNG."""
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    width, height = PANEL + GAP, PANEL + CAPTION + GAP
    title = textwrap.wrap(title, (LEFT + len(columns) * width) // 9)
    head = 20 * len(title) + 26
    sheet = Image.new("RGB", (LEFT + len(columns) * width, head + len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    small, middle, large = (ImageFont.load_default(size) for size in (12, 14, 16))
    pen.text((8, 4), "\n".join(title), fill="black", font=large)
    for j, column in enumerate(columns):
        pen.text((LEFT + j * width, head - 20), column, fill="black", font=middle)
    for i, row in enumerate(rows):
        pen.text((8, head + i * height + 8), row, fill="black", font=small)
    for (row, column), (layers, text) in cells.items():
        left, top = LEFT + columns.index(column) * width, head + rows.index(row) * height
        sheet.paste(panel(layers), (left, top))
        pen.text((left + 2, top + PANEL + 1), text, fill="black", font=small)
    # 24 colours are plenty, and a third of the bytes
    sheet = sheet.quantize(24, dither=Image.Dither.NONE)
    write_atomically(path, lambda temporary: sheet.save(temporary, "PNG", optimize=True))


def table(rows):
    """Rows of one experiment as a markdown table: mean +- std over the seeds, a list's largest."""
    keys = [key for key in ("data", "corruption", "n", "lam", "attack", "mode") if key in rows[0]]
    names = [name for name in dict.fromkeys(name for row in rows for name in row)
             if name not in keys + ["experiment", "seed", *SETTINGS]]
    groups = {}
    for row in rows:
        groups.setdefault(tuple(str(row[key]) for key in keys), []).append(row)

    def cell(name, group):
        if name not in group[0]:
            return ""
        values = np.array([row[name] for row in group], dtype=float)
        digits = 2 if values.ndim > 1 else 3
        spread = f" +- {values.std(0, ddof=1).max():.{digits}f}" if len(group) > 1 else ""
        return " / ".join(f"{v:.{digits}f}" for v in np.atleast_1d(values.mean(0))) + spread

    lines = [keys + names, ["---"] * len(keys + names)]
    lines += [[*key, *(cell(name, group) for name in names)] for key, group in groups.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---------- Command line

# name: (its function, the title of its picture)
EXPERIMENTS = {
    "plane": (points, "A square in 3-D seen edge-on: samples (blue) should lie on the red line and "
                      "fill it. std ratio: of the samples within the plane, over the true one."),
    "plane_lambda": (plane_lambda, "The weight lambda growing: does a mode flatten the cloud "
                                   "(off-plane to 0) or shrink the square (std ratio below 1)?"),
    "mixture": (points, "Five Gaussians, red circles at 2 std: samples (blue) should be in them. "
                        "Mass error: of the modes' shares. Spurious: beyond 4 std of each."),
    "subspace": (subspace, "Images of a linear subspace: samples of each mode, all from the same "
                           "noise. Best: share outside 0, variance ratio 1."),
    "memorize": (memorize, "Few training points (red): samples (blue) that sit on them are copies. "
                           "Error: of denoising fresh x at s = .2, over the least possible."),
    "attack": (attack, "Sampling while every fifth state is pushed by half a standard deviation of "
                       "its noise: at random, or where it moves the denoised estimate most (pgd)."),
    "why": (why, "Why adversarially train: where does each rule turn omega, and what does the "
                 "penalty there let through? Wanted: noise at 0, signal on the grey line."),
    "frontier": (frontier, "What training removes and keeps, over a step's compute (forwards of "
                           "its batch; a backward is two). From dsm, at 3, to random at 6; sign "
                           "and l2 on 30 % of each batch, 4.5, on all of it, 8; l2 x3, 12."),
}
CLEAN = (0.0, 0.0, 0.0)
CORRUPTIONS = [CLEAN, (0.9, 0.1, 0.0), (0.9, 0.2, 0.0), (0.0, 0.0, 0.1)]


def plan(args):
    """{Run: names of the experiments that look at it}; experiments share networks."""
    runs = {}

    def want(name, *run):
        if args.experiment in (name, name.partition("_")[0], "all"):
            runs.setdefault(Run(*run), []).append(name)

    for seed in range(args.seed, args.seed + args.seeds):
        if args.experiment == "frontier":
            for mode in args.modes:
                for data, corruption in FRONTIER:
                    lam = 0.0 if mode == "dsm" else args.lam
                    want("frontier", data, corruption, mode, lam, seed)
            continue
        for mode in ["exact", *args.modes]:
            lam = 0.0 if mode in ("exact", "dsm") else args.lam
            # the exact score has no training: one corruption stands for all
            for corruption in [args.shown] if mode == "exact" else args.corruptions:
                for data in ("plane", "mixture"):
                    want(data, data, corruption, mode, lam, seed)
                    if corruption in (CLEAN, args.shown):
                        want("attack", data, corruption, mode, lam, seed)
                if mode != "exact":
                    want("subspace", "subspace", corruption, mode, lam, seed)
            for n in args.few:
                want("memorize", "mixture", args.corruptions[0], mode, lam, seed, n)
            if mode not in ("exact", "invariant"):
                want("why", "plane", args.shown, mode, lam, seed)
            for lam in args.lambdas if mode in ("random", "adv") else ():
                want("plane_lambda", "plane", args.shown, mode, lam, seed)
    return runs


def work(args, job):
    """Train a network and measure it: (run, names) -> (run, [(experiment, rows, cells)])."""
    run, names = job
    torch.set_num_threads(1)
    if run.mode == "exact":
        net = Exact(TRUTHS[run.data](run.seed))
    else:
        net = train(run, training_points(run, args), args)
    head = {"corruption": describe(run.corruption), "mode": run.mode, "seed": run.seed}
    made = (run.lam, args.reading, training_steps(run, args), args.samples, args.sample_steps)
    results = []
    for name in names:
        rows, cells = EXPERIMENTS[name][0](net, run, args)
        rows = [{"experiment": name, **head, **row, **dict(zip(SETTINGS, made))} for row in rows]
        results.append((name, rows, cells))
    return run, results


def modes(text):
    """An argparse type: "dsm,adv" -> ["dsm", "adv"]."""
    chosen, known = text.split(","), list(VARIANTS)[1:]
    if not set(chosen) <= set(known):
        raise argparse.ArgumentTypeError(f"{text!r}: modes are {','.join(known)}")
    return list(dict.fromkeys(chosen))


def parse_args(argv=None):
    """The command line; UserError where it is wrong."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("experiment", nargs="?", default="all",
                   choices=["plane", "mixture", "subspace", "memorize", "attack", "why",
                            "frontier", "all"])
    p.add_argument("--modes", type=modes,
                   help=f"with commas between, of {','.join(list(VARIANTS)[1:])} "
                        "(dsm,random,adv,adv_l2x3,invariant; frontier: all but the last)")
    p.add_argument("--noise_p", type=number(float, 0, 1), help="share of noisy training points")
    p.add_argument("--noise_std", type=number(float, 0), help="standard deviation of their noise")
    p.add_argument("--outlier_p", type=number(float, 0, 1), help="share of outliers")
    p.add_argument("--reading", choices=list(READINGS), default=Perturbation.reading,
                   help=f"how the radius follows the noise schedule ({Perturbation.reading})")
    p.add_argument("--lam", type=number(float, 1e-3), default=Perturbation.lam,
                   help=f"weight lambda ({Perturbation.lam})")
    p.add_argument("--images", help="subspace: folder of your own images, of which a decoded copy "
                                    "is kept beside them (the embedded shapes)")
    p.add_argument("--rank", type=number(int, 1, 64), default=16,
                   help="subspace: its dimension, 1 to 64 (16)")
    p.add_argument("--steps", type=number(int, 1),
                   help="training steps (2000 on the plane, 1000 elsewhere; 300 if --quick)")
    p.add_argument("--seed", type=number(int, 0, 10**6), default=0, help="the first seed (0)")
    p.add_argument("--seeds", type=number(int, 1), default=1, help="how many seeds (1)")
    p.add_argument("--quick", action="store_true",
                   help="short training, few samples and sampling steps, one corruption, no "
                        "adv_l2x3, fewer lambdas and n")
    p.add_argument("--workers", type=number(int, 1), default=torch.get_num_threads(),
                   help="processes side by side, one thread each (one a core)")
    p.add_argument("--out", type=Path, help="output folder (out/toy, or out/toy-quick)")
    args = p.parse_args(argv)

    if (args.noise_p is None) != (args.noise_std is None):
        raise UserError("--noise_p and --noise_std go together: give both")
    if args.experiment == "frontier" and (args.noise_p, args.outlier_p) != (None, None):
        raise UserError("frontier has corruptions of its own: no --noise_p, --outlier_p")
    args.corruptions = CORRUPTIONS[2:3] if args.quick else CORRUPTIONS
    if args.noise_p is not None or args.outlier_p is not None:
        args.corruptions = [(args.noise_p or 0.0, args.noise_std or 0.0, args.outlier_p or 0.0)]
    # The corruption whose sampling paths, fields, attacks and lambdas are shown
    args.shown = args.corruptions[min(2, len(args.corruptions) - 1)]
    if args.experiment == "frontier":
        args.modes = args.modes or [mode for mode in [*VARIANTS][1:-1]
                                    if not (args.quick and mode == "adv_l2x3")]
    args.modes = args.modes or ["dsm", "random", "adv", *["adv_l2x3"] * (not args.quick),
                                "invariant"]
    args.steps = args.steps or (300 if args.quick else None)
    args.out = args.out or Path("out/toy-quick" if args.quick else "out/toy")
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
    probe = args.out / ".probe"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}") from error
    begun = time.perf_counter()
    done = {}
    # leaving the pool ends its processes at once, be it by Ctrl-C, which they ignore
    with get_context("spawn").Pool(args.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)
                                   ) as pool:
        for run, results in pool.imap_unordered(partial(work, args), runs.items()):
            done[run] = results
            each = (time.perf_counter() - begun) / len(done)
            print(f"{len(done)}/{len(runs)}  {run.data}, {describe(run.corruption)}, {run.mode}, "
                  f"lambda {run.lam}, seed {run.seed}  {each:.1f} s/network  "
                  f"ETA {duration(each * (len(runs) - len(done)))}", flush=True)

    rows, cells = {}, {}
    for run in sorted(runs, key=lambda run: run.lam):  # else as planned, not as finished
        for name, found, drawn in done[run]:
            rows.setdefault(name, []).extend(found)
            if run.seed == args.seed:
                cells.setdefault(name, {}).update(drawn)
    if "frontier" in rows:
        cells["frontier"] = frontier_cells(rows["frontier"])
    text = json.dumps([row for found in rows.values() for row in found], indent=1)
    write_atomically(args.out / "toy.json", lambda temporary: temporary.write_text(text + "\n"))
    for name in [name for name in EXPERIMENTS if name in rows]:
        print(f"\n{name}; lists are at t = {' / '.join(map(str, LEVELS))}\n{table(rows[name])}")
        if name == "plane_lambda":
            cells[name].update(lambda_cell(rows[name]))
        draw(args.out / f"{name}.png", EXPERIMENTS[name][1], cells[name])
    print(f"\n{sum(map(len, rows.values()))} rows in {args.out / 'toy.json'}, a picture of each "
          f"experiment beside it, {duration(time.perf_counter() - begun)}")


if __name__ == "__main__":
    run_cli(main)
