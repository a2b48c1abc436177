"""Metrics against closed forms and direct formulas; each command in this process, on tiny runs."""

import itertools
import json
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import nn

import evaluate
from conftest import TINY
from evaluate import attacker, extract, load_inception, nearest, next_view
from losses import Diffusion, Perturbation, denoise
from sample import (ATTACK, Run, UserError, denoise_step, image_noise, load_run, sample,
                    to_uint8)
from train import Corruption, choose_corruption, load_images, training_images

CPU = torch.device("cpu")


def gaussian(n, d, seed, scale=1.0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, d, generator=g) + shift


def distances(x, y):
    return (x.double()[:, None] - y.double()).norm(dim=-1)


@pytest.fixture
def small_blocks(monkeypatch):
    """A small set has several blocks."""
    monkeypatch.setattr(evaluate, "BLOCK", 7)


# ---------------------------------------------------------------------------------------------
# Metrics


def test_frechet_distance_of_gaussians_in_closed_form():
    """Commuting covariances: |m1 - m2|^2 + sum (sqrt(v1) - sqrt(v2))^2."""
    g = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))
    v1, v2 = torch.rand(2, 6, generator=g, dtype=torch.float64)
    v2[2] = 0  # A singular covariance.
    m1, m2 = torch.randn(2, 6, generator=g, dtype=torch.float64)
    truth = (m1 - m2).square().sum() + (v1.sqrt() - v2.sqrt()).square().sum()
    cov1, cov2 = basis * v1 @ basis.T, basis * v2 @ basis.T
    assert evaluate.frechet(m1, cov1, m2, cov2) == pytest.approx(truth.item(), rel=1e-8)
    assert evaluate.frechet(m2, cov2, m1, cov1) == pytest.approx(truth.item(), rel=1e-6)


def test_frechet_distance_in_two_dimensions_and_never_below_zero():
    """tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB)). Of a set and itself rounding alone is left."""
    a = torch.tensor([[2.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
    b = torch.tensor([[0.7, -0.4], [-0.4, 1.5]], dtype=torch.float64)
    root = ((a @ b).trace() + 2 * torch.linalg.det(a @ b).sqrt()).sqrt()
    zero = torch.zeros(2, dtype=torch.float64)
    truth = (a.trace() + b.trace() - 2 * root).item()
    assert evaluate.frechet(zero, a, zero, b) == pytest.approx(truth, rel=1e-10)
    for seed in range(20):
        mean, cov = evaluate.moments(gaussian(10, 60, seed, 30.0))
        assert 0 <= evaluate.frechet(mean, cov, mean, cov) < 1e-2


def test_moments_are_numpys(small_blocks):
    x = gaussian(40, 5, 0, shift=100.0)
    mean, cov = evaluate.moments(x)
    np.testing.assert_allclose(mean, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9)


def test_inception_score_by_the_formula():
    logits = gaussian(47, 6, 1, scale=2.0)
    scores = []
    for i in range(10):
        p = logits[i * 47 // 10:(i + 1) * 47 // 10].double().softmax(1)
        scores.append((p * (p / p.mean(0)).log()).sum(1).mean().exp().item())
    assert evaluate.inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)))
    # One-hot and even: as many as there are classes.  All alike: 1.
    assert evaluate.inception_score(1000 * torch.eye(4).repeat(10, 1))[0] == pytest.approx(4)
    assert evaluate.inception_score(torch.ones(20, 4)) == pytest.approx((1, 0))


def test_kid_by_the_formula_and_unbiased():
    """All pairs, one by one: the diagonal left out of both sets, and not between them."""
    x, y = gaussian(9, 4, 0), gaussian(12, 4, 1, shift=0.5)

    def direct(x, y):
        def k(a, b):
            return (float(a @ b) / 4 + 1) ** 3

        m = len(x)
        within = sum(k(s[i], s[j]) for s in (x, y) for i, j in itertools.permutations(range(m), 2))
        return within / (m * (m - 1)) - 2 * sum(k(a, b) for a in x for b in y) / m**2

    mean, std = evaluate.kid(x, y[:9], subsets=3)
    assert mean == pytest.approx(direct(x.double(), y[:9].double()), rel=1e-6)
    assert std == pytest.approx(0, abs=1e-9)
    # Subsets are drawn without repetition, those of the samples first.
    rng = np.random.RandomState(2020)
    values = []
    for _ in range(4):
        a, b = (s[rng.choice(len(s), 5, replace=False)].double() for s in (x, y))
        values.append(direct(a, b))
    assert evaluate.kid(x, y, 4, 5) == pytest.approx((np.mean(values), np.std(values)), rel=1e-6)
    # Of one distribution: zero on average, and of either sign.
    values = [evaluate.kid(gaussian(40, 3, 2 * i), gaussian(40, 3, 2 * i + 1), 1)[0]
              for i in range(60)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 60**0.5 and min(values) < 0 < max(values)


def test_neighbours_are_exact_and_in_order(small_blocks):
    """Against brute force, far from the origin, with duplicates and in blocks."""
    x, y = gaussian(20, 40, 0, shift=50.0), gaussian(30, 40, 1, shift=50.0)
    y[7] = x[3]
    distance, index = nearest(x, y, 2, CPU, "")
    truth = distances(x, y).sort(1)
    assert torch.equal(index, truth.indices[:, :2])
    torch.testing.assert_close(distance, truth.values[:, :2], rtol=1e-9, atol=0)
    assert distance[3, 0] == 0 and index[3, 0] == 7
    # Of one set: not the row itself, but a duplicate of it.
    y[12] = y[20]
    distance, index = nearest(y, y, 3, CPU, "", same=True)
    truth = distances(y, y).fill_diagonal_(torch.inf).sort(1).values[:, :3]
    torch.testing.assert_close(distance, truth, rtol=1e-9, atol=0)
    assert distance[12, 0] == 0 and (index[12, 0], index[20, 0]) == (20, 12)
    # Prepared: the angle.
    unit = nn.functional.normalize
    distance, _ = nearest(x, y, 1, CPU, "", unit)
    truth = (unit(x.double()) @ unit(y.double()).T).amax(1)
    torch.testing.assert_close(1 - distance[:, 0] ** 2 / 2, truth, rtol=1e-9, atol=0)


def precision_recall(fake, real):
    measured = []
    for rows in (fake, real):
        mean, cov = evaluate.moments(rows)
        radii = nearest(rows, rows, 3, CPU, "", same=True)[0][:, -1]
        measured.append({"features": rows, "mean": mean, "cov": cov, "radii": radii, "logits": None,
                         **dict.fromkeys(evaluate.PLAIN, torch.zeros(()))})
    found = evaluate.figures(*measured, CPU)
    return found["precision"], found["recall"]


def test_precision_and_recall_on_manifolds():
    """Real: two clusters. Samples of one: precise, half recalled. With junk: the other way."""
    left, right = gaussian(200, 2, 0, 0.1), gaussian(200, 2, 1, 0.1, shift=10.0)
    real, junk = torch.cat([left, right]), gaussian(300, 2, 3, 0.1, shift=-50.0)
    precision, recall = precision_recall(left[:100] + 0.001, real)
    assert precision == 1 and 0.4 < recall <= 0.5
    precision, recall = precision_recall(torch.cat([real[::2], junk]), real)
    assert precision == pytest.approx(0.4) and recall > 0.9
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(junk, real) == (0, 0)


@pytest.mark.parametrize("d", [5, 40])
def test_precision_and_recall_by_the_definition(d, small_blocks):
    """Far from the origin, where |x|^2 + |y|^2 - 2 x.y cancels; with duplicates; in blocks."""
    fake, real = gaussian(60, d, 0, shift=300.0), gaussian(50, d, 1, shift=300.2)
    real[10:15] = real[10]
    fake[3] = real[10]  # In a ball of radius 0.
    radius = [distances(x, x).sort(1).values[:, 3] for x in (fake, real)]
    between = distances(fake, real)
    truth = ((between <= radius[1]).any(1).double().mean().item(),
             (between.T <= radius[0]).any(1).double().mean().item())
    assert radius[1][12] == 0 and precision_recall(fake, real) == truth
    assert 0.1 < min(truth) and max(truth) < 0.99


def test_plain_figures_by_their_formulas():
    images = np.random.default_rng(0).integers(0, 200, (1503, 3, 9, 7), dtype=np.uint8)
    x = images / 127.5 - 1
    e = x[..., :8, :6]  # Without the edge of an odd size.
    detail = abs(e[..., ::2, ::2] - e[..., ::2, 1::2] - e[..., 1::2, ::2] + e[..., 1::2, 1::2]) / 2
    own = np.median(detail, (1, 2, 3)) / 0.6745
    level = float(np.median(own))
    found = evaluate.plain_figures(images, level)
    assert found["residual_noise"] == pytest.approx(np.median(detail) / 0.6745, rel=1e-12)
    assert found["pixel_std"] == pytest.approx(x.std(), rel=1e-12)
    assert found["brightness_std"] == pytest.approx(x.mean((1, 2, 3)).std(), rel=1e-12)
    assert found["noise_images"] == pytest.approx((own > level + 1e-9).mean(), abs=0.01)
    assert 0.2 < found["noise_images"] < 0.6

    # White noise: its own std.  A ramp: none.
    noise = 127.5 + 127.5 * np.random.default_rng(1).normal(0, 0.2, (50, 3, 32, 32))
    noise = noise.round().clip(0, 255).astype(np.uint8)
    assert evaluate.plain_figures(noise)["residual_noise"] == pytest.approx(0.2, rel=0.02)
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8) * 8, (10, 1, 32, 32))
    assert evaluate.plain_figures(ramp)["residual_noise"] == 0
    # A few images of noise among flat ones: a share, which the one median does not see.
    flat = np.full((6, 1, 8, 8), 128, np.uint8)
    flat[4:] = np.random.default_rng(2).integers(0, 256, (2, 1, 8, 8))
    found = evaluate.plain_figures(flat)
    assert found["noise_images"] == 2 / 6 and found["residual_noise"] == 0
    assert np.isnan(evaluate.plain_figures(images[..., :1, :1])["residual_noise"])


# ---------------------------------------------------------------------------------------------
# The feature network


def test_full_precision_keeps_cudnn_and_leaves_things_as_they_were():
    torch.set_float32_matmul_precision("high")
    with evaluate.full_precision():
        assert torch.backends.cudnn.enabled and torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.allow_tf32 and not torch.is_grad_enabled()
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high" and torch.is_grad_enabled()
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="module")
def net():
    return evaluate.random_inception()[0].eval()


def test_inception_computes_what_pytorch_fid_does():
    """A value of each branch of the last block, and logits, as pytorch-fid 0.3.0 computed them."""
    net = evaluate.random_inception()[0].eval()
    g = torch.Generator().manual_seed(1)
    for name, values in sorted(net.named_buffers()):
        if name.endswith("mean"):
            values.normal_(0, 0.3, generator=g)
        elif name.endswith("var"):
            values.uniform_(0.5, 2, generator=g)
    net.fc.bias.data.fill_(5.0)  # The logits are without it.
    x = torch.randint(256, (1, 3, 40, 40), generator=torch.Generator().manual_seed(2)).byte()
    with torch.no_grad():
        features, logits = net(x)
    assert features.shape == (1, 2048) and logits.shape == (1, 1008)
    assert features[0, [8, 326, 708, 1092, 1476, 1859]].tolist() == pytest.approx(
        [1.3313296, 1.2831856, 1.3079925, 0.2727155, 0.3312625, 1.9609100], rel=1e-4)
    assert logits[0, [0, 500, 1007]].tolist() == pytest.approx(
        [-0.3846971, -0.4822296, -0.1432729], rel=1e-4)


def test_inception_has_the_published_layers_and_pools(net):
    """Means that do not count the padding: a constant stays so at the border; a maximum at last."""
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert sum(p.numel() for p in net.parameters()) == 23_850_960
    assert shapes["Conv2d_4a_3x3.bn.bias"] == (192,) and shapes["fc.weight"] == (1008, 2048)
    assert shapes["Mixed_6b.branch7x7_2.conv.weight"] == (128, 128, 1, 7)
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    for name, peak in (("Mixed_5b", 1), ("Mixed_6e", 1), ("Mixed_7b", 1), ("Mixed_7c", 9)):
        seen, block = [], getattr(net, name)
        hook = block.branch_pool.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
        spot = torch.zeros(1, block.branch_pool.conv.in_channels, 5, 5)
        spot[..., 2, 2] = 9
        with torch.no_grad():
            block(torch.ones_like(spot))
            assert torch.equal(seen[-1], torch.ones_like(spot))
            block(spot)
        assert seen[-1][0, 0, 1, 1] == peak
        hook.remove()


def test_inception_input(net, monkeypatch):
    """Enlarged between the pixels' centres, shrunk without antialiasing; 0..255 becomes -1..1."""
    seen = []
    monkeypatch.setattr(net.Conv2d_1a_3x3, "forward", lambda x: seen.append(x[0, 0]) or 1 / 0)
    stripes = torch.zeros(2, 3, 598, 598, dtype=torch.uint8)
    stripes[0, :, ::2] = 255
    for x in (stripes, torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 2, 2)):
        with pytest.raises(ZeroDivisionError):
            net(x)
    assert torch.allclose(seen[0], torch.zeros(()), atol=1e-5)
    truth = 2 * ((torch.arange(299) + 0.5) * 2 / 299 - 0.5).clamp(0, 1) - 1
    assert torch.allclose(seen[1][0], truth, atol=1e-5)


class Small(nn.Module):
    """Six features of the corner of 4x4 pixels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, 4)

    def forward(self, x):
        return self.conv(x.float() / 255).flatten(1)[:, :6]


class Two(Small):
    """And logits."""

    def forward(self, x):
        return super().forward(x), 20 * super().forward(x)


def test_inception_files(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "build_inception", Small)
    good = Small()
    torch.save(good.state_dict(), tmp_path / "good.pth")
    net, label = load_inception(tmp_path / "good.pth")
    assert "NOT the published network" in label and torch.equal(net.conv.weight, good.conv.weight)
    monkeypatch.setattr(evaluate, "HASH", label.split()[1].strip(","))
    assert "NOT" not in load_inception(tmp_path / "good.pth")[1]
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    for name in ("other.pth", "none.pth"):
        with pytest.raises(UserError, match=f"{name}: no weights of the FID Inception"):
            load_inception(tmp_path / name)

    # Without the file: fetched and checked by torch.hub, or one line that says what to do.
    def offline(url, **options):
        assert url.endswith("pt_inception-2015-12-05-6726825d.pth") and options["check_hash"]
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"\(no network\): fetch https://.*--inception, or use"):
        load_inception()


class FakeViT(nn.Module):
    def forward(self, x):
        return x[:, :, 0, 0] if x.shape[2:] == (224, 224) else None


def test_dinov2_sees_imagenets_scale(monkeypatch):
    monkeypatch.setattr(torch.hub, "load", lambda *_, **__: FakeViT())
    function, label = evaluate.load_dinov2(CPU)
    x = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert label.startswith("DINOv2") and function(x)[0].tolist() == pytest.approx(
        [-0.485 / 0.229, (1 - 0.456) / 0.224, (0.2 - 0.406) / 0.225], rel=1e-4)


def test_features_do_not_depend_on_the_batch_and_grey_is_repeated(monkeypatch):
    monkeypatch.setattr(evaluate, "random_inception", lambda: (Small(), "random"))
    args = SimpleNamespace(features="random", device=CPU, batch_size=3)
    function = evaluate.load_features(args, (1, 16, 16), {})
    images = np.random.default_rng(0).integers(0, 256, (10, 1, 16, 16), dtype=np.uint8)
    parts = extract(images, function, args, "")[0]
    args.batch_size = 10
    torch.testing.assert_close(parts, extract(images.repeat(3, 1), function, args, "")[0])
    assert parts.std(0).min() > 1e-3


# ---------------------------------------------------------------------------------------------
# Commands


class Wrong(nn.Module):
    def forward(self, x):
        return x.float()


@pytest.fixture(scope="module")
def pictures(run, tmp_path_factory):
    """Twenty colour images as a folder, zip and npz; others that are wrong; a small network."""
    root = tmp_path_factory.mktemp("pictures")
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    for folder, many in (("folder", 20), ("mixed", 12), ("colours", 12), ("corrupt", 12),
                         ("empty", 0)):
        (root / folder).mkdir()
        for i in range(many):
            Image.fromarray(images[i]).save(root / folder / f"{i:03d}.png")
    Image.fromarray(images[0, :8, :8]).save(root / "mixed/005.png")
    Image.fromarray(images[0, :, :, 0]).save(root / "colours/005.png")
    (root / "corrupt/005.png").write_bytes((root / "folder/005.png").read_bytes()[:400])
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for file in (root / "folder").iterdir():
            archive.write(file, f"deep/{file.name}")
    for name, array in {"images": images, "few": images[:9], "wide": images[:, :8],
                        "large": np.zeros((20, 64, 64, 3), np.uint8),
                        "double": np.kron(images, np.ones((1, 2, 2, 1), np.uint8))}.items():
        np.savez(root / f"{name}.npz", array)
    checkpoint = torch.load(run / "ckpt.pt", weights_only=True)
    del checkpoint["config"]["image_size"]
    torch.save(checkpoint, root / "foreign.pt")
    torch.manual_seed(0)
    example = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated.
        torch.jit.trace(Small(), example).save(root / "small.pt")
        torch.jit.trace(Two(), example).save(root / "two.pt")
        torch.jit.trace(Wrong(), example).save(root / "wrong.pt")
    return root


@pytest.fixture(scope="module")
def measure(in_process, tmp_path_factory):
    """Run a command here; its JSON."""
    out = tmp_path_factory.mktemp("measured")

    def run_command(*argv):
        in_process("evaluate", *argv, "--cache_dir", out / "cache", "--json", out / "a.json")
        return json.loads((out / "a.json").read_text())

    return run_command


KEYS = ["fid", "is_mean", "is_std", "kid_mean", "kid_std", "precision", "recall", "residual_noise",
        "pixel_std", "brightness_std", "noise_images", "residual_noise_reference",
        "pixel_std_reference", "brightness_std_reference", "noise_images_reference"]


def test_quality_of_folder_zip_and_npz(pictures, measure, capsys):
    found = []
    for name in ("folder", "images.zip", "images.npz"):
        figures = measure("quality", pictures / name, "--reference", pictures / "folder",
                          "--features", pictures / "small.pt", "--batch_size", 7)
        about = figures.pop("provenance")
        assert list(figures) == KEYS and about["num"] == about["reference_num"] == 20
        assert about["samples"].endswith(name) and about["sampler"] is None
        assert "small.pt" in about["features"] and "NOT comparable" in about["features"]
        found.append(figures)
    printed = capsys.readouterr()
    assert printed.out.startswith("output ") and "rank-deficient" not in printed.err
    assert max(map(len, printed.out.splitlines()[1:8])) <= 100
    assert printed.out.count("reference: residual_noise ") == 3
    for figures in found:
        assert figures == found[0]
        assert figures["precision"] == figures["recall"] == 1 and figures["is_mean"] is None
        assert 0 <= figures["fid"] < 1e-6
        assert figures["residual_noise"] == figures["residual_noise_reference"] > 0.1


def test_quality_of_a_run_and_its_cached_reference(run, pictures, measure, monkeypatch, capsys):
    argv = ["quality", run, "--num", 12, "--steps", 2, "--features", "pixels", "--reference_num"]
    first = measure(*argv, 20)
    about = first["provenance"]
    assert (about["reference"], about["reference_num"], about["num"]) == ("shapes train", 20, 12)
    assert (about["weights"], about["sampler"], about["steps"], about["step"]) == (
        "EMA", "ddim", 2, 3)
    # The figures are those of what sample.py draws, and so few images for so many pixels warn.
    model = load_run(run)
    drawn = sample(model.net, model.diffusion, image_noise(0, range(12), model.shape, CPU), steps=2)
    fake = to_uint8(drawn).flatten(1)
    real = torch.from_numpy(load_images("shapes", 16, 3)[:20]).flatten(1)
    assert first["kid_mean"] == pytest.approx(evaluate.kid(fake, real)[0], rel=1e-3)
    truth = evaluate.frechet(*evaluate.moments(fake), *evaluate.moments(real))
    assert first["fid"] == pytest.approx(truth, rel=1e-3)
    assert "N = 12 for 768 features: rank-deficient" in about["warning"]
    assert "rank-deficient" in capsys.readouterr().err
    # Measured once; another content or another network finds nothing of it.
    argv = [*argv[:6], "--reference", pictures / "images.npz", "--features", pictures / "small.pt"]
    first, titles = measure(*argv), []
    monkeypatch.setattr(evaluate, "extract", lambda images, function, args, title: titles.append(
        title) or extract(images, function, args, title))
    raw = measure(*argv, "--raw")
    assert titles == ["samples"]
    assert raw["provenance"]["weights"] == "raw" and raw["fid"] != first["fid"]
    measure(*argv, "--reference_num", 19)
    found = measure(*argv, "--features", pictures / "two.pt")
    assert titles[1:] == ["reference", "samples"] * 2
    torch.manual_seed(0)
    Small()
    truth = evaluate.inception_score(Two()(to_uint8(drawn))[1])
    assert (found["is_mean"], found["is_std"]) == pytest.approx(truth, rel=1e-3) and truth[0] > 1.01


def test_the_note_of_sample_py_goes_with_its_own_images(pictures, measure, tmp_path):
    """Beside the images in a folder, or beside samples.npz, and nothing else that lies there."""
    for name in ("samples.npz", "other.npz"):
        (tmp_path / name).write_bytes((pictures / "images.npz").read_bytes())
    for image in (pictures / "folder").iterdir():
        (tmp_path / image.name).write_bytes(image.read_bytes())
    argv = ["--reference", pictures / "folder", "--features", pictures / "small.pt"]
    for note, steps in (('{"steps": 7, "sampler": "ddpm"}', 7), ("[1, 2]", None), ("{", None)):
        (tmp_path / "samples.json").write_text(note)
        for name, found in (("samples.npz", steps), ("other.npz", None), (".", steps)):
            about = measure("quality", tmp_path / name, *argv)["provenance"]
            assert about["steps"] == found and about["seed"] is None and about["num"] == 20


class Inverse(nn.Module):
    def forward(self, x):
        return 1 / x.flatten(1)


def test_features_that_are_not_finite(pictures, measure, monkeypatch):
    monkeypatch.setattr(evaluate, "random_inception", lambda: (Inverse(), "inverse"))
    with pytest.raises(UserError, match="reference: .* not finite"):
        measure("quality", pictures / "folder", "--reference", pictures / "folder", "--features",
                "random")


def test_a_reference_is_made_at_the_samples_size(pictures, measure, in_process, tmp_path):
    """A named npz; held-out images for a run on another folder, which has no test split."""
    argv = ["quality", pictures / "images.npz", "--features", pictures / "small.pt", "--reference"]
    double, made = pictures / "double.npz", ", made 16x16 RGB of 32x32 RGB"
    named = ["cifar10", "--data_dir", double]
    for flags, name in (([double], str(double)), (named, "cifar10 train")):
        found = measure(*argv, *flags)
        assert found["provenance"]["reference"] == name + made
        assert found["fid"] < 1e-6  # Each pixel was doubled, and is averaged again.

    folder = tmp_path / "run"
    in_process("train", *TINY, "--dataset", "folder", "--data_dir", pictures / "folder", "--steps",
               1, "--limit", 12, "--out", folder)
    assert measure("quality", folder, "--num", 10, "--steps", 1, "--features", "pixels")[
        "provenance"]["reference"] == "folder train"
    for flag in ("--reference", "--data_dir"):
        found = measure("denoise", folder, "--noise_std", 0.02, flag, double)["provenance"]
        assert found["reference"].endswith(made) and found["num"] == 20
    for argv in (["denoise", folder], ["memorization", folder, "--holdout", "folder"]):
        with pytest.raises(UserError, match="has no test split: name a folder, zip or npz"):
            measure(*argv)
    # Copies are sought among the images that the run saw.
    argv = ["memorization", folder, "--num", 10, "--steps", 1, "--png", tmp_path / "p.png"]
    assert measure(*argv)["provenance"]["reference_num"] == 12
    argv += ["--reference", pictures / "folder"]
    assert measure(*argv)["provenance"]["reference_num"] == 20


def test_memorization_finds_copies(pictures, measure, tmp_path):
    """Six of twelve samples are training images, one of them there twice."""
    rng = np.random.default_rng(1)
    train = rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    train[30] = train[2]
    held = rng.integers(0, 256, (15, 16, 16, 3), dtype=np.uint8)
    samples = rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    samples[::2] = train[[2, 3, 5, 7, 11, 13]]
    # A mixture of a training image and another: d1 / d2 is .28 or .4.
    for i, share in ((1, 0.25), (3, 0.35)):
        samples[i] = np.round((1 - share) * train[20 + i] + share * held[i])
    for name, images in (("train", train), ("samples", samples), ("held", held)):
        np.savez(tmp_path / f"{name}.npz", images)
    flags = ["--reference", tmp_path / "train.npz", "--holdout", tmp_path / "held.npz", "--png",
             tmp_path / "pairs.png", "--blur", 0.6]
    found = measure("memorization", tmp_path / "samples.npz", *flags)
    rows = {row["set"]: row for row in found["rows"]}
    assert list(rows) == ["samples", "blurred", "held out"] and rows["held out"]["n"] == 15
    assert found["provenance"]["duplicates_left_out"] == 1
    assert rows["samples"]["copied"] == pytest.approx(7 / 12) and rows["samples"]["> 0.99"] == 0.5
    assert rows["held out"]["copied"] == rows["blurred"]["> 0.99"] == 0
    assert rows["held out"]["similar 99%"] < 0.4
    # The blurred control and the cosine, by hand.
    known = np.delete(train, 30, 0).reshape(39, -1).astype(float)
    blurred = gaussian_filter(samples.astype(float), (0, 0.6, 0.6, 0)).round().reshape(12, 1, -1)
    gaps = np.linalg.norm(blurred - known, axis=-1).min(1) / 127.5
    assert rows["blurred"]["d1"] == pytest.approx(np.sort(gaps)[5], rel=1e-3)
    unit = [x - known.mean(0) for x in (held.reshape(15, -1), known)]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in unit]
    cosine = (unit[0] @ unit[1].T).max(1)
    assert rows["held out"]["similar 50%"] == pytest.approx(np.median(cosine), rel=1e-6)
    # The first two tiles, a sample and its training image, are alike.
    picture = np.array(Image.open(tmp_path / "pairs.png"))
    assert picture.shape[1] == 8 * 50 + 2
    assert np.array_equal(picture[2:50, 2:50], picture[2:50, 52:100])
    # Of other features the cosine is taken as it is.
    features = pictures / "small.pt"
    found = measure("memorization", tmp_path / "samples.npz", "--features", features, *flags)
    row = found["rows"][2]
    torch.manual_seed(0)
    small = Small()
    unit = [nn.functional.normalize(small(torch.from_numpy(x).permute(0, 3, 1, 2)))
            for x in (held, train)]
    truth = (unit[0] @ unit[1].T).amax(1).quantile(0.5).item()
    assert row["similar 50%"] == pytest.approx(truth, rel=1e-5)


def test_attack(run, pictures, measure, tmp_path, monkeypatch):
    """The same seeds attacked and not; norms exact; a row of the picture for each of the table."""
    drawn, draw = [], evaluate.draw
    monkeypatch.setattr(evaluate, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    flags = ["--num", 12, "--steps", 4, "--reference", pictures / "images.npz", "--features",
             pictures / "small.pt", "--budget", 0.3, "--attack_steps", 3]
    for extra, names in ((["--norm", "linf", "--eot", 2, "--sampler", "ddpm"], 3),
                         (["--surrogate", run, "--png", tmp_path / "a.png"], 4)):
        drawn.clear()
        found = measure("attack", run, *flags, *extra)
        rows = found["rows"]
        known = ["none", "random", "white box", "transfer"]
        assert [row["attack"] for row in rows] == known[:names]
        assert set(KEYS) < set(rows[0]) and rows[0]["mse"] == rows[0]["norm_max"] == 0
        for row, images in zip(rows[1:], drawn[1:]):
            assert (row["norm_min"], row["norm_max"]) == pytest.approx((0.3, 0.3), rel=1e-3)
            truth = np.mean((images / 127.5 - drawn[0] / 127.5) ** 2)
            assert row["mse"] == pytest.approx(truth) and truth > 0
    # Through the same network, transfer is the white box.
    assert rows[2]["mse"] == rows[3]["mse"] != rows[1]["mse"]
    assert found["provenance"]["surrogate"]["weights_sha256"]
    picture = np.array(Image.open(tmp_path / "a.png"))
    margin = picture.shape[1] - (12 * 50 + 2)
    assert picture.shape[0] == 4 * 50 + 2 and margin > 40
    for row, images in enumerate(drawn):
        tile = np.kron(images[3].transpose(1, 2, 0), np.ones((3, 3, 1)))
        assert np.array_equal(picture[50 * row + 2:, margin + 3 * 50 + 2:][:48, :48], tile)
        assert picture[50 * row:50 * row + 50, :margin].min() < 128  # Its name is beside it.


class Stretch(nn.Module):
    """eps = W x: takes (1, -1) for noise and (1, 1) for signal."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.9, -0.9], [-0.9, 0.9]]), requires_grad=False)

    def forward(self, x, t):
        return (x.flatten(1) @ self.weight).view_as(x)


PAIR = (1, 1, 2)


def attack_settings(**changed):
    settings = dict(seed=0, steps=10, spacing="respaced", sampler="ddpm", share=0.5, norm="l2",
                    budget=0.2, eot=1, device=CPU)
    return SimpleNamespace(**settings | changed)


@pytest.mark.parametrize("eot", [0, 3])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_attacker_keeps_to_its_ball_and_beats_chance(norm, eot):
    stretch, diffusion = Stretch(), Diffusion()
    model = Run(stretch, diffusion, {}, PAIR, {})
    args = attack_settings(norm=norm, eot=eot)
    g = torch.randn(64, *PAIR, generator=torch.Generator().manual_seed(0))
    clean, moved = sample(stretch, diffusion, lambda: g, "ddim", 10), {}
    for steps in (0, 10):
        norms, times = torch.zeros(64), []
        perturb = attacker(stretch, steps, model, args, norms)(range(64))

        def watched(x, t):
            y = perturb(x, t)
            times.append((t, not torch.equal(x, y)))
            return y

        x = sample(stretch, diffusion, lambda: g, "ddim", 10, perturb=watched)
        moved[steps] = (x - clean).square().mean().item()
        # Half of the ten: the middles of five equal parts.
        assert [i for i, (_, pushed) in enumerate(times) if pushed] == [1, 3, 5, 7, 9]
        # What a float32 state keeps of a push near the end.
        assert torch.allclose(norms, torch.tensor(0.2), rtol=5e-3)
    assert moved[10] > (1.1 if norm == "l2" else 1) * moved[0] > 0


def test_attack_noises(monkeypatch):
    """The start is the same whatever --eot; the sampler's noises are others, as many as it says."""
    starts, noises = [], []
    monkeypatch.setattr(evaluate, "next_view", lambda *args: noises.append(args[4]))
    monkeypatch.setattr(evaluate, "trajectory_attack", lambda *args: starts.append(args[3]()))
    model = Run(Stretch(), Diffusion(), {}, PAIR, {})
    for eot in (0, 1, 4):
        attacker(model.net, 3, model, attack_settings(eot=eot), torch.zeros(64))(range(64))
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])
    assert [len(some) for some in noises] == [1, 4] and 0.9 < torch.stack(noises[1]).std() < 1.1
    own = image_noise(0, range(64), PAIR, CPU)()
    for one, other in itertools.combinations([own, starts[0], *noises[1]], 2):
        assert not torch.allclose(one, other)


def test_next_view_is_the_mean_denoised_image_after_the_step():
    net, diffusion, calls = Stretch(), Diffusion(), []
    x = torch.randn(3, *PAIR, generator=torch.Generator().manual_seed(0)) / 4
    noises = [torch.full_like(x, value) for value in (-1.0, 2.0)]
    t, later = torch.full((3,), 500), torch.full((3,), 300)

    def after(sampler, now, prev, noise):
        return denoise_step(net, diffusion, x, now, prev, sampler, lambda: noise)

    views = {sampler: next_view(net, diffusion, [(500, 300), (20, -1)], sampler, noises)
             for sampler in ("ddpm", "ddim")}
    seen = [denoise(net, diffusion, after("ddpm", 500, 300, noise), later) for noise in noises]
    assert torch.allclose(views["ddpm"](x, t), sum(seen) / 2) and not torch.allclose(*seen)
    last = views["ddpm"](x, torch.full((3,), 20))
    assert torch.allclose(last, after("ddpm", 20, -1, None))
    once = denoise(net, diffusion, after("ddim", 500, 300, None), later)
    assert torch.allclose(views["ddim"](x, t), once)
    # One call for the step and one a noise; without noise in the step one is all of them.
    net.register_forward_hook(lambda *_: calls.append(1))
    for sampler, number in (("ddpm", 3), ("ddim", 2)):
        calls.clear()
        views[sampler](x, t)
        assert len(calls) == number


def test_steps(run, pictures, measure, tmp_path, capsys):
    rows = measure("steps", run, "--num", 12, "--steps", "3,2", "--sampler", "ddpm,ddim",
                   "--spacing", "respaced,naive", "--reference", pictures / "folder", "--features",
                   pictures / "small.pt", "--png", tmp_path / "a.png")["rows"]
    assert [(r["sampler"], r["spacing"], r["steps"]) for r in rows] == list(
        itertools.product(["ddpm", "ddim"], ["respaced", "naive"], [3, 2]))
    assert len({row["fid"] for row in rows if row["steps"] == 3}) == 4
    assert Image.open(tmp_path / "a.png").height == 8 * 50 + 2
    # Columns that fit; each part is labelled again, and the reference's own figures come once.
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[1:])) <= 100
    parts = printed.count("sampler   spacing  steps")
    assert parts > 1 and printed.count("ddim     naive") == 2 * parts
    assert printed.count("reference: residual_noise ") == 1


def with_network(monkeypatch, run, net):
    """Let evaluate.py find `net` in place of the run's own."""
    model = load_run(run)._replace(net=net)
    monkeypatch.setattr(evaluate, "load_run", lambda *_: model)
    return model.diffusion


def test_denoise_of_a_linear_denoiser_by_hand(run, measure, monkeypatch):
    """D(x_t) = x_t / (2 sqrt(a)) from the step where the noise is as strong as the images."""
    diffusion = with_network(monkeypatch, run, lambda x, t: x / (2 * diffusion.at(t, x)[1]))
    net = evaluate.load_run().net
    found = measure("denoise", run, "--noise_std", 1, "--num", 12)
    (row,), shape = found["rows"], (3, 16, 16)
    a = diffusion.alpha_bar
    t = (((1 - a) / a).sqrt() - 1).abs().argmin().item()
    images = load_images("shapes", 16, 3, split="test")[:12]
    clean = torch.from_numpy(images).float() / 127.5 - 1
    noisy = clean + image_noise(0, range(12), shape, CPU, ATTACK)()
    x, noise = a[t].sqrt().float() * noisy, image_noise(0, range(12), shape, CPU)
    for now in range(t, -1, -1):
        x = denoise_step(net, diffusion, x, now, now - 1, "ddpm", noise)
    ends = {"input": noisy, "one-shot": (noisy / 2).clamp(-1, 1), "ancestral": x.clamp(-1, 1)}
    for name, end in ends.items():
        psnr = 10 * torch.log10(4 / (end - clean).square().mean((1, 2, 3)))
        assert row[f"{name} psnr"] == pytest.approx(psnr.mean().item(), rel=1e-4)
        e = end.double().numpy()
        detail = e[..., ::2, ::2] - e[..., ::2, 1::2] - e[..., 1::2, ::2] + e[..., 1::2, 1::2]
        noise = np.median(abs(detail)) / 2 / 0.6745
        assert row[f"{name} residual"] == pytest.approx(noise, rel=1e-3)
    assert row["t"] == t and len({f"{row[f'{name} psnr']:.2f}" for name in ends}) == 3
    assert row["clean residual"] == evaluate.plain_figures(images)["residual_noise"]
    assert (found["provenance"]["reference"], found["provenance"]["num"]) == ("shapes test", 12)


def test_an_ideal_denoiser_leaves_no_noise(run, measure, monkeypatch, tmp_path):
    """Of data that is one image the posterior mean is that image."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "one.npz", np.stack([image] * 10))
    truth = torch.from_numpy(image.transpose(2, 0, 1)).float() / 127.5 - 1
    diffusion = with_network(monkeypatch, run, lambda x, t: diffusion.eps_from_x0(x, t, truth))
    rows = measure("denoise", run, "--noise_std", "0.1,0.3", "--reference", tmp_path / "one.npz")[
        "rows"]
    for row, std in zip(rows, (0.1, 0.3)):
        a = diffusion.alpha_bar[row["t"]].item()
        assert ((1 - a) / a) ** 0.5 == pytest.approx(std, rel=0.05)
        assert row["input psnr"] == pytest.approx(-20 * np.log10(std / 2), abs=0.3)
        assert row["one-shot psnr"] == row["ancestral psnr"] == pytest.approx(100, abs=1)
        assert row["ancestral residual"] == pytest.approx(row["clean residual"], rel=1e-3)


class Wave(nn.Module):
    def forward(self, x, t):
        return torch.sin(6 * x)


class Line(nn.Module):
    def forward(self, x, t):
        return 2 * x


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_alarm_sounds_for_a_network_that_deceives_one_step(norm):
    """eps = sin(6 x): a full step overshoots the hill that ten small ones climb."""
    x0, diffusion = gaussian(64, 16, 0), Diffusion()
    cfg = Perturbation(beta_min=0.5, beta_max=1.0, ascent_norm=norm)
    found = evaluate.overfit(Wave(), diffusion, x0, cfg)
    assert list(found) == [20, 100, 250, 500, 800]
    assert found == evaluate.overfit(Wave(), diffusion, x0, cfg)
    assert found[500][0] > 1.2 * found[500][1]
    found = evaluate.overfit(Line(), diffusion, x0, cfg)
    assert found[500][0] == pytest.approx(found[500][1], rel=1e-3)


def test_overfit_prints_a_row_a_checkpoint(run, pictures, in_process, measure, tmp_path):
    in_process("train", *TINY, "--mode", "adv", "--dataset", "folder", "--data_dir",
               pictures / "folder", "--noise_p", 0.9, "--noise_std", 0.2, "--lr", 0.01, "--warmup",
               0, "--steps", 2, "--save_every", 1, "--keep", 2, "--out", tmp_path)
    found = measure("overfit", tmp_path / "ckpt_0000001.pt", tmp_path, "--num", 3)
    first, last = found["rows"]
    assert (first["step"], last["step"], found["provenance"]["num"]) == (1, 2, 3)
    assert found["provenance"]["weights"] == "raw" and len(found["provenance"]["checkpoints"]) == 2
    # On the images as training saw them, noise included, and on the raw weights.
    kinds = choose_corruption(20, 0.9, 0, 0)
    images = load_images("folder", 16, 3, pictures / "folder", tmp_path)
    x0, model = training_images(images, np.arange(3), Corruption(kinds, 0, 0.2)), load_run(tmp_path, raw=True)
    truth = evaluate.overfit(model.net, model.diffusion, x0, Perturbation())
    assert last["J_train"] == pytest.approx([own for _, own in truth.values()]) and kinds[:3].any()
    ratios = [last[f"t = {t}"] for t in (20, 100, 250, 500, 800)]
    assert last["ratio"] == max(ratios) and last["J_train"] != first["J_train"]
    assert ratios == pytest.approx(np.divide(last["J_pgd10"], last["J_train"]).tolist())


def test_a_surrogate_of_another_shape(run, in_process, tmp_path):
    in_process("train", *TINY, "--in_channels", 1, "--steps", 1, "--out", tmp_path)
    with pytest.raises(UserError, match="its in_channels is 1, that of .* is 3"):
        in_process("evaluate", "attack", run, "--surrogate", tmp_path, "--num", 12)


@pytest.mark.parametrize("argv, words", [
    (["quality", "P/mixed", "--reference", "P/folder"], "mixed/005.png: it is 8x8 RGB, the first"),
    (["quality", "P/colours", "--reference", "P/folder"], "it is 16x16 grey, the first is"),
    (["quality", "P/corrupt", "--reference", "P/folder"], "corrupt/005.png: "),
    (["quality", "P/wide.npz", "--reference", "P/folder"], "it is 16x8 RGB"),
    (["quality", "P/empty", "--reference", "P/folder"], "no train images of folder in"),
    (["quality", "P/nowhere", "--reference", "P/folder"], "no such file"),
    (["quality", "P/few.npz", "--reference", "P/folder"], "samples: 9 images, at least 10"),
    (["quality", "P/folder", "--reference", "P/folder", "--num", "21"], "--num asks for 21"),
    (["quality", "P/folder", "--reference", "P/few.npz"], "reference: 9 images, at least 10"),
    (["quality", "P/folder", "--reference", "P/nowhere"], "neither a data set nor a file"),
    (["quality", "P/folder", "--reference", "P/corrupt"], "corrupt/005.png: not a readable image"),
    (["quality", "P/folder"], "--reference is needed"),
    (["quality", "P/large.npz", "--reference", "P/large.npz", "--features", "pixels"], "12288"),
    (["quality", "P/folder", "--reference", "P/folder", "--features", "P/wrong.pt"], "(B, d)"),
    (["quality", "RUN", "--features", "P/no.pt"], "no.pt"),
    (["quality", "P/foreign.pt"], "the config lacks image_size"),
    (["quality", "RUN", "--json", "LICENSE/a.json"], "cannot write LICENSE/a.json"),
    (["quality", "RUN", "--num", "5"], "--num: '5' is not a whole number"),
    (["memorization", "RUN", "--png", "out/pairs"], "does not end in .png"),
    (["memorization", "RUN", "--holdout", "P/nowhere"], "neither a data set nor a file"),
    (["attack", "P/folder"], "no checkpoint"),
    (["attack", "RUN", "--steps", "2000"], "T = 1000"),
    (["steps", "RUN", "--sampler", "euler"], "is not of ddpm, ddim"),
    (["denoise", "RUN", "--reference", "P/folder", "--num", "21"], "held-out images: 20 images"),
    (["overfit", "RUN", "--device", "tpu9"], "device tpu9"),
])
def test_bad_input_is_one_line(argv, words, run, pictures, in_process, tmp_path, monkeypatch):
    """And it is found before any work: nothing is drawn."""
    monkeypatch.setattr(evaluate, "draw", None)
    argv = [part.replace("P/", f"{pictures}/").replace("RUN", str(run)) for part in argv]
    argv += ["--cache_dir", str(tmp_path)]
    if argv[0] in ("quality", "memorization", "attack", "steps") and "--features" not in argv:
        argv += ["--features", f"{pictures}/small.pt"]
    with pytest.raises(UserError) as error:
        in_process("evaluate", *argv)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_processes_that_torchrun_starts_are_sent_to_sample_py(run, in_process, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process; `torchrun sample.py` draws"):
        in_process("evaluate", "quality", run)
