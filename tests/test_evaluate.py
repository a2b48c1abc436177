"""Metrics against closed forms and direct formulas; each command in this process, on tiny runs."""

import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from torch import nn

import evaluate
import evidence
from conftest import ROOT, TINY
from evaluate import attack_hook, extract, load_features, nearest, next_denoised, share_covered
from losses import Diffusion, Perturbation, denoise
from sample import (ATTACK, Run, UserError, denoise_step, image_noise, load_run, sample,
                    step_pairs, to_uint8)
from train import Corruption, choose_corruption, load_images, own_noise, training_images

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")


def gaussian(n, d, seed, scale=1.0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, d, generator=g) + shift


def moments(x):
    return x.double().mean(0), x.T.double().cov()


# ---------- Metrics


def test_frechet_distance_by_the_formula():
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), which do not commute; one is singular."""
    (m1, c1), (m2, c2) = moments(gaussian(20, 6, 0)), moments(gaussian(5, 6, 1, 2.0))
    root = torch.from_numpy(sqrtm((c1 @ c2).numpy()).real)
    truth = ((m1 - m2).square().sum() + (c1 + c2 - 2 * root).trace()).item()
    assert evaluate.frechet(m1, c1, m2, c2) == pytest.approx(truth, rel=1e-6)
    assert evaluate.frechet(m2, c2, m1, c1) == pytest.approx(truth, rel=1e-6)
    # Of a set and itself rounding alone is left, and nothing below zero.
    for seed in range(5):
        same = moments(gaussian(10, 60, seed, 30.0))
        assert 0 <= evaluate.frechet(*same, *same) < 1e-2


def test_inception_score_by_the_formula():
    logits, scores = gaussian(47, 6, 1, scale=2.0), []
    for i in range(10):
        p = logits[i * 47 // 10:(i + 1) * 47 // 10].double().softmax(1)
        scores.append((p * (p / p.mean(0)).log()).sum(1).mean().exp().item())
    assert evaluate.inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)))


def test_kid_by_the_formula():
    """All pairs, one by one: the diagonal is left out of both sets, and not between them."""
    x, y = gaussian(9, 4, 0), gaussian(9, 4, 1, shift=0.5)

    def k(a, b):
        return (float(a @ b) / 4 + 1) ** 3

    within = sum(k(s[i], s[j]) for s in (x, y) for i, j in itertools.permutations(range(9), 2))
    truth = within / (9 * 8) - 2 * sum(k(a, b) for a in x for b in y) / 9**2
    assert evaluate.kid(x, y) == pytest.approx((truth, 0), rel=1e-5, abs=1e-9)


def test_neighbours_precision_and_recall_by_brute_force(monkeypatch):
    """Far from the origin, where |x|^2 + |y|^2 - 2 x.y cancels; with duplicates; in blocks."""
    monkeypatch.setattr(evaluate, "BLOCK", 7)
    fake, real = gaussian(60, 5, 0, shift=300.0), gaussian(50, 5, 1, shift=300.2)
    real[10:15] = real[10]
    fake[3] = real[10]  # In a ball of radius 0.
    between = cdist(fake, real)
    distance, index = nearest(fake, real, 2, CPU, "")
    np.testing.assert_allclose(distance, np.sort(between)[:, :2], rtol=1e-9)
    assert torch.equal(real[index[:, 0]], real[between.argmin(1)])

    radius = [np.sort(cdist(x, x))[:, 3] for x in (fake, real)]
    radii = [nearest(x, x, 3, CPU, "", same=True)[0][:, -1] for x in (fake, real)]
    np.testing.assert_allclose(radii[1], radius[1], rtol=1e-9)
    truth = ((between <= radius[1]).any(1).mean(), (between.T <= radius[0]).any(1).mean())
    assert radius[1][12] == 0 and 0.1 < min(truth) and max(truth) < 0.99
    assert truth == (share_covered(fake, real, radii[1], CPU, ""),
                     share_covered(real, fake, radii[0], CPU, ""))


def test_plain_figures_by_their_formulas():
    images = np.random.default_rng(0).integers(0, 200, (503, 3, 9, 7), dtype=np.uint8)
    images[:300] //= 5
    x = images / 127.5 - 1
    e = x[..., :8, :6]  # Without the edge of an odd size.
    detail = abs(e[..., ::2, ::2] - e[..., ::2, 1::2] - e[..., 1::2, ::2] + e[..., 1::2, 1::2]) / 2
    own = np.median(detail, (1, 2, 3)) / 0.6745
    assert evaluate.plain_figures(images) == pytest.approx({
        "residual_noise": np.median(detail) / 0.6745, "pixel_std": x.std(),
        "brightness_std": x.mean((1, 2, 3)).std(), "noise_images": (own > 0.3).mean()}, rel=1e-12)


# ---------- The feature network


def test_inception_computes_what_pytorch_fid_does(monkeypatch):
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
    assert sum(p.numel() for p in net.parameters()) == 23_850_960

    # Images are shrunk without antialiasing, which leaves two of a pixel's four neighbours.
    seen = []
    monkeypatch.setattr(net.Conv2d_1a_3x3, "forward", lambda x: seen.append(x) or 1 / 0)
    stripes = torch.zeros(1, 3, 897, 897, dtype=torch.uint8)
    stripes[:, :, 1::3] = 255
    with pytest.raises(ZeroDivisionError):
        net(stripes)
    torch.testing.assert_close(seen[0], torch.ones(1, 3, 299, 299))


class Small(nn.Module):
    """Six features of the corner of 4x4 pixels, and logits."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, 4)

    def forward(self, x):
        features = self.conv(x.float() / 255).flatten(1)[:, :6]
        return features, 20 * features


def settings(**changed):
    """Flags of the commands, without a command line."""
    return SimpleNamespace(**dict(device=CPU, batch_size=3, seed=0, steps=10, spacing="respaced",
                                  sampler="ddpm", stop=0.0, share=0.5, budget=0.2) | changed)


def test_inception_files(tmp_path, monkeypatch):
    """One that is named and fits is taken; else a line says where to fetch the published one."""
    monkeypatch.setattr(evaluate, "build_inception", Small)
    good = Small()
    torch.save(good.state_dict(), tmp_path / "good.pth")
    net, label = evaluate.load_inception(tmp_path / "good.pth")
    assert "NOT the published network" in label and torch.equal(net.conv.weight, good.conv.weight)

    def offline(url, **options):
        assert url == evaluate.INCEPTION and options["check_hash"]
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    for path, reason in ((tmp_path / "other.pth", "Unexpected key"), (None, "no network")):
        with pytest.raises(UserError, match=f"{reason}.*fetch https://.*--inception, or use"):
            load_features(settings(features="inception", inception=path), (3, 8, 8), {})


def test_features_do_not_depend_on_the_batch_and_grey_is_repeated(monkeypatch):
    monkeypatch.setattr(evaluate, "random_inception", lambda: (Small(), "random"))
    args = settings(features="random")
    function = load_features(args, (1, 16, 16), {})
    images = np.random.default_rng(0).integers(1, 256, (10, 1, 16, 16), dtype=np.uint8)
    parts = extract(images, function, args, "")[0]
    args.batch_size = 10
    torch.testing.assert_close(parts, extract(images.repeat(3, 1), function, args, "")[0])
    assert parts.std(0).min() > 1e-3
    with pytest.raises(UserError, match="title: .* not finite"):
        extract(images, lambda x, index: [x / 0], args, "title")


# ---------- Commands


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twenty colour images as a folder, zip and npz; others that are wrong; a small network."""
    root = tmp_path_factory.mktemp("pictures")
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    (root / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(root / f"folder/{i:03d}.png")
    shutil.make_archive(root / "images", "zip", root, "folder")
    shutil.copytree(root / "folder", root / "corrupt")
    (root / "corrupt/005.png").write_bytes((root / "folder/005.png").read_bytes()[:400])
    for name, array in {"images": images, "few": images[:9], "wide": images[:, :8],
                        "other": 255 - images, "double": images.repeat(2, 1).repeat(2, 2)}.items():
        np.savez(root / f"{name}.npz", array)
    torch.manual_seed(0)
    torch.jit.trace(Small(), torch.zeros(1, 3, 16, 16).byte()).save(root / "small.pt")
    return root


@pytest.fixture(scope="module")
def measure(in_process, pictures, tmp_path_factory):
    """Run a command here, on the small network's features unless others are named; its JSON."""
    out = tmp_path_factory.mktemp("measured")

    def run_command(command, *argv):
        small = ["--features", pictures / "small.pt"]
        argv = [command, *(small if command in ("quality", "attack", "steps") else []), *argv]
        in_process("evaluate", *argv, "--cache_dir", out / "cache", "--json", out / "a.json")
        return json.loads((out / "a.json").read_text())

    return run_command


def test_quality_of_folder_zip_and_npz(pictures, measure, tmp_path):
    """The note of sample.py goes with its images, in a folder or samples.npz, and no others."""
    shutil.copytree(pictures / "folder", tmp_path, dirs_exist_ok=True)
    for name in ("samples.npz", "other.npz"):
        shutil.copy(pictures / "images.npz", tmp_path / name)
    (tmp_path / "samples.json").write_text('{"steps": 7}')
    argv = ["--reference", pictures / "folder"]
    for path, steps in ((pictures / "images.zip", None), (tmp_path / "other.npz", None),
                        (tmp_path / "samples.npz", 7), (tmp_path, 7)):
        found = measure("quality", path, *argv, "--batch_size", 7)
        about = found["provenance"]
        assert about["num"] == about["reference_num"] == 20
        assert about["steps"] == steps and about["seed"] is None and "commit" in about
        assert "small.pt" in about["features"] and "NOT comparable" in about["features"]
        assert found["precision"] == found["recall"] == 1 and 0 <= found["fid"] < 1e-6
        assert found["residual_noise"] == found["residual_noise_reference"] > 0.1
    found = measure("quality", tmp_path, "--num", 10, *argv)
    assert found["precision"] == 1 > found["recall"] > 0.5 and found["fid"] > 1e-3
    # The tables of the results find their columns, but for what they count themselves.
    assert evidence.FIGURES.keys() - {"strangers"} <= found.keys()


def test_quality_of_a_run_and_its_cached_reference(run, pictures, measure, monkeypatch, capsys):
    """The figures are those of what sample.py draws; of several sets, side by side."""
    argv = ["quality", run, run / "ckpt.pt", "--num", 12, "--steps", 2, "--reference_num", 20]
    found = measure(*argv, "--features", "pixels")
    about, (first, second) = found["provenance"], found["rows"]
    assert first | {"samples": f"{run / 'ckpt.pt'}"} == second != first
    assert [own["samples"] for own in about["sets"]] == [first["samples"], second["samples"]]
    assert (about["reference"], about["num"], about["weights"], about["sampler"], about["step"]
            ) == ("shapes train", 12, "EMA", "ddim", 3)
    model = load_run(run)
    noise = image_noise(0, range(12), model.shape, CPU)
    fake = to_uint8(sample(model.net, model.diffusion, noise, steps=2)).flatten(1)
    real = torch.from_numpy(load_images("shapes", 16, 3)[:20]).flatten(1)
    assert first["kid_mean"] == pytest.approx(evaluate.kid(fake, real)[0], rel=1e-3)
    assert first["fid"] == pytest.approx(
        evaluate.frechet(*moments(fake), *moments(real)), rel=1e-3)
    assert first["is_mean"] is None and "rank-deficient" in capsys.readouterr().err

    # The reference is measured once; another content or another network finds nothing of it.
    argv = ["quality", run, *argv[3:]]
    first, titles = measure(*argv), []
    monkeypatch.setattr(evaluate, "extract", lambda images, function, args, title: titles.append(
        title) or extract(images, function, args, title))
    raw = measure(*argv, "--raw")
    assert titles == ["samples"] and raw["fid"] != first["fid"] and raw["is_mean"] > 1.01
    measure(*argv, "--reference", pictures / "other.npz")
    assert titles[1:] == ["reference", "samples"]


def test_a_reference_is_made_at_the_samples_size(pictures, measure, in_process, tmp_path):
    double, run = pictures / "double.npz", tmp_path / "run"
    found = measure("quality", pictures / "images.npz", "--reference", double)
    assert found["provenance"]["reference"] == f"{double}, made 16x16 RGB of 32x32 RGB"
    assert found["fid"] < 1e-6  # Each pixel was doubled, and is averaged again.

    # A folder has no test split: held-out images have to be named.
    in_process("train", *TINY, "--dataset", "folder", "--data_dir", pictures / "folder", "--steps",
               1, "--limit", 12, "--out", run)
    with pytest.raises(UserError, match="has no test split: name a folder, zip or npz"):
        measure("denoise", run)
    found = measure("denoise", run, "--noise_std", 0.02, "--data_dir", double)["provenance"]
    assert "32x32" in found["reference"] and found["num"] == 20
    # Copies are sought among the images that the run saw.
    found = measure("memorization", run, "--num", 10, "--steps", 1, "--png", tmp_path / "p.png",
                    "--features", pictures / "small.pt")
    assert found["provenance"]["reference_num"] == 12


def test_memorization_finds_copies(measure, tmp_path):
    """Six of twelve samples are training images, one of them there twice."""
    rng = np.random.default_rng(1)
    train, held, samples = (rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
                            for n in (40, 15, 12))
    train[30] = train[2]
    samples[::2] = train[[2, 3, 5, 7, 11, 13]]
    # A mixture of a training image and another: d1 / d2 is .28 or .4.
    for i, share in ((1, 0.25), (3, 0.35)):
        samples[i] = np.round((1 - share) * train[20 + i] + share * held[i])
    for name, images in (("train", train), ("samples", samples), ("held", held)):
        np.savez(tmp_path / f"{name}.npz", images)
    found = measure("memorization", tmp_path / "samples.npz", "--reference", tmp_path / "train.npz",
                    "--holdout", tmp_path / "held.npz", "--png", tmp_path / "pairs.png",
                    "--blur", 0.6)
    rows = {row["set"]: row for row in found["rows"]}
    assert found["provenance"]["duplicates_left_out"] == 1 and rows["held out"]["n"] == 15
    assert rows["samples"]["copied"] == pytest.approx(7 / 12) and rows["samples"]["> 0.99"] == 0.5
    assert rows["held out"]["copied"] == rows["blurred"]["> 0.99"] == 0
    # The blurred control and the cosine, by hand.
    known = np.delete(train, 30, 0).reshape(39, -1).astype(float)
    blurred = gaussian_filter(samples.astype(float), (0, 0.6, 0.6, 0)).round().reshape(12, -1)
    gaps = cdist(blurred, known).min(1) / 127.5
    assert rows["blurred"]["d1"] == pytest.approx(np.sort(gaps)[5], rel=1e-3)
    turns = cdist(held.reshape(15, -1) - known.mean(0), known - known.mean(0), "cosine").min(1)
    assert rows["held out"]["similar 50%"] == pytest.approx(1 - np.median(turns), rel=1e-6)


def test_attack(run, pictures, measure, tmp_path, monkeypatch):
    """The same seeds attacked and not; norms exact; through the same network, as a transfer."""
    drawn, draw = [], evaluate.draw
    monkeypatch.setattr(evaluate, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    rows = measure("attack", run, "--num", 12, "--steps", 4, "--sampler", "ddpm", "--budget", 0.3,
                   "--norm", "linf", "--attack_steps", 3, "--eot", 2, "--surrogate", run,
                   "--reference", pictures / "images.npz", "--png", tmp_path / "a.png")["rows"]
    assert [row["attack"] for row in rows] == ["none", "random", "white box", "transfer"]
    assert rows[0]["fid"] > 0 and rows[0]["mse"] == rows[0]["norm_max"] == 0
    for row, images in zip(rows[1:], drawn[1:], strict=True):
        assert (row["norm_min"], row["norm_max"]) == pytest.approx((0.3, 0.3), rel=1e-3)
        truth = np.mean((images / 127.5 - drawn[0] / 127.5) ** 2)
        assert row["mse"] == pytest.approx(truth) and truth > 0
    assert rows[2]["mse"] == rows[3]["mse"] != rows[1]["mse"]
    # Four rows of twelve enlarged images, and their names on the left.
    width, height = Image.open(tmp_path / "a.png").size
    assert width > 12 * 50 + 2 + 40 and height == 4 * 50 + 2


def stretch(x, t):
    """eps = W x: takes (1, -1) for noise and (1, 1) for signal."""
    return (x.flatten(1) @ torch.tensor([[0.9, -0.9], [-0.9, 0.9]])).view_as(x)


PAIR = (1, 1, 2)
STRETCH = Run(stretch, Diffusion(), {}, PAIR, {})


@pytest.mark.parametrize("norm, eot", [("l2", 0), ("l2", 3), ("linf", 3)])
def test_an_attack_keeps_to_its_ball_and_beats_chance(norm, eot):
    net, diffusion, *_ = STRETCH
    start = torch.randn(64, *PAIR, generator=torch.Generator().manual_seed(0))
    clean, moved = sample(net, diffusion, lambda: start, "ddim", 10), []
    for steps in (0, 10):
        norms = torch.zeros(64)
        perturb = attack_hook(net, steps, STRETCH, settings(norm=norm, eot=eot), norms)(range(64))
        x = sample(net, diffusion, lambda: start, "ddim", 10, perturb=perturb)
        moved.append((x - clean).square().mean())
        # What a float32 state keeps of a push near the end.
        assert torch.allclose(norms, torch.tensor(0.2), rtol=5e-3)
    assert moved[1] > (1.1 if norm == "l2" else 1) * moved[0] > 0


def test_an_attack_does_not_foresee_the_samplers_noise(monkeypatch):
    """Its start, the same whatever --eot, and the noises it averages over are others."""
    starts, noises = [], []

    def attack(view, diffusion, chosen, start, *_):
        starts.append(start())
        # Half of the ten times: the middles of five equal parts.
        assert chosen == {t for t, _ in step_pairs(diffusion, 10)[1::2]}

    monkeypatch.setattr(evaluate, "next_denoised", lambda *args: noises.extend(args[4]))
    monkeypatch.setattr(evaluate, "trajectory_attack", attack)
    for eot in (0, 4):
        attack_hook(None, 3, STRETCH, settings(norm="l2", eot=eot), None)(range(64))
    assert torch.equal(*starts) and len(noises) == 4
    own = image_noise(0, range(64), PAIR, CPU)()
    for one, other in itertools.combinations([own, starts[0], *noises], 2):
        assert not torch.allclose(one, other) and 0.8 < other.std() < 1.2


def test_next_denoised_is_the_mean_denoised_image_after_the_step():
    net, diffusion, *_ = STRETCH
    x = torch.randn(3, *PAIR, generator=torch.Generator().manual_seed(0)) / 4
    noises = [torch.full_like(x, value) for value in (-1.0, 2.0)]
    view = next_denoised(net, diffusion, [(500, 300), (20, -1)], "ddpm", noises)
    states = [denoise_step(net, diffusion, x, 500, 300, "ddpm", lambda: noise) for noise in noises]
    seen = [denoise(net, diffusion, y, torch.full((3,), 300)) for y in states]
    assert torch.allclose(view(x, torch.full((3,), 500)), sum(seen) / 2)
    assert not torch.allclose(*seen)
    end = denoise_step(net, diffusion, x, 20, -1, "ddpm", None)
    assert torch.allclose(view(x, torch.full((3,), 20)), end)


def test_steps(run, pictures, measure, capsys):
    rows = measure("steps", run, "--num", 12, "--steps", "3,2", "--spacing", "respaced,naive",
                   "--reference", pictures / "folder")["rows"]
    assert [(r["sampler"], r["spacing"], r["steps"]) for r in rows] == list(
        itertools.product(["ddpm", "ddim"], ["respaced", "naive"], [3, 2]))
    assert len({row["fid"] for row in rows if row["steps"] == 3}) == 4
    # The table has the rows side by side, as many as fit.
    shown = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if "fid " in line]
    assert sum(shown, []) == [f"{row['fid']:.5g}" for row in rows]


def test_denoise_of_a_linear_denoiser_by_hand(run, measure, monkeypatch):
    """D(x_t) = x_t / (2 sqrt(a)) from the step where the noise is as strong as the images'."""
    model = load_run(run)
    diffusion, shape, a = model.diffusion, model.shape, model.diffusion.alpha_bar

    def net(x, t):
        return x / (2 * diffusion.at(t, x)[1])

    monkeypatch.setattr(evaluate, "load_run", lambda *_: model._replace(net=net))
    found = measure("denoise", run, "--noise_std", "0.3,1", "--num", 12)
    images = load_images("shapes", 16, 3, split="test")[:12]
    clean = torch.from_numpy(images).float() / 127.5 - 1
    for row, std in zip(found["rows"], (0.3, 1), strict=True):
        t = (((1 - a) / a).sqrt() - std).abs().argmin().item()
        noisy = clean + std * image_noise(0, range(12), shape, CPU, ATTACK)()
        x, noise = a[t].sqrt().float() * noisy, image_noise(0, range(12), shape, CPU)
        for now in range(t, -1, -1):
            x = denoise_step(net, diffusion, x, now, now - 1, "ddpm", noise)
        for name, end in {"input": noisy, "one-shot": noisy / 2, "ancestral": x}.items():
            end = end.clamp(-1, 1)
            psnr = 10 * torch.log10(4 / (end - clean).square().mean((1, 2, 3)))
            given = psnr if name == "input" else given
            assert row[f"{name} psnr"] == pytest.approx(psnr.mean().item(), rel=1e-4)
            assert row[f"{name} gain"] == pytest.approx((psnr - given).median().item(), abs=1e-3)
            level = np.median(evaluate.haar(end)) / 2 / 0.6745
            assert row[f"{name} residual"] == pytest.approx(level, rel=1e-3)
        assert row["t"] == t


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_alarm_sounds_for_a_network_that_deceives_one_step(norm):
    """eps = sin(20 x): a full step overshoots the hill that ten small ones climb. 2 x has none."""
    x0, diffusion, seen = gaussian(64, 16, 0), Diffusion(), []
    cfg = Perturbation(beta_min=0.5, beta_max=1.0, ascent_norm=norm, reg_t=0.2, t_max=0.4)
    found = evaluate.overfit(lambda x, t: torch.sin(20 * x), diffusion, x0, cfg)
    assert found[0.5][0] > 1.2 * found[0.5][1]
    assert found == evaluate.overfit(lambda x, t: torch.sin(20 * x), diffusion, x0, cfg)
    found = evaluate.overfit(lambda x, t: seen.append(t[0].item()) or 2 * x, diffusion, x0, cfg)
    assert found[0.5][0] == pytest.approx(found[0.5][1], rel=1e-3)
    assert sorted({*seen}) == [4, 20, 50, 100, 160]  # Of t what is regularised.


def test_overfit_looks_at_what_training_saw(pictures, in_process, measure, tmp_path):
    """At its images, those that --filter left, noise included, and at the raw weights."""
    in_process("train", *TINY, "--mode", "dsm", "--mult", 1, "--attention", 0, "--dataset",
               "folder", "--data_dir", pictures / "folder", "--noise_p", 0.5, "--noise_std", 0.2,
               "--filter", 0.65, "--lr", 0.01, "--warmup", 0, "--steps", 2, "--save_every", 1,
               "--keep", 2, "--out", tmp_path)
    rows = measure("overfit", tmp_path / "ckpt_0000001.pt", tmp_path, "--num", 3)["rows"]
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["J_train"] != rows[1]["J_train"]
    spoil = Corruption(choose_corruption(20, 0.5, 0, 0), 0, 0.2)
    images = load_images("folder", 16, 3, pictures / "folder", tmp_path)
    chosen = np.flatnonzero(own_noise(images, np.arange(20), spoil) < 0.65)[:3]
    assert chosen[2] > 2 and spoil.kinds[chosen].any()
    model, x0 = load_run(tmp_path, raw=True), training_images(images, chosen, spoil)
    truth = evaluate.overfit(model.net, model.diffusion, x0, Perturbation())
    assert rows[1]["J_train"] == pytest.approx([own for _, own in truth.values()])
    assert rows[1]["ratio"] == pytest.approx(max(after / own for after, own in truth.values()))


@pytest.mark.parametrize("argv, words", [
    ("quality P/corrupt --reference P/folder", "005.png: "),
    ("quality P/wide.npz --reference P/folder", "it is 16x8 RGB"),
    ("quality P/nowhere --reference P/folder", "nowhere is not readable: "),
    ("quality P/few.npz --reference P/folder", "samples: 9 images, 10 are needed"),
    ("quality RUN --features P/no.pt", "no.pt"),
    ("quality RUN --json FILE/a.json", "cannot write FILE/a.json"),
    ("memorization P/folder --reference P/folder --holdout cifar10 --data_dir P/double.npz",
     "has no test split"),
    ("attack RUN --steps 1001", "T = 1000"),
    ("attack RUN --surrogate ROOT/assets/fashion-adv.pt", "its in_channels is 1, that of"),
])
def test_bad_input_is_one_line(argv, words, run, pictures, mistake, tmp_path, monkeypatch):
    """And it is found before any work: nothing is drawn."""
    monkeypatch.setattr(evaluate, "draw", None)
    for word, path in (("P/", f"{pictures}/"), ("RUN", f"{run}"), ("ROOT", f"{ROOT}")):
        argv = argv.replace(word, path)
    argv = argv.split()
    if argv[0] != "denoise" and "--features" not in argv:
        argv += ["--features", pictures / "small.pt"]
    assert words in mistake("evaluate", *argv, "--cache_dir", tmp_path)


def test_processes_that_torchrun_starts_are_sent_to_sample_py(run, mistake, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process; `torchrun sample.py` draws" in mistake("evaluate", "quality", run)
