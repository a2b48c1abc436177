"""The forward process, the perturbation and the objectives of adversarial diffusion training.

Every function works on (B, ...) tensors of any rank: images and points go through the same code.
a = alpha_bar_t, s = sqrt(1 - a), squares are means over the elements of a sample.

    x_t     = sqrt(a) x0 + s eps                                               forward process
    L       = |eps_theta(x_t, t) - eps|^2                                      dsm
            + lam_t |eps_theta(x_t + s omega, t) - eps_theta(x_t, t) - omega|^2    equivariance
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

# ---------- Forward process


class Diffusion:
    """Variance-preserving forward process of T steps; t is an int64 tensor (B,) in 0..T-1.

    schedule: "linear", beta from 1e-4 to .02 at T = 1000 (Ho et al. 2020), scaled by 1000 / T;
    or "cosine" (Nichol & Dhariwal 2021).  Raises ValueError on any other.
    predict: what a network of these states returns, "eps" or "v", see `predict_eps`.
    `alpha_bar` and `noise_level`, s / sqrt(a), are float64 on the CPU, (T,): samplers read them;
    `sqrt_a` and `s` are float32.
    """

    def __init__(self, T=1000, schedule="linear", device="cpu", predict="eps"):
        if schedule == "linear":
            beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
        elif schedule == "cosine":
            u = torch.arange(T + 1, dtype=torch.float64) / T
            f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = 1 - f[1:] / f[:-1]
        else:
            raise ValueError(f"unknown schedule {schedule!r}: linear or cosine")
        self.T, self.predict = T, predict
        self.alpha_bar = torch.cumprod(1 - beta.clamp(max=0.999), dim=0)
        self.noise_level = (1 / self.alpha_bar - 1).sqrt()
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

    def eps_from_x0(self, x_t, t, x0):
        """eps = (x_t - sqrt(a) x0) / s, the inverse of `denoise`."""
        sqrt_a, s = self.at(t, x_t)
        return (x_t - sqrt_a * x0) / s


def stratified_t(n, T, device="cpu"):
    """A batch's time steps, t_i = floor((i + u_i) / n T), u_i ~ U[0, 1): int64 (n,), ascending.

    One step from each n-th part of the T: uniform for an image, since batches are shuffled, and of
    low variance for the batch (Kingma et al. 2021). Every m-th of them is such a batch again.
    """
    u = (torch.arange(n, device=device) + torch.rand(n, device=device)) / n
    return (u * T).long().clamp(max=T - 1)


def predict_eps(net, diffusion, x_t, t):
    """The predicted noise, (B, ...): the one place that says what the network's output means.

    That is eps, or v = sqrt(a) eps - s x0 (Salimans & Ho 2022): then eps = sqrt(a) v + s x_t.
    """
    output = net(x_t, t)
    if diffusion.predict == "v":
        sqrt_a, s = diffusion.at(t, x_t)
        output = sqrt_a * output + s * x_t
    return output


def denoise(net, diffusion, x_t, t):
    """The denoiser D(x_t) = (x_t - s eps_theta(x_t, t)) / sqrt(a), (B, ...)."""
    sqrt_a, s = diffusion.at(t, x_t)
    return (x_t - s * predict_eps(net, diffusion, x_t, t)) / sqrt_a


# ---------- The perturbation: how far, and with what weight


@dataclass(frozen=True)
class Perturbation:
    """The numbers of the regulariser. What the paper leaves open is an option here."""

    reading: str = "sigma"  # how the radius follows the schedule, one of `READINGS`
    lam: float = 0.3  # weight (paper: .3; .5 over-smooths)
    rho: float = 2.0  # exponent of the radius (paper: 2)
    beta_min: float = 8 / 255  # range of the random beta
    beta_max: float | None = None  # None: the reading's own
    ascent_steps: int = 1  # gradient steps of the adversarial omega (paper: 1)
    ascent_norm: str = "linf"  # sign steps inside the box (paper); "l2": omega along the gradient
    ascent_step: float = 1.25  # size of a sign step in units of r, RS-FGSM's (Wong et al. 2020)
    detach_target: bool = False  # stop the gradient through eps_theta(x_t, t) in the regulariser
    # Only t < reg_t T are regularised, at the weight that they have in the batch (ours; paper: 1).
    # Below 1 it needs t as `stratified_t` draws them.
    reg_t: float = 1.0
    # Of these a random share, in (0, 1], is regularised and stands for all (ours; paper: 1).
    reg_share: float = 1.0
    # The first share of the steps trains plainly: first the structure, then the noise (ours).
    reg_after: float = 0.0
    # Training sees t < t_max T alone, as a model's expert for the last steps does (ours).
    t_max: float = 1.0
    ip_gamma: float = 0.1  # std of DDPM-IP's second noise over the first's (their CIFAR-10: .15)

    @classmethod
    def of(cls, settings):
        """From a dict of settings, which may have others too, or lack some."""
        return cls(**{key: settings[key] for key in cls.__dataclass_fields__ if key in settings})


# The readings of the radius, each with its own beta_max.
READINGS = {"sigma": 1.0, "epsilon": 16 / 255}


def radius_and_weight(s, cfg):
    """Draw beta ~ U(beta_min, beta_max), one a sample; return (r, lam_t), shaped as s (B, 1, ...).

    r: half-width of omega's box.  lam_t: sqrt(3) / half-width is 1 / std of a uniform perturbation.
    sigma: half-width R = beta (1-a)^(1/rho) in x-space; omega = delta / s, so that r = R / s.
    epsilon: half-width r = s^rho + beta in eps-space.
    """
    highest = READINGS[cfg.reading] if cfg.beta_max is None else cfg.beta_max
    beta = cfg.beta_min + (highest - cfg.beta_min) * torch.rand_like(s)
    if cfg.reading == "sigma":
        R = beta * s ** (2 / cfg.rho)
        return R / s, cfg.lam * math.sqrt(3) / R
    r = s**cfg.rho + beta
    return r, cfg.lam * math.sqrt(3) / r


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


def ascent_gradient(view, omega, x, s, t, clean):
    """Gradient in omega (B, ...) of J = |view(x + s omega, t) - clean|^2, summed over the batch."""
    omega = omega.detach().requires_grad_(True)
    with torch.enable_grad():
        # A sum in float32: a mean's gradient underflows in float16.
        J = (view(x + s * omega, t) - clean.detach()).float().square().sum()
        return torch.autograd.grad(J, omega)[0].nan_to_num(0.0, 0.0, 0.0)


def along(grad, r):
    """The gradient's direction, r sqrt(d) long for d elements; 0 where it is 0 or overflows."""
    length = grad.flatten(1).norm(dim=1).view_as(r)
    return r * math.sqrt(grad[0].numel()) * grad / length.clamp(min=1e-30)


def ascend(view, omega, x_t, s, t, r, clean, cfg, rewind=lambda: None):
    """Training's omega: ascend J = |eps_theta(x_t + s omega, t) - eps_theta(x_t, t)|^2.

    J, and not the penalty: it is steep where the data vary little, which is where noise shows; the
    penalty is where they vary much (`python toy.py why`).
    linf: omega <- clip(omega + 1.25 r sign(grad J), -r, r).
    l2:   omega <- r sqrt(d) grad J / |grad J|, as long as a corner of the box.
    Where the gradient is zero (a fresh network's) or overflows, omega stays as it was.

    view: function (x, t) -> (B, ...), such as a network on frozen weights; clean: view(x_t, t).
    omega: the start, U[-r, r], (B, ...): J's gradient is exactly zero at omega = 0.
    rewind: called before the network, to repeat its dropout.
    """
    for _ in range(cfg.ascent_steps):
        rewind()
        grad = ascent_gradient(view, omega, x_t, s, t, clean)
        if cfg.ascent_norm == "linf":
            omega = (omega + cfg.ascent_step * r * grad.sign()).clamp(-r, r)
        else:
            step = along(grad, r)
            omega = torch.where(mean_square(step).view_as(r) > 0, step, omega)
    return omega


# ---------- Attacks


def pgd(view, omega, x, s, t, r, clean, norm, steps):
    """Projected gradient ascent on J = |view(x + s omega, t) - clean|^2 (Madry et al. 2018).

    linf: omega <- clip(omega + r/4 sign(grad J), -r, r).
    l2:   omega <- omega + r/4 sqrt(d) grad J / |grad J|, scaled back to |omega| <= r sqrt(d).
    Arguments as of `ascend`; returns omega (B, ...).
    """
    for _ in range(steps):
        grad = ascent_gradient(view, omega, x, s, t, clean)
        if norm == "linf":
            omega = (omega + r / 4 * grad.sign()).clamp(-r, r)
        else:
            omega = omega + along(grad, r / 4)
            size = mean_square(omega).sqrt().view_as(r)
            omega = omega * (r / size.clamp(min=1e-30)).clamp(max=1)
    return omega


def trajectory_attack(view, diffusion, chosen, noise, norm="l2", budget=0.5, steps=10):
    """The hook of `sample.sample` that pushes the state, x <- x + s_t omega, at the times `chosen`.

    view: function (x (B, ...), t (B,)) -> what the attack should change most, such as `denoise`;
        its weights should require no gradient.
    noise: function without arguments -> standard normals of x's shape, for the random start.
    norm, budget: |omega| <= budget per element ("linf"), or <= budget sqrt(d) a sample ("l2").
    steps: of `pgd`; 0 for the control, a random push of just that norm.
    """

    @torch.no_grad()
    def perturb(x, t):
        if t not in chosen:
            return x
        t = torch.full((len(x),), t, device=x.device)
        _, s = diffusion.at(t, x)
        r = torch.full_like(s, budget)
        omega = noise()
        if norm == "linf":
            # A corner of the box, or U[-r, r] to ascend from: some corners are local maxima.
            omega = r * (torch.erf(omega / math.sqrt(2)) if steps else omega.sign())
        else:
            omega = r * omega / mean_square(omega).sqrt().view_as(r)
        if steps:
            omega = pgd(view, omega, x, s, t, r, view(x, t), norm, steps)
        return x + s * omega

    return perturb


# ---------- Objectives: (net, diffusion, x0, t, eps, cfg) -> (loss, dict of detached scalars)


def dsm(net, diffusion, x0, t, eps, cfg=None):
    """Denoising score matching: |eps_theta(x_t, t) - eps|^2."""
    x_t = diffusion.diffuse(x0, t, eps)
    loss = mean_square(predict_eps(net, diffusion, x_t, t) - eps).mean()
    return loss, {"dsm": loss.detach()}


def regularised(net, diffusion, x0, t, eps, cfg, adversarial, equivariant):
    """dsm + lam_t |eps_theta(x_t + s omega, t) - eps_theta(x_t, t) - omega|^2.

    adversarial: omega from `ascend`, else random.
    equivariant: False drops the last "- omega", which is a classifier's invariance.
    With lam = 0 it is dsm, at its cost.
    """
    if cfg.lam == 0:
        return dsm(net, diffusion, x0, t, eps)

    # t ascends from 0 to t_max T (`stratified_t`): the first n_low samples hold all of them below
    # reg_t T. Of these, k are regularised.
    reg_end, t_end = (math.ceil(u * diffusion.T - 1e-6) for u in (cfg.reg_t, cfg.t_max))
    n_low = math.ceil(min(1, reg_end / t_end) * len(t) - 1e-6)
    k = max(1, round(cfg.reg_share * n_low))
    if k < n_low:
        order = torch.arange(len(t), device=t.device)
        order[:n_low] = torch.randperm(n_low, device=t.device)
        x0, t, eps = x0[order], t[order], eps[order]
    x_t = diffusion.diffuse(x0, t, eps)
    x, times = x_t[:k], t[:k]
    _, s = diffusion.at(times, x)
    r, lam_t = radius_and_weight(s, cfg)
    omega = random_omega(r, x)

    # One pass predicts all, unless dropout ties the first k to their other branches.
    n = len(t) if getattr(net, "dropout", None) == 0 else k
    rewind = repeat_randomness(x.device)
    predicted = predict_eps(net, diffusion, x_t[:n], t[:n])
    clean = predicted[:k]
    if adversarial:
        weights = frozen(net)
        omega = ascend(lambda x, t: predict_eps(weights, diffusion, x, t), omega, x, s, times, r,
                       clean, cfg, rewind)
    rewind()
    moved = predict_eps(net, diffusion, x + s * omega, times)

    target = clean.detach() if cfg.detach_target else clean
    residual = mean_square(moved - target - omega if equivariant else moved - target)
    fit = mean_square(predicted - eps[:n])
    if n < len(t):
        fit = torch.cat([fit, mean_square(predict_eps(net, diffusion, x_t[n:], t[n:]) - eps[n:])])
    weight = lam_t.flatten() * (times < cfg.reg_t * diffusion.T)
    # A mean over the batch as well: in it the k stand for all n_low.
    fit, reg = fit.mean(), (weight * residual).sum() / k * n_low / len(t)
    figures = {"dsm": fit, "reg": reg, "equivariance": residual.mean(), "omega": omega.abs().mean()}
    return fit + reg, {name: value.detach() for name, value in figures.items()}


def input_perturbation(net, diffusion, x0, t, eps, cfg):
    """DDPM-IP (Ning et al. 2023): x_t of eps + gamma xi, xi ~ N(0, I), and the target eps."""
    pushed = eps + cfg.ip_gamma * torch.randn_like(eps)
    loss = mean_square(predict_eps(net, diffusion, diffusion.diffuse(x0, t, pushed), t) - eps)
    return loss.mean(), {"dsm": loss.mean().detach()}


def aware(net, diffusion, x0, t, eps, cfg, noise):
    """Noise-aware matching, in the manner of Daras et al. 2024: |c eps_theta(x_t, t) - eps|^2.

    x0 = clean + n z is a noisy image of known n, `noise` (B,). With c^2 = 1 - (n sqrt(a) / s)^2
    the state x_t = sqrt(a) x0 + c s eps = sqrt(a) clean + s e has e = (n sqrt(a) z + c s eps) / s,
    of variance 1: it is a state of the clean data. E[eps | x_t] = c E[e | x_t], so the minimiser
    is E[e | x_t], the clean data's eps. With n = 0 this is dsm; where the image is noisier than the
    time step, c = 0, and it teaches nothing.
    """
    sqrt_a, s = diffusion.at(t, x0)
    c = (1 - (noise.view_as(s) * sqrt_a / s).square()).clamp(min=0).sqrt()
    predicted = predict_eps(net, diffusion, sqrt_a * x0 + c * s * eps, t)
    loss = (mean_square(c * predicted - eps) * (c > 0).flatten()).mean()
    return loss, {"dsm": loss.detach()}


def regularised_units(cfg, ascents):
    """dsm's 3; of what is regularised another forward and backward, and 2 for each ascent step."""
    regularised_share = min(1, cfg.reg_t / cfg.t_max) * cfg.reg_share * (1 - cfg.reg_after)
    return 3 + (3 + 2 * ascents) * regularised_share


# Name: (objective, its `forward_units`, a function of cfg).
# random: omega ~ U[-r, r].  adv: the paper's method.  invariant: what a classifier does; it fails.
# ip and aware are baselines that the paper lacks; aware is told an estimate of each image's noise.
MODES = {
    "dsm": (dsm, lambda cfg: 3),
    "random": (partial(regularised, adversarial=False, equivariant=True),
               lambda cfg: regularised_units(cfg, 0)),
    "adv": (partial(regularised, adversarial=True, equivariant=True),
            lambda cfg: regularised_units(cfg, cfg.ascent_steps)),
    "invariant": (partial(regularised, adversarial=True, equivariant=False),
                  lambda cfg: regularised_units(cfg, cfg.ascent_steps)),
    "ip": (input_perturbation, lambda cfg: 3),
    "aware": (aware, lambda cfg: 3),
}


def forward_units(mode, cfg):
    """Compute of a mean step: a forward of the batch is 1, a backward 2, of omega alone 1."""
    return MODES[mode][1](cfg)


class Objective(nn.Module):
    """The whole loss as one forward call, which is what DistributedDataParallel supports.

    x0 (B, C, H, W), t (B,), eps (B, C, H, W) -> (loss, dict of detached figures). The mode aware
    takes the noise's std (B,) after them.
    """

    def __init__(self, net, diffusion, mode, perturbation):
        super().__init__()
        self.net, self.diffusion, self.perturbation = net, diffusion, perturbation
        self.loss, _ = MODES[mode]

    def forward(self, x0, t, eps, *noise):
        return self.loss(self.net, self.diffusion, x0, t, eps, self.perturbation, *noise)
