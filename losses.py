"""The forward process, the perturbation and the objectives of adversarial diffusion training.

Every function works on (B, ...) tensors of any rank: images and points go through the same code.
a = alpha_bar_t, s = sqrt(1 - a), squares are means over the elements of a sample.

    x_t     = sqrt(a) x0 + s eps                                               forward process
    L       = |eps_theta(x_t, t) - eps|^2                                      dsm
            + lam_t |eps_theta(x_t + s omega, t) - eps_theta(x_t, t) - omega|^2    equivariance
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

# ---------- Forward process


class Diffusion:
    """Variance-preserving forward process of T steps; t is an int64 tensor (B,) in 0..T-1.

    schedule: "linear", beta from 1e-4 to .02 at T = 1000 (Ho et al. 2020), scaled by 1000 / T;
    or "cosine" (Nichol & Dhariwal 2021).  Raises ValueError on any other, or T < 1.
    `alpha_bar` is float64 on the CPU, (T,): samplers read it; `sqrt_a` and `s` are float32.
    """

    def __init__(self, T=1000, schedule="linear", device="cpu"):
        if T < 1:
            raise ValueError(f"T = {T}: at least one step")
        if schedule == "linear":
            beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
        elif schedule == "cosine":
            u = torch.arange(T + 1, dtype=torch.float64) / T
            f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = 1 - f[1:] / f[:-1]
        else:
            raise ValueError(f"unknown schedule {schedule!r}: linear or cosine")
        self.T = T
        self.alpha_bar = torch.cumprod(1 - beta.clamp(max=0.999), dim=0)
        self.sqrt_a = self.alpha_bar.sqrt().float().to(device)
        self.s = (1 - self.alpha_bar).sqrt().float().to(device)

    def at(self, t, like):
        """(sqrt(a), s) of t (B,), shaped (B, 1, ...) to broadcast against `like` (B, ...)."""
        shape = (-1,) + (1,) * (like.dim() - 1)
        return self.sqrt_a[t].view(shape), self.s[t].view(shape)

    def diffuse(self, x0, t, eps):
        """x_t = sqrt(a) x0 + s eps, all (B, ...)."""
        sqrt_a, s = self.at(t, x0)
        return sqrt_a * x0 + s * eps

    def x0_from_eps(self, x_t, t, eps):
        """The denoiser D(x_t) = (x_t - s eps) / sqrt(a)."""
        sqrt_a, s = self.at(t, x_t)
        return (x_t - s * eps) / sqrt_a

    def eps_from_x0(self, x_t, t, x0):
        """eps = (x_t - sqrt(a) x0) / s, the inverse of `x0_from_eps`."""
        sqrt_a, s = self.at(t, x_t)
        return (x_t - sqrt_a * x0) / s


# ---------- The perturbation: how far, and with what weight


@dataclass(frozen=True)
class Perturbation:
    """The numbers of the regulariser. What the paper leaves open is an option here.

    reading: how the radius follows the schedule, see `radius_sigma` and `radius_epsilon`.
    lam: weight (paper: .3; .5 over-smooths).      rho: exponent of the radius (paper: 2).
    beta_min, beta_max: range of the random beta, one draw a sample and step; beta_max None
        stands for the reading's own, 1 for sigma and 16/255 for epsilon.
    ascent_steps: gradient steps of the adversarial omega (paper: 1).
    ascent_norm: "linf", sign steps inside the box (paper); "l2", omega along the gradient.
    ascent_step: size of a sign step in units of r. 1.25 is RS-FGSM's (Wong et al. 2020).
    detach_target: stop the gradient through eps_theta(x_t, t) in the regulariser.
    reg_share: of the batch that is regularised, in (0, 1]; its mean stands for the whole.
    reg_low: take that share from the smallest t of the batch, or of the part of it that a process
        computes at a time; each keeps its weight in the batch, the rest is left to dsm (ours).
    """

    reading: str = "sigma"
    lam: float = 0.3
    rho: float = 2.0
    beta_min: float = 8 / 255
    beta_max: float | None = None
    ascent_steps: int = 1
    ascent_norm: str = "linf"
    ascent_step: float = 1.25
    detach_target: bool = False
    reg_share: float = 1.0
    reg_low: bool = False


def radius_sigma(s, beta, lam, rho):
    """Reading `sigma` (default): half-width R = beta (1-a)^(1/rho) in x-space; omega = delta / s.

    Returns (r, lam_t) = (R / s, lam sqrt(3) / R), shaped as s.
    """
    R = beta * s ** (2 / rho)
    return R / s, lam * math.sqrt(3) / R


def radius_epsilon(s, beta, lam, rho):
    """Reading `epsilon`: (r, lam_t) = (s^rho + beta, lam sqrt(3) / r), r in eps-space."""
    r = s**rho + beta
    return r, lam * math.sqrt(3) / r


READINGS = {"sigma": (radius_sigma, 1.0), "epsilon": (radius_epsilon, 16 / 255)}


def radius_and_weight(s, cfg):
    """Draw beta ~ U(beta_min, beta_max), one a sample; return (r, lam_t), shaped as s (B, 1, ...).

    r is the half-width of omega's box; lam_t weighs the regulariser: sqrt(3) / half-width is
    1 / std of a uniform perturbation.
    """
    radius, widest = READINGS[cfg.reading]
    beta_max = widest if cfg.beta_max is None else cfg.beta_max
    beta = cfg.beta_min + (beta_max - cfg.beta_min) * torch.rand_like(s)
    return radius(s, beta, cfg.lam, cfg.rho)


# ---------- The perturbation: which direction


def mean_square(x):
    """Mean over the elements of each sample, in float32: (B, ...) -> (B,)."""
    return x.float().square().flatten(1).mean(1)


def frozen(net):
    """`net` on detached parameters: gradients reach its input and no weight.

    Asking autograd for the input's gradient alone is not enough: a compiled network computes
    its weight gradients all the same. Nor do hooks on the parameters (DDP) see this call.
    """
    weights = {name: p.detach() for name, p in net.named_parameters()}
    return lambda x, t: torch.func.functional_call(net, weights, (x, t))


def repeat_randomness(device):
    """Remember the random state of `device`; the function returned rewinds to it.

    The branches of the regulariser must drop the same units, or dropout noise would pass for a
    lack of equivariance. Draw everything else first: a rewind repeats what came after.
    """
    module = torch if device.type == "cpu" else getattr(torch, device.type)
    which = (device,) if device.type == "cuda" else ()
    state = module.get_rng_state(*which)
    return lambda: module.set_rng_state(state, *which)


def random_omega(r, like):
    """omega ~ U[-r, r] per element; r (B, 1, ...), result (B, ...) as `like`."""
    return r * (2 * torch.rand_like(like) - 1)


def ascend(omega, net, x_t, s, t, r, clean, cfg, again=lambda: None):
    """Adversarial omega: ascend J = |eps_theta(x_t + s omega, t) - eps_theta(x_t, t)|^2.

    omega: the start, U[-r, r], (B, ...): J's gradient is exactly zero at omega = 0.
    linf: omega <- clip(omega + 1.25 r sign(grad J), -r, r).
    l2:   omega <- r sqrt(d) grad J / |grad J|, d elements a sample: a corner's mean square.
    Where the gradient is zero (a fresh network) or overflows, omega stays as it was.

    net: called on detached parameters, so no weight gradient is computed.
    clean: eps_theta(x_t, t), (B, ...).  again: called before the network, to repeat its dropout.
    """
    net, clean = frozen(net), clean.detach()
    for _ in range(cfg.ascent_steps):
        omega.requires_grad_(True)
        again()
        with torch.enable_grad():
            # a sum, in float32: a mean's gradient underflows in float16
            J = (net(x_t + s * omega, t) - clean).float().square().sum()
            (grad,) = torch.autograd.grad(J, omega)
        omega = omega.detach()
        if cfg.ascent_norm == "linf":
            step = cfg.ascent_step * r * grad.nan_to_num(0.0).sign()
            omega = torch.minimum(torch.maximum(omega + step, -r), r)
        else:
            norm = grad.flatten(1).norm(dim=1).view_as(r)
            length = r * math.sqrt(grad[0].numel())
            usable = (norm > 0) & norm.isfinite()
            omega = torch.where(usable, length * grad / norm, omega)
    return omega


# ---------- Attacks on the sampling trajectory


class Denoiser(nn.Module):
    """net as (x_t, t) -> D(x_t) (B, ...): what `ascend` moves on it is the denoised estimate."""

    def __init__(self, net, diffusion):
        super().__init__()
        self.net, self.diffusion = net, diffusion

    def forward(self, x, t):
        return self.diffusion.x0_from_eps(x, t, self.net(x, t))


def trajectory_attack(view, diffusion, chosen, noise, norm="l2", budget=0.5, steps=5):
    """The hook of `sample.sample` that pushes the state, x <- x + s_t omega, at the times `chosen`.

    view: module (x (B, ...), t (B,)) -> what the attack should change most, such as `Denoiser`.
    noise: function without arguments -> standard normals of x's shape, for the random start.
    norm, budget: |omega| <= budget per element ("linf"), or <= budget sqrt(d) a sample ("l2").
    steps: ascent steps; 0 for the control, a random push of just that norm.
    """
    cfg = Perturbation(ascent_norm=norm, ascent_steps=steps)

    @torch.no_grad()
    def perturb(x, t):
        if t not in chosen:
            return x
        t = torch.full((len(x),), t, device=x.device)
        _, s = diffusion.at(t, x)
        r = torch.full_like(s, budget)
        omega = noise()
        if norm == "linf":
            # a corner of the box, or U[-r, r] to ascend from: some corners are local maxima
            omega = r * (torch.erf(omega / math.sqrt(2)) if steps else omega.sign())
        else:
            omega = r * omega / mean_square(omega).sqrt().view_as(r)
        if steps:
            omega = ascend(omega, view, x, s, t, r, view(x, t), cfg)
        return x + s * omega

    return perturb


# ---------- Objectives: (net, diffusion, x0, t, eps, cfg) -> (loss, dict of detached scalars)


def dsm(net, diffusion, x0, t, eps, cfg=None):
    """Denoising score matching: |eps_theta(x_t, t) - eps|^2."""
    loss = mean_square(net(diffusion.diffuse(x0, t, eps), t) - eps).mean()
    return loss, {"dsm": loss.detach()}


def regularised(net, diffusion, x0, t, eps, cfg, adversarial, equivariant):
    """dsm + lam_t |eps_theta(x_t + s omega, t) - eps_theta(x_t, t) - omega|^2.

    adversarial: omega from `ascend`, else random.
    equivariant: False drops the last "- omega", which is a classifier's invariance.
    """
    if cfg.reg_low:
        order = t.argsort()
        x0, t, eps = x0[order], t[order], eps[order]
    x_t = diffusion.diffuse(x0, t, eps)
    k = max(1, round(cfg.reg_share * len(x0)))  # batches are shuffled: their head is a random share
    x, times = x_t[:k], t[:k]
    _, s = diffusion.at(times, x)
    r, lam_t = radius_and_weight(s, cfg)
    omega = random_omega(r, x)

    again = repeat_randomness(x.device)
    clean = net(x, times)
    if adversarial:
        omega = ascend(omega, net, x, s, times, r, clean, cfg, again)
    again()
    moved = net(x + s * omega, times)

    target = clean.detach() if cfg.detach_target else clean
    residual = mean_square(moved - target - omega if equivariant else moved - target)
    fit = mean_square(clean - eps[:k])
    if k < len(x0):
        fit = torch.cat([fit, mean_square(net(x_t[k:], t[k:]) - eps[k:])])
    fit, reg = fit.mean(), lam_t.flatten() * residual
    reg = reg.sum() / len(x0) if cfg.reg_low else reg.mean()
    figures = {"dsm": fit, "reg": reg, "residual": residual.mean(), "omega": omega.abs().mean()}
    return fit + reg, {name: value.detach() for name, value in figures.items()}


def random(net, diffusion, x0, t, eps, cfg):
    """Random equivariance: omega ~ U[-r, r]."""
    return regularised(net, diffusion, x0, t, eps, cfg, adversarial=False, equivariant=True)


def adv(net, diffusion, x0, t, eps, cfg):
    """Adversarial equivariance, the paper's method: omega moves the prediction most."""
    return regularised(net, diffusion, x0, t, eps, cfg, adversarial=True, equivariant=True)


def invariant(net, diffusion, x0, t, eps, cfg):
    """A classifier's adversarial training, |eps_theta(x_t + s omega) - eps_theta(x_t)|^2: fails."""
    return regularised(net, diffusion, x0, t, eps, cfg, adversarial=True, equivariant=False)


MODES = {"dsm": dsm, "random": random, "adv": adv, "invariant": invariant}


def forward_units(mode, cfg):
    """Compute of a training step in forwards of its batch; a backward is two, omega's alone one."""
    if mode == "dsm":
        return 3
    return 3 + cfg.reg_share * (3 + (0 if mode == "random" else 2 * cfg.ascent_steps))
