"""Metrics against closed forms and direct formulas; each command as a user runs it."""

import itertools
import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import evaluate
from conftest import TINY, script
from evaluate import (NextLook, attacker, extract, haar_counts, load_inception, noise_std,
                      pixel_std, random_inception, residual_noise)
from losses import Denoiser, Diffusion, Perturbation
from model import UserError
from sample import ATTACK, denoise_step, image_noise, load_run, sample, ticker
from train import load_images, overfit

HERE = SimpleNamespace(rank=0, local=0, world=1, device=torch.device("cpu"), batch_size=3,
                       exact=torch.device("cpu"), about={}, cache_dir=None)


def gaussian(n, d, seed, scale=1.0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, d, generator=g) + shift


# ---------------------------------------------------------------------------------------------
# Metrics


def test_frechet_distance_of_gaussians_in_closed_form():
    """Commuting covariances: |m1 - m2|^2 + sum (sqrt(v1) - sqrt(v2))^2."""
    g = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))
    v1, v2 = torch.rand(2, 6, generator=g, dtype=torch.float64)
    v2[2] = 0  # a singular covariance
    m1, m2 = torch.randn(2, 6, generator=g, dtype=torch.float64)
    truth = (m1 - m2).square().sum() + (v1.sqrt() - v2.sqrt()).square().sum()
    cov1, cov2 = basis * v1 @ basis.T, basis * v2 @ basis.T
    assert evaluate.frechet(m1, cov1, m2, cov2) == pytest.approx(truth.item(), rel=1e-8)
    assert evaluate.frechet(m2, cov2, m1, cov1) == pytest.approx(truth.item(), rel=1e-6)
    assert evaluate.frechet(m1, cov1, m1, cov1) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """In one and two dimensions: tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det AB))."""
    a = torch.tensor([[2.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
    b = torch.tensor([[0.7, -0.4], [-0.4, 1.5]], dtype=torch.float64)
    root = ((a @ b).trace() + 2 * torch.linalg.det(a @ b).sqrt()).sqrt()
    zero = torch.zeros(2, dtype=torch.float64)
    truth = (a.trace() + b.trace() - 2 * root).item()
    assert evaluate.frechet(zero, a, zero, b) == pytest.approx(truth, rel=1e-10)


def test_moments_are_numpys(monkeypatch):
    monkeypatch.setattr(evaluate, "ROWS", 7)
    x = gaussian(40, 5, 0, shift=100.0)
    mean, cov = evaluate.moments(x)
    np.testing.assert_allclose(mean, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9)


def test_inception_score_by_the_formula():
    logits = gaussian(47, 6, 1, scale=2.0)
    p = logits.double().softmax(1).numpy()
    scores = []
    for i in range(10):
        part = p[i * 47 // 10:(i + 1) * 47 // 10]
        kl = [sum(a * np.log(a / b) for a, b in zip(row, part.mean(0))) for row in part]
        scores.append(np.exp(np.mean(kl)))
    assert evaluate.inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)))
    # one-hot and even: as many as there are classes; all alike: 1
    sure = 1000 * torch.eye(4).repeat(10, 1)
    assert evaluate.inception_score(sure)[0] == pytest.approx(4)
    assert evaluate.inception_score(torch.ones(20, 4)) == pytest.approx((1, 0))


def test_kid_by_the_formula():
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
    # subsets are drawn without repetition, those of the samples first
    rng = np.random.RandomState(2020)
    values = []
    for _ in range(4):
        a, b = (s[rng.choice(len(s), 5, replace=False)].double() for s in (x, y))
        values.append(direct(a, b))
    assert evaluate.kid(x, y, 4, 5) == pytest.approx((np.mean(values), np.std(values)), rel=1e-6)


def test_kid_is_unbiased():
    """The same distribution: zero on average, and of either sign."""
    values = [evaluate.kid(gaussian(40, 3, 2 * i), gaussian(40, 3, 2 * i + 1), 1)[0]
              for i in range(60)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 60**0.5 and min(values) < 0 < max(values)


def described(rows):
    near = evaluate.neighbours(rows, rows, 3, lambda x: x, HERE, "", same=True)[0]
    mean, cov = evaluate.moments(rows)
    return {"features": rows, "mean": mean, "cov": cov, "radii": near[:, -1].sqrt(),
            "logits": None, **dict.fromkeys(evaluate.PLAIN, torch.zeros(()))}


def precision_recall(fake, real):
    found = evaluate.figures(described(fake), described(real), HERE)
    return found["precision"], found["recall"]


def test_precision_and_recall_on_manifolds_and_not_swapped():
    """Real: two clusters. Samples of one: precise, half recalled. With junk: the other way."""
    left, right = gaussian(200, 2, 0, 0.1), gaussian(200, 2, 1, 0.1, shift=10.0)
    real = torch.cat([left, right])
    one = left[:100] + 0.001
    junk = gaussian(300, 2, 3, 0.1, shift=-50.0)
    precision, recall = precision_recall(one, real)
    assert precision == 1 and 0.4 < recall <= 0.5
    precision, recall = precision_recall(torch.cat([real[::2], junk]), real)
    assert precision == pytest.approx(0.4) and recall > 0.9
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(junk, real) == (0, 0)


@pytest.mark.parametrize("blocks", [(4096, 8192), (7, 5)])
def test_precision_and_recall_by_the_definition(blocks, monkeypatch):
    """Far from the origin, where |x|^2 + |y|^2 - 2 x.y cancels; with duplicates; in blocks."""
    monkeypatch.setattr(evaluate, "ROWS", blocks[0])
    monkeypatch.setattr(evaluate, "COLUMNS", blocks[1])
    fake, real = gaussian(60, 5, 0, shift=300.0), gaussian(50, 5, 1, shift=300.5)
    real[10:15] = real[10]
    fake[3] = real[10]

    def radius(x):
        d = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
        return d.sort(1).values[:, 3]

    d = torch.cdist(fake.double(), real.double(), compute_mode="donot_use_mm_for_euclid_dist")
    truth = ((d <= radius(real)).any(1).double().mean().item(),
             (d.T <= radius(fake)).any(1).double().mean().item())
    assert precision_recall(fake, real) == truth
    assert 0.1 < min(truth) and max(truth) < 0.99
    assert torch.allclose(described(real)["radii"], radius(real), rtol=1e-5)
    assert described(real)["radii"][12] == 0


def test_neighbours_are_exact_and_in_order():
    x, y = gaussian(20, 8, 0, shift=50.0), gaussian(30, 8, 1, shift=50.0)
    y[7] = x[3]
    square, index = evaluate.neighbours(x, y, 2, lambda rows: rows, HERE, "")
    d = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")
    truth = d.square().sort(1)
    assert torch.equal(index, truth.indices[:, :2])
    assert torch.allclose(square, truth.values[:, :2], rtol=1e-9)
    assert square[3, 0] == 0 and index[3, 0] == 7


def test_residual_noise():
    """White noise: its own std; smooth images: none; of uint8, the exact median."""
    noise = gaussian(20, 3 * 32 * 32, 0, 0.2).view(20, 3, 32, 32)
    assert noise_std(haar_counts(noise)) == pytest.approx(0.2, rel=0.02)
    ramp = torch.linspace(-1, 1, 32)[None, None, None].expand(4, 1, 32, 32)
    assert noise_std(haar_counts(ramp)) < 1e-3
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 9, 7), dtype=np.uint8)
    x = images[..., :8, :6] / 127.5 - 1
    detail = (x[..., ::2, ::2] - x[..., ::2, 1::2] - x[..., 1::2, ::2] + x[..., 1::2, 1::2]) / 2
    assert residual_noise(images) == pytest.approx(np.median(abs(detail)) / 0.6745, rel=1e-9)
    assert residual_noise(images[:2]) != residual_noise(images)


def test_pixel_std():
    images = np.random.default_rng(0).integers(0, 200, (1003, 1, 4, 4), dtype=np.uint8)
    assert pixel_std(images) == pytest.approx((images / 127.5 - 1).std(), rel=1e-12)


def test_brightness_and_noise_images():
    images = np.random.default_rng(0).integers(0, 200, (1003, 3, 5, 5), dtype=np.uint8)
    means = (images / 127.5 - 1).mean((1, 2, 3))
    assert evaluate.brightness_std(images) == pytest.approx(means.std(), rel=1e-12)
    # flat, a little noise, much of it: 1, 2 and 3 of 6, the edge of an odd size left out
    x = np.full((6, 1, 9, 9), 128.0)
    x[1:, :, :8, :8] += 127.5 * np.random.default_rng(1).normal(0, 0.1, (5, 1, 8, 8))
    x[3:, :, :8, :8] += 127.5 * np.random.default_rng(2).normal(0, 0.5, (3, 1, 8, 8))
    images = x.clip(0, 255).astype(np.uint8)
    assert evaluate.noise_images(images) == 0.5
    assert evaluate.noise_images(images, 0.02) == 5 / 6
    own = [residual_noise(image[None]) for image in images]
    assert evaluate.noise_images(images, np.mean(own[:2])) == np.mean(own > np.mean(own[:2]))


# ---------------------------------------------------------------------------------------------
# The feature network


@pytest.fixture(scope="module")
def net():
    return random_inception()[0].eval()


def test_inception_has_the_published_layers(net):
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert sum(p.numel() for p in net.parameters()) == 23_850_960
    for name, shape in {
            "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Conv2d_4a_3x3.bn.bias": (192,),
            "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
            "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
            "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
            "Mixed_6e.branch7x7dbl_2.conv.weight": (192, 192, 7, 1),
            "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
            "Mixed_7b.branch_pool.conv.weight": (192, 1280, 1, 1),
            "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
            "fc.weight": (1008, 2048), "fc.bias": (1008,)}.items():
        assert shapes[name] == shape
    assert all(m.eps == 0.001 for m in net.modules() if isinstance(m, nn.BatchNorm2d))


def test_inception_computes_what_pytorch_fid_does():
    """A value of each branch of the last block, and logits, as pytorch-fid 0.3.0 computed them."""
    net = random_inception()[0].eval()
    g = torch.Generator().manual_seed(1)
    for name, values in sorted(net.named_buffers()):
        if name.endswith("mean"):
            values.normal_(0, 0.3, generator=g)
        elif name.endswith("var"):
            values.uniform_(0.5, 2, generator=g)
    x = torch.randint(256, (1, 3, 40, 40), generator=torch.Generator().manual_seed(2)).byte()
    with torch.no_grad():
        features, logits = net(x)
    assert features[0, [8, 326, 708, 1092, 1476, 1859]].tolist() == pytest.approx(
        [1.3313296, 1.2831856, 1.3079925, 0.2727155, 0.3312625, 1.9609100], rel=1e-4)
    assert logits[0, [0, 500, 1007]].tolist() == pytest.approx(
        [-0.3846971, -0.4822296, -0.1432729], rel=1e-4)


def test_inception_sizes_inputs_and_pools(net):
    """Every stage's size at 299; black, white and grey; the bias is not in the logits."""
    seen = {}
    hooks = [layer.register_forward_hook(lambda m, x, y, name=name: seen.update({name: y.shape}))
             for name, layer in net.named_children()]
    x = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 20, 20)
    first = {}
    hooks.append(net.Conv2d_1a_3x3.register_forward_pre_hook(lambda m, x: first.update(x=x[0])))
    with torch.no_grad():
        features, logits = net(x)
        net.fc.bias.fill_(5.0)
        assert torch.equal(net(x)[1], logits)
        net.fc.bias.zero_()
    for hook in hooks:
        hook.remove()
    assert first["x"].shape == (3, 3, 299, 299)
    for image, value in zip(first["x"], (-1, 256 / 255 - 1, 1)):
        assert torch.allclose(image, torch.tensor(float(value)), atol=1e-6)
    sizes = {name: tuple(shape[1:]) for name, shape in seen.items()}
    assert sizes["Conv2d_1a_3x3"] == (32, 149, 149) and sizes["Conv2d_2b_3x3"] == (64, 147, 147)
    assert sizes["Conv2d_4a_3x3"] == (192, 71, 71)
    assert [sizes[f"Mixed_5{c}"] for c in "bcd"] == [(256, 35, 35), (288, 35, 35), (288, 35, 35)]
    assert {sizes[f"Mixed_6{c}"] for c in "abcde"} == {(768, 17, 17)}
    assert sizes["Mixed_7a"] == (1280, 8, 8) and sizes["Mixed_7c"] == (2048, 8, 8)
    assert features.shape == (3, 2048) and logits.shape == (3, 1008)
    assert features.isfinite().all() and features.std() > 0.01
    torch.testing.assert_close(logits, features @ net.fc.weight.T)

    # means do not count the padding: a constant stays so at the border. The last block: maximum
    spot = torch.zeros(1, 1, 5, 5)
    spot[..., 2, 2] = 9
    for name in ("Mixed_5b", "Mixed_6e", "Mixed_7b"):
        pool = getattr(net, name).pool
        assert torch.equal(pool(torch.ones(1, 1, 5, 5)), torch.ones(1, 1, 5, 5))
        assert pool(spot)[0, 0, 1, 1] == 1
    assert net.Mixed_7c.pool(spot)[0, 0, 1, 1] == 9 and net.Mixed_7c.pool(spot).shape[-1] == 5


def test_resizing_does_not_antialias(net):
    """From above 299 too, bilinear takes the four nearest pixels."""
    seen = []
    hook = net.Conv2d_1a_3x3.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    image = torch.zeros(1, 3, 598, 598, dtype=torch.uint8)
    image[..., ::2, :] = 255
    with torch.no_grad():
        net(image)
    hook.remove()
    assert torch.allclose(seen[0], torch.zeros(()), atol=1e-5)
    small = torch.randint(256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hook = net.Conv2d_1a_3x3.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
        net(small.byte())
    hook.remove()
    # pixel i looks at (i + 0.5) 32 / 299 - 0.5, clamped
    at = (((torch.arange(299) + 0.5) * 32 / 299) - 0.5).clamp(min=0)
    low = at.floor().long()
    high, share = (low + 1).clamp(max=31), at - low
    rows = small[0, 0].float()
    rows = rows[low] * (1 - share)[:, None] + rows[high] * share[:, None]
    truth = rows[:, low] * (1 - share) + rows[:, high] * share
    assert torch.allclose(seen[1][0, 0], truth / 127.5 - 1, atol=1e-4)


def test_inception_files(tmp_path, monkeypatch, net):
    good = tmp_path / "shared.pth"
    torch.save(net.state_dict(), good)
    other, label = load_inception(good)
    assert "NOT the published network" in label and torch.equal(other.fc.weight, net.fc.weight)
    named = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    named.write_bytes(good.read_bytes())
    with pytest.raises(UserError, match=r"wrong hash .*6726825d"):
        load_inception(named)
    for name, state in (("half.pth", None), ("other.pth", {"fc.weight": torch.zeros(2)})):
        torch.save(state, tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: not the weights"):
            load_inception(tmp_path / name)

    # without the file: fetched and checked by torch.hub, or one line that says what to do
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def offline(url, **options):
        assert url.endswith("6726825d.pth") and options["check_hash"]
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match="fetch https://.*--inception, or put it at .*checkpoints"):
        load_inception()


def test_features_do_not_depend_on_the_batch_and_grey_is_repeated(net, monkeypatch):
    monkeypatch.setattr(evaluate, "random_inception", lambda: (net, "random"))
    args = SimpleNamespace(**{**vars(HERE), "features": "random"})
    look = evaluate.load_features(args, (1, 16, 16))
    images = np.random.default_rng(0).integers(0, 256, (10, 1, 16, 16), dtype=np.uint8)
    by_three = extract(images, look, HERE, "")
    whole = SimpleNamespace(**{**vars(HERE), "batch_size": 10})
    at_once = extract(images.repeat(3, 1), look, whole, "")
    for a, b in zip(by_three, at_once):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert by_three[0].std(0).mean() > 1e-3


# ---------------------------------------------------------------------------------------------
# Commands


@pytest.fixture(scope="module")
def pictures(run, tmp_path_factory):
    """Twenty colour images as a folder, a zip and an npz; others that are wrong; a small network.
    """
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    (root / "folder").mkdir()
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / "folder" / f"{i:03d}.png")
            archive.write(root / "folder" / f"{i:03d}.png", f"deep/{i:03d}.png")
    np.savez(root / "images.npz", images)
    np.savez(root / "grey.npz", images[..., :1])
    np.savez(root / "few.npz", images[:9])
    np.savez(root / "small.npz", images[:, :8, :8])
    np.savez(root / "float.npz", np.full((20, 16, 16, 3), np.nan, np.float32))
    np.savez(root / "named.npz", other=images)
    np.savez(root / "large.npz", np.zeros((20, 64, 64, 3), np.uint8))
    checkpoint = torch.load(run / "ckpt.pt", weights_only=True)
    del checkpoint["config"]["dataset"]
    torch.save(checkpoint, root / "foreign.pt")
    (root / "broken.npz").write_bytes(b"PK and no more")
    (root / "broken.zip").write_bytes(b"PK and no more")
    for name in ("mixed", "colours", "corrupt", "empty"):
        (root / name).mkdir()
        for i in range(12 if name != "empty" else 0):
            Image.fromarray(images[i]).save(root / name / f"{i:03d}.png")
    Image.fromarray(images[0, :8, :8]).save(root / "mixed" / "005.png")
    Image.fromarray(images[0, :, :, 0]).save(root / "colours" / "005.png")
    whole = (root / "corrupt" / "005.png").read_bytes()
    (root / "corrupt" / "005.png").write_bytes(whole[:len(whole) // 2])

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 4, 4)

        def forward(self, x):
            return self.conv(x.float() / 255).flatten(1)[:, :6]

    class Wrong(nn.Module):
        def forward(self, x):
            return x.float()

    torch.manual_seed(0)
    example = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    torch.jit.trace(Small(), example).save(root / "small.pt")
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
        "residual_noise_reference", "pixel_std", "pixel_std_reference", "brightness_std",
        "brightness_std_reference", "noise_images", "noise_images_reference"]


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
    for figures in found:
        assert figures == found[0]
        assert figures["precision"] == figures["recall"] == 1 and figures["is_mean"] is None
        assert figures["fid"] == pytest.approx(0, abs=1e-6)
        assert figures["residual_noise"] == figures["residual_noise_reference"] > 0.1
        assert figures["pixel_std"] == figures["pixel_std_reference"] > 0.1


def test_quality_of_a_run_and_its_cached_reference(run, pictures, measure, capsys, monkeypatch):
    argv = ["quality", run, "--num", 12, "--steps", 2, "--reference_num", 40, "--features",
            pictures / "small.pt"]
    first = measure(*argv)
    about = first["provenance"]
    assert (about["reference"], about["reference_num"], about["num"]) == ("shapes train", 40, 12)
    assert (about["weights"], about["sampler"], about["steps"], about["step"]) == (
        "EMA", "ddim", 2, 3)
    titles = []
    real = evaluate.extract
    monkeypatch.setattr(evaluate, "extract",
                        lambda images, look, args, title: titles.append(title) or real(
                            images, look, args, title))
    assert measure(*argv)["fid"] == first["fid"]
    assert titles == ["samples"]
    # another content, another network: nothing cached is taken for them
    measure(*argv, "--reference_num", 41)
    measure(*argv[:-1], "pixels")
    assert titles == ["samples", "reference", "samples", "reference", "samples"]
    assert measure(*argv, "--raw")["provenance"]["weights"] == "raw"
    assert measure(*argv, "--raw")["fid"] != first["fid"]


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
            assert about["steps"] == found and about["seed"] is None
            assert about["num"] == 20 and about["image"] == "16x16 RGB"


def test_features_that_are_not_finite(pictures, measure, monkeypatch):
    monkeypatch.setattr(evaluate, "random_inception", lambda: (nn.Sequential(nn.Flatten(), Log()),
                                                               "logarithms"))
    with pytest.raises(UserError, match="reference: .* not finite"):
        measure("quality", pictures / "folder", "--reference", pictures / "folder", "--features",
                "random")


class Log(nn.Module):
    def forward(self, x):
        return x.log()


def test_a_line_of_progress_ends_before_an_error(capsys, monkeypatch):
    now = iter(range(0, 1000, 5))
    monkeypatch.setattr("sample.time.time", lambda: next(now))
    with pytest.raises(UserError), ticker("some", 10) as tick:
        tick(1)
        raise UserError("no")
    assert capsys.readouterr().out.endswith("   \n")
    with ticker("all", 10) as tick:
        tick(1)
        tick(10)
    assert capsys.readouterr().out.count("\n") == 1


def test_a_cache_is_filled_by_one_process_a_machine(monkeypatch):
    """And what it has loaded is not loaded again."""
    calls = []
    monkeypatch.setattr(evaluate.dist, "barrier", lambda: calls.append("wait"))
    for local, world, order in ((0, 1, ["load"]), (0, 2, ["load", "wait"]),
                                (1, 2, ["wait", "load"])):
        calls.clear()
        args = SimpleNamespace(local=local, world=world)
        assert evaluate.first_here(args, lambda: calls.append("load") or 7) == 7
        assert calls == order


def test_a_data_set_made_smaller_is_noted(run, pictures, measure, in_process, tmp_path):
    """Where a run's images ask for it; samples without a run are refused instead."""
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "data" / f"{i}.png")
    about = measure("quality", run, "--num", 10, "--steps", 1, "--reference", "cifar10",
                    "--data_dir", tmp_path / "data", "--features", pictures / "small.pt")
    assert about["provenance"]["reference"] == "cifar10 train, made 16x16 RGB of 32x32 RGB"
    assert about["provenance"]["image"] == "16x16 RGB"


def test_few_images_for_many_features_warn(pictures, measure, capsys):
    figures = measure("quality", pictures / "images.npz", "--reference", pictures / "folder",
                      "--features", "pixels")
    assert "rank-deficient" in figures["provenance"]["warning"]
    assert "N = 20 for 768 features" in capsys.readouterr().err


def shared(argv, tmp_path, processes):
    """The JSON of a command under torchrun."""
    done = script("evaluate.py", *argv, "--cache_dir", tmp_path, "--json", tmp_path / "a.json",
                  processes=processes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("output ") == 1
    return json.loads((tmp_path / "a.json").read_text())


def test_world_size_does_not_matter(run, pictures, measure, tmp_path):
    """Processes share images and samples unevenly, and find what one finds."""
    argv = ["quality", pictures / "folder", "--num", 13, "--reference", pictures / "images.npz",
            "--reference_num", 17, "--features", pictures / "small.pt", "--batch_size", 4]
    one, two = measure(*argv), shared(argv, tmp_path, 2)
    assert one["fid"] > 0 and one["kid_mean"] != 0 and 0 < one["residual_noise"]
    for key in KEYS:
        assert one[key] == two[key]

    # drawn, a pixel may round to the next of 255 levels in another batch
    argv = ["attack", run, "--num", 13, "--steps", 3, "--sampler", "ddpm", "--reference_num", 31,
            "--features", pictures / "small.pt", "--batch_size", 4]
    one, two = (found["rows"] for found in (measure(*argv), shared(argv, tmp_path, 2)))
    for a, b in zip(one, two):
        assert a["norm_min"] == pytest.approx(b["norm_min"], rel=1e-3)
        for key in ("fid", "mse", "residual_noise", "residual_noise_reference"):
            assert a[key] == pytest.approx(b[key], rel=5e-3)


def test_more_processes_than_images(monkeypatch):
    """Eleven for ten: each looks at its share, and the last one at what gather() leaves out."""
    images = np.random.default_rng(0).integers(0, 256, (10, 1, 4, 4), dtype=np.uint8)
    parts = []
    monkeypatch.setattr(evaluate, "gather", lambda part, *_: parts.append(part) or part)
    for rank in range(11):
        args = SimpleNamespace(**{**vars(HERE), "world": 11, "rank": rank})
        extract(images, lambda x, index: [x.flatten(1)], args, "")
    found = torch.stack(parts, dim=1).flatten(0, 1)[:10]
    assert torch.equal(found, torch.from_numpy(images).flatten(1))


def test_attack(run, pictures, measure, tmp_path, monkeypatch):
    """The same seeds attacked and not; equal norms; what ascends moves the images furthest."""
    flags = ["--num", 12, "--steps", 4, "--reference_num", 20, "--features", pictures / "small.pt",
             "--budget", 0.3]
    for extra, names in ((["--norm", "l2", "--surrogate", run], 4),
                         (["--norm", "linf", "--eot", 2, "--sampler", "ddpm"], 3)):
        rows = measure("attack", run, *flags, *extra)["rows"]
        named = ["none", "random", "white box", "transfer"][:names]
        assert [row["attack"] for row in rows] == named
        assert set(KEYS) < set(rows[0]) and rows[0]["mse"] == rows[0]["norm_max"] == 0
        for row in rows[1:]:
            assert row["norm_min"] == pytest.approx(0.3, rel=1e-3)
            assert row["norm_max"] == pytest.approx(0.3, rel=1e-3)
            assert row["mse"] > 0
    # through the same network, transfer is the white box
    drawn, real = [], evaluate.draw
    monkeypatch.setattr(evaluate, "draw", lambda *args: drawn.append(real(*args)) or drawn[-1])
    rows = measure("attack", run, *flags, "--surrogate", run, "--png", tmp_path / "a.png")["rows"]
    assert rows[2]["mse"] == rows[3]["mse"]
    # one row of the picture for each of the table, the images 48 pixels wide with 2 between
    picture = np.array(Image.open(tmp_path / "a.png"))
    assert picture.shape == (4 * 50 + 2, 12 * 50 + 2, 3)
    tiles = [np.kron(images[3].transpose(1, 2, 0), np.ones((3, 3, 1))) for images in drawn]
    for row, tile in enumerate(tiles):
        assert np.array_equal(picture[50 * row + 2:, 3 * 50 + 2:][:48, :48], tile)
    for row, images in zip(rows, drawn):
        assert row["mse"] == pytest.approx(np.mean((images / 127.5 - drawn[0] / 127.5) ** 2))
    assert measure("attack", run, *flags)["rows"][0]["fid"] == rows[0]["fid"]


class Stretch(nn.Module):
    """eps = W x: takes (1, -1) for noise and (1, 1) for signal."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.9, -0.9], [-0.9, 0.9]]))

    def forward(self, x, t):
        return (x.flatten(1) @ self.weight).view_as(x)


@pytest.mark.parametrize("eot", [0, 3])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_attacker_uses_its_own_noise_and_beats_chance(norm, eot):
    net, diffusion, shape = Stretch(), Diffusion(), (1, 1, 2)
    args = SimpleNamespace(seed=0, steps=10, spacing="respaced", sampler="ddpm", share=0.5,
                           norm=norm, budget=0.2, eot=eot, device=torch.device("cpu"))
    g = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))
    moved = {}
    for steps in (0, 3):
        norms, times = torch.zeros(64), []
        perturb = attacker(net, steps, diffusion, shape, args, norms)(range(64))

        def watched(x, t):
            y = perturb(x, t)
            times.append((t, not torch.equal(x, y)))
            return y

        clean = sample(net, diffusion, lambda: g, "ddim", 10)
        x = sample(net, diffusion, lambda: g, "ddim", 10, perturb=watched)
        moved[steps] = (x - clean).square().mean().item()
        # half of the ten: the middles of five equal parts
        assert [i for i, (_, pushed) in enumerate(times) if pushed] == [1, 3, 5, 7, 9]
        assert len(times) == 10
        if steps == 0 and norm == "l2":
            # not the sampler's own stream, whose first draw is x_T
            y = attacker(net, 0, diffusion, shape, args, norms)(range(64))(g, times[1][0])
            own = image_noise(0, range(64), shape, "cpu")()
            assert (nn.functional.cosine_similarity((y - g).flatten(1), own.flatten(1)) < 0.9).any()
        # what a float32 state keeps of a push near the end
        assert torch.allclose(norms, torch.tensor(0.2), rtol=5e-3)
    if eot:
        args.eot = 0
        now = attacker(net, 3, diffusion, shape, args, norms)(range(64))(g, times[1][0])
        args.eot = eot
        later = attacker(net, 3, diffusion, shape, args, norms)(range(64))(g, times[1][0])
        assert not torch.allclose(now, later)
    assert moved[3] > (1.1 if norm == "l2" else 1) * moved[0] > 0


def test_attack_noises(monkeypatch):
    """The start is the same whatever --eot; the sampler's noises are k others, normal."""
    seen = {}

    class Look(NextLook):
        def __init__(self, net, diffusion, after, sampler, noises):
            super().__init__(net, diffusion, after, sampler, noises)
            seen["noises"] = torch.stack(noises)

    monkeypatch.setattr(evaluate, "NextLook", Look)
    monkeypatch.setattr(evaluate, "trajectory_attack", lambda view, diffusion, chosen, noise, *_: (
        seen.update(view=view, start=noise())))
    starts = []
    for eot in (0, 1, 4):
        args = SimpleNamespace(seed=3, steps=10, spacing="respaced", sampler="ddpm", share=0.5,
                               norm="l2", budget=0.2, eot=eot, device=torch.device("cpu"))
        attacker(Stretch(), 3, Diffusion(), (1, 1, 2), args, torch.zeros(64))(range(64))
        starts.append(seen["start"])
        assert isinstance(seen["view"], Look if eot else Denoiser)
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])
    assert seen["noises"].shape == (4, 64, 1, 1, 2) and 0.9 < seen["noises"].std() < 1.1
    for one, other in itertools.combinations([starts[0], *seen["noises"]], 2):
        assert not torch.allclose(one, other)


def test_next_look_is_the_mean_denoised_image_after_the_step():
    net, diffusion = Stretch(), Diffusion()
    x = torch.randn(3, 1, 1, 2, generator=torch.Generator().manual_seed(0)) / 4
    noises = [torch.full_like(x, value) for value in (-1.0, 2.0)]
    view = NextLook(net, diffusion, {500: 300, 20: -1}, "ddpm", noises)
    denoiser = Denoiser(net, diffusion)
    looks = [denoiser(denoise_step(net, diffusion, x, 500, 300, "ddpm", lambda: noise),
                      torch.full((3,), 300)) for noise in noises]
    torch.testing.assert_close(view(x, torch.full((3,), 500)), sum(looks) / 2)
    assert not torch.allclose(looks[0], looks[1])
    last = denoise_step(net, diffusion, x, 20, -1, "ddpm", None)
    torch.testing.assert_close(view(x, torch.full((3,), 20)), last)
    # one call for the step and one a look; without noise in the step one look is all of them
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    view(x, torch.full((3,), 500))
    assert len(calls) == 3
    view.sampler = "ddim"
    look = view(x, torch.full((3,), 500))
    assert len(calls) == 5
    step = denoise_step(net, diffusion, x, 500, 300, "ddim", None)
    torch.testing.assert_close(look, denoiser(step, torch.full((3,), 300)))


def test_steps(run, pictures, measure):
    rows = measure("steps", run, "--num", 12, "--steps", "3,2", "--sampler", "ddpm,ddim",
                   "--spacing", "respaced,naive", "--reference_num", 20, "--features",
                   pictures / "small.pt")["rows"]
    assert [(r["sampler"], r["spacing"], r["steps"]) for r in rows] == list(
        itertools.product(["ddpm", "ddim"], ["respaced", "naive"], [3, 2]))
    assert len({row["fid"] for row in rows if row["steps"] == 3}) == 4


def test_memorization_finds_copies(pictures, measure, tmp_path):
    """Six of twelve samples are training images, one of them there twice."""
    rng = np.random.default_rng(1)
    train = rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    train[30] = train[2]
    held = rng.integers(0, 256, (15, 16, 16, 3), dtype=np.uint8)
    samples = rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    samples[::2] = train[[2, 3, 5, 7, 11, 13]]
    # a mixture of a training image and another: d1 / d2 is .28 or .4
    for i, share in ((1, 0.25), (3, 0.35)):
        samples[i] = np.round((1 - share) * train[20 + i] + share * held[i])
    for name, images in (("train", train), ("samples", samples), ("held", held)):
        np.savez(tmp_path / f"{name}.npz", images)
    for features in ("pixels", pictures / "small.pt"):
        found = measure("memorization", tmp_path / "samples.npz", "--features", features,
                        "--reference", tmp_path / "train.npz", "--holdout", tmp_path / "held.npz",
                        "--png", tmp_path / "pairs.png", "--blur", 0.6)
        rows = {row["set"]: row for row in found["rows"]}
        assert rows["samples"]["copied"] >= 0.5 and rows["samples"]["> 0.99"] >= 0.5
        assert found["provenance"]["duplicates_left_out"] == 1
        assert rows["held out"]["n"] == 15
        if features == "pixels":
            assert rows["samples"]["copied"] == pytest.approx(7 / 12)
            assert rows["samples"]["> 0.99"] == 0.5
            assert rows["held out"]["copied"] == rows["blurred"]["> 0.99"] == 0
            assert rows["held out"]["similar 99%"] < 0.4
        else:
            net = torch.jit.load(features)
            of = [nn.functional.normalize(net(torch.from_numpy(x).permute(0, 3, 1, 2)))
                  for x in (held, train)]
            nearest = (of[0] @ of[1].T).amax(1)
            assert rows["held out"]["similar 50%"] == pytest.approx(nearest.quantile(0.5).item())
    picture = np.array(Image.open(tmp_path / "pairs.png"))
    # the first two tiles, a sample and its training image, are alike
    assert picture.shape[1] == 8 * 50 + 2
    assert np.array_equal(picture[2:50, 2:50], picture[2:50, 52:100])


def test_denoise(run, measure):
    found = measure("denoise", run, "--noise_std", "0.1,0.3", "--num", 12)
    assert found["provenance"]["reference"] == "shapes test"
    levels = Diffusion().alpha_bar
    for row, std in zip(found["rows"], (0.1, 0.3)):
        a = levels[row["t"]].item()
        assert ((1 - a) / a) ** 0.5 == pytest.approx(std, rel=0.05)
        assert row["input psnr"] == pytest.approx(-20 * np.log10(std / 2), abs=0.3)
        assert row["input residual"] == pytest.approx(std, rel=0.1)
        assert row["clean residual"] < 0.02
        assert 0 < row["one-shot psnr"] < 60 and 0 < row["ancestral psnr"] < 60


def test_denoise_of_a_linear_denoiser_by_hand(run, measure, monkeypatch):
    """D(x_t) = x_t / (2 sqrt(a)) from the step where the noise is as strong as the images."""
    config, diffusion, shape = load_run(run, "cpu")[2], Diffusion(), (3, 16, 16)

    def halve(x, t):
        return x / (2 * diffusion.at(t, x)[1])

    monkeypatch.setattr(evaluate, "load_run", lambda *_: (halve, diffusion, config, {}))
    row, = measure("denoise", run, "--noise_std", 1, "--num", 12)["rows"]
    a = diffusion.alpha_bar
    t = (((1 - a) / a).sqrt() - 1).abs().argmin().item()
    clean = torch.from_numpy(load_images("shapes", 16, 3, split="test")[:12]).float() / 127.5 - 1
    noisy = clean + image_noise(0, range(12), shape, "cpu", ATTACK)()
    x, noise = a[t].sqrt().float() * noisy, image_noise(0, range(12), shape, "cpu")
    for now in range(t, -1, -1):
        x = denoise_step(halve, diffusion, x, now, now - 1, "ddpm", noise)
    ends = {"input": noisy, "one-shot": (noisy / 2).clamp(-1, 1), "ancestral": x.clamp(-1, 1)}
    for name, end in ends.items():
        psnr = 10 * torch.log10(4 / (end - clean).square().mean((1, 2, 3)))
        assert row[f"{name} psnr"] == pytest.approx(psnr.mean().item(), rel=1e-4)
        assert row[f"{name} residual"] == pytest.approx(noise_std(haar_counts(end)), rel=1e-3)
    assert row["t"] == t and len({f"{row[f'{name} psnr']:.2f}" for name in ends}) == 3


def test_overfit_command_and_monitoring(measure, in_process, tmp_path, capsys):
    """Monitoring leaves training as it was, to the bit, and resumes into the same figures."""
    flags = [*TINY, "--mode", "adv", "--log_every", 2, "--noise_p", 0.5, "--noise_std", 0.2]
    for name, argv in {"plain": ["--steps", 6], "watched": ["--steps", 6, "--monitor_every", 2],
                       "parts": ["--steps", 4, "--monitor_every", 2]}.items():
        in_process("train", *flags, *argv, "--out", tmp_path / name)
    assert capsys.readouterr().out.count("  overfit ") == 5
    in_process("train", "--resume", "--steps", 6, "--out", tmp_path / "parts")
    weights = [torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["model"]
               for name in ("plain", "watched", "parts")]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][key], other[key]) for key in other)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("watched", "parts")]
    assert [row["overfit"] for row in logs[0]] == [row["overfit"] for row in logs[1]]
    assert len(logs[0][0]["overfit"]) == 5

    found = measure("overfit", tmp_path / "watched")
    ratios = [row["ratio"] for row in found["rows"]]
    assert ratios == pytest.approx(logs[0][-1]["overfit"], rel=1e-4)
    assert found["provenance"]["weights"] == "raw"


@pytest.mark.parametrize("log_every", [0, 3])
def test_the_alarm_is_logged_at_the_step_that_it_is_of(log_every, in_process, tmp_path):
    in_process("train", *TINY, "--mode", "dsm", "--steps", 6, "--monitor_every", 2, "--log_every",
               log_every, "--out", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "overfit" in row] == [2, 4, 6]
    assert [row["step"] for row in rows if "overfit" not in row] == [3][:log_every]


def test_alarm_sounds_for_a_network_that_deceives_one_step():
    """eps = sin(6 x): a full step overshoots the hill that ten small ones climb."""

    class Wave(nn.Module):
        def forward(self, x, t):
            return torch.sin(6 * x)

    class Line(nn.Module):
        def forward(self, x, t):
            return 2 * x

    x0 = gaussian(64, 16, 0)
    cfg = Perturbation(beta_min=0.5, beta_max=1.0)
    (pgd, own), = overfit(Wave(), Diffusion(), x0, [500], cfg)
    assert pgd > 1.3 * own
    (pgd, own), = overfit(Line(), Diffusion(), x0, [500], cfg)
    assert pgd == pytest.approx(own, rel=1e-3)
    assert overfit(Wave(), Diffusion(), x0, [500], cfg) == overfit(Wave(), Diffusion(), x0, [500],
                                                                  cfg)


def test_the_runs_own_data_set_is_where_the_run_had_it(pictures, measure, in_process, tmp_path):
    """Named or not; and of a folder, which has no split, no held-out images."""
    folder = tmp_path / "folder"
    in_process("train", *TINY, "--dataset", "folder", "--data_dir", pictures / "folder", "--steps",
               1, "--noise_p", 0.5, "--noise_std", 0.2, "--out", folder)
    argv = ["quality", folder, "--num", 10, "--steps", 1, "--features", pictures / "small.pt"]
    assert measure(*argv)["fid"] == measure(*argv, "--reference", "folder")["fid"]
    with pytest.raises(UserError, match="folder has no test split: name a folder, zip or npz"):
        measure("memorization", folder, "--holdout", "folder")


def test_copies_are_sought_among_the_images_that_the_run_saw(pictures, measure, in_process,
                                                             tmp_path):
    folder = tmp_path / "few"
    in_process("train", *TINY, "--dataset", "folder", "--data_dir", pictures / "folder", "--steps",
               1, "--limit", 12, "--out", folder)
    argv = ["memorization", folder, "--num", 10, "--steps", 1, "--png", tmp_path / "p.png"]
    assert measure(*argv)["provenance"]["reference_num"] == 12
    own = measure(*argv, "--reference", pictures / "folder")["provenance"]
    assert own["reference_num"] == 20


def test_a_surrogate_of_another_shape(run, in_process, tmp_path):
    config = load_run(run, "cpu")[2]
    grey = tmp_path / "grey"
    in_process("train", *TINY, "--in_channels", 1, "--steps", 1, "--out", grey)
    assert config["in_channels"] == 3
    with pytest.raises(UserError, match="16x16 grey"):
        in_process("evaluate", "attack", run, "--surrogate", grey, "--num", 12)


@pytest.mark.parametrize("argv, words", [
    (["quality", "P/mixed", "--reference", "P/folder"], "mixed/005.png is 8x8 RGB"),
    (["quality", "P/colours", "--reference", "P/folder"], "colours/005.png is 16x16 grey"),
    (["quality", "P/corrupt", "--reference", "P/folder"], "corrupt/005.png"),
    (["quality", "P/empty", "--reference", "P/folder"], "no images in"),
    (["quality", "P/folder", "--reference", "P/empty"], "no images in"),
    (["quality", "P/nowhere", "--reference", "P/folder"], "no such file"),
    (["quality", "P/few.npz", "--reference", "P/folder"], "samples: 9 images, at least 10"),
    (["quality", "P/folder", "--reference", "P/few.npz"], "reference: 9 images, at least 10"),
    (["quality", "P/float.npz", "--reference", "P/folder"], "float.npz: not readable as images "
     "(arr_0 is float32 (20, 16, 16, 3)"),
    (["quality", "P/named.npz", "--reference", "P/folder"], "named.npz"),
    (["quality", "P/broken.npz", "--reference", "P/folder"], "broken.npz"),
    (["quality", "P/broken.zip", "--reference", "P/folder"], "broken.zip"),
    (["quality", "P/grey.npz", "--reference", "P/folder"], "grey"),
    (["quality", "P/grey.npz", "--reference", "cifar10"], "cifar10 is 32x32 RGB"),
    (["quality", "P/folder", "--reference", "fashion_mnist"], "fashion_mnist is 28x28 grey"),
    (["quality", "P/small.npz", "--reference", "cifar10"], "32x32 RGB, the sample 8x8 RGB"),
    (["quality", "P/folder", "--reference", "P/folder", "--num", "21"],
     "samples: 20 images, --num asks for 21"),
    (["quality", "RUN", "--reference", "P/folder", "--reference_num", "21"],
     "reference: 20 images, --reference_num asks for 21"),
    (["quality", "P/large.npz", "--reference", "P/large.npz", "--features", "pixels"], "12288"),
    (["denoise", "RUN", "--reference", "P/folder", "--num", "21"], "20 images, --num asks for 21"),
    (["overfit", "P/foreign.pt"], "foreign.pt: its config is not one of train.py"),
    (["quality", "P/foreign.pt"], "foreign.pt: its config is not one of train.py"),
    (["quality", "P/small.npz", "--reference", "P/folder"], "8x8"),
    (["quality", "P/folder"], "--reference is needed"),
    (["quality", "P/folder", "--reference", "P/folder", "--features", "P/wrong.pt"], "(B, d)"),
    (["quality", "P/folder", "--reference", "P/folder", "--features", "P/no.pt"], "no.pt"),
    (["quality", "P/folder", "--reference", "P/folder", "--features", "inception", "--inception",
      "P/small.pt"], "not the weights"),
    (["quality", "RUN", "--json", "LICENSE/a.json"], "cannot write LICENSE/a.json"),
    (["quality", "RUN", "--json", "tests"], "cannot write tests"),
    (["memorization", "P/folder", "--reference", "P/folder", "--holdout", "P/grey.npz"], "grey"),
    (["attack", "P/folder"], "no checkpoint"),
    (["attack", "RUN", "--steps", "2000", "--num", "12"], "T = 1000"),
    (["attack", "RUN", "--share", "0"], "--share"),
    (["steps", "RUN", "--steps", "3,2000"], "T = 1000"),
    (["quality", "RUN", "--num", "5"], "--num: '5' is not a whole number, at least 10"),
    (["quality", "RUN", "--reference_num", "9"], "--reference_num"),
    (["quality", "RUN", "--reference", "P/nowhere"], "no such file"),
    (["quality", "RUN", "--features", "P/no.pt"], "no.pt"),
    (["memorization", "RUN", "--reference", "P/nowhere"], "no such file"),
    (["memorization", "RUN", "--holdout", "P/grey.npz"], "grey"),
    (["memorization", "RUN", "--blur", "6"], "--blur 6.0: too wide for images of 16 pixels"),
    (["memorization", "RUN", "--png", "out/pairs"], "does not end in .png"),
    (["memorization", "RUN", "--png", "LICENSE/a.png"], "cannot write LICENSE/a.png"),
    (["steps", "RUN", "--sampler", "euler"], "is not of ddpm, ddim"),
    (["steps", "RUN", "--steps", "ten"], "--steps"),
    (["denoise", "RUN", "--noise_std", "0"], "--noise_std"),
    (["overfit", "RUN", "--device", "tpu9"], "device tpu9"),
    (["overfit", "RUN", "--data_dir", "nowhere"], "--data_dir"),
    (["quality", "", "--reference", "P/folder"], "samples is empty"),
    (["quality", "P/folder", "--reference", ""], "reference is empty"),
    (["memorization", "RUN", "--reference", "cifar10", "--holdout", "cifar10", "--data_dir",
      "P/empty"], "no train images of cifar10"),
    (["denoise", "RUN", "--reference", "cifar10", "--data_dir", "P/empty"],
     "no test images of cifar10"),
    (["quality"], "samples"),
    (["polish", "RUN"], "invalid choice"),
    ([], "command"),
])
def test_bad_input_is_one_line(argv, words, run, pictures, in_process, tmp_path, monkeypatch):
    """And before any work: nothing is drawn."""
    monkeypatch.setattr(evaluate, "sample", None)
    argv = [part.replace("P/", f"{pictures}/").replace("RUN", str(run)) for part in argv]
    if argv and argv[0] in ("quality", "memorization", "attack", "steps") and len(argv) > 1:
        argv += ["--cache_dir", str(tmp_path)]
        argv += [] if "--features" in argv else ["--features", f"{pictures}/small.pt"]
    with pytest.raises(UserError) as error:
        in_process("evaluate", *argv)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_mistake_as_a_user_meets_it(pictures, capsys):
    done = script("evaluate.py", "quality", pictures / "corrupt", "--cache_dir", pictures / "cache",
                  "--reference", pictures / "folder")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "005.png" in done.stderr
    for flag in (["--features", pictures / "wrong.pt"], ["--inception", pictures / "small.pt"]):
        done = script("evaluate.py", "quality", pictures / "folder", "--reference",
                      pictures / "folder", *flag)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and ".pt" in done.stderr
    with pytest.raises(SystemExit):
        evaluate.parse_args(["steps", "-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert "network calls per image (1000,500,300,100,50,20,10)" in text
    assert "None)" not in text
