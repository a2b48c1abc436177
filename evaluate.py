"""Measure a set of images or a trained model, and test the claims on it.

    python evaluate.py quality out/cifar10-adv/samples --reference cifar10
    python evaluate.py attack out/cifar10-adv --norm l2 --budget 0.1
    python evaluate.py overfit out/cifar10-adv/ckpt_*.pt

The commands: quality, memorization, attack, steps, denoise, overfit; each has its own -h. They run
in one process: `torchrun sample.py` draws many images on several GPUs, then `quality` measures.
"""

import contextlib
import hashlib
import inspect
import itertools
import math
import os
import sys
import textwrap
import warnings
from functools import partial
from pathlib import Path

# See sample.py.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from scipy.ndimage import gaussian_filter
from scipy.stats import entropy
from torch import nn

from losses import (Perturbation, ascend, denoise, mean_square, pgd, predict_eps,
                    radius_and_weight, random_omega, trajectory_attack)
from model import diffusers_file
from sample import (ATTACK, EOT, FIXED_BATCH, MAD, SAMPLERS, Parser, UserError, add_sampling_flags,
                    check_alike, check_writable, clean_images, comma_list, commit, crop_resize,
                    denoise_step, draw_images, finite, haar, image_noise, load_run, number,
                    open_images, read_json, run_cli, save_grid, seed_for, setup_device, step_pairs,
                    ticker, user_errors, with_expert, write_atomically, write_json)
from train import (CACHE, PRESETS, choose_images, complete_config, find_source, limit_images,
                   load_corruption, load_images, training_images)

# ---------- Images: uint8 arrays (N, C, H, W)

def shape_of(image):
    """(C, H, W) of a PIL image, C 1 for grey or 3."""
    return 1 if image.mode[0] in "1L" else 3, image.height, image.width


def size_and_colour(shape):
    """(C, H, W) -> "28x28 grey"."""
    return f"{shape[2]}x{shape[1]} {'grey' if shape[0] == 1 else 'RGB'}"


def first_images(images, num, name):
    """The first `num` images, None: all.  UserError where there are fewer, or fewer than 10."""
    if len(images) < (num or 10):
        raise UserError(f"{name}: {len(images)} images, {num or 10} are needed")
    return images[:num]


def read_as_is(path):
    """The images of a folder, zip or npz, to measure: uint8 (N, C, H, H), not cropped or resized.

    Raises UserError, naming the file, for one that is missing, damaged, not square, or not of the
    first one's size and colour.
    """
    source = open_images(path)
    for i, name in enumerate(source.names):
        # A damaged file may raise anything.
        with user_errors(Exception, prefix=f"{path}, {name}: "):
            image = source.read(name)
            shape = shape_of(image)
            if i == 0:
                images = np.empty((len(source.names), *shape), np.uint8)
            if shape != images.shape[1:] or shape[1] != shape[2]:
                raise ValueError(f"it is {size_and_colour(shape)}, the first is "
                                 f"{size_and_colour(images.shape[1:])}: all must be alike, square")
            images[i] = crop_resize(image, shape[1], shape[0])
    return images


def load_reference(name, shape, args, about, config=None, key="reference", split="train"):
    """The images to compare with, made at `shape` (C, H, W) as train.py makes its own: uint8.

    name: a data set of train.py, a folder, a zip or an npz; None: that of the run with `config`.
    about: the provenance, which calls them `key`.
    Raises UserError for what is missing, and with split "test" for a data set without that split.
    """
    folder, cache = args.data_dir, args.cache_dir
    if config and name in (None, config["dataset"]):
        name = config["dataset"]
        folder, cache = folder or config["data_dir"], cache or config["cache_dir"]
    if not name:
        raise UserError("--reference is needed: a data set, a folder, a zip or an npz")
    dataset, label, source = name, f"{name} {split}", None
    if name not in PRESETS:
        dataset, label, folder = "folder", name, name
    if dataset != "shapes":
        source = find_source(dataset, folder, split)
    # A bare set is the training images, unless --data_dir names another one to denoise.
    if (name in PRESETS and split == "test" and source and source.split is None
            and (key == "holdout" or str(folder) == str(config["data_dir"]))):
        raise UserError(f"{folder or f'data/{name}'} has no test split: name a folder, zip or npz "
                        "of held-out images")
    images = load_images(dataset, shape[1], shape[0], folder, cache, split, source)
    made_of = shape_of(source.read(source.names[0])) if source else shape
    if made_of != shape:
        label += f", made {size_and_colour(shape)} of {size_and_colour(made_of)}"
    about.update({key: label, f"{key}_num": len(images), "image": size_and_colour(shape)})
    return images


def open_run(path, args, about, *steps, expert=None):
    """`load_run`, its config complete, noted in the provenance; UserError for more steps than T."""
    run = with_expert(load_run(path, args.device, args.raw), expert, args.device, args.raw)
    if max(steps, default=0) > run.diffusion.T:
        raise UserError(f"--steps {max(steps)}: the model was trained with T = {run.diffusion.T}")
    about.update(run.origin)
    return run._replace(config=complete_config(run.config))


def load_samples(path, args, about):
    """Images to measure: (shape (C, H, W), function that returns them, the run's config or None).

    A run is drawn from by that function: after whatever can be wrong has been found.
    """
    if (path / "ckpt.pt").exists() or path.suffix == ".pt" or diffusers_file(path):
        run = open_run(path, args, about, args.steps, expert=args.expert)
        about["num"] = args.num or 50_000
        return run.shape, lambda: draw(run, about["num"], args, "drawing", args.sampler, args.steps,
                                       args.spacing), run.config
    images = first_images(read_as_is(path), args.num, "samples")
    # The flags did not draw these; sample.py may have, and left a note.
    about.update(dict.fromkeys(["sampler", "steps", "spacing", "stop", "expert", "seed", "raw"]))
    note = (path.parent if path.name == "samples.npz" else path) / "samples.json"
    about.update({key: value for key, value in read_json(note).items() if key != "sha256"})
    about["num"] = len(images)
    return images.shape[1:], lambda: images, None


# ---------- Feature networks: uint8 (B, 3, H, W) -> features (B, d), and perhaps logits

INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")


def build_inception():
    """The Inception of 2015 that FID is defined by, its layers named as in the published file.

    uint8 (B, 3, H, W), resized to 299 -> pool3 features (B, 2048), logits without bias (B, 1008).
    Two quirks set it apart from torchvision's: means that do not count the padding, and a maximum
    in the last block.
    """
    from torchvision.models import inception as layers  # Here, since importing it takes seconds.

    def mean(x, *window):
        return F.avg_pool2d(x, *window, count_include_pad=False)

    def pooling(block, pool):
        class Block(block):
            def _forward(self, x):
                return [*super()._forward(x)[:-1], self.branch_pool(pool(x, 3, 1, 1))]
        return Block

    def last_blocks(c_in):
        return pooling(layers.InceptionE, F.max_pool2d if c_in == 2048 else mean)(c_in)

    class Inception(layers.Inception3):
        def forward(self, x):
            x = F.interpolate(x.float() / 255, (299, 299), mode="bilinear", align_corners=False)
            x = (2 * x - 1).contiguous(memory_format=torch.channels_last)
            for layer in list(self.children())[:-2]:  # Without dropout and fc.
                x = layer(x)
            return x.flatten(1), x.flatten(1) @ self.fc.weight.T

    return Inception(num_classes=1008, aux_logits=False, init_weights=False, inception_blocks=[
        layers.BasicConv2d, pooling(layers.InceptionA, mean), layers.InceptionB,
        pooling(layers.InceptionC, mean), layers.InceptionD, last_blocks, layers.InceptionAux])


def load_inception(path=None):
    """The published network, or other weights that fit it: (net, what it is).

    Without `path` torch.hub fetches the file, checked by its hash.  Raises whatever goes wrong.
    """
    net, file = build_inception(), path
    if file is None:
        torch.hub.load_state_dict_from_url(INCEPTION, map_location="cpu", check_hash=True)
        file = Path(torch.hub.get_dir(), "checkpoints", Path(INCEPTION).name)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    known = INCEPTION.endswith(f"-{digest}.pth")
    return net, f"Inception {digest}" + ("" if known else ", NOT the published network")


def random_inception():
    """The network on He et al.'s initial weights, so that no layer fades: (net, what it is)."""
    net, g = build_inception(), torch.Generator().manual_seed(0)
    for p in net.parameters():
        if p.dim() > 1:
            p.data.normal_(0, math.sqrt(2 / p[0].numel()), generator=g)
    return net, "random Inception (seed 0), NOT comparable with published figures"


@torch.no_grad()
def load_features(args, shape, about):
    """What --features names, as a function for `extract`; the provenance says what it is.

    Grey images are repeated to three channels, but for "pixels". It is tried on one black image of
    `shape` (C, H, W): UserError where it cannot be had or does not bear that.
    """
    name, device = args.features, args.device

    def features(x, index):
        found = net(x if name == "pixels" else x.expand(-1, 3, -1, -1))
        return found if isinstance(found, tuple) else (found,)

    try:
        if name == "inception":
            net, label = load_inception(args.inception)
        elif name == "random":
            net, label = random_inception()
        elif name == "pixels":
            net, label = nn.Flatten(), "pixels, NOT comparable"
        else:
            digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()[:8]
            label = f"{Path(name).name} ({digest}), NOT comparable with published figures"
            with warnings.catch_warnings():  # Deprecated; no other format brings its own code.
                warnings.simplefilter("ignore")
                net = torch.jit.load(name, map_location=device)
        net = net.to(device, memory_format=torch.channels_last).eval()
        rows = features(torch.zeros(1, *shape, dtype=torch.uint8, device=device), None)[0]
        if rows.dim() != 2:
            raise ValueError(f"the output is {tuple(rows.shape)}, not (B, d)")
    except Exception as error:  # Missing, no weights, no network, or what the module raises.
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[-1].strip()
        hint = f": fetch {INCEPTION} and name it with --inception, or use --features random"
        raise UserError(f"--features {name}: {reason}" + hint * (name == "inception")) from error
    about["features"] = label
    return features


@contextlib.contextmanager
def full_precision():
    """No gradients, and no TF32, which `setup_device` allows: figures equal the reference's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        # `enabled` is False by default here, which would be to do without cuDNN.
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=True,
                                                         allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@full_precision()
def extract(images, function, args, title):
    """What function(uint8 (B, C, H, W), their indices) returns, over all: CPU tensors (N, ...).

    Raises UserError where a value is not finite.
    """
    batches, tick = [], ticker(title, len(images))
    for index in torch.arange(len(images)).split(args.batch_size):
        batch = torch.from_numpy(images[index.numpy()]).to(args.device)
        batches.append([values.cpu() for values in function(batch, index)])
        if not all(values.isfinite().all() for values in batches[-1]):
            raise UserError(f"{title}: what the network returns is not finite")
        tick(index[-1].item() + 1)
    return [torch.cat(parts) for parts in zip(*batches)]


# ---------- Neighbours among rows (N, d) of features, a block at a time, in float64

BLOCK = 512


def nearest(x, y, k, device, title, prepare=lambda rows: rows, same=False, radii=None):
    """The k rows of y with the least |x - y|, for each row of x: distances, indices, both (N, k).

    prepare: applied to float64 rows first.
    same: x is y, and a row is no neighbour of itself; a duplicate of it is one, at distance 0.
    radii: (len(y),), to seek the least |x - y| - radius instead, with k = 1.
    """
    device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64.

    def ready(rows):
        return prepare(rows.to(device).double())

    found, tick = [], ticker(title, len(x))
    for i in range(0, len(x), BLOCK):
        a = ready(x[i:i + BLOCK])
        distance = torch.cat([torch.cdist(a, ready(b)) for b in y.split(BLOCK)], dim=1)
        if same:
            distance[:, i:i + len(a)].fill_diagonal_(math.inf)
        if radii is not None:
            distance -= radii.to(distance)
        index = distance.topk(k, largest=False).indices.cpu()
        # cdist takes |x|^2 + |y|^2 - 2 x.y; the differences to the chosen few are exact.
        chosen = ready(y[index.flatten()]).view(*index.shape, -1)
        exact, order = (a[:, None] - chosen).norm(dim=2).cpu().sort(dim=1)
        found.append((exact, index.gather(1, order)))
        tick(i + len(a))
    return tuple(torch.cat(part) for part in zip(*found))


def share_covered(x, y, radii, device, title):
    """Share of rows x in the ball of some row of y, the edge included (Kynkaanniemi et al. 2019).

    radii: (len(y),), to the 3rd nearest of y's own. Precision: generated rows in the balls of real
    ones. Recall: the other way round.
    """
    distance, index = nearest(x, y, 1, device, title, radii=radii)
    return (distance <= radii[index] * (1 + 1e-6)).double().mean().item()


# ---------- Metrics


def frechet(mean1, cov1, mean2, cov2):
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)): Heusel et al. 2017.

    The root's trace is the sum of the roots of the eigenvalues of cov1^(1/2) cov2 cov1^(1/2).
    What rounding leaves below 0 is 0.
    """
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(0.0, distance.item())


def inception_score(logits):
    """exp(mean KL(p(y|x) || p(y))) of each tenth, in file order: (mean, std over the tenths)."""
    n, scores = len(logits), []
    for i in range(10):
        p = logits[i * n // 10:(i + 1) * n // 10].double().softmax(1).numpy()
        scores.append(np.exp(entropy(p, p.mean(0, keepdims=True), axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kid(fake, real, subsets=100, size=1000):
    """Unbiased MMD^2, kernel (x.y / d + 1)^3, over random subsets: (mean, std over subsets).

    Seed and order of drawing are torch-fidelity's. A size above a set's is cut to it.
    """
    size, values = min(size, len(fake), len(real)), []
    rng = np.random.RandomState(2020)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    for _ in range(subsets):
        x, y = (rows[rng.choice(len(rows), size, replace=False)].double() for rows in (fake, real))
        within = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y)))
        values.append((within / (size * (size - 1)) - 2 * kernel(x, y).mean()).item())
    return float(np.mean(values)), float(np.std(values))


def plain_figures(images):
    """What is said of uint8 images (N, C, H, W) without a network, on the [-1, 1] scale: a dict.

    residual_noise: the noise's std by Donoho's estimate, median |Haar detail| / 0.6745, one median
        over all images; nan below 2x2 pixels.
    pixel_std: over all values.  brightness_std: over the images, of their means.
    noise_images: share of images that are mostly noise, their own estimate above .3. The median
        over all images does not notice a few of them.
    """
    detail = np.stack([haar(image.astype(np.int16)) for image in images])
    means = np.array([image.mean() for image in images])
    variance = np.mean([image.var() for image in images]) + means.var()
    # A value is 1 / 127.5 of the scale, and a detail half of what `haar` returns.
    noise, own = (np.median(detail, axis) / 255 / MAD for axis in (None, (1, 2, 3)))
    return {"residual_noise": float(noise), "pixel_std": float(variance**0.5 / 127.5),
            "brightness_std": float(means.std() / 127.5),
            "noise_images": float((own > 0.3).mean())}


def measure_set(images, features, args, about, title, keep=False):
    """Features (N, d) of images (N, C, H, W), their mean, cov and radii, logits if any: a dict.

    features: of `load_features`.  radii: (N,), to the 3rd nearest of the same set.
    keep: cache it (but for the logits), keyed by the images' content and the network.
    """
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(np.ascontiguousarray(images))
    about.setdefault("sha256", {})[title] = digest.hexdigest()[:16]
    digest.update(about["features"].encode())
    path = Path(args.cache_dir or CACHE, f"statistics-{digest.hexdigest()[:16]}.npz")
    if keep:
        with contextlib.suppress(Exception), np.load(path) as file:  # Missing or damaged: anew.
            return {name: torch.from_numpy(file[name]) for name in file}
        check_writable(path)
    rows, *logits = extract(images, features, args, title)
    near, _ = nearest(rows, rows, 3, args.device, f"{title}: radii", same=True)
    found = {"features": rows, "mean": rows.double().mean(0), "cov": rows.T.double().cov(),
             "radii": near[:, -1]}
    if keep:
        write_atomically(path, lambda temporary: np.savez(temporary, **found))
    return found | {"logits": part for part in logits}


def quality_scorer(args, shape, about, config=None):
    """Measure --reference once: function (images, title) -> their quality against it, a dict.

    Its keys: fid, is_mean, is_std (None without logits), kid_mean, kid_std, precision, recall, and
    `plain_figures` of both sets, the reference's with _reference behind the name.
    """
    reference = load_reference(args.reference, shape, args, about, config)
    reference = first_images(reference, args.reference_num, "reference")
    about["reference_num"] = len(reference)
    if args.features == "pixels" and math.prod(shape) > 8192:
        raise UserError(f"--features pixels: {math.prod(shape)} values an image, at most 8192 have "
                        "a covariance to compute with")
    features = load_features(args, shape, about)
    real = measure_set(reference, features, args, about, "reference", keep=True)
    plain = {f"{key}_reference": value for key, value in plain_figures(reference).items()}

    def score(images, title):
        fake = measure_set(images, features, args, about, title)
        x, y = fake["features"], real["features"]
        n, d = min(len(x), len(y)), y.shape[1]
        about["kid_subset"] = min(n, 1000)
        if n <= d and "warning" not in about:
            about["warning"] = f"N = {n} for {d} features: rank-deficient, FID biased upwards"
            print(f"warning: {about['warning']}", file=sys.stderr)
        is_mean, is_std = inception_score(fake["logits"]) if "logits" in fake else (None, None)
        kid_mean, kid_std = kid(x, y)
        return {
            "fid": frechet(fake["mean"], fake["cov"], real["mean"], real["cov"]),
            "is_mean": is_mean, "is_std": is_std, "kid_mean": kid_mean, "kid_std": kid_std,
            "precision": share_covered(x, y, real["radii"], args.device, "precision"),
            "recall": share_covered(y, x, fake["radii"], args.device, "recall"),
            **plain_figures(images), **plain}

    return score


# ---------- Sampling, attacked or not


def draw(run, num, args, title, sampler, steps, spacing, hook=None):
    """`num` images of a run as sample.py draws them: uint8 (num, C, H, W); see `draw_images`."""
    batches = draw_images(run.net, run.diffusion, run.shape, range(num), args.seed, sampler, steps,
                          spacing, args.batch_size, args.device, title, hook, stop=args.stop)
    return np.concatenate([images for _, images in batches])


def next_denoised(net, diffusion, path, sampler, noises):
    """What the denoiser will see after the coming step: a view (x, t) -> (B, ...) to attack.

    It is the mean of D(x_prev) over `noises`, each a draw of the sampler's noise that is kept while
    an attack ascends. A step without noise needs one of them.  path: of `step_pairs`.
    """
    after = dict(path)

    def view(x, t):
        now, prev = t[0].item(), after[t[0].item()]
        output = net(x, t)  # Once for all noises; what it means is for `denoise_step` to say.
        seen = []
        for noise in noises[:1] if sampler == "ddim" or prev < 0 else noises:
            y = denoise_step(lambda *_: output, diffusion, x, now, prev, sampler, lambda: noise)
            seen.append(y if prev < 0 else denoise(net, diffusion, y, torch.full_like(t, prev)))
        return sum(seen) / len(seen)

    return view


def attack_hook(net, attack_steps, run, args, norms):
    """For `draw`: function (image indices) -> the hook that pushes their states while sampling.

    net: whose denoiser to attack.  attack_steps: of PGD; 0 for a random push of the same norm.
    args: seed, steps, spacing, sampler; share of the steps that is attacked, evenly spread; norm
        and budget as `trajectory_attack`; eot, how many of the sampler's noises to average over.
    norms: (num,), filled with each image's largest push, in the ball's own norm and units.
    """
    diffusion = run.diffusion
    path = step_pairs(diffusion, args.steps, args.spacing, args.stop)
    pushes = max(1, round(args.share * len(path)))
    chosen = {path[int((i + 0.5) * len(path) / pushes)][0] for i in range(pushes)}

    def hook(batch):
        # Streams of their own, so that the sampler's noise is that of the images left alone.
        start, coming = (image_noise(args.seed, batch, run.shape, args.device, use)
                         for use in (ATTACK, EOT))
        view = partial(denoise, net, diffusion)
        if args.eot and attack_steps:
            noises = [coming() for _ in range(args.eot)]
            view = next_denoised(net, diffusion, path, args.sampler, noises)
        push = trajectory_attack(view, diffusion, chosen, start, args.norm, args.budget,
                                 attack_steps)

        def measured(x, t):
            y = push(x, t)
            omega = ((y - x) / diffusion.s[t]).flatten(1)
            size = omega.abs().amax(1) if args.norm == "linf" else mean_square(omega).sqrt()
            norms[batch] = torch.maximum(norms[batch], size.cpu())
            return y

        return measured

    return hook


def overfit(net, diffusion, x0, cfg):
    """J after 10 steps of PGD and after the step of training, cfg's: {share: (J_pgd10, J_train)}.

    J = |eps_theta(x_t + s omega, t) - eps_theta(x_t, t)|^2, the mean over x0 (B, C, H, W), at five
    shares of the t that are regularised; x_t, radii and start are the same at every call. A growing
    ratio says that training has learnt to deceive its own step (Wong et al. 2020).
    net: as `load_run` returns it.  Reseeds torch.
    """
    found, view = {}, partial(predict_eps, net, diffusion)
    for share in (0.02, 0.1, 0.25, 0.5, 0.8):
        now = int(share * min(cfg.reg_t, cfg.t_max) * diffusion.T)
        torch.manual_seed(seed_for(FIXED_BATCH, now))
        t = torch.full((len(x0),), now, device=x0.device)
        x_t = diffusion.diffuse(x0, t, torch.randn_like(x0))
        _, s = diffusion.at(t, x_t)
        r, _ = radius_and_weight(s, cfg)
        start = random_omega(r, x_t)
        with torch.no_grad():
            clean = view(x_t, t)
            omegas = (pgd(view, start, x_t, s, t, r, clean, cfg.ascent_norm, 10),
                      ascend(view, start, x_t, s, t, r, clean, cfg))
            found[share] = tuple(mean_square(view(x_t + s * omega, t) - clean).mean().item()
                                 for omega in omegas)
    return found


# ---------- Commands: (args, about), the provenance to add to -> rows of the table


def quality(args, about):
    """FID, IS, KID, precision and recall of images, or of a run; of several, side by side.

    Besides, of both sets: residual noise, the std of the pixels and of the images' brightness, the
    share of images that are mostly noise.
    """
    sets, rows, strips = [], [], {}
    for path in args.samples:  # Whatever can be wrong is found before anything is drawn.
        own = {**about, "samples": str(path)}
        shape, load, config = load_samples(path, args, own)
        sets.append((own, load, quality_scorer(args, shape, own, config)))
    for own, load, score in sets:
        images = load()
        strips[own["samples"]] = images[:16].copy()
        label = {"samples": own["samples"]} if len(sets) > 1 else {}
        rows.append(label | score(images, "samples"))
    # What is said of all sets, such as the reference; what differs is said of each.
    first = sets[0][0]
    about.clear()
    about.update({key: value for key, value in first.items()
                  if all(own.get(key) == value for own, _, _ in sets)})
    if len(sets) > 1:
        about["sets"] = [own for own, _, _ in sets]
    if len({images.shape[1:] for images in strips.values()}) == 1:
        n = min(map(len, strips.values()))
        save_sheet({name: images[:n] for name, images in strips.items()}, args.png)
    return rows


def few_steps(args, about):
    """The quality figures for each number of sampling steps, sampler and spacing."""
    run = open_run(args.run, args, about, *args.steps)
    score, rows, strips = quality_scorer(args, run.shape, about, run.config), [], {}
    for sampler, spacing, steps in itertools.product(args.sampler, args.spacing, args.steps):
        title = f"{sampler} {spacing} {steps}"
        images = draw(run, args.num, args, title, sampler, steps, spacing)
        strips[title] = images[:16].copy()
        rows.append({"sampler": sampler, "spacing": spacing, "steps": steps,
                     **score(images, title)})
    save_sheet(strips, args.png)
    return rows


def attack(args, about):
    """The quality figures of images whose sampling is attacked, the state x moved to x + s_t omega.

    Beside them the same seeds left alone, and pushed at random by the same norm. mse: to the images
    left alone, on the [-1, 1] scale. norm_min, norm_max: of the images' largest omegas.
    """
    run = open_run(args.run, args, about, args.steps, expert=args.expert)
    attacks = {"none": None, "random": (run.net, 0), "white box": (run.net, args.attack_steps)}
    if args.surrogate:
        about["surrogate"] = {}
        other = open_run(args.surrogate, args, about["surrogate"])
        check_alike(run, other)
        attacks["transfer"] = (other.net, args.attack_steps)
    score, rows, strips = quality_scorer(args, run.shape, about, run.config), [], {}
    for name, how in attacks.items():
        norms = torch.zeros(args.num)
        hook = how and attack_hook(*how, run, args, norms)
        images = draw(run, args.num, args, name, args.sampler, args.steps, args.spacing, hook)
        strips[name] = images[:16].copy()
        clean = images if how is None else clean
        mse = np.mean([np.mean((a / 127.5 - b / 127.5) ** 2) for a, b in zip(images, clean)])
        rows.append({"attack": name, **score(images, name), "mse": mse.item(),
                     "norm_min": norms.min().item(), "norm_max": norms.max().item()})
    save_sheet(strips, args.png)
    return rows


def memorization(args, about):
    """Whether samples are copies: the nearest and second nearest training image, d1 and d2 away.

    copied: the share with d1 < d2 / 3. similar: median, 95 % and 99 % quantile of the cosine
    similarity to the most similar training image (pixels: less the mean image), and the shares
    above .9, .95, .99. Beside it held-out images, the curve of an honest model, and the samples
    blurred, since smoothness alone changes similarity. Exact duplicates in training count once.
    Training images are taken as they were before --noise_p: a copy with its noise is not found.
    """
    shape, load, config = load_samples(args.samples, args, about)
    train = load_reference(args.reference, shape, args, about, config)
    if config and args.reference in (None, config["dataset"]):
        train = limit_images(train, config["limit"], config["seed"])
        if config["filter"]:
            train = train[choose_images(train, load_corruption(len(train), config), config)[0]]
    train = first_images(train, args.reference_num, "reference")
    about["reference_num"] = len(train)
    _, once = np.unique([hashlib.sha256(x.tobytes()).digest() for x in train], return_index=True)
    about["duplicates_left_out"] = len(train) - len(once)
    train = train[np.sort(first_images(once, None, "different training images"))]
    held_out = {}
    if args.holdout is not None:
        held_out["held out"] = load_reference(args.holdout, shape, args, about, config, "holdout",
                                              "test")
    features = load_features(args, shape, about)
    base, *_ = extract(train, features, args, "training set")
    pixels = args.features == "pixels"
    mean = torch.from_numpy(train.mean(0, dtype=np.float64)).flatten()

    def direction(rows):
        return F.normalize(rows - mean.to(rows) if pixels else rows)

    images, rows = load(), []
    blurred = np.stack([
        gaussian_filter(image, (0, args.blur, args.blur), output=np.float32).round()
        .astype(np.uint8) for image in images])
    for name, some in {"samples": images, "blurred": blurred, **held_out}.items():
        found, *_ = extract(some, features, args, name)
        near, index = nearest(found, base, 2, args.device, name)
        d1, d2 = near.T / (127.5 if pixels else 1)
        turn, _ = nearest(found, base, 1, args.device, f"{name}: cosine", direction)
        cosine = 1 - turn[:, 0].square() / 2
        rows.append({
            "set": name, "n": len(some), "copied": (d1 < d2 / 3).double().mean().item(),
            "d1": d1.median().item(), "d1/d2": (d1 / d2).nanmedian().item(),
            **{f"similar {q:.0%}": cosine.quantile(q).item() for q in (0.5, 0.95, 0.99)},
            **{f"> {p}": (cosine > p).double().mean().item() for p in (0.9, 0.95, 0.99)}})
        if name == "samples":
            closest = (d1 / d2).nan_to_num(1).argsort()[:32].numpy()
            pairs = np.stack([images[closest], train[index[closest, 0].numpy()]], axis=1)
    save_grid(pairs.reshape(-1, *shape), args.png)
    print(f"{args.png}: pairs of a sample and its nearest training image, least d1 / d2 first")
    return rows


def denoising(args, about):
    """Held-out images plus Gaussian noise, denoised from the time step of nearest s / sqrt(a).

    One-shot: D(x_t). Ancestral: all DDPM steps from t down. All three are clipped to [-1, 1].
    Both are `sample.py --denoise --noise_std S`, with --sampler ddpm --steps t + 1 the second.
    psnr: dB, peak 2, the mean over images; gain: over the input, their median; residual:
    `residual_noise`, std on the [-1, 1] scale.
    """
    net, diffusion, config, shape, _ = open_run(args.run, args, about)
    images = load_reference(args.reference, shape, args, about, config, split="test")
    images = first_images(images, None, "held-out images")[:args.num]
    about["num"], rows = len(images), []
    clean = torch.from_numpy(np.array(images)).float() / 127.5 - 1
    clean_noise = plain_figures(images)["residual_noise"]
    for std in args.noise_std:
        t = (diffusion.noise_level - std).abs().argmin().item()

        def denoised(batch, index):
            noisy = batch.float() / 127.5 - 1
            noisy += std * image_noise(args.seed, index, shape, args.device, ATTACK)()
            levels = torch.full((len(noisy),), std)
            noise = image_noise(args.seed, index, shape, args.device)
            once = clean_images(net, diffusion, noisy, levels, noise)
            x = clean_images(net, diffusion, noisy, levels, noise, "ddpm", t + 1)
            return [noisy.clamp(-1, 1), once, x]

        row = {"t": t, "noise_std": std, "clean residual": clean_noise}
        found = extract(images, denoised, args, f"noise {std}")
        for name, image in zip(("input", "one-shot", "ancestral"), found):
            # An exact image, such as a black one, counts as 100 dB.
            error = (mean_square(image - clean) / 4).clamp(min=1e-10)
            psnr = -10 * error.log10()
            before = psnr if name == "input" else before
            row |= {f"{name} psnr": psnr.mean().item(),
                    f"{name} gain": (psnr - before).median().item(),
                    f"{name} residual": float(np.median(haar(image))) / 2 / MAD}
        rows.append(row)
    return rows


def overfitting(args, about):
    """J under 10 steps of PGD over J under the training step, raw weights, at five shares of t.

    A row for each checkpoint, `ratio` the largest of its five: the alarm of Wong et al. 2020. On
    the first --num training images as training saw them; of t what --reg_t and --t_max left.
    """
    rows, about["checkpoints"] = [], []
    for path in args.run:
        net, diffusion, config, shape, origin = open_run(path, args, {})
        images = load_reference(None, shape, args, about, config)
        images = limit_images(images, config["limit"], config["seed"])
        spoil = load_corruption(len(images), config)
        index = choose_images(images, spoil, config)[0][:args.num]
        x0 = training_images(images, index, spoil)
        cfg = Perturbation.of(config)
        found = overfit(net, diffusion, x0.to(args.device), cfg)
        ratios = {f"at {share:.0%} of t": after / own if own else None
                  for share, (after, own) in found.items()}
        about["checkpoints"].append(origin)
        rows.append({"checkpoint": str(path), "step": origin["step"],
                     "ratio": max(filter(None, ratios.values()), default=None), **ratios,
                     "J_pgd10": [after for after, _ in found.values()],
                     "J_train": [own for _, own in found.values()]})
    about.update(weights="raw", num=len(index))
    return rows


# ---------- Tables, sheets, the command line


def save_sheet(strips, path):
    """Write a PNG: a row of images, uint8 (n, C, H, W), for each of `strips`, named on the left."""
    if path is None:
        return
    save_grid(np.concatenate(list(strips.values())), path, len(next(iter(strips.values()))))
    sheet, margin = Image.open(path).convert("RGB"), 8 + 7 * max(map(len, strips))
    sheet = ImageOps.expand(sheet, (margin, 0, 0, 0), "white")
    for row, name in enumerate(strips):
        middle = (row + 0.5) * sheet.height / len(strips)
        ImageDraw.Draw(sheet).text((4, middle - 6), name, "black")
    sheet.save(path, "PNG")


def print_table(rows):
    """Print rows, dicts of the same keys, side by side: a figure a line. Lists are for the JSON."""
    keys = [key for key, value in rows[0].items() if not isinstance(value, list)]
    columns = [[f"{row[key]:.5g}" if isinstance(row[key], float) else str(row[key])
                for key in keys] for row in rows]
    label, width = (2 + max(map(len, texts)) for texts in (keys, itertools.chain(*columns)))
    abreast = max(1, (100 - label) // width)
    for i in range(0, len(columns), abreast):
        for key, *texts in zip(keys, *columns[i:i + abreast]):
            print(key.ljust(label) + "".join(text.rjust(width) for text in texts))
        print()


COMMANDS = {"quality": quality, "memorization": memorization, "attack": attack, "steps": few_steps,
            "denoise": denoising, "overfit": overfitting}


def parse_args(argv=None):
    """The command line; UserError where it is wrong."""
    positive, whole, ten = number(float, 1e-9), number(int, 1), number(int, 10)
    p = Parser(description=__doc__)
    subparsers, parsers = p.add_subparsers(dest="command", required=True, metavar="command"), {}
    for command, function in COMMANDS.items():
        text = inspect.cleandoc(function.__doc__)
        parsers[command] = subparsers.add_parser(command, help=text.split(".")[0], description=text)

    def adder(*commands):
        def flag(name, **options):
            for command in commands:
                parsers[command].add_argument(name, **options)
        return flag

    model, many = "run folder or checkpoint file of train.py", "how many images"
    flag = adder("quality", "memorization")
    parsers["quality"].add_argument("samples", type=Path, nargs="+",
                                    help=f"{model}, or images: folder, zip, npz; or several")
    parsers["memorization"].add_argument("samples", type=Path,
                                         help=f"{model}, or images: folder, zip, npz")
    flag("--num", type=ten, help=f"{many}; else 50000 of a run, all of a folder")
    flag = adder("attack", "steps")
    flag("run", type=Path, help=model)
    flag("--num", type=ten, default=5000, help=many)
    flag = adder("denoise")
    flag("run", type=Path, help=model)
    flag("--num", type=ten, default=1000, help=many)
    flag("--noise_std", type=comma_list(positive), default=[0.1, 0.2],
         help="std of the noise on the [-1, 1] scale")
    flag = adder("overfit")
    flag("run", type=Path, nargs="+", help=model)
    flag("--num", type=whole, default=16, help=many)

    flag = adder("quality", "memorization", "attack", "steps")
    flag("--features", default="inception",
         help="inception; random: untrained, offline, not comparable; pixels; or FILE.pt, "
              "TorchScript uint8 NCHW -> (B, d)")
    flag("--inception", type=Path, help="file of the Inception's weights; else torch.hub's")
    flag("--reference_num", type=ten, help="only so many images of the reference; else all")
    flag("--png", type=Path, help="file for a picture")
    flag = adder("memorization")
    parsers["memorization"].set_defaults(features="pixels", png=Path("out/memorization.png"))
    flag("--holdout", help="held-out images, as --reference; of a data set the test split")
    flag("--blur", type=positive, default=1.0, help="std of the blurred control, in pixels")
    flag = adder("attack")
    flag("--norm", choices=["l2", "linf"], default="l2", help="the attack's ball")
    flag("--budget", type=positive, default=0.1,
         help="its radius in units of s_t, a root mean square or largest element")
    flag("--attack_steps", type=whole, default=10, help="steps of PGD, a quarter radius each")
    flag("--share", type=number(float, 1e-9, 1), default=0.5, help="of the steps, attacked")
    flag("--eot", type=number(int, 0), default=1,
         help="attack D after the next step, clipping included, in the mean over so many noises of "
              "ddpm; 0: D now, which overlooks the clipping")
    flag("--surrogate", type=Path, help="second run, to attack through as well (transfer)")

    flag = adder("steps")
    flag("--sampler", type=comma_list(str, *SAMPLERS), default=list(SAMPLERS),
         help=f"of {', '.join(SAMPLERS)}")
    flag("--steps", type=comma_list(whole), default=[1000, 500, 300, 100, 50, 20, 10],
         help="network calls an image")
    flag("--spacing", type=comma_list(str, "respaced", "naive"), default=["respaced"],
         help="of respaced, naive")
    add_sampling_flags(adder("quality", "memorization", "attack"))
    flag = adder("steps", "denoise")
    flag("--seed", type=number(int, 0), default=0, help="seed of image 0, 1, ...")
    flag("--raw", action="store_true", help="raw weights instead of the EMA")
    flag("--batch_size", type=whole, default=64, help="images at a time; it changes no figure")
    parsers["steps"].set_defaults(stop=0.0)
    flag = adder("quality", "memorization", "attack", "steps", "denoise")
    flag("--reference", help="a data set of train.py, a folder, zip or npz; else the run's own")
    flag = adder(*COMMANDS)
    flag("--data_dir", type=Path, help="folder, zip or npz of the data set; else the run's")
    flag("--cache_dir", type=Path, help=f"for statistics and decoded images; else {CACHE}")
    flag("--device", default="auto", help="cpu, cuda, cuda:1 or mps")
    flag("--json", type=Path, help="file for the figures and their provenance")
    return p.parse_args(argv)


def main(argv=None):
    """Run a command, print its table and keep it."""
    args = parse_args(argv)
    png, args.raw = getattr(args, "png", None), getattr(args, "raw", True)  # The alarm's are raw.
    about = {key: value for key, value in vars(args).items()
             if key not in ("device", "json")} | {"commit": commit()}
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("evaluate.py runs in one process; `torchrun sample.py` draws on several")
    args.device = setup_device(args.device)[3]
    print(f"output {args.json or 'on the screen alone; --json FILE keeps it'}", flush=True)
    for path in filter(None, (args.json, png)):
        check_writable(path)
    rows = [finite(row) for row in COMMANDS[args.command](args, about)]
    print_table(rows)
    text = "; ".join(f"{key} {value}" for key, value in about.items()
                     if value is not None and not isinstance(value, (list, dict)))
    print(textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False))
    if args.json:
        flat = rows[0] if args.command == "quality" and len(rows) == 1 else {"rows": rows}
        write_json(args.json, {**flat, "provenance": about})


if __name__ == "__main__":
    run_cli(main)
