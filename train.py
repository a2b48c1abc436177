"""Train a diffusion model: plainly (dsm), or with random or adversarial equivariance.

    python train.py                                    embedded shapes, no network, a laptop's CPU
    python train.py --dataset cifar10 --mode adv --noise_p 0.9 --noise_std 0.2
    torchrun --nproc_per_node=8 train.py --dataset celeba --mode adv
    python train.py --dataset cifar10 --mode adv --resume
    python train.py --dataset cifar10 --mode adv --init_from out/cifar10-dsm --steps 50000
    python train.py --dataset cifar10 --mode adv --init_from ddpm-cifar10-32   (published weights)

Writes out/<dataset>-<mode>/: ckpt.pt, log.jsonl, config.json, data.png, curves.png and
samples_<step>.png.
"""

import argparse
import contextlib
import copy
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

# See sample.py.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from losses import (MODES, READINGS, Diffusion, Objective, Perturbation, forward_units,
                    stratified_t)
from model import UNET_KEYS, build_network, read_checkpoint
from sample import (CHOICE, CORRUPT, INIT, LIMIT, ORDER, SHAPES, STEP, Parser, Source, UserError,
                    claim_folder, comma_list, crop_resize, draw_chart, draw_images, duration,
                    find_files, finite, noise_estimate, number, numbered, open_images, read_json,
                    remove_leftovers, run_cli, save_grid, seed_for, setup_device, size_and_date,
                    tell, ticker, to_uint8, user_errors, write_atomically, write_json)

# ---------- Settings: default < preset of the data set < a stored run's < flag

# The defaults of the flags are DDPM's for 64x64 pixels. A text is parsed as if it were given.
PRESETS = {
    "shapes": dict(  # Minutes on one CPU core, and the paper's point: less noise than in the data.
        noise_p=0.9, noise_std=0.2, reg_t=0.2, reg_after=0.75,
        image_size=16, channels=16, mult="1,2,2", blocks=1, attention="8", dropout=0.0, predict="v",
        batch_size=32, steps=3000, lr=3e-3, warmup=100, cooldown=0.75, ema=0.99,
        log_every=100, sample_every=1000, save_every=1000),
    "fashion_mnist": dict(
        image_size=28, in_channels=1, channels=64, mult="1,2,2", attention="14", flip=False,
        steps=50_000, warmup=1000, ema=0.999, sample_every=2500, save_every=1000),
    "cifar10": dict(image_size=32, mult="1,2,2,2", steps=800_000),
    "celeba": dict(),
    "lsun_bedroom": dict(dropout=0.0),
    "folder": dict(),
}
# The defaults of the copy that --t_max fine-tunes: short, and its average forgets the start.
EXPERT = dict(reg_t=1.0, warmup=0, cooldown=0.5, ema=0.99)
# What a checkpoint fixes: the shape of its weights, or the meaning of t.
FIXED = tuple(key for key in UNET_KEYS if key != "dropout") + ("T", "schedule", "predict")
# What makes a training set: a run that begins with another's weights has its data too.
DATA = ("data_dir", "cache_dir", "limit", "noise_p", "noise_std", "noise_blur", "outlier_p",
        "outlier_dir", "filter", "seed")
# The flags that are no settings of a run.
SESSION = ("out", "resume", "overwrite", "new_data", "device")


def widths(text):
    """An argparse type: "1,2,2" -> (1, 2, 2); "0" -> (), none."""
    return () if text == "0" else tuple(comma_list(number(int, 1))(text))


def make_parser(dataset="shapes"):
    """The flags, with the defaults of a data set."""
    share, size, natural = number(float, 0, 1), number(float, 0), number(int, 0)
    count, some, positive = number(int, 1), number(float, 1e-3, 1), number(float, 1e-6)
    on_off, own = argparse.BooleanOptionalAction, Perturbation
    p = Parser(description=__doc__, epilog="In brackets the default, with this --dataset.")

    flag = p.add_argument_group("what to train").add_argument
    flag("--dataset", choices=list(PRESETS), default=dataset, help="data set, and its preset")
    flag("--mode", choices=list(MODES), default="adv", help="objective")
    flag("--data_dir", type=Path, help="folder, zip or npz of the data; else ./data/<dataset>")
    flag("--cache_dir", type=Path, help=f"folder of the decoded images; else {CACHE}")
    flag("--limit", type=natural, default=0, help="train on so many of the decoded images; 0: all")
    flag("--init_from", type=Path,
         help="begin with the EMA weights of another run, whose data are then the default, or of a "
              "folder of diffusers")

    flag = p.add_argument_group("corruption of the data, frozen per image").add_argument
    flag("--noise_p", type=share, default=0.0, help="share of images with Gaussian noise, 0 to 1")
    flag("--noise_std", type=size, default=0.0, help="its std on the [-1, 1] scale")
    flag("--noise_blur", type=size, default=0.0,
         help="correlate the noise: white noise blurred by so many pixels, brought back to its std")
    flag("--outlier_p", type=share, default=0.0, help="share replaced by uniform noise, 0 to 1")
    flag("--outlier_dir", type=Path,
         help="replace them by images of this folder, zip or npz instead")
    flag("--filter", type=threshold, default=0.0,
         help="train only on images whose own noise estimate is below this; 0: all; half: half the "
              "median of the estimates, which is good where most are noisy")

    flag = p.add_argument_group("regulariser (losses.Perturbation)").add_argument
    flag("--reading", choices=list(READINGS), default=own.reading, help="form of the radius")
    flag("--lam", type=size, default=own.lam, help="weight lambda")
    flag("--rho", type=number(float, 1e-3), default=own.rho, help="exponent of the radius")
    flag("--beta_min", type=positive, default=own.beta_min, help="lower end of beta")
    flag("--beta_max", type=positive, help="its upper end; else 1 for sigma, 16/255 for epsilon")
    flag("--ascent_steps", type=count, default=own.ascent_steps, help="gradient steps of omega")
    flag("--ascent_norm", choices=["linf", "l2"], default=own.ascent_norm,
         help="linf: sign steps in the box; l2: along the gradient")
    flag("--ascent_step", type=size, default=own.ascent_step, help="a sign step, in radii")
    flag("--reg_t", type=some, default=own.reg_t,
         help="regularise only t below this share of T; .1 takes 3.5 units of compute instead of 8")
    flag("--reg_share", type=some, default=own.reg_share,
         help="regularise a random share of each batch, which stands for all")
    flag("--reg_after", type=share, default=own.reg_after,
         help="regularise only after this share of --steps: plain training learns the structure "
              "of images faster")
    flag("--t_max", type=some, default=own.t_max,
         help="train on t below this share of T alone: an expert for sample.py; by default then "
              + ", ".join(f"{key} {value}" for key, value in EXPERT.items()))
    flag("--ip_gamma", type=size, default=own.ip_gamma, help="--mode ip: std of the second noise")
    flag("--detach_target", action=on_off, default=own.detach_target,
         help="no gradient through the unperturbed branch")

    flag = p.add_argument_group("network and diffusion").add_argument
    flag("--image_size", type=number(int, 2), default=64, help="pixels a side")
    flag("--in_channels", type=int, choices=[1, 3], default=3, help="1 grey, 3 RGB")
    flag("--channels", type=count, default=128, help="width of the first level")
    flag("--mult", type=widths, default="1,2,2,2,4", help="width of each level / channels")
    flag("--blocks", type=count, default=2, help="residual blocks a level")
    flag("--attention", type=widths, default="16", help="resolutions with attention; 0 for none")
    flag("--dropout", type=number(float, 0, 0.99), default=0.1, help="probability")
    flag("--T", type=number(int, 1, 10**6), default=1000, help="diffusion steps")
    flag("--schedule", default="linear", help="noise schedule: linear or cosine")
    flag("--predict", choices=["eps", "v"], default="eps",
         help="what the network returns; the loss is the same. With v plain training learns the "
              "structure of images in fewer steps")

    flag = p.add_argument_group("training").add_argument
    flag("--batch_size", type=count, default=128, help="images a step, over all processes")
    flag("--accum", type=count, default=1, help="parts that a process takes one by one")
    flag("--steps", type=count, default=500_000, help="optimiser steps in all")
    flag("--lr", type=size, default=2e-4, help="Adam's learning rate")
    flag("--warmup", type=natural, default=5000, help="steps of linear warm-up, 0 for none")
    flag("--cooldown", type=share, default=0.0,
         help="the rate falls to 0 over this share of the steps, the last; 0: constant, as DDPM's")
    flag("--ema", type=number(float, 0, 0.999999), default=0.9999, help="EMA decay")
    flag("--grad_clip", type=size, default=1.0, help="largest gradient norm, 0 for no limit")
    flag("--flip", action=on_off, default=True, help="random horizontal flips")
    flag("--seed", type=natural, default=0, help="seed of all that is random")

    flag = p.add_argument_group("machine").add_argument
    flag("--device", default="auto", help="cpu, cuda, cuda:1 or mps")
    flag("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto",
         help="mixed precision; auto: bf16 or fp16 on CUDA, else off")
    flag("--compile", action=on_off, help="torch.compile; else on with CUDA only")

    flag = p.add_argument_group("reports, each in steps, 0 is off").add_argument
    flag("--log_every", type=natural, default=100, help="a line on the screen and in log.jsonl")
    flag("--sample_every", type=natural, default=10_000,
         help="a grid of EMA samples, not of an expert's")
    flag("--save_every", type=natural, default=5000,
         help="a checkpoint; there is one with each grid and at the end as well")

    group = p.add_argument_group("run folder")
    flag, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    flag("--keep", type=count, default=1, help="the newest so many stay, as ckpt_<step>.pt")
    flag("--out", type=Path, help="where it is; else out/<dataset>-<mode>")
    either("--resume", action="store_true", help="go on from its checkpoint, with its settings")
    either("--overwrite", action="store_true", help="replace the run that is there")
    flag("--new_data", action="store_true", help="resume although the data has changed")
    p.set_defaults(**PRESETS[dataset])
    return p


def parse_args(argv=None):
    """The settings and the checkpoint to begin from: (Namespace, dict or None).

    Raises UserError for flags that are wrong, foolish together, or at odds with the checkpoint.
    """
    # The first parse finds what the defaults depend on, the second one has these defaults.
    argv = sys.argv[1:] if argv is None else list(argv)
    p, saved, stored = make_parser(), None, {}
    p.set_defaults(dataset=None)
    given = p.parse_args([word for word in argv if word not in ("-h", "--help")])
    if given.init_from and not (given.resume and (given.out or given.dataset)):
        with user_errors(ValueError):
            saved = read_checkpoint(given.init_from)
        stored = saved["config"]
    dataset = given.dataset or stored.get("dataset")
    dataset = dataset if dataset in PRESETS else "shapes"
    out = given.out or Path(f"out/{dataset}-{given.mode}")
    if out.is_file():
        raise UserError(f"--out {out} is a file: name the folder of the run")
    if given.resume:
        with user_errors(ValueError):
            saved = read_checkpoint(out)
        if not saved.get("optimizer"):
            raise UserError(f"{out} holds nothing to resume from: begin with it by --init_from")
    p = make_parser(dataset)
    if given.init_from:  # It has learned the structure.
        p.set_defaults(reg_after=0.0)
    if given.t_max < 1:
        p.set_defaults(**EXPERT)
    if saved:
        same = DATA if stored.get("dataset") == dataset and not given.data_dir else ()
        p.set_defaults(**{key: value for key, value in saved["config"].items()
                          if given.resume or key in (*FIXED, "dropout", *same)})
    args = p.parse_args(argv)
    args.out = out

    for key in FIXED if saved else ():
        value = getattr(args, key)
        stored = saved["config"].get(key, value)
        if value != stored:
            raise UserError(f"--{key} {value}: the checkpoint has {stored}")
    if args.dataset == "shapes" and args.data_dir:
        raise UserError("--data_dir: the data set shapes is drawn; say which --dataset it is")
    for folder in filter(None, (args.data_dir, args.outlier_dir)):
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--out {out} is in a folder of data: its pictures would become data")
    if bool(args.noise_p) != bool(args.noise_std):
        raise UserError("--noise_p and --noise_std go together: one of them is 0")
    if not args.outlier_p:
        args.outlier_dir = None
    if args.t_max < 1 and not args.init_from:
        raise UserError("--t_max makes an expert of a trained model: name that by --init_from")
    if args.mode == "aware" and not args.filter:
        raise UserError("--mode aware needs --filter: an estimate below it counts as no noise")
    return args, saved


# ---------- Training


def learning_rate(step, cfg):
    """Adam's rate in a step, from 0: linear warm-up, constant, linear to 0 over the last share."""
    warm = (step + 1) / max(1, cfg.warmup)
    cool = (cfg.steps - step) / max(1, cfg.cooldown * cfg.steps)
    return cfg.lr * min(1, warm, cool)


def update(objective, parts, weights, averages, optimizer, scaler, autocast, grad_clip, decay):
    """One optimiser step on the sum of parts, (x0, t, eps, ...) each, and the EMA's.

    Returns {"loss": ..., the objective's figures, "grad_norm": ...}, scalars on the device: to
    read one would wait for it.
    """
    total = {}
    for i, part in enumerate(parts):
        objective.require_backward_grad_sync = i == len(parts) - 1
        with autocast:
            loss, figures = objective(*part)
        scaler.scale(loss / len(parts)).backward()
        for name, value in {"loss": loss.detach(), **figures}.items():
            total[name] = total.get(name, 0) + value / len(parts)
    scaler.unscale_(optimizer)
    total["grad_norm"] = nn.utils.clip_grad_norm_(weights, grad_clip or math.inf).detach()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        torch._foreach_lerp_(averages, weights, 1 - decay)
    return total


def main(argv=None):
    """Train a run; returns 128 + the signal that stopped it, else None."""
    # --- settings: whatever can be wrong is found before anything is written

    args, saved = parse_args(argv)
    rank, local, world, device = setup_device(args.device)
    out, lead, cuda = args.out, rank == 0, device.type == "cuda"
    cfg = argparse.Namespace(**{key: str(value) if isinstance(value, Path) else value
                                for key, value in vars(args).items() if key not in SESSION})
    tell(f"output {out}")

    start = saved["step"] if args.resume else 0
    there = [] if args.resume else run_files(out)
    if there and not set(UNET_KEYS) <= read_json(out / "config.json").keys():
        raise UserError(f"{there[0]} is of no run that could be replaced: take another --out")
    if there and not args.overwrite:
        raise UserError(f"{out} holds a run: --resume continues it, --overwrite replaces it")
    if start >= cfg.steps:
        raise UserError(f"{out} is at step {start} of {cfg.steps}: more of them with --steps")
    if cfg.batch_size % (world * cfg.accum):
        raise UserError(f"--batch_size {cfg.batch_size} does not divide into {world} processes "
                        f"x {cfg.accum} parts")

    # --- network: the same initial weights on every rank

    torch.manual_seed(seed_for(INIT, cfg.seed))
    with user_errors(ValueError):
        net = build_network(vars(cfg)).to(device, memory_format=torch.channels_last)
        ema = copy.deepcopy(net).eval().requires_grad_(False)
        diffusion = Diffusion(cfg.T, cfg.schedule, device, cfg.predict)
    if saved:
        with user_errors(RuntimeError, TypeError, prefix="its weights do not fit its config: "):
            net.load_state_dict(saved["model" if args.resume else "ema"])
            ema.load_state_dict(saved["ema"])
    weights, averages = list(net.parameters()), list(ema.parameters())
    optimizer = torch.optim.Adam(weights, cfg.lr, fused=True)
    amp = cfg.amp
    if amp == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "bf16" if bf16 else "fp16" if cuda else "off"
    autocast = torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16,
                              enabled=amp != "off")
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    if args.resume:
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
        stored = saved["config"]
        changed = [f"{key} {stored.get(key)} -> {value}" for key, value in vars(cfg).items()
                   if stored.get(key) != value]
        tell("; ".join([f"resuming at step {start:,}", *changed]))
    perturbation = Perturbation.of(vars(cfg))
    rule = objective = Objective(net, diffusion, cfg.mode, perturbation).train()
    compiled = cuda if cfg.compile is None else cfg.compile
    if compiled:
        if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
            raise UserError("--compile needs a C++ compiler, and there is none: --no-compile")
        # Up to four graphs: the batch, what is regularised of it, that frozen, and the rest.
        net.compile(dynamic=False)
    if world > 1:
        objective = DistributedDataParallel(objective, device_ids=[device.index] if cuda else None,
                                            gradient_as_bucket_view=True)

    # --- data: fetched and decoded by one process a machine while the others wait

    def load():
        sources = [] if cfg.dataset == "shapes" else [find_source(cfg.dataset, cfg.data_dir)]
        images = load_images(cfg.dataset, cfg.image_size, cfg.in_channels, cfg.data_dir,
                             cfg.cache_dir, source=sources[0] if sources else None)
        images = limit_images(images, cfg.limit, cfg.seed)
        if cfg.outlier_dir:
            sources.append(find_source("folder", cfg.outlier_dir))
        return images, load_corruption(len(images), vars(cfg)), data_identity(*sources)

    try:
        loaded = load() if local == 0 else None
    finally:  # The others wait here. What could not be read, they then meet themselves.
        any_rank([], world)
    images, spoil, data = loaded or load()
    before = saved.get("data", data) if args.resume else data
    if before != data and not args.new_data:
        raise UserError(f"the data of {out} has changed ({before['files']} files before, now "
                        f"{data['files']}): --new_data accepts it")
    chosen, noise = choose_images(images, spoil, vars(cfg))
    mine = slice(rank, None, world)  # This process's images of a batch; its parts take turns.

    def fetch(step):
        index = chosen[batch_index(step, cfg.batch_size, len(chosen), cfg.seed)[mine]]
        batch = [training_images(images, index, spoil)]
        if cfg.mode == "aware":
            batch.append(noise[index])
        return [part.pin_memory() if cuda else part for part in batch]

    del saved
    tell(f"data {cfg.dataset}: {len(images):,} images {tuple(images.shape[1:])}, of which "
         f"{np.sum(spoil.kinds == NOISY):,} with noise of std {cfg.noise_std}, "
         f"{np.sum(spoil.kinds == OUTLIER):,} outliers")
    seen = own_noise(images, np.arange(0, len(images), -(-len(images) // 2000)), spoil)
    low, middle, high = seen.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    tell(f"their own noise estimates: {low:.3f}, {middle:.3f}, {high:.3f} (10, 50, 90 %), "
         f"{(seen < middle / 2).float().mean():.1%} below half the median")
    tell(f"net {sum(p.numel() for p in weights):,} parameters, mode {cfg.mode} of "
         f"{forward_units(cfg.mode, perturbation):.3g} forward-units a step, "
         f"{world} x {device.type}, {torch.get_num_threads()} threads, amp {amp}, "
         f"compile {'on' if compiled else 'off'}")

    # --- run folder: claimed now, and written to once the first step has succeeded

    if lead:
        lock = claim_folder(out)  # noqa: F841  held until the process ends

    def claim():
        drop_beyond(out, start)
        write_json(out / "config.json", vars(cfg))
        some = np.linspace(0, len(chosen) - 1, min(64, len(chosen))).astype(int)
        save_grid(to_uint8(training_images(images, chosen[some], spoil)), out / "data.png")

    def draw():
        drawn = draw_images(ema, diffusion, images.shape[1:], range(64), cfg.seed,
                            steps=min(50, cfg.T), device=device, title="samples",
                            batch_size=max(1, 64 * 64**2 // cfg.image_size**2))  # For memory.
        save_grid(np.concatenate([part for _, part in drawn]), out / f"samples_{step:07d}.png")

    # --- loop

    signals = catch_signals()
    loader = ThreadPoolExecutor(1)
    ahead = loader.submit(fetch, start)
    step = kept = start
    reg_begin = round(cfg.reg_after * cfg.steps)
    recent, waited, stopped_by = [], 0.0, False
    began = mark = time.perf_counter()

    while step < cfg.steps and not stopped_by:
        tic = time.perf_counter()
        x0, *known = [part.to(device, non_blocking=True) for part in ahead.result()]
        waited += time.perf_counter() - tic
        ahead = loader.submit(fetch, step + 1)

        # All that is random in a step depends on (seed, rank, step): resume is exact. Flips, t
        # and eps are drawn for the whole batch: they do not depend on the number of parts.
        torch.manual_seed(seed_for(STEP, cfg.seed, 0, step))
        flipped = torch.rand(cfg.batch_size, 1, 1, 1, device=device)[mine] < 0.5
        t = stratified_t(cfg.batch_size, math.ceil(cfg.t_max * cfg.T), device)[mine]
        eps = torch.randn(cfg.batch_size, *images.shape[1:], device=device)[mine]
        if rank:
            torch.manual_seed(seed_for(STEP, cfg.seed, rank, step))
        if cfg.flip:
            x0 = torch.where(flipped, x0.flip(-1), x0)
        x0, eps = (x.contiguous(memory_format=torch.channels_last) for x in (x0, eps))

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        # The decay ramps up, so that a short run's average is not one of its first weights. One
        # that begins with another run's weights must not forget them.
        decay = cfg.ema if cfg.init_from else min(cfg.ema, (1 + step) / (10 + step))
        rule.perturbation = replace(perturbation, lam=cfg.lam if step >= reg_begin else 0.0)
        batch = [[x[i::cfg.accum] for x in (x0, t, eps, *known)] for i in range(cfg.accum)]
        figures = update(objective, batch, weights, averages, optimizer, scaler, autocast,
                         cfg.grad_clip, decay)
        recent.append(torch.stack(list(figures.values())))
        step += 1

        # The figures stay on the device until something is due.
        stopped_by = any_rank(signals, world)
        first, last = step == start + 1, step == cfg.steps
        logs, saves, draws = (every and step % every == 0 for every in (
            cfg.log_every, cfg.save_every, cfg.sample_every))
        begins = step == reg_begin  # From here on a step has more figures.
        # An expert alone draws nothing to look at.
        draws = (draws or last and cfg.sample_every) and cfg.t_max == 1
        saves = saves or draws or step == 1 or last or stopped_by
        if not (first or logs or saves or begins or len(recent) % 100 == 0):
            continue

        table = torch.stack(recent)
        if world > 1:
            dist.all_reduce(table)
        table = (table / world).cpu()
        # Loss and gradient; under fp16 the scaler skips a step whose gradient overflows.
        sound = table[:, 0].isfinite() & (table[:, -1].isfinite() | scaler.is_enabled())
        if not sound.all():
            good = f"{out}/ckpt.pt, of step {kept}" if kept else "none was saved"
            bad = step - len(recent) + 1 + int(sound.int().argmin())
            raise UserError(f"the loss or its gradient is not finite at step {bad}; last "
                            f"checkpoint: {good}")
        if logs or first or last:
            spent = (time.perf_counter() - mark) / len(recent)
            means = table.where(table.isfinite(), math.nan).nanmean(0).tolist()
            row = {"step": step, **dict(zip(figures, means)), "lr": learning_rate(step - 1, cfg),
                   "img_s": cfg.batch_size / spent, "s_step": spent,
                   "data_wait": waited / len(recent) / spent, "eta_s": (cfg.steps - step) * spent}
            tell(log_line(row, cfg.steps))
        tic = time.perf_counter()
        if lead:
            if first:
                claim()
            if logs or last:  # Before the checkpoint: a resumed run drops the lines past its step.
                with open(out / "log.jsonl", "a") as file:
                    file.write(json.dumps(finite(row)) + "\n")
            if saves:
                save_checkpoint(out, {
                    "model": net.state_dict(), "ema": ema.state_dict(), "step": step,
                    "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                    "config": vars(cfg), "data": data}, cfg.keep)
            if draws:
                draw()
            if draws or last:
                draw_curves(out)
        kept = step if saves else kept
        mark += time.perf_counter() - tic  # A picture's time is not a step's.
        if logs or begins or len(recent) >= 1000:
            recent, waited, mark = [], 0.0, time.perf_counter()

    loader.shutdown()
    if world > 1:
        any_rank([], world)  # Who leaves before the checkpoint is written makes torchrun end all.
        dist.destroy_process_group()
    if stopped_by:
        name = signal.Signals(stopped_by).name
        tell(f"stopped by {name} at step {step:,}; saved, --resume continues")
        return 128 + stopped_by
    tell(f"done: step {step:,} after {duration(time.perf_counter() - began)}, see {out}")
    tell("next: python sample.py "
         + (f"{cfg.init_from} --expert {out}" if cfg.t_max < 1 else f"{out}"))


# ---------- Signals, and the screen


def any_rank(signals, world):
    """The signal that any process has received, 0 without; all wait here, but for no GPU."""
    number = torch.tensor(max(signals, default=0))
    if world > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def catch_signals():
    """A list that gets the number of a signal to stop; a second one ends a lone process at once."""
    received = []
    alone = not (dist.is_initialized() or "TORCHELASTIC_RUN_ID" in os.environ)

    def note(number, _):
        received.append(number)
        if alone:  # torchrun repeats a signal to whoever still saves, and kills after 30 s.
            signal.signal(number, signal.SIG_DFL)

    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(name) != signal.SIG_IGN:  # As nohup sets it.
            signal.signal(name, note)
    return received


def log_line(row, steps):
    """A row of log.jsonl for the screen, in less than 120 characters."""
    shown = "  ".join(f"{name} {row[name]:.4f}" for name in ("loss", "dsm", "reg", "grad_norm")
                      if name in row)
    return (f"step {row['step']:,}/{steps:,}  {shown}  {row['img_s']:.0f} img/s  "
            f"{row['s_step']:.3f} s/step  data {row['data_wait']:.0%}  "
            f"ETA {duration(row['eta_s'])}")


# ---------- Run folder

DIGITS = "[0-9]" * 7
RUN_FILES = ("ckpt.pt", f"ckpt_{DIGITS}.pt", "config.json", "log.jsonl", "data.png",
             "curves.png", f"samples_{DIGITS}.png")


def run_files(out):
    """The files in a folder that have the names of a run's."""
    return [path for pattern in RUN_FILES for path in out.glob(pattern)]


def complete_config(config):
    """A run's settings with the defaults for those that it lacks; the data set may stay None."""
    dataset = config.get("dataset")
    defaults = vars(make_parser(dataset if dataset in PRESETS else "shapes").parse_args([]))
    defaults["dataset"] = None
    return {key: value for key, value in defaults.items() if key not in SESSION} | config


def drop_beyond(out, step):
    """Drop what a run will make (again) from `step` on: log lines, checkpoints and samples.

    From step 0 on that is all: a fresh run takes this folder only to replace what is there.
    """
    log, kept = out / "log.jsonl", []
    for line in log.read_text().splitlines() if log.exists() else []:
        with contextlib.suppress(ValueError):  # A kill may cut a line short.
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    for path in run_files(out):
        number = path.stem[-7:]
        if step == 0 or number.isdigit() and int(number) > step:
            path.unlink()
    write_atomically(log, lambda temporary: temporary.write_text("".join(kept)))


def draw_curves(out):
    """curves.png from log.jsonl: the loss and its parts, the gradient's norm, the learning rate."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    sheet = Image.new("RGB", (3 * 320, 320), "white")
    for i, (title, names, scale) in enumerate((
            ("log10 of the loss", ("loss", "dsm", "reg"), np.log10),
            ("log10 of the gradient's norm", ("grad_norm",), np.log10),
            ("learning rate", ("lr",), np.asarray))):
        curves = {name: [(row["step"], scale(row[name])) for row in rows
                         if isinstance(row.get(name), float) and row[name] > 0] for name in names}
        curves = {name: points for name, points in curves.items() if points}
        if curves:
            sheet.paste(draw_chart(curves, "step", title, size=320), (i * 320, 0))
    sheet.save(out / "curves.png")


def save_checkpoint(out, state, keep):
    """Write ckpt.pt, whole at every moment; keep > 1 also as ckpt_<step>.pt, the newest `keep`."""
    with user_errors(RuntimeError, prefix=f"{out} cannot be written, is the disk full? "):
        for name in ["ckpt.pt", f"ckpt_{state['step']:07d}.pt"][:keep]:
            write_atomically(out / name, lambda temporary: torch.save(state, temporary))
    for old in sorted(out.glob(f"ckpt_{DIGITS}.pt"))[:-keep if keep > 1 else None]:
        old.unlink()


# ---------- Data: every set becomes one uint8 array (N, C, H, W)


def shapes(n, size, channels, seed):
    """n anti-aliased coloured discs and boxes on dark grey: uint8 (n, channels, size, size)."""
    rng = np.random.default_rng([SHAPES, seed])

    def uniform(low, high):
        return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)

    pixel = np.arange(size, dtype=np.float32) + 0.5
    dx = abs(pixel[None, None, :] - size * uniform(0.35, 0.65))
    dy = abs(pixel[None, :, None] - size * uniform(0.35, 0.65))
    radius, width, height = (size * uniform(0.15, 0.33) for _ in range(3))
    is_disc = rng.random((n, 1, 1)) < 0.5
    # The signed distance to the outline, in pixels.
    distance = np.where(is_disc, np.hypot(dx, dy) - radius, np.maximum(dx - width, dy - height))
    cover = np.clip(0.5 - distance, 0, 1)[:, None]
    hue = 6 * uniform(0, 1)[..., None] + np.array([0, 4, 2], np.float32)[None, :, None, None]
    colour = np.clip(abs(hue % 6 - 3) - 1, 0, 1)
    if channels == 1:
        colour = 0.5 + 0.5 * colour[:, :1]
    return np.round(255 * (0.15 + (colour - 0.15) * cover)).astype(np.uint8)


class ArrayUnpickler(pickle.Unpickler):
    """Reads CIFAR-10's batches: numpy arrays and plain values, nothing that could run."""

    def find_class(self, module, name):
        known = module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype")
        if known or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which was not run")


def open_cifar(files):
    """CIFAR-10's python batches: (names, read) of a `Source`."""
    batches = [ArrayUnpickler(open(file, "rb"), encoding="bytes").load() for file in files]
    images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
    return numbered(images.transpose(0, 2, 3, 1))


def open_idx(files):
    """(Fashion-)MNIST's gzipped idx file: (names, read)."""
    with gzip.open(files[0]) as file:
        shape = np.frombuffer(file.read(16), ">i4")[1:]
        return numbered(np.frombuffer(file.read(), np.uint8).reshape(shape))


def open_lsun(files):
    """LSUN's lmdb: (names, read). torchvision's reader pickles its keys into the current folder."""
    import lmdb
    base = lmdb.open(str(files[0].parent), readonly=True, lock=False)
    with base.begin() as transaction:
        keys = list(transaction.cursor().iternext(values=False))

    def read(key):
        with base.begin() as transaction:  # A transaction serves one thread only.
            return Image.open(io.BytesIO(transaction.get(key)))

    return keys, read


# The formats that data sets are published in: a reader, and the files of each split.
PUBLISHED = {
    "cifar10": (open_cifar, {"train": [f"data_batch_{i}" for i in range(1, 6)],
                             "test": ["test_batch"]}),
    "fashion_mnist": (open_idx, {"train": ["train-images-idx3-ubyte.gz"],
                                 "test": ["t10k-images-idx3-ubyte.gz"]}),
    "lsun_bedroom": (open_lsun, {"train": ["bedroom_train_lmdb/data.mdb"],
                                 "test": ["bedroom_val_lmdb/data.mdb"]}),
}


def published_files(dataset, root, split):
    """The files of a published format, below `root` where the first of them is found, else []."""
    names = PUBLISHED[dataset][1][split] if dataset in PUBLISHED else []
    for file in find_files(root) if names and root.is_dir() else []:
        if file.match(names[0]):
            return [Path(str(file).removesuffix(names[0]), name) for name in names]
    return []


def open_source(dataset, root, split="train"):
    """The `Source` of a data set at `root`: its published files, else a folder, zip or npz.

    Raises UserError for one that is empty or damaged, naming the file.
    """
    files = published_files(dataset, root, split)
    if files:
        with user_errors(Exception, prefix=f"{files[0]} is not readable: "):
            return Source(*PUBLISHED[dataset][0](files), size_and_date(root, files), split)
    source = open_images(root)
    if dataset == "celeba":
        # The official split is by file number; a folder with fewer files than CelebA is used whole.
        names = source.names[:162_770] if split == "train" else source.names[182_637:]
        source = source._replace(names=names, split=split)
    if not source.names:
        raise UserError(f"no {split} images of {dataset} in {root}")
    return source


def find_source(dataset, data_dir=None, split="train"):
    """The `Source` of a data set in `data_dir`, else in data/<dataset>, downloaded if need be.

    Raises UserError for one that is not there, or that torchvision cannot fetch.
    """
    root = Path(data_dir or f"data/{dataset}")
    makers = {"cifar10": "CIFAR10", "fashion_mnist": "FashionMNIST", "celeba": "CelebA"}
    if dataset not in makers and not data_dir and not root.exists():
        raise UserError(f"--dataset {dataset} needs --data_dir: the folder or zip that holds it")
    try:
        return open_source(dataset, root, split)
    except UserError:  # Not there, or half a download.
        if data_dir or dataset not in makers:
            raise
    tell(f"downloading {dataset} to {root}")
    # Network, quota, a missing helper package: all end alike.
    with user_errors(Exception, prefix=f"{dataset} could not be downloaded, fetch it by hand and "
                                       "name its folder or zip with --data_dir: "):
        from torchvision import datasets
        # CelebA takes the split. The others fetch all, and take it as `train`, which is true then.
        getattr(datasets, makers[dataset])(root, split, download=True)
    return open_source(dataset, root, split)


CACHE = Path("out/cache")
# The usual 128x128 pixels of CelebA's aligned images, around (89, 121).
CELEBA_FACE = (25, 57, 153, 185)


def load_images(dataset, image_size, in_channels, data_dir=None, cache_dir=None, split="train",
                source=None):
    """A data set as a uint8 array (N, in_channels, image_size, image_size), memory-mapped.

    cache_dir: where the decoded .npy goes, None is `CACHE`. Its name holds a hash of the settings
        and of the source's names, sizes and dates: others never meet it.
    source: of `find_source`, where it is open already.
    """
    if dataset == "shapes":
        n, seed = (10_000, 0) if split == "train" else (2000, 1)
        return shapes(n, image_size, in_channels, seed)
    source = source or find_source(dataset, data_dir, split)
    root = Path(data_dir or f"data/{dataset}")
    folder = Path(cache_dir or CACHE)
    key = json.dumps([dataset, split, image_size, in_channels, str(root), source.files])
    key = hashlib.sha256(key.encode()).hexdigest()[:12]
    cache = folder / f"{dataset}-{split}-{image_size}x{in_channels}-{key}.npy"

    def decode_one(name):
        with user_errors(Exception, prefix=f"{name} of {root} is not readable: "):
            image = source.read(name)
            aligned = dataset == "celeba" and image.size == (178, 218)
            return crop_resize(image, image_size, in_channels, CELEBA_FACE if aligned else None)

    def decode(path):
        n = len(source.names)
        tell(f"decoding {n:,} images of {root}")
        tick = ticker("decoding", n)
        # Written, not memory-mapped: a full disk is an error then, and no signal.
        with open(path, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
            np.lib.format.write_array_header_1_0(file, {
                "descr": "|u1", "fortran_order": False,
                "shape": (n, in_channels, image_size, image_size)})
            for first in range(0, n, 1000):
                for image in pool.map(decode_one, source.names[first:first + 1000]):
                    file.write(image.tobytes())
                tick(min(first + 1000, n))

    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if not cache.exists():
        write_atomically(cache, decode)
    with user_errors(EOFError, ValueError, prefix=f"{cache} is damaged, delete it: "):
        return np.load(cache, mmap_mode="r")


def data_identity(*sources):
    """What tells data from others: their number and a hash over names and sizes, not dates."""
    names = [(name, size) for source in sources for name, (size, _) in source.files.items()]
    return {"files": len(names),
            "sha256": hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]}


def limit_images(images, limit, seed):
    """`limit` of the images, chosen by the seed, in their order; 0: all. UserError: too few."""
    if limit > len(images):
        raise UserError(f"--limit {limit}: the data set has {len(images)} images")
    if not limit:
        return images
    chosen = np.random.default_rng([LIMIT, seed]).permutation(len(images))[:limit]
    return images[np.sort(chosen)]


@lru_cache(maxsize=4)
def permutation(seed, epoch, n):
    """The order of one pass over n images."""
    return np.random.default_rng([ORDER, seed, epoch]).permutation(n)


def batch_index(step, batch_size, n, seed):
    """Indices of the global batch of a step: an endless row of shuffled passes, cut to size."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return np.array([permutation(seed, k // n, n)[k % n] for k in positions])


# ---------- Corruption, and what is filtered out of it

CLEAN, NOISY, OUTLIER = 0, 1, 2


def choose_corruption(n, noise_p, outlier_p, seed):
    """Which images are spoiled: uint8 (n,) of CLEAN, NOISY, OUTLIER. Exact shares, in a seed.

    A larger share contains the smaller one's images. Outliers replace whatever was there.
    """
    kinds = np.full(n, CLEAN, np.uint8)
    for kind, share in ((NOISY, noise_p), (OUTLIER, outlier_p)):
        order = np.random.default_rng([CHOICE, seed, kind]).permutation(n)
        kinds[order[:round(share * n)]] = kind
    return kinds


class Corruption(NamedTuple):
    """What spoils a training set, frozen: a function of (seed, index), never stored or re-drawn."""

    kinds: np.ndarray  # of `choose_corruption`, one for each image
    seed: int
    noise_std: float = 0.0  # on the [-1, 1] scale
    noise_blur: float = 0.0  # pixels
    strangers: np.ndarray | None = None  # uint8 (M, C, H, W): outliers instead of uniform noise


def load_corruption(n, config):
    """The `Corruption` of n images by a run's settings, a dict.  UserError: no --outlier_dir."""
    strangers = None
    if config["outlier_dir"]:
        strangers = load_images("folder", config["image_size"], config["in_channels"],
                                config["outlier_dir"], config["cache_dir"])
    kinds = choose_corruption(n, config["noise_p"], config["outlier_p"], config["seed"])
    return Corruption(kinds, config["seed"], config["noise_std"], config["noise_blur"], strangers)


def training_images(images, index, spoil):
    """The training set's images at `index`, as the model sees them: float32 (B, C, H, W).

    spoil: `Corruption`. On the [-1, 1] scale. NOISY: plus Gaussian noise, not clipped.
    OUTLIER: uniform noise or a stranger instead.
    """
    x = torch.from_numpy(images[index]).float() / 127.5 - 1
    for row in np.flatnonzero(spoil.kinds[index]):
        rng = np.random.default_rng([CORRUPT, spoil.seed, int(index[row])])
        if spoil.kinds[index[row]] == NOISY:
            noise = rng.standard_normal(x[row].shape, np.float32)
            if spoil.noise_blur:
                noise = gaussian_filter(noise, (0, spoil.noise_blur, spoil.noise_blur), mode="wrap")
                noise = noise / np.sqrt(np.mean(noise**2))
            x[row] += spoil.noise_std * torch.from_numpy(noise)
        elif spoil.strangers is not None:
            other = spoil.strangers[rng.integers(len(spoil.strangers))]
            x[row] = torch.from_numpy(np.array(other)).float() / 127.5 - 1
        else:
            x[row] = 2 * torch.from_numpy(rng.random(x[row].shape, np.float32)) - 1
    return x


def own_noise(images, index, spoil):
    """Each training image's own estimate of its noise, see `noise_estimate`: float32 (len(index),).

    Blind: it sees what the model sees, and knows nothing of `spoil`.
    """
    found, tick = [], ticker("noise estimates", len(index))
    for first in range(0, len(index), 100):
        part = index[first:first + 100]
        found.append(noise_estimate(training_images(images, part, spoil)))
        tick(first + len(part))
    return torch.cat(found)


def threshold(text):
    """An argparse type, what --filter takes: a number of at least 0, or "half"."""
    return text if text == "half" else number(float, 0)(text)


def choose_images(images, spoil, config):
    """The indices that a run trains on, and with --filter the noise of each image, else None.

    The noise is the image's own estimate, or 0 below the threshold: texture is no noise.
    """
    chosen, limit = np.arange(len(images)), config["filter"]
    if not limit:
        return chosen, None
    estimates = own_noise(images, chosen, spoil)
    if limit == "half":
        limit = estimates.median().item() / 2
    noise = torch.where(estimates < limit, 0, estimates)
    if config["mode"] != "aware":  # That takes all.
        chosen = chosen[(noise == 0).numpy()]
    if not len(chosen):
        raise UserError(f"--filter {limit:.3g} leaves no image: 10 % of their estimates are below "
                        f"{estimates.quantile(0.1):.3f}")
    tell(f"--filter {limit:.3g} takes {(noise == 0).sum():,} as clean")
    return chosen, noise


if __name__ == "__main__":
    run_cli(main)
