"""Closed forms and exact invariants of the forward process, the perturbation and the losses."""

import math
import shutil

import pytest
import torch
from torch import nn

import losses
from losses import (MODES, Diffusion, Objective, Perturbation, forward_units, frozen,
                    mean_square, stratified_t)
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


def test_schedules_and_conversions():
    cosine, d = Diffusion(1000, "cosine"), Diffusion()
    assert (cosine.alpha_bar.diff() < 0).all() and 0 < cosine.alpha_bar[-1] < 1e-4
    beta = 1 - d.alpha_bar[1:] / d.alpha_bar[:-1]
    assert 1 - d.alpha_bar[0] == pytest.approx(1e-4) and beta[-1].item() == pytest.approx(0.02)

    for shape in ((6, 1, 4, 4), (6,)):
        x0, eps, t = torch.randn(shape), torch.randn(shape), torch.arange(6) * 100
        x_t, (sqrt_a, s) = d.diffuse(x0, t, eps), d.at(t, x0)
        found = losses.denoise(lambda x, t: eps, d, x_t, t)
        torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(d.eps_from_x0(x_t, t, x0), eps, rtol=1e-3, atol=1e-4)
        v = sqrt_a * eps - s * x0
        found = losses.predict_eps(lambda x, t: v, Diffusion(predict="v"), x_t, t)
        torch.testing.assert_close(found, eps, rtol=1e-5, atol=1e-5)


def test_stratified_t():
    """Uniform for each image; one from each n-th part; every m-th of them is such a batch again."""
    torch.manual_seed(0)
    many = torch.stack([stratified_t(10, 1000) for _ in range(4000)])
    assert (many // 100 == torch.arange(10)).all()
    assert (many[:, 1::2] // 200 == torch.arange(5)).all()
    counts = torch.bincount(many.flatten(), minlength=1000).double()
    assert (counts - 40).abs().max() < 6 * 40**0.5


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


def test_an_image_noisier_than_its_time_step_teaches_aware_nothing():
    assert slope(1, "aware", Perturbation(), v=0.5, noisy=1, t=20, n=64) == 0


def test_a_detached_target_has_another_gradient():
    attached, detached = (
        slope(1, "adv", Perturbation(detach_target=detach), v=0.5, noisy=0, t=100, n=64)
        for detach in (False, True))
    assert attached != detached


@pytest.mark.parametrize("mode", ["random", "adv", "invariant"])
@pytest.mark.parametrize("cfg, rows, weight", [
    (Perturbation(reg_share=0.25), [5, 1], 1),  # A random share stands for the whole batch,
    (Perturbation(reg_t=0.25), [0, 1], 0.25),  # the lowest t for themselves,
    (Perturbation(reg_t=0.45, reg_share=0.5), [1, 0], 0.5)])  # and a share of these for these.
def test_a_part_of_the_batch_is_regularised_and_all_of_it_fitted(mode, cfg, rows, weight,
                                                                 monkeypatch):
    """The rest's gradient is dsm's."""
    torch.manual_seed(0)
    net, diffusion, calls = small_unet(), Diffusion(), []
    x0, eps = torch.randn(2, 8, 3, 8, 8)
    t = torch.tensor([10, 130, 300, 400, 500, 700, 800, 900])
    order = torch.tensor([5, 1, 0, 2, 3, 4, 6, 7])
    monkeypatch.setattr(torch, "randperm", lambda n, device: order[order < n])

    def gradients(mode, rows, cfg):
        torch.manual_seed(1)
        loss, figures = MODES[mode][0](net, diffusion, x0[rows], t[rows], eps[rows], cfg)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        return figures, torch.cat([g.flatten() for g in grads])

    alone, of_rows = gradients(mode, rows, Perturbation())
    _, of_rows_dsm = gradients("dsm", rows, None)
    whole_dsm, of_all_dsm = gradients("dsm", slice(None), None)
    net.register_forward_pre_hook(lambda net, inputs: calls.append(len(inputs[1])))
    for net.dropout in (0.0, None):
        calls.clear()
        shared, got = gradients(mode, slice(None), cfg)
        # One pass predicts all, but for a network that may drop: its branches share their units.
        assert (8 in calls) == (net.dropout == 0)
        assert shared["dsm"] == pytest.approx(whole_dsm["dsm"].item(), rel=1e-5)
        assert shared["reg"] == pytest.approx(weight * alone["reg"].item(), rel=1e-5)
        assert torch.allclose(got, of_all_dsm + weight * (of_rows - of_rows_dsm), rtol=1e-3,
                              atol=1e-5)


@pytest.mark.parametrize("T, U, t_max, taken", [
    (1000, 0.1, 1, 13), (50, 0.05, 1, 8), (7, 0.5, 1, 74), (1000, 0.1, 0.3, 43)])
def test_exactly_the_lowest_t_are_regularised(T, U, t_max, taken, monkeypatch):
    """A network of zeros and omega = 1 leave the sum of lam_t = sqrt(3) lam / (beta s)."""
    seen, x, t = [], torch.zeros(128, 1), stratified_t(128, round(T * t_max))
    monkeypatch.setattr(losses, "random_omega", lambda r, x: seen.append(len(x)) or x + 1)
    cfg, d = Perturbation(reg_t=U, t_max=t_max, lam=0.3, beta_min=0.3, beta_max=0.3), Diffusion(T)
    _, figures = MODES["random"][0](Scalar(0), d, x, t, x, cfg)
    truth = (3**0.5 / d.s[t[t < U * T]]).sum() / 128
    assert figures["reg"].item() == pytest.approx(truth.item(), rel=1e-5)
    assert seen == [taken] and (t[taken:] >= U * T).all()


def test_forward_units_by_a_hand_count():
    """A forward is one, a backward two; the inner one, to omega alone, is one."""
    assert forward_units("random", Perturbation(reg_share=0.5)) == pytest.approx(3 + 3 / 2)
    cfg = Perturbation(reg_t=0.1, t_max=0.2, ascent_steps=3)
    assert forward_units("adv", cfg) == pytest.approx(3 + 9 / 2)
    assert forward_units("adv", Perturbation(reg_after=0.8)) == pytest.approx(3 + 5 / 5)


def test_radius_of_another_exponent_and_the_range_of_beta():
    """With the paper's exponent the linear-Gaussian closed form looks at both."""
    s = torch.tensor([[0.05], [0.5], [1.0]])
    r, lam_t = losses.radius_and_weight(s, Perturbation(rho=4.0, beta_min=0.4, beta_max=0.4))
    torch.testing.assert_close((r, lam_t), (0.4 * s**0.5 / s, 0.3 * 3**0.5 / (0.4 * s**0.5)))

    # beta, one a sample, spans its range: of each reading, or the one that is asked for.
    s = torch.full((20_000, 1), 0.5)
    for cfg, offset, high in ((Perturbation(), 0, 1), (Perturbation(beta_max=0.2), 0, 0.2),
                              (Perturbation(reading="epsilon"), 0.25, 16 / 255)):
        beta = losses.radius_and_weight(s, cfg)[0] - offset
        assert beta.aminmax() == pytest.approx((8 / 255, high), abs=1e-3)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_ascent_and_pgd_stay_in_their_set_and_ascend(norm):
    net = small_unet()
    torch.manual_seed(3)
    x, t = torch.randn(8, 3, 8, 8), torch.randint(1000, (8,))
    view, (_, s) = frozen(net), Diffusion().at(t, x)
    clean, r = view(x, t), torch.rand_like(s) + 0.01
    start = losses.random_omega(r, x)
    assert (start.abs() <= r).all()

    def J(omega):
        return mean_square(view(x + s * omega, t) - clean)

    def size(omega):
        return omega.abs().amax((1, 2, 3)) if norm == "linf" else mean_square(omega).sqrt()

    for steps in (1, 3):
        cfg = Perturbation(ascent_norm=norm, ascent_steps=steps)
        omega = losses.ascend(view, start, x, s, t, r, clean, cfg)
        assert not omega.requires_grad and torch.allclose(size(omega), r.flatten(), rtol=1e-4)
        # Most of a sign step's elements end in a corner.
        assert norm == "l2" or (omega.abs() > 0.99 * r).float().mean() > 0.5
        same_size = start * (omega.square().mean() / start.square().mean()).sqrt()
        assert (J(omega) > J(same_size)).float().mean() > 0.7

    first, many = (losses.pgd(view, start, x, s, t, r, clean, norm, n) for n in (1, 10))
    assert (J(first) > J(start)).all() and (J(many) > J(first)).all()
    assert torch.allclose(size(first - start), r.flatten() / 4, rtol=1e-4)
    assert (size(many) <= r.flatten() * (1 + 1e-5)).all()

    # A random start is needed: at omega = 0 J's gradient is exactly zero.
    assert (losses.ascend(view, 0 * x, x, s, t, r, clean, cfg) == 0).all()
    # So it is everywhere in a fresh network: omega stays where it was, as where J overflows.
    nn.init.zeros_(net.conv_out.weight)
    for flat in (frozen(net), lambda x, t: 1e25 * x):
        assert torch.equal(losses.ascend(flat, start, x, s, t, r, flat(x, t), cfg), start)


def test_inner_step_computes_no_weight_gradient(monkeypatch):
    """Compiled, since a compiled network computes them even where autograd asks for omega's."""
    net, seen = Points(), []
    weights = list(net.parameters())
    net.compile(backend="aot_eager")  # The default backend's tracing, without a C++ compiler.
    objective = Objective(net, Diffusion(), "adv", Perturbation())

    def look(view, omega, x, s, t, r, clean, cfg, rewind):
        J = view(x + s * omega.requires_grad_(), t).sum()
        seen.extend(torch.autograd.grad(J, [omega, *weights], allow_unused=True))
        return omega.detach()

    monkeypatch.setattr(losses, "ascend", look)
    loss, _ = objective(torch.randn(16, 2), torch.randint(1000, (16,)), torch.randn(16, 2))
    assert seen[0] is not None and seen[1:] == [None] * len(weights)
    loss.backward()
    assert all(p.grad is not None for p in weights)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_branches_drop_the_same_units(backend, monkeypatch):
    """Clean, inner step and moved branch are three graphs, of one mask each step, a new one each.

    At omega = 0 the branches differ by their masks alone, and only then J has a gradient there.
    """
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    monkeypatch.setattr(losses, "random_omega", lambda r, x: 0 * x)
    torch.manual_seed(0)
    torch._dynamo.reset()
    net, x0, eps = Points(dropout=0.5), *torch.randn(2, 8, 2)
    net.compile(backend=backend, dynamic=False)

    seen = set()
    settings = [Perturbation(reg_t=0.5), Perturbation(), Perturbation(reg_share=0.5)]
    for cfg in settings[:1 if backend == "inductor" else 3]:  # It compiles for long.
        for _ in range(2):
            loss, figures = MODES["adv"][0](net, Diffusion(), x0, stratified_t(8, 1000), eps, cfg)
            loss.backward()
            assert figures["omega"] == figures["equivariance"] == 0
            assert loss.item() not in seen
            seen.add(loss.item())
