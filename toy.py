"""The claims of adversarial diffusion training where the truth is known.

    python toy.py                       every experiment, one seed: minutes on two cores
    python toy.py --quick               the same with short training and few samples
    python toy.py plane --seeds 3       one of them, mean and standard deviation over three seeds
    python toy.py plane --noise_p 0.9 --noise_std 0.2 --modes random,adv --lam 0.1,0.3,1,3

plane     a square on an oblique plane in 3-D: who leaves the plane, who shrinks the square?
mixture   five unequal Gaussians in 2-D: mass where no mode is, and the modes' shares
subspace  drawn shapes projected on their first principal components, as flat vectors
memorize  few training points (of the first corruption): copies, and the error on fresh points
attack    perturbed sampling trajectories, beside random perturbations of the same norm
why       which directions the perturbation picks, and what the penalty then removes

Training points have noise (90 % of them, std .1 or .2) or are outliers (10 %), frozen per point;
flags narrow this to one corruption. The mode `exact` is the true score of the clean data in the
same sampler: the best attainable. All modes see the same batches. The output folder gets toy.json,
a list of rows, and <experiment>.png, which shows the first seed.
"""

import math
import signal
import textwrap
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.spatial import cKDTree
from torch import nn

from losses import (MODES, READINGS, Diffusion, Perturbation, ascend, denoise, forward_units,
                    predict_eps, radius_and_weight, random_omega, stratified_t, trajectory_attack)
from model import timestep_embedding
from sample import (BLACK, BLUE, GREY, RED, TOY, Parser, UserError, check_writable,
                    comma_list, draw_chart, draw_layers, number, run_cli, sample, seed_for,
                    step_pairs, ticker, to_uint8, write_atomically, write_json)
from train import CLEAN, NOISY, OUTLIER, choose_corruption, shapes

DIFFUSION = Diffusion()
# The time steps of the figures that are lists: s = .08, .20, .46 and .90
LEVELS = (20, 60, 150, 400)
# The largest component that the plane's normal may have: within 26 degrees of an axis, 30 % of all
# orientations, the paper's sign step goes blind.
OBLIQUE = 0.9
# name: (objective in losses.MODES, settings of `Perturbation` that the mode fixes, title)
VARIANTS = {
    "exact": (None, {"lam": 0.0}, "exact score"),
    "dsm": ("dsm", {"lam": 0.0}, "dsm: plain DDPM"),
    "random": ("random", {}, "random equivariance"),
    "adv": ("adv", {}, "adversarial (paper)"),
    "adv_low": ("adv", {"reg_t": 0.1}, "adversarial, lowest tenth of t"),
    "adv_share": ("adv", {"reg_share": 0.3}, "adversarial, 30 % of each batch"),
    "adv_l2x3": ("adv", {"ascent_norm": "l2", "ascent_steps": 3}, "adversarial, l2, 3 steps"),
    "invariant": ("invariant", {}, "invariance"),
    "ip": ("ip", {"lam": 0.0}, "DDPM-IP"),
    # Told the truth about each point, where images have estimates.
    "filter": ("dsm", {"lam": 0.0}, "dsm on the clean points alone (oracle)"),
    "aware": ("aware", {"lam": 0.0}, "noise-aware (oracle)"),
}
# (share of noisy points, standard deviation of their noise, share of outliers); the first is clean
CORRUPTIONS = [(0.0, 0.0, 0.0), (0.9, 0.1, 0.0), (0.9, 0.2, 0.0), (0.0, 0.0, 0.1)]
STEPS = {"plane": 2000, "mixture": 1000, "subspace": 1000}  # of training
RANK, HELD_OUT = 16, 500  # of the subspace: its dimension; images that no network is trained on
FEW = (8, 32, 128)  # training points of `memorize`

# No two uses of randomness share a stream; all modes share all of these
ORIENT, POINTS, SPOIL, BATCH, SAMPLES, LEVEL, TEST, FRESH, PROJECT, PUSH, WEIGHTS, OMEGA = range(12)


def perturbation(mode, lam, args):
    """The settings of a mode in VARIANTS: what it fixes (lam 0: no regulariser), else the flags."""
    return Perturbation(**{"reading": args.reading, "lam": lam} | VARIANTS[mode][1])


def generator_for(use, *numbers):
    """A random generator for one of the uses above and whole numbers, such as the run's seed."""
    return torch.Generator().manual_seed(seed_for(TOY, use, *numbers))


# ---------- Ground truth


class Truth(NamedTuple):
    """Clean data with a known density."""

    frame: torch.Tensor  # (d, d), orthonormal: x @ frame are coordinates in the data's own axes
    outline: torch.Tensor  # lines (m, n, d) for pictures
    draw: Callable  # (n, generator) -> x0 (n, d)
    log_density: Callable  # (x (B, d), sqrt_a, s (B, 1)), float64 -> log p_t(x) (B,), diffused
    figures: Callable  # samples (n, d) -> dict

    def exact_eps(self, x, t):
        """What training on clean data aims at, -s grad log p_t(x) (B, d): autograd in float64."""
        sqrt_a, s = (value.double() for value in DIFFUSION.at(t, x))
        score = torch.func.grad(lambda x: self.log_density(x, sqrt_a, s).sum())(x.double())
        return (-s * score).float()


def plane(seed):
    """A uniform square [-1, 1]^2 on an oblique plane through 0 in 3-D, oriented by the seed.

    In its frame u, whose third axis is normal to the plane, p_t is a product:
        p(u_i) = [Phi((u_i + sqrt_a) / s) - Phi((u_i - sqrt_a) / s)] / (2 sqrt_a),  i = 1, 2
        p(u_3) = N(0, s^2)
    """
    g = generator_for(ORIENT, seed)
    frame = torch.eye(3)
    while frame[:, 2].abs().max() > OBLIQUE:
        frame = torch.linalg.qr(torch.randn(3, 3, generator=g)).Q

    def draw(n, generator):
        return (2 * torch.rand(n, 2, generator=generator) - 1) @ frame[:, :2].T

    def log_density(x, sqrt_a, s):
        u = x @ frame.double() / s
        # Both edges are seen from -|u|: Phi is precise in its left tail, and 1 in the right one
        near, far = (torch.special.log_ndtr(-u[:, :2].abs() + edge / s)
                     for edge in (sqrt_a, -sqrt_a))
        within = near + torch.log1p(-(far - near).exp()) - (2 * sqrt_a).log()
        across = -u[:, 2].square() / 2 - (s.squeeze(1) * math.sqrt(2 * math.pi)).log()
        return within.sum(1) + across

    def figures(x):
        u = x @ frame
        clean = 2 * torch.rand(len(u), 2, generator=generator_for(FRESH, seed)) - 1
        return {
            "off_plane_rms": rms(u[:, 2:]),
            # A uniform coordinate on [-1, 1] has the std 1 / sqrt(3)
            "in_plane_std_ratio": u[:, :2].std(0).mean().item() * math.sqrt(3),
            "sliced_wasserstein": sliced_wasserstein(u, F.pad(clean, (0, 1))),
        }

    edge = torch.stack([-frame[:, 0], frame[:, 0]])[None]
    return Truth(frame, edge, draw, log_density, figures)


MODE_WEIGHTS = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05], dtype=torch.float64)
MODE_ANGLES = torch.arange(5, dtype=torch.float64) * 2 * math.pi / 5
MODE_MEANS = torch.stack([MODE_ANGLES.sin(), MODE_ANGLES.cos()], 1)
MODE_STD = 0.1


def mixture(seed):
    """Five Gaussians of std .1 on the unit circle, weights .4 to .05; the same for every seed.

        p_t(x) = sum_k w_k N(x; sqrt_a mu_k, (a std^2 + s^2) I)

    spurious_mass: share of points beyond 4 std of every mode.
    mass_error: total variation between the modes' shares of points (nearest mean) and weights.
    nll: mean of -log p(x), nats; that of the true data is its entropy, see `exact`.
    """

    def draw(n, generator):
        k = torch.multinomial(MODE_WEIGHTS, n, replacement=True, generator=generator)
        return MODE_MEANS[k].float() + MODE_STD * torch.randn(n, 2, generator=generator)

    def log_density(x, sqrt_a, s):
        variance = (sqrt_a * MODE_STD).square() + s.square()
        distance = (x[:, None] - sqrt_a[:, :, None] * MODE_MEANS).square().sum(2)
        log_p = -distance / (2 * variance) - (2 * math.pi * variance).log()
        return (MODE_WEIGHTS.log() + log_p).logsumexp(1)

    def figures(x):
        distance = torch.cdist(x.double(), MODE_MEANS)
        shares = distance.argmin(1).bincount(minlength=5) / len(x)
        undiffused = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
        return {
            "spurious_mass": (distance.amin(1) > 4 * MODE_STD).double().mean().item(),
            "mass_error": (shares - MODE_WEIGHTS).abs().sum().item() / 2,
            "nll": -log_density(x.double(), *undiffused).mean().item(),
        }

    angle = torch.linspace(0, 2 * math.pi, 40)
    circle = 2 * MODE_STD * torch.stack([angle.cos(), angle.sin()], 1)
    return Truth(torch.eye(2), MODE_MEANS.float()[:, None] + circle, draw, log_density, figures)


TRUTHS = {"plane": plane, "mixture": mixture}


@cache
def image_subspace():
    """Grey 16x16 shapes, flat, on their first RANK principal components.

    Returns (x (N, 256), figures of samples (n, 256)):
    outside_share: energy of samples outside the subspace, over all of it, about the data's mean.
    variance_ratio: variance of samples within the subspace over that of x.
    """
    x = torch.from_numpy(shapes(6000, 16, 1, 0)).float().flatten(1) / 127.5 - 1
    mean = x.mean(0)
    basis = torch.linalg.svd(x[:4000] - mean, full_matrices=False).Vh[:RANK].T
    x = mean + (x - mean) @ basis @ basis.T
    variance = ((x - mean) @ basis).var(0).sum()

    def figures(samples):
        centred = samples - mean
        inside = centred @ basis
        outside = (centred - inside @ basis.T).square().sum() / centred.square().sum()
        return {"outside_share": outside.item(),
                "variance_ratio": (inside.var(0).sum() / variance).item()}

    return x, figures


class Task(NamedTuple):
    """One network to train, on n points of `data`, and the experiment that looks at it."""

    experiment: str
    data: str
    corruption: tuple
    mode: str
    cfg: Perturbation
    seed: int
    n: int = 10_000


def training_points(task):
    """The task's training set, a function of the task alone: x (n, d), kinds uint8 (n,) of train's.

    NOISY points have Gaussian noise; an OUTLIER is uniform in [-2, 2], an image's in [-1, 1].
    """
    if task.data == "subspace":
        x0, reach = image_subspace()[0][:-HELD_OUT], 1
    else:
        x0 = TRUTHS[task.data](task.seed).draw(task.n, generator_for(POINTS, task.seed))
        reach = 2
    noise_p, noise_std, outlier_p = task.corruption
    kinds = torch.from_numpy(choose_corruption(len(x0), noise_p, outlier_p, task.seed))
    g = generator_for(SPOIL, task.seed)
    noise = noise_std * torch.randn(x0.shape, generator=g)
    outliers = reach * (2 * torch.rand(x0.shape, generator=g) - 1)
    x = x0 + noise * (kinds == NOISY)[:, None]
    return torch.where((kinds == OUTLIER)[:, None], outliers, x), kinds


def corruption_name(corruption):
    """(.9, .2, 0) -> "noise p 0.9 std 0.2"."""
    noise_p, noise_std, outlier_p = corruption
    parts = [f"noise p {noise_p} std {noise_std}"] if noise_p else []
    parts += [f"outliers p {outlier_p}"] if outlier_p else []
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


def train(task, args):
    """The exact eps, or an MLP trained by Adam; its cosine learning rate stands for an EMA."""
    if task.mode == "exact":
        return TRUTHS[task.data](task.seed).exact_eps
    objective, steps = VARIANTS[task.mode][0], args.steps or STEPS[task.data]
    x0, kinds = training_points(task)
    noise = task.corruption[1] * (kinds == NOISY)
    if task.mode == "filter":
        x0 = x0[kinds == CLEAN]
    torch.manual_seed(seed_for(TOY, WEIGHTS, task.seed))
    net = MLP(x0.shape[1])
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.002 * (1 + math.cos(math.pi * step / steps))
        # Reseeded, so that every mode sees the same batches whatever it draws within a step
        torch.manual_seed(seed_for(TOY, BATCH, task.seed, step))
        index, t = torch.randint(len(x0), (256,)), stratified_t(256, DIFFUSION.T)
        eps = torch.randn(256, x0.shape[1])
        told = [noise[index]] if objective == "aware" else []
        loss, _ = MODES[objective][0](net, DIFFUSION, x0[index], t, eps, task.cfg, *told)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.eval().requires_grad_(False)


def generate(net, shape, steps, seed, perturb=None, sampler="ddpm"):
    """Samples of `shape` (n, d) in `steps` steps, unclipped: points have no natural range."""
    g = generator_for(SAMPLES, seed)
    x = sample(net, DIFFUSION, lambda: torch.randn(shape, generator=g), sampler, steps,
               clip=False, perturb=perturb)
    # Where sampling diverges, figures should be large, not undefined
    return x.nan_to_num(nan=1e4).clamp(-1e4, 1e4)


def diffuse_to(level, x0, seed):
    """x0 (B, d) diffused to the time step `level`: (x_t (B, d), t (B,))."""
    t = torch.full((len(x0),), level)
    eps = torch.randn(x0.shape, generator=generator_for(LEVEL, seed, level))
    return DIFFUSION.diffuse(x0, t, eps), t


# ---------- Figures


def rms(x):
    """Root mean square length of the rows of x (B, d)."""
    return x.double().square().sum(1).mean().sqrt().item()


def sliced_wasserstein(x, y, projections=128):
    """sqrt(mean over unit vectors p of (sorted x.p - sorted y.p)^2) of points x, y (n, d)."""
    g = generator_for(PROJECT)
    p = F.normalize(torch.randn(x.shape[1], projections, generator=g), dim=0)
    return ((x @ p).sort(0).values - (y @ p).sort(0).values).square().mean().sqrt().item()


def against_truth(net, truth, seed):
    """Errors on fresh clean data at each of LEVELS.

    score_error: |eps_theta - eps*| / |eps*| in the mean square, eps* the exact one.
    reconstruction_rms: rms distance of D(x_t) to x0.
    """
    x0 = truth.draw(2000, generator_for(TEST, seed))
    figures = {"score_error": [], "reconstruction_rms": []}
    for level in LEVELS:
        x_t, t = diffuse_to(level, x0, seed)
        best = truth.exact_eps(x_t, t)
        error = predict_eps(net, DIFFUSION, x_t, t) - best
        figures["score_error"].append(rms(error) / rms(best))
        figures["reconstruction_rms"].append(rms(denoise(net, DIFFUSION, x_t, t) - x0))
    return figures


def copied_share(x, points):
    """Share of x (n, d) nearer to a training point than 1/3 of the distance to the second one."""
    nearest, second = cKDTree(points.numpy()).query(x.numpy(), k=2)[0].T
    return float((nearest < second / 3).mean())


# ---------- Pictures: a sheet of panels, each a PIL image of PANEL x PANEL pixels

PANEL, LEFT, GAP, CAPTION = 160, 150, 8, 32


def draw_points(frame, layers):
    """Layers [(x (..., d), colour, width)] as a panel: the plane edge-on, the mixture as it is.

    frame (d, d): its first and last axis are drawn to the right and upwards, from -1.5 to 1.5.
    """
    return draw_layers([((x @ frame)[..., [0, -1]].numpy() / 1.5, colour, width)
                        for x, colour, width in layers])


def image_panel(x):
    """The first 25 of the flat images x (N, 256) on the [-1, 1] scale, as a panel."""
    tiles = to_uint8(x[:25].view(5, 5, 16, 16).permute(0, 2, 1, 3).reshape(80, 80))
    return Image.fromarray(tiles.numpy()).resize((PANEL, PANEL), Image.NEAREST)


def save_panels(path, title, cells):
    """Write the cells {(row title, column title): (panel, caption)} as one PNG."""
    rows, columns = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    width, height, head = PANEL + GAP, PANEL + CAPTION + GAP, 64
    size = max(LEFT + len(columns) * width, 9 * len(title)), head + len(rows) * height
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    small, middle, large = (ImageFont.load_default(size) for size in (12, 14, 16))
    pen.text((8, 4), title, BLACK, large)
    for j, column in enumerate(columns):
        pen.text((LEFT + j * width, head - 4), textwrap.fill(column, 24), BLACK, middle, "ld")
    for i, row in enumerate(rows):
        pen.text((8, head + i * height + 8), row, BLACK, small)
    for (row, column), (panel, caption) in cells.items():
        left, top = LEFT + columns.index(column) * width, head + rows.index(row) * height
        sheet.paste(panel, (left, top))
        pen.text((left + 2, top + PANEL + 1), caption, BLACK, small)
    # Maximum coverage keeps red, which has few pixels; k-means keeps the greys grey
    sheet = sheet.quantize(64, Image.Quantize.MAXCOVERAGE, 3, dither=Image.Dither.NONE)
    write_atomically(path, lambda temporary: sheet.save(temporary, "PNG", optimize=True))


# ---------- Experiments: (net, task, args) -> (rows of figures, cells of the picture)
#
# A cell is (panel, caption) at its row's title, or at (row title, column title).


def caption_of(row, *names):
    """A line for each of the row's figures `names`; of a list, the second: s = .2."""
    values = [(name, row[name][1] if isinstance(row[name], list) else row[name]) for name in names]
    return "\n".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values)


def known_density(net, task, args):
    """`plane` and `mixture`: samples, sampling paths and score field against the exact ones."""
    truth, name = TRUTHS[task.data](task.seed), corruption_name(task.corruption)
    frame, d, outline = truth.frame, len(truth.frame), (truth.outline, RED, 4)
    x = generate(net, (args.samples, d), args.sample_steps, task.seed)
    row = {**truth.figures(x), **against_truth(net, truth, task.seed)}
    panel = draw_points(frame, [(x[:1500], BLUE, 2), outline])
    cells = {f"samples, trained on\n{name}": (panel, caption_of(row, *[*row][:2]))}
    if task.corruption != args.shown:
        return [row], cells

    states = []
    end = generate(net, (40, d), 100, task.seed, lambda x, t: states.append(x) or x, "ddim")
    paths = torch.stack([*states, end], 1)
    panel = draw_points(frame, [(paths, GREY, 2), outline, (end, BLUE, 3)])
    cells[f"sampling paths (DDIM),\n{name}"] = panel, ""

    line = torch.linspace(-1.3, 1.3, 9)
    u = torch.cartesian_prod(line, line if d == 2 else line[[3, 5]])
    x, t = u @ frame[:, [0, -1]].T, torch.full((len(u),), LEVELS[1])
    exact, field = (torch.stack([x, denoise(f, DIFFUSION, x, t)], 1)
                    for f in (truth.exact_eps, net))
    layers = [(exact, GREY, 2), (field, BLUE, 2), outline, (field[:, 1], BLUE, 3)]
    title = f"score at s = .2, as steps\nx to D(x) (grey: exact),\n{name}"
    cells[title] = draw_points(frame, layers), caption_of(row, "score_error")
    return [row], cells


def subspace(net, task, args):
    """Images of a linear subspace, flat: do the samples stay in it, and keep its variance?"""
    data, figures = image_subspace()
    held_out = data[-HELD_OUT:]
    x = generate(net, (args.samples // 4, data.shape[1]), args.sample_steps, task.seed)
    row = {**figures(x), "psnr": [], "samples": len(x)}
    for level in LEVELS:
        D = denoise(net, DIFFUSION, *diffuse_to(level, held_out, task.seed))
        row["psnr"].append(10 * math.log10(4 / (D - held_out).square().mean().item()))
    title = f"trained on\n{corruption_name(task.corruption)}"
    return [row], {(title, "training data"): (image_panel(training_points(task)[0]), ""),
                   title: (image_panel(x), caption_of(row, "outside_share", "variance_ratio"))}


def memorize(net, task, args):
    """Few training points: copies among the samples, and the denoising error on fresh points."""
    truth, (seen, _) = mixture(task.seed), training_points(task)
    x = generate(net, (args.samples, 2), args.sample_steps, task.seed)
    fresh = truth.draw(args.samples, generator_for(FRESH, task.seed))
    error, least = (np.array(against_truth(f, truth, task.seed)["reconstruction_rms"])
                    for f in (net, truth.exact_eps))
    row = {"n": task.n, "copied_share": copied_share(x, seen),
           "fresh_draws_share": copied_share(fresh, seen),
           "heldout_error_ratio": (error / least).tolist()}
    panel = draw_points(truth.frame, [(x[:1500], BLUE, 2), (seen, RED, 3)])
    caption = caption_of(row, "copied_share", "heldout_error_ratio")
    return [row], {f"{task.n} training points\n(red)": (panel, caption)}


# The push on every fifth state of a sampling trajectory: (norm, budget over s_t, steps of PGD)
ATTACKS = {"none": None, "none, other noise": None,
           "random linf": ("linf", 0.5, 0), "pgd linf": ("linf", 0.5, 10),
           "random l2": ("l2", 0.5, 0), "pgd l2": ("l2", 0.5, 10)}


def attack(net, task, args):
    """White-box perturbation of sampling, and controls: random pushes of the same norm, or none.

    moved_wasserstein: distance to the samples left alone, from the same noise but for the second.
    """
    truth, rows, cells = TRUTHS[task.data](task.seed), [], {}
    shape = (args.samples // 3, len(truth.frame))
    chosen = [t for t, _ in step_pairs(DIFFUSION, args.sample_steps)[4::5]]
    untouched = generate(net, shape, args.sample_steps, task.seed)
    for name, push in ATTACKS.items():
        g = generator_for(PUSH, task.seed)
        hook = push and trajectory_attack(partial(denoise, net, DIFFUSION), DIFFUSION, chosen,
                                          lambda: torch.randn(shape, generator=g), *push)
        start = task.seed + (1_000_000 if name == "none, other noise" else 0)
        x = untouched if name == "none" else generate(net, shape, args.sample_steps, start, hook)
        figures = {**truth.figures(x), "moved_wasserstein": sliced_wasserstein(x, untouched)}
        rows.append({"data": task.data, "attack": name, "samples": len(x), **figures})
        if task.corruption == args.shown and name in ("none", "random l2", "pgd l2"):
            panel = draw_points(truth.frame, [(x, BLUE, 2), (truth.outline, RED, 4)])
            caption = caption_of(figures, [*figures][0], "moved_wasserstein")
            cells[f"{task.data}\nattack: {name}"] = panel, caption
    return rows, cells


# A column of `why`: (the mode in VARIANTS, what the ascent moves, degrees between the signal's
# direction and the first axis). To move D is to maximise |C omega| instead of |(I - C) omega|.
RULES = {
    "dsm": ("dsm", predict_eps, 30),
    "random": ("random", predict_eps, 30),
    "sign x1 (paper)": ("adv", predict_eps, 30),
    "l2 x3": ("adv_l2x3", predict_eps, 30),
    "residual, l2 x3": ("adv_l2x3", denoise, 30),
    "sign x1, not turned": ("adv", predict_eps, 0),
}


def find_omega(objective, moved, cfg, net, x, t):
    """omega at x (B, d) as training finds it: (omega / r (B, d), lam_t r^2 (B, 1))."""
    _, s = DIFFUSION.at(t, x)
    r, lam_t = radius_and_weight(s, cfg)
    omega = random_omega(r, x)
    if objective == "adv":
        view = partial(moved, net, DIFFUSION)
        omega = ascend(view, omega, x, s, t, r, view(x, t), cfg)
    return omega / r, lam_t * r**2


def linear_optimum(find, V, level, draws=256):
    """The linear network K x that minimises the regularised objective on data N(0, V), at one t.

    K = s (I + M) (a V + s^2 I + s^2 M)^-1 with M = E[lam_t omega omega^T], which depends on K
    through the ascent: alternate, averaging M over the rounds.
    find: `find_omega` of (net, x, t).  Returns (K (d, d), the last omega / r (draws, d)).
    """
    eye, M = torch.eye(len(V)), torch.zeros_like(V)
    a, s = DIFFUSION.alpha_bar[level].float(), DIFFUSION.s[level]
    x, t = torch.zeros(draws, len(V)), torch.full((draws,), level)
    for i in range(30):
        K = s * (eye + M) @ torch.linalg.inv(a * V + s**2 * (eye + M))
        u, weight = find(lambda x, t: x @ K.T, x, t)  # it moves by K omega, at every x the same
        M = M + 2 / (i + 2) * ((weight * u).T @ u / draws - M)
    return K, u


def directions(axes, J, u):
    """C = sqrt(a) dD/dx = I - s J along `axes` (d, d), the last of them noise: lists over LEVELS.

    Its gains are what the denoiser D lets through; the penalty is |C omega|^2.
    J: d eps_theta / dx (4, d, d).  u: omega / r (4, n, d).
    """
    C = torch.eye(len(axes)) - DIFFUSION.s[list(LEVELS), None, None] * J
    gains = (axes.T @ C @ axes).diagonal(dim1=1, dim2=2)
    u = u @ axes
    share = u[..., -1].square().sum(1) / u.square().sum((1, 2))
    return {"signal_gain": gains[:, :-1].mean(1).tolist(), "noise_gain": gains[:, -1].tolist(),
            "omega_on_noise": share.tolist()}


def why(dsm_net, task, args):
    """Where omega points, and what follows: exact on linear-Gaussian data, measured on MLPs.

    Data N(0, V) in 2-D: signal of variance 1/3 along one direction, noise of variance p sigma^2
    (at least 1e-4) along both, turned by 30 degrees. The MLPs are trained on the plane.
    """
    noise_p, noise_std, _ = task.corruption
    variance = torch.tensor([1 / 3, 0.0]) + max(noise_p * noise_std**2, 1e-4)
    seen = training_points(task)[0][:1000]
    states = [diffuse_to(level, seen, task.seed) for level in LEVELS]
    s, across = DIFFUSION.s[list(LEVELS)], torch.tensor([[[0, -1.4], [0, 1.4]]])
    rows, cells = [], {}
    for name, (mode, moved, degrees) in RULES.items():
        objective, cfg = VARIANTS[mode][0], perturbation(mode, args.lam[0], args)
        find = partial(find_omega, objective, moved, cfg)
        torch.manual_seed(seed_for(TOY, OMEGA, task.seed))
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        axes = torch.tensor([[cos, -sin], [sin, cos]])
        V = axes @ variance.diag() @ axes.T
        K, u = zip(*(linear_optimum(find, V, level) for level in LEVELS))
        found = {"linear network": (axes, torch.stack(K), torch.stack(u))}
        if moved == predict_eps and degrees:
            net = dsm_net if mode == "dsm" else train(task._replace(mode=mode, cfg=cfg), args)
            jacobian = torch.func.vmap(torch.func.jacrev(
                lambda x, t: predict_eps(net, DIFFUSION, x[None], t[None])[0]))
            J = torch.stack([jacobian(*state).mean(0) for state in states])
            u = torch.stack([find(net, *state)[0] for state in states])
            found["MLP on the plane"] = plane(task.seed).frame, J, u

        for network, (axes, J, u) in found.items():
            row = {"network": network, "mode": name, "lam": cfg.lam,
                   "forward_units": forward_units(objective, cfg), **directions(axes, J, u)}
            rows.append(row)
            gains = {"signal": row["signal_gain"], "noise": row["noise_gain"],
                     "clean": (1 - s**2) / (1 + 2 * s**2)}
            chart = draw_chart({label: list(zip(s, gain)) for label, gain in gains.items()},
                               "s", "gain", high=(1, 1))
            title = f"{network}:\nwhat it lets through (grey:\nbest on clean data);\nbelow: s = .2"
            cells[title, name] = chart, caption_of(row, "signal_gain", "noise_gain")
            if mode != "dsm":
                layers = [(across, RED, 3), (0.8 * (u @ axes)[1][:400, [0, -1]], BLUE, 2)]
                title = f"{network}:\nomega at s = .2 (red: the\nnoise's direction)"
                cells[title, name] = (draw_points(torch.eye(2), layers),
                                      caption_of(row, "omega_on_noise"))
    return rows, cells


# ---------- Command line

# name: (its function, the title of its picture)
EXPERIMENTS = {
    "plane": (known_density, "A square in 3-D, edge-on: samples (blue) should fill the red line"),
    "mixture": (known_density, "Five Gaussians: samples (blue) should fill the red circles, 2 std"),
    "subspace": (subspace, "Images of a linear subspace: samples from the same noise"),
    "memorize": (memorize, "Few training points: samples (blue) that sit on the red are copies"),
    "attack": (attack, "Every fifth state of sampling is pushed by half a std of its noise"),
    "why": (why, "Where does each rule turn omega, and what does the denoiser then let through?"),
}
# What a table groups rows by, and what every row says of how it was made and no table repeats
KEYS = ("data", "corruption", "n", "attack", "network", "mode", "lam", "forward_units")
SETTINGS = ("experiment", "seed", "reading", "training_steps", "samples", "sample_steps")


def markdown_table(rows):
    """Rows of one experiment: mean +- std over the seeds; of lists, the largest std."""
    keys = [key for key in KEYS if key in rows[0]]
    names = [name for name in dict.fromkeys(name for row in rows for name in row)
             if name not in (*keys, *SETTINGS)]
    lines = [keys + names, ["---"] * len(keys + names)]
    groups = {}
    for row in rows:
        groups.setdefault(tuple(str(row[key]) for key in keys), []).append(row)
    for key, group in groups.items():
        lines.append([*key])
        for name in names:
            values = np.array([row.get(name, []) for row in group], dtype=float)
            cell = " / ".join(f"{mean:.3f}" for mean in np.atleast_1d(values.mean(0)))
            if len(group) > 1 and cell:
                cell += f" +- {values.std(0, ddof=1).max():.3f}"
            lines[-1].append(cell)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plan(args):
    """The tasks of the chosen experiment, or of all, in the order of the rows."""
    tasks = []
    for seed, mode, lam in product(range(args.seed, args.seed + args.seeds), args.modes, args.lam):
        network = mode, perturbation(mode, lam, args), seed
        # The exact score has no training: one corruption stands for all
        for corruption in [args.shown] if mode == "exact" else args.corruptions:
            for data in TRUTHS:
                tasks.append(Task(data, data, corruption, *network))
                if corruption in (CORRUPTIONS[0], args.shown):
                    tasks.append(Task("attack", data, corruption, *network))
            if mode != "exact":
                tasks.append(Task("subspace", "subspace", corruption, *network))
        tasks += [Task("memorize", "mixture", args.corruptions[0], *network, n) for n in FEW]
        plain = perturbation("dsm", lam, args)
        tasks.append(Task("why", "plane", args.shown, "dsm", plain, seed))
    return [task for task in dict.fromkeys(tasks) if args.experiment in (task.experiment, "all")]


def train_and_measure(args, task):
    """Train the task's network and measure it: (rows, cells of the picture)."""
    torch.set_num_threads(1)
    objective, _, title = VARIANTS[task.mode]
    rows, cells = EXPERIMENTS[task.experiment][0](train(task, args), task, args)
    lam, units, steps = task.cfg.lam, 0, 0
    if objective:
        units, steps = forward_units(objective, task.cfg), args.steps or STEPS[task.data]
    head = {"experiment": task.experiment, "corruption": corruption_name(task.corruption),
            "mode": task.mode, "lam": lam, "forward_units": units, "seed": task.seed,
            "reading": args.reading, "training_steps": steps, "samples": args.samples,
            "sample_steps": args.sample_steps}
    column = f"{title}, lambda {lam:g}" if lam and len(args.lam) > 1 else title
    return [{**head, **row} for row in rows], {
        key if isinstance(key, tuple) else (key, column): cell for key, cell in cells.items()}


def measured(tasks, args):
    """Yield (rows, cells) of each task, in their order, from args.workers processes."""
    job = partial(train_and_measure, args)
    if args.workers == 1:
        yield from map(job, tasks)
    else:  # Ctrl-C is left to the parent, which ends its workers
        ignore = (signal.SIGINT, signal.SIG_IGN)
        with get_context("spawn").Pool(args.workers, signal.signal, ignore) as pool:
            yield from pool.imap(job, tasks)


def parse_args(argv=None):
    """The command line; UserError where it is wrong."""
    p = Parser(description=__doc__)
    flag = p.add_argument
    flag("experiment", nargs="?", default="all", choices=[*EXPERIMENTS, "all"])
    flag("--modes", type=comma_list(str, *VARIANTS),
         default="exact,dsm,random,adv,adv_low,adv_l2x3,invariant",
         help=f"of {', '.join(VARIANTS)}; why has its own")
    flag("--lam", type=comma_list(number(float, 1e-3)), default="0.3",
         help="weights lambda, with commas between; why takes the first")
    flag("--noise_p", type=number(float, 0, 1), help="share of noisy training points")
    flag("--noise_std", type=number(float, 0), help="standard deviation of their noise")
    flag("--outlier_p", type=number(float, 0, 1), help="share of outliers")
    flag("--reading", choices=READINGS, default="sigma", help="of the radius, see losses")
    flag("--steps", type=number(int, 1), help="of training; else 2000 or 1000, see STEPS")
    flag("--seed", type=number(int, 0, 10**6), default=0, help="the first seed")
    flag("--seeds", type=number(int, 1), default=1, help="how many seeds")
    flag("--quick", action="store_true", help="less of everything, one corruption")
    flag("--workers", type=number(int, 1), default=torch.get_num_threads(), help="processes")
    flag("--out", type=Path, default=Path("out/toy"), help="output folder")
    args = p.parse_args(argv)

    if (args.noise_p is None) != (args.noise_std is None):
        raise UserError("--noise_p and --noise_std go together: give both")
    args.corruptions, args.samples, args.sample_steps = CORRUPTIONS, 3000, 250
    if args.quick:
        args.corruptions, args.samples, args.sample_steps = CORRUPTIONS[2:3], 600, 50
        args.steps = args.steps or 300
    if args.noise_p is not None or args.outlier_p is not None:
        args.corruptions = [(args.noise_p or 0.0, args.noise_std or 0.0, args.outlier_p or 0.0)]
    # The corruption whose sampling paths, score fields, attacks and directions are shown
    args.shown = args.corruptions[:3][-1]  # 90 % with std .2, or the only one.
    return args


def main(argv=None):
    """Run the experiments, print their tables and keep them."""
    args = parse_args(argv)
    print(f"output {args.out}", flush=True)
    tasks = plan(args)
    check_writable(args.out / "toy.json")
    rows, pictures = {}, {}
    tick = ticker("networks", len(tasks))
    for done, (task, (found, cells)) in enumerate(zip(tasks, measured(tasks, args)), 1):
        tick(done)
        rows.setdefault(task.experiment, []).extend(found)
        if task.seed == args.seed:
            pictures.setdefault(task.experiment, {}).update(cells)
    for name, cells in pictures.items():
        print(f"\n{name}; lists are at t = {LEVELS}\n{markdown_table(rows[name])}")
        save_panels(args.out / f"{name}.png", EXPERIMENTS[name][1], cells)
    write_json(args.out / "toy.json", sum(rows.values(), []))
    print(f"\nthe rows are in {args.out / 'toy.json'}, a picture of each experiment beside it")


if __name__ == "__main__":
    run_cli(main)
