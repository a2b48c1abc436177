"""Closed forms and exact invariants of the forward process, the perturbation and the losses."""

import math
import shutil

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import losses
from losses import (MODES, Diffusion, Objective, Perturbation, forward_units, frozen,
                    stratified_t)
from model import UNet


class Scalar(nn.Module):
    """eps_theta(x, t) = k x: the network of the linear-Gaussian closed forms."""

    def __init__(self, k):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(float(k), dtype=torch.float64))

    def forward(self, x, t):
        return self.k * x


class Points(nn.Module):
    """A small network on points in the plane that looks at t."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 32), nn.Dropout(dropout), nn.Tanh(),
                                    nn.Linear(32, 2))

    def forward(self, x, t):
        return self.layers(torch.cat([x, t[:, None] / 1000], dim=1))


def small_unet():
    """A narrow U-Net whose near-zero layers are made loud, so that its Jacobian is not trivial."""
    torch.manual_seed(0)
    net = UNet(8, 3, 8, (1, 2), 1, (4,), 0.0)
    for p in net.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    return net


def slope(k, mode, cfg, v, noisy, t, n=400_000):
    """The slope in k of MODES[mode]'s loss on N(0, v); a share `noisy` has noise of std .2."""
    g = torch.Generator().manual_seed(0)
    noise = 0.2 * (torch.rand(n, generator=g, dtype=torch.float64) < noisy)
    clean, extra, eps = torch.randn(3, n, 1, generator=g, dtype=torch.float64)
    x0, known = v**0.5 * clean + noise[:, None] * extra, [noise] if mode == "aware" else []
    torch.manual_seed(1)
    net, t = Scalar(k), torch.full((n,), t)
    MODES[mode][0](net, Diffusion(), x0, t, eps, cfg, *known)[0].backward()
    return net.k.grad


@pytest.mark.parametrize("t", [100, 400])
@pytest.mark.parametrize("mode, reading", [
    *[(mode, "sigma") for mode in MODES],
    *[(mode, "epsilon") for mode in ("random", "adv", "invariant")]])
def test_linear_gaussian_closed_form(mode, reading, t):
    v, noisy, beta, lam, gamma = 0.5, 0.6, 0.3, 0.4, 0.5
    cfg = Perturbation(reading=reading, lam=lam, beta_min=beta, beta_max=beta, ip_gamma=gamma)
    d = Diffusion()
    a, s = d.alpha_bar[t].item(), d.s[t].item()
    seen = a * (v + noisy * 0.2**2)
    # c = lam_t E[omega^2]: a third of the corner's value if omega is uniform
    c = math.sqrt(3) * lam * (beta / s if reading == "sigma" else s**2 + beta)
    truth = {"dsm": seen + s**2, "ip": seen + s**2 * (1 + gamma**2), "aware": a * v + s**2,
             "random": seen / (1 + c / 3) + s**2, "adv": seen / (1 + c) + s**2,
             "invariant": seen + s**2 * (1 + c)}
    # The loss is a parabola in k > 0.
    low, high = (slope(share * s / truth[mode], mode, cfg, v, noisy, t) for share in (0.99, 1.01))
    assert low < 0 < high


def test_aware_is_dsm_without_noise_and_silent_below_it():
    x0, eps, t, d = *torch.randn(2, 3, 2, 4, 4), torch.tensor([5, 100, 900]), Diffusion()
    net, cfg = Scalar(0.7), Perturbation()
    plain, _ = MODES["dsm"][0](net, d, x0, t, eps, cfg)
    told, _ = MODES["aware"][0](net, d, x0, t, eps, cfg, torch.zeros(3))
    loss, _ = MODES["aware"][0](net, d, x0, t, eps, cfg, torch.full((3,), 1000.0))
    loss.backward()
    assert torch.equal(plain, told) and loss == 0 and net.k.grad == 0


def test_schedules_and_conversions():
    for schedule in ("linear", "cosine"):
        d = Diffusion(1000, schedule)
        assert (d.alpha_bar.diff() < 0).all() and 0 < d.alpha_bar[-1] < 1e-4
    d = Diffusion()
    beta = 1 - d.alpha_bar[1:] / d.alpha_bar[:-1]
    assert 1 - d.alpha_bar[0] == pytest.approx(1e-4) and beta[-1].item() == pytest.approx(0.02)
    for shape in ((6, 3), (6, 1, 4, 4), (6,)):
        x0, eps, t = torch.randn(shape), torch.randn(shape), torch.arange(6) * 100
        x_t = d.diffuse(x0, t, eps)
        found = losses.denoise(lambda x, t: eps, d, x_t, t)
        torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(d.eps_from_x0(x_t, t, x0), eps, rtol=1e-3, atol=1e-4)
        sqrt_a, s = d.at(t, x0)
        v = sqrt_a * eps - s * x0
        found = losses.predict_eps(lambda x, t: v, Diffusion(predict="v"), x_t, t)
        torch.testing.assert_close(found, eps, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="schedule"):
        Diffusion(10, "sqrt")


def test_radius_and_weight():
    s = torch.tensor([[0.05], [0.5], [1.0]])
    for fields, radius, weight in (
            (dict(), 0.4 + 0 * s, 0.3 * 3**0.5 / (0.4 * s)),
            (dict(rho=4.0), 0.4 * s**0.5 / s, 0.3 * 3**0.5 / (0.4 * s**0.5)),
            (dict(reading="epsilon"), s**2 + 0.4, 0.3 * 3**0.5 / (s**2 + 0.4))):
        r, lam_t = losses.radius_and_weight(s, Perturbation(beta_min=0.4, beta_max=0.4, **fields))
        torch.testing.assert_close(r, radius)
        torch.testing.assert_close(lam_t, weight)
    # beta, one a sample, spans its range: of each reading, or the one that is asked for.
    s = torch.full((20_000, 1), 0.5)
    for cfg, offset, high in ((Perturbation(), 0, 1), (Perturbation(beta_max=0.2), 0, 0.2),
                              (Perturbation(reading="epsilon"), 0.25, 16 / 255)):
        beta = losses.radius_and_weight(s, cfg)[0] - offset
        assert 8 / 255 <= beta.min() + 1e-6 and beta.min() < 8 / 255 + 0.01
        assert high - 0.01 < beta.max() <= high + 1e-6


def ascent_point():
    """(network, x, s, t, its prediction there, J of an omega): what an ascent climbs."""
    net = frozen(small_unet())
    torch.manual_seed(3)
    x, t = torch.randn(8, 3, 8, 8), torch.randint(1000, (8,))
    _, s = Diffusion().at(t, x)
    clean = net(x, t)
    return net, x, s, t, clean, lambda w: losses.mean_square(net(x + s * w, t) - clean)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ascent_stays_in_its_set_and_ascends(norm, steps):
    net, x, s, t, clean, J = ascent_point()
    r = torch.rand_like(s) + 0.01
    start = losses.random_omega(r, x)
    assert (start.abs() <= r).all()
    assert start.abs().mean().item() == pytest.approx(r.mean().item() / 2, rel=0.1)
    cfg = Perturbation(ascent_norm=norm, ascent_steps=steps)
    omega = losses.ascend(net, start, x, s, t, r, clean, cfg)
    assert not omega.requires_grad
    if norm == "linf":
        assert (omega.abs() <= r).all()
        assert (omega.abs() > 0.99 * r).float().mean() > 0.5
    else:
        torch.testing.assert_close(losses.mean_square(omega).sqrt(), r.flatten(), rtol=1e-4,
                                   atol=1e-6)
    same_size = start * (omega.square().mean() / start.square().mean()).sqrt()
    assert (J(omega) > J(same_size)).float().mean() > 0.7


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_start_is_needed(norm):
    """J's gradient is exactly zero at omega = 0, and a fresh network leaves omega where it was."""
    net, d, cfg = small_unet(), Diffusion(), Perturbation(ascent_norm=norm)
    x, t = torch.randn(4, 3, 8, 8), torch.full((4,), 300)
    _, s = d.at(t, x)
    r, start = torch.full_like(s, 0.5), losses.random_omega(torch.full_like(s, 0.5), x)
    assert (losses.ascend(frozen(net), 0 * x, x, s, t, r, net(x, t), cfg) == 0).all()
    nn.init.zeros_(net.conv_out.weight)
    for view in (frozen(net), lambda x, t: 1e25 * x):  # Or where it overflows.
        assert torch.equal(losses.ascend(view, start, x, s, t, r, view(x, t), cfg), start)


@pytest.mark.parametrize("how", ["plain", "compiled", "DDP"])
def test_inner_step_computes_no_weight_gradient(monkeypatch, how, request):
    net, d = Points(), Diffusion()
    weights = list(net.parameters())
    objective = Objective(net, d, "adv", Perturbation(ascent_steps=2))
    if how == "compiled":
        # the same tracing as the default backend, without a C++ compiler
        net.compile(backend="aot_eager")
    if how == "DDP":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        request.addfinalizer(dist.destroy_process_group)
        objective = DistributedDataParallel(objective)
    seen = []
    grad = torch.autograd.grad

    def watched(J, omega, *args, **kwargs):
        # the compiler, tracing, calls it too, with lists
        if isinstance(J, torch.Tensor):
            seen.append(grad(J, weights, allow_unused=True, retain_graph=True))
        return grad(J, omega, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    loss, _ = objective(torch.randn(16, 2), torch.randint(1000, (16,)), torch.randn(16, 2))
    assert seen == 2 * [(None,) * len(weights)] and all(p.grad is None for p in weights)
    loss.backward()
    assert all(p.grad is not None for p in weights)


def test_target_branch_and_figures():
    net, d = Points(), Diffusion()
    x0, t, eps = torch.randn(64, 2), torch.randint(1000, (64,)), torch.randn(64, 2)
    grads = {}
    for detach in (False, True):
        torch.manual_seed(0)
        net.zero_grad()
        loss, figures = MODES["adv"][0](net, d, x0, t, eps, Perturbation(detach_target=detach))
        loss.backward()
        grads[detach] = torch.cat([p.grad.flatten() for p in net.parameters()])
        assert loss.item() == pytest.approx((figures["dsm"] + figures["reg"]).item())
        assert set(figures) == {"dsm", "reg", "equivariance", "omega"}
        assert not any(value.requires_grad for value in figures.values())
    assert not torch.allclose(grads[False], grads[True])
    dsm, _ = losses.dsm(net, d, x0, t, eps)
    assert dsm.item() == pytest.approx(figures["dsm"].item())


@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_compiled_branches_drop_the_same_units(backend, monkeypatch):
    """Clean, inner step and moved branch are three graphs, of one mask each step, a new one each.

    At omega = 0 the branches differ by their masks alone, with all of the batch and with a part.
    """
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    torch.manual_seed(0)
    net, diffusion = Points(dropout=0.5), Diffusion()
    if backend:
        torch._dynamo.reset()
        net.compile(backend=backend, dynamic=False)
    x0, eps = torch.randn(2, 8, 2)
    seen = []

    def look(view, omega, x_t, s, t, r, clean, cfg, rewind):
        rewind()
        seen.append((view(x_t, t) - clean).abs().max().item())
        return 0 * omega

    monkeypatch.setattr(losses, "ascend", look)
    losses_seen = set()
    settings = [Perturbation(reg_t=0.5), Perturbation(), Perturbation(reg_share=0.5)]
    for cfg in settings[:1 if backend == "inductor" else 3]:  # It compiles for long.
        for _ in range(2):
            t = stratified_t(8, 1000)
            loss, figures = MODES["adv"][0](net, diffusion, x0, t, eps, cfg)
            loss.backward()
            assert seen[-1] == 0 and figures["equivariance"] == 0
            losses_seen.add(loss.item())
    assert len(losses_seen) == len(seen)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_takes_small_steps_from_its_start_and_stays_in_the_ball(norm):
    net, x, s, t, clean, J = ascent_point()
    r = torch.full_like(s, 0.3)
    start = losses.random_omega(r, x)
    first, many = (losses.pgd(net, start, x, s, t, r, clean, norm, n) for n in (1, 10))
    assert (J(first) > J(start)).all() and (J(many) > J(first)).all()
    if norm == "linf":
        assert (many.abs() <= r + 1e-6).all()
        assert ((first - start).abs() <= r / 4 + 1e-6).all()
    else:
        assert (losses.mean_square(many).sqrt() <= 0.3 + 1e-5).all()
        moved = losses.mean_square(first - start).sqrt()
        torch.testing.assert_close(moved, torch.full((8,), 0.3 / 4))


def test_stratified_t():
    """Uniform for each image; one from each n-th part; every m-th of them is such a batch again."""
    torch.manual_seed(0)
    many = torch.stack([stratified_t(10, 1000) for _ in range(4000)])
    assert many.min() == 0 and many.max() == 999 and many.dtype == torch.int64
    for i in range(10):
        assert (many[:, i] // 100 == i).all()
    counts = torch.bincount(many.flatten(), minlength=1000).double()
    assert (counts - 40).abs().max() < 6 * 40**0.5
    assert (many[:, 1::2] // 200 == torch.arange(5)).all()
    assert (stratified_t(3, 2) <= 1).all()


@pytest.mark.parametrize("t_max", [1.0, 0.6])
def test_the_lowest_t_are_regularised_however_the_batch_is_split(t_max, monkeypatch):
    """reg_t = U: the terms of U = 1 but those at t >= U T; parts are dealt by stride."""
    torch.manual_seed(0)
    net, t = small_unet(), stratified_t(8, round(1000 * t_max))
    x0, eps = torch.randn(2, 8, 3, 8, 8)
    monkeypatch.setattr(losses, "ascend", lambda view, omega, x_t, s, t, r, *_:
                        torch.ones_like(omega) * r / 2)  # Without chance, as is the radius.

    def regulariser(U, rows):
        cfg = Perturbation(reg_t=U, t_max=t_max, beta_min=0.3, beta_max=0.3)
        _, figures = MODES["adv"][0](net, Diffusion(), x0[rows], t[rows], eps[rows], cfg)
        return figures["reg"].item()

    low = [i for i in range(8) if t[i] < 300]
    truth = sum(regulariser(1.0, slice(i, i + 1)) for i in low) / 8
    for parts in (1, 2, 4):
        found = [regulariser(0.3, slice(part, None, parts)) for part in range(parts)]
        assert 2 <= len(low) * t_max <= 3 and sum(found) / parts == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("T, U, most", [(1000, 0.1, 13), (50, 0.05, 8), (7, 0.5, 74)])
def test_all_of_the_lowest_t_are_taken_whatever_T(T, U, most, monkeypatch):
    taken, x, t = [], torch.zeros(128, 1), stratified_t(128, T)
    monkeypatch.setattr(losses, "random_omega", lambda r, like: taken.append(len(like)) or 0 * like)
    MODES["random"][0](Scalar(1), Diffusion(T), x, t, x, Perturbation(reg_t=U))
    assert taken == [most] and (t[most:] >= U * T).all()


@pytest.mark.parametrize("mode", ["random", "adv", "invariant"])
@pytest.mark.parametrize("low", [False, True])
def test_a_share_of_the_batch_is_regularised_and_all_of_it_fitted(mode, low, monkeypatch):
    """The rest's gradient is dsm's; a random share stands for the batch, the lowest t do not."""
    torch.manual_seed(0)
    net, diffusion = small_unet(), Diffusion()
    x0, eps = torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8)
    t = torch.tensor([10, 130, 300, 400, 500, 700, 800, 900])
    rows, weight, cfg = (([0, 1], 0.25, Perturbation(reg_t=0.25)) if low else
                         ([5, 1], 1, Perturbation(reg_share=0.25)))
    order = torch.tensor([5, 1, 0, 2, 3, 4, 6, 7])
    monkeypatch.setattr(torch, "randperm", lambda n, device: order)

    def gradients(mode, rows, cfg):
        torch.manual_seed(1)
        loss, figures = MODES[mode][0](net, diffusion, x0[rows], t[rows], eps[rows], cfg)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        return figures, torch.cat([g.flatten() for g in grads])

    alone, of_rows = gradients(mode, rows, Perturbation())
    _, of_rows_dsm = gradients("dsm", rows, None)
    whole_dsm, of_all_dsm = gradients("dsm", slice(None), None)
    calls = []
    net.register_forward_pre_hook(lambda net, inputs: calls.append(len(inputs[1])))
    for net.dropout, passes in ((0.0, [8]), (None, [2, 6])):  # A network that may drop needs two.
        calls.clear()
        shared, got = gradients(mode, slice(None), cfg)
        assert sorted(calls) == sorted(passes + [2] * (1 if mode == "random" else 2))
        assert shared["dsm"] == pytest.approx(whole_dsm["dsm"].item(), rel=1e-5)
        assert shared["reg"] == pytest.approx(weight * alone["reg"].item(), rel=1e-5)
        assert torch.allclose(got, of_all_dsm + weight * (of_rows - of_rows_dsm), rtol=1e-3,
                              atol=1e-5)


def test_forward_units():
    """Hand count: a forward is one, a backward two; the inner one, to omega alone, is one."""
    assert forward_units("dsm", Perturbation(reg_share=0.3)) == 3
    assert forward_units("random", Perturbation()) == 6
    assert forward_units("adv", Perturbation()) == forward_units("invariant", Perturbation()) == 8
    assert forward_units("adv", Perturbation(ascent_steps=3)) == 12
    assert forward_units("adv", Perturbation(reg_share=0.3)) == pytest.approx(4.5)
    assert forward_units("adv", Perturbation(reg_t=0.1)) == pytest.approx(3.5)
    assert forward_units("adv", Perturbation(reg_t=0.1, t_max=0.2)) == pytest.approx(5.5)
    assert forward_units("adv", Perturbation(t_max=0.2)) == 8
