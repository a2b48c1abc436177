"""What the CUDA paths do, in numbers: run by hand where there is a card; small on a CPU as a test.

    python tests/gpu.py bench                    img/s, memory, share of the card's peak, a peer
    python tests/gpu.py check                    CUDA against the CPU, one check after another
    python tests/gpu.py cifar10 --data_dir FOLDER --features FILE.pt    dsm and adv side by side
    python tests/gpu.py bench dsm adv:reg_t=0.1 dsm:channels=64 --all batch_size=8 --device cpu

A verb ends within its --minutes, with what it has: --out/<verb>.json is a list of records {name,
figures, error, seconds, provenance}, written after each item; one that fails leaves its error there
and the next goes on. A row of bench is a mode of losses.py, or diffusers (its UNet2DModel trained
by dsm), and options for this row alone: flags of train.py, and eager, compiled, reduce-overhead.

A machine without a network is given: wheels of diffusers, httpx and importlib_metadata; CIFAR-10's
images as a folder or zip; the file that tests/features.py writes. What a later call on that machine
goes on with lies in --runs. On an H100 the first use of cuDNN took one to two minutes, and the
graph of CIFAR-10's network 100 s to compile: run `bench` first and alone, then `check`.
"""

import contextlib
import copy
import functools
import gc
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch._dynamo.utils import counters

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import evaluate  # noqa: E402
import evidence  # noqa: E402
import losses  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from losses import Diffusion, Objective, Perturbation, forward_units  # noqa: E402
from model import build_network, diffusers_config, read_checkpoint  # noqa: E402
from sample import (Parser, UserError, comma_list, draw_images, load_run,  # noqa: E402
                    number, run_cli, setup_device, to_uint8, write_json)

SMALL = "image_size=32:channels=64:mult=1,2:blocks=1:attention=16:batch_size=32"
TINY = "image_size=8:channels=8:mult=1:blocks=1:attention=0:batch_size=8"
LSUN = "image_size=256:mult=1,1,2,2,4,4:dropout=0"
LOW_T = "adv:reg_t=0.1"  # The recommended form.
PAIR = ("dsm", LOW_T)
PEER = "diffusers"
HOW = {"eager": {}, "compiled": {}, "reduce-overhead": {"mode": "reduce-overhead"}}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # Dense bf16 FLOP/s of the SXM cards.

# ---------- A row: train.py with some flags, in this process


def read_row(row, args):
    """A row's settings: train.py's, its flags `argv`, `how`, `peer`, `shape`, `perturbation`."""
    name, *options = row.split(":")
    how = "compiled" if args.device.type == "cuda" else "eager"
    argv = ["--dataset", "cifar10", "--mode", "dsm" if name == PEER else name,
            "--sample_every", "0", "--save_every", "0"]
    for option in filter(None, [*args.all.split(":"), *options]):
        if option in HOW:
            how = option
        else:
            argv.append(f"--{option}")
    argv.append("--no-compile" if how == "eager" else "--compile")
    settings, _ = train.parse_args(argv)
    settings.perturbation = Perturbation.of(vars(settings))
    settings.argv, settings.how, settings.peer = argv, how, name == PEER
    settings.shape = settings.in_channels, settings.image_size, settings.image_size
    return settings


def network(config, peer=False, device="cpu"):
    """Our network or diffusers' of the same shape; near-zero layers are drawn anew.

    A fresh network gives the ascent no gradient, and hides what dropout does.
    """
    with torch.device(device):
        if peer:
            from diffusers import UNet2DModel  # This row's alone.
            net = UNet2DModel(**diffusers_config(config))
            net.forward = functools.partial(lambda call, x, t: call(x, t).sample, net.forward)
        else:
            net = build_network(config)
    for p in net.parameters():
        if p.dim() > 1 and p.std() < 1e-4:
            nn.init.xavier_uniform_(p.flatten(1))
    return net


@contextlib.contextmanager
def before_each_step(hook):
    """Call `hook` with the number of each step, from 0, that train.py takes in this process."""
    rate = train.learning_rate

    def hooked(step, cfg):
        hook(step)
        return rate(step, cfg)

    with mock.patch.object(train, "learning_rate", hooked):
        yield


def train_row(row, args, *flags, hook=lambda step: None):
    """The log of train.py's own loop on 64 embedded images, nothing being saved: a list of dicts.

    The first of them has the number of compiled `graphs` too.
    """
    settings = read_row(row, args)
    compiler = {"backend": "eager"} if args.tiny else HOW[settings.how]
    fakes = {"find_source": lambda *_: mock.Mock(files={}),
             "load_images": lambda _, size, channels, *__, **___: train.shapes(
                 64, size, channels, 0),
             "build_network": functools.partial(network, peer=settings.peer, device=args.device),
             "setup_device": lambda _: (0, 0, 1, args.device),
             "catch_signals": list, "save_checkpoint": lambda *_: None}
    if settings.how != "eager":
        torch.compiler.reset()
    counters.clear()
    with (tempfile.TemporaryDirectory(dir=args.runs) as out, before_each_step(hook),
          mock.patch.multiple(train, **fakes),
          mock.patch.object(nn.Module, "compile",
                            functools.partialmethod(nn.Module.compile, **compiler))):
        train.main([*settings.argv, *map(str, flags), "--out", f"{out}/run"])
        log = [json.loads(line) for line in Path(out, "run/log.jsonl").read_text().splitlines()]
    return [{**log[0], "graphs": counters["stats"]["unique_graphs"]}, *log[1:]]


# ---------- Items: whatever one of them does, the next runs and the file is whole


class OutOfTime(BaseException):
    """The minutes are over; no handler of ordinary errors may swallow it."""


def out_of_time(*_):
    """What the alarm does."""
    raise OutOfTime


def run_items(args, items):
    """Run {name: function without arguments -> figures} one by one, and write what they find."""
    cuda = args.device.type == "cuda"
    about = {"card": torch.cuda.get_device_name(args.device) if cuda else platform.machine(),
             "torch": torch.__version__, "python": platform.python_version(), "all": args.all,
             "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"),
             "commit": sample.commit()}
    records = []
    signal.signal(signal.SIGALRM, out_of_time)
    for name in args.only or items:
        record = {"name": name, "figures": None, "error": None, "provenance": about}
        records.append(record)
        began = time.monotonic()
        try:
            if began > args.deadline:
                raise OutOfTime
            # Repeated, in case that a library swallows even this.
            signal.setitimer(signal.ITIMER_REAL, args.deadline - began + 0.01, 5)
            with open(args.runs / "gpu.log", "a") as log, contextlib.redirect_stdout(log):
                record["figures"] = items[name]()
        except OutOfTime:
            record["error"] = f"no time left of {args.minutes} minutes"
        except Exception:
            record["error"] = traceback.format_exc()[-2500:]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        record["seconds"] = round(time.monotonic() - began, 2)
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
            record["MiB_left"] = torch.cuda.memory_allocated(args.device) / 2**20
        write_json(args.out / f"{args.verb}.json", records)
        text = record["error"] or json.dumps(record["figures"], default=str)
        print(f"--- {name}, {record['seconds']} s: {text[-1500:]}", flush=True)
    return records


# ---------- Runs of train.py in processes of their own

CHILDREN = []


def start_training(out, *flags):
    """train.py in a process that ends with this one; what it prints goes to <out>.log."""
    command = [sys.executable, ROOT / "train.py", *flags, "--out", out]
    child = subprocess.Popen([str(word) for word in command], cwd=ROOT, stderr=subprocess.STDOUT,
                             stdout=open(f"{out}.log", "w"))
    CHILDREN.append(child)
    return child


def end_training(child, out, expected):
    """Wait for a train.py; RuntimeError with its last words unless it ends as expected."""
    status = child.wait()
    if status != expected:
        words = Path(f"{out}.log").read_text()[-1000:]
        raise RuntimeError(f"train.py ended with {status}: {words}")


# ---------- check


def set_exact(on=True):
    """fp32 without TF32 and cuDNN's deterministic algorithms; or what sample.py computes with."""
    torch.set_float32_matmul_precision("highest" if on else "high")
    torch.backends.cudnn.allow_tf32 = not on
    torch.backends.cudnn.deterministic = on


def loss_and_gradient(net, settings, device):
    """(loss, all gradients in one vector) of a network's copy on a device; both on the CPU.

    All that is random is drawn on the CPU: devices have streams of their own.
    """
    g, n = torch.Generator().manual_seed(1), settings.batch_size
    net = copy.deepcopy(net).to(device)
    x0, eps = torch.randn(2, n, *settings.shape, generator=g).to(device)
    t = (torch.arange(n) * 1000 // n).to(device)
    objective = Objective(net, Diffusion(device=device), settings.mode, settings.perturbation)
    with mock.patch.object(torch, "rand_like",
                           lambda like: torch.rand(like.shape, generator=g).to(device)):
        loss, _ = objective(x0, t, eps)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in net.parameters()]).cpu()


def check_gradients(args):
    """The device's loss and gradients against the CPU's, fp32; sign steps may flip at a zero."""
    found = {}
    set_exact()
    for row in ("dsm", "random", "adv:ascent_norm=l2", "adv", "invariant", LOW_T):
        settings = read_row(f"{row}:dropout=0", args)
        torch.manual_seed(0)
        net = network(vars(settings))
        loss, gradient = loss_and_gradient(net, settings, torch.device("cpu"))
        here, there = loss_and_gradient(net, settings, args.device)
        found[row] = {"loss": abs(here / loss - 1),
                      "gradient": ((there - gradient).norm() / gradient.norm()).item()}
        bound = 1e-2 if settings.mode in ("adv", "invariant") else 1e-4
        found[row]["holds"] = max(found[row].values()) < bound
    return found


def check_compiled(args):
    """A first step with dropout, eager and compiled, on the same random numbers; and its cost."""
    import torch._inductor.config as inductor
    found = {}
    set_exact()
    for row in PAIR:
        for how in ("eager", "compiled"):
            with inductor.patch(fallback_random=True):
                log, = train_row(f"{row}:{how}:dropout=0.1:amp=off", args, "--steps", 1)
            found[f"{row} {how}"] = {key: log[key]
                                     for key in ("loss", "grad_norm", "s_step", "graphs")}
    return found


def check_masks(args):
    """Dropout in the branches of a step that is given no omega: distances from the clean one.

    They are zero, but for rounding, if the inner and the moved branch drop the same units.
    """
    found = {}

    def no_omega(view, omega, x_t, s, t, r, clean, cfg, rewind):
        rewind()
        inner = view(x_t.detach().requires_grad_(), t)  # As the ascent calls it.
        found[how] = {"inner": (inner - clean).abs().max().item()}
        return torch.zeros_like(omega)

    for how in list(HOW)[:2]:
        with mock.patch.object(losses, "ascend", no_omega):
            row, = train_row(f"adv:{how}:dropout=0.3:amp=off", args, "--steps", 1)
        found[how]["moved"] = row["equivariance"] ** 0.5
    return found


def check_precision(args):
    """Mean loss of the last fifth of 100 steps in bf16 and fp16, and its ratio to fp32's."""
    found, steps = {}, 5 if args.tiny else 100
    for row in PAIR:
        for amp in ("off", "bf16", "fp16"):
            log = train_row(f"{row}:eager:dropout=0:amp={amp}", args, "--steps", steps,
                            "--log_every", steps // 5, "--warmup", 0)
            late = log[-1]["loss"]
            full = late if amp == "off" else full
            found[f"{row} {amp}"] = {"loss": late, "ratio": late / full}
    return found


def check_waits(args):
    """How often ten steps wait for the device, and where first; dsm, and the recommended form."""
    found = {}
    notice = torch.cuda.set_sync_debug_mode if args.device.type == "cuda" else lambda _: None

    def hook(step):
        if step in (3, 13):
            notice("warn" if step == 3 else "default")

    for row in PAIR:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_row(f"{row}:eager", args, "--steps", 15, "--log_every", 0, hook=hook)
        # One warning says that the mode is a prototype.
        waits = [str(warning) for warning in caught if "synchroniz" in str(warning.message)
                 and "prototype" not in str(warning.message)]
        found[row] = {"waits": len(waits), "first": waits[0][:500] if waits else None}
    return found


def check_inception(args):
    """Features of the (random) Inception against the CPU's, and whether cuDNN is on for them."""
    net, _ = evaluate.random_inception()
    images = torch.from_numpy(train.shapes(16, 32, 3, 0))
    with evaluate.full_precision():
        here, there = (net.to(device).eval()(images.to(device))[0].cpu()
                       for device in (torch.device("cpu"), args.device))
        return {"apart": ((there - here).norm() / here.norm()).item(),
                "cudnn": torch.backends.cudnn.enabled, "tf32": torch.backends.cudnn.allow_tf32,
                "version": torch.backends.cudnn.version()}


def small_run(name, args, hook=lambda step: None):
    """Train args.runs/<name> as train.py does; returns the flags."""
    flags = ["--mode", "adv", "--reg_t", "0.1", "--dropout", "0.1", "--no-compile", "--device",
             args.device.type, "--sample_every", "0", "--steps", "100"]
    if args.tiny:
        flags += [*(f"--{flag}" for flag in TINY.split(":")), "--steps", "6"]
    with before_each_step(hook):
        train.main([*flags, "--overwrite", "--out", str(args.runs / name)])
    return flags


def check_resume(args):
    """A run that SIGTERM stopped and a new process resumed, against one left alone; and two alone.

    `resumed` and `two_alone` are the largest differences of a weight after the last step.
    """
    stopped = args.runs / "stopped"
    flags = small_run("stopped", args,
                      lambda step: step == 3 and os.kill(os.getpid(), signal.SIGTERM))
    step = read_checkpoint(stopped)["step"]
    end_training(start_training(stopped, *flags, "--resume"), stopped, 0)
    small_run("again", args)
    small_run("whole", args)
    resumed, again, whole = (read_checkpoint(args.runs / name)["model"]
                             for name in ("stopped", "again", "whole"))

    def apart(other):
        return max((other[key] - value).abs().max().item() for key, value in whole.items())

    return {"stopped_at": step, "resumed": apart(resumed), "two_alone": apart(again)}


def trained(args):
    """The folder of a trained run."""
    if not (args.runs / "whole/ckpt.pt").exists():
        small_run("whole", args)
    return args.runs / "whole"


def check_sampling(args):
    """Levels of 255 between the device's images and the CPU's, without TF32 and as sampled."""
    found, cpu = {}, torch.device("cpu")
    for sampler in ("ddim", "ddpm"):
        ends = {}
        for name, device in (("cpu", cpu), ("exact", args.device), ("as sampled", args.device)):
            set_exact(name != "as sampled")
            run = load_run(trained(args), device)
            parts = draw_images(run.net, run.diffusion, run.shape, range(16), sampler=sampler,
                                steps=10, device=device)
            ends[name] = np.concatenate([part.astype(int) for _, part in parts])
            apart = abs(ends[name] - ends["cpu"])
            found[f"{sampler} {name}"] = {"levels": int(apart.max()), "share": (apart > 0).mean()}
    return found


def evaluated(file, command, *flags):
    """The JSON of one of evaluate.py's commands, which `file` keeps."""
    evaluate.main([str(word) for word in (command, *flags, "--json", file)])
    return json.loads(file.read_text())


def check(args):
    """All checks, the cheapest and weightiest first."""
    args.all = args.all or (TINY if args.tiny else SMALL)
    few = ["--num", 16, "--batch_size", 16]
    small = [*few, "--reference_num", 32, "--features", "pixels" if args.tiny else "random"]
    commands = {"quality": [*small, "--steps", 10], "attack": [*small, "--steps", 10],
                "steps": [*small, "--steps", "10,5"], "memorization": [*small, "--steps", 10],
                "denoise": few, "overfit": few[:2]}
    items = {name: functools.partial(globals()[f"check_{name}"], args) for name in (
        "waits", "inception", "precision", "gradients", "masks", "resume", "sampling")}
    for name, flags in commands.items():
        items[name] = lambda name=name, flags=flags: evaluated(
            args.runs / f"{name}.json", name, trained(args), "--device", args.device, *flags)
    items["compiled"] = lambda: check_compiled(args)
    run_items(args, items)


# ---------- bench


def forward_flops(settings):
    """Floating-point operations of the network's forward of one image: convolutions, products."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_network(vars(settings))(torch.zeros(1, *settings.shape), torch.zeros(1).long())
    return counter.get_total_flops()


def measure(row, args):
    """The figures of a row, its first steps left out.

    On CUDA a time is the mean of five steps, since to wait after each would stall the launches.
    """
    settings, cuda, began = read_row(row, args), args.device.type == "cuda", {}
    block = 5 if cuda else 1

    def hook(step):
        began.setdefault(step, time.perf_counter())
        if cuda and step == 2 * block:
            torch.cuda.reset_peak_memory_stats(args.device)

    log = train_row(row, args, "--steps", block * (2 + args.repeats), "--log_every", block,
                    hook=hook)
    spent = sorted(line["s_step"] for line in log[2:])
    middle = statistics.median(spent)
    units = forward_units(settings.mode, settings.perturbation)
    flops = units * settings.batch_size * forward_flops(settings)
    card = torch.cuda.get_device_name(args.device) if cuda else ""
    peak = next((rate for name, rate in PEAK.items() if name in card), None)
    return {"row": row, "how": settings.how, "seconds (median)": middle,
            "fastest to slowest": f"{spent[0]:.4f} to {spent[-1]:.4f}",
            "x the first": middle / args.first.setdefault(settings.how, middle),
            "forward-units": units, "images / s": settings.batch_size / middle,
            "MiB": torch.cuda.max_memory_allocated(args.device) / 2**20 if cuda else None,
            "share of the bf16 peak": peak and flops / middle / peak,
            "first step, seconds": began[1] - began[0], "graphs": log[0]["graphs"]}


def profile(row, args):
    """The ten costliest kernels of three steps of a row, and the device's busy time."""
    from torch.profiler import ProfilerActivity
    cuda = args.device.type == "cuda"
    kind = "device" if cuda else "cpu"
    profiler = torch.profiler.profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda)

    def hook(step):
        if step == 3:
            profiler.start()
        if step == 6:
            torch.cuda.synchronize() if cuda else None
            profiler.stop()

    log = train_row(row, args, "--steps", 8, "--log_every", 3, hook=hook)
    events = [event for event in profiler.key_averages()
              if not cuda or event.device_type.name == "CUDA"]
    total = {event.key[:80]: getattr(event, f"self_{kind}_time_total") / 3000 for event in events}
    top = sorted(total.items(), key=lambda pair: -pair[1])[:10]
    return {"ms_step": 1000 * log[1]["s_step"], f"{kind}_ms_step": sum(total.values()),
            "top_ms": dict(top)}


def measure_ddim(args):
    """ddim's images a second in fp32, as sample.py draws them."""
    settings = read_row("dsm", args)
    n, steps = (256, 50) if args.device.type == "cuda" else (16, 5)
    net = network(vars(settings)).to(args.device, memory_format=torch.channels_last).eval()
    for _ in range(2):
        tic = time.perf_counter()
        list(draw_images(net, Diffusion(device=args.device), settings.shape, range(n), steps=steps,
                         batch_size=n, device=args.device))
        spent = time.perf_counter() - tic
    return {"steps": steps, "batch": n, "s_step": spent / steps, "images / s": n / spent}


def largest_batch(row, args):
    """The largest batch with which a step of LSUN's 256-pixel network fits the card's memory."""

    # cuDNN's search for the fastest algorithms costs more than the steps, and memory of its own.
    @torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True)
    def measure(n):
        torch.cuda.reset_peak_memory_stats(args.device)
        log = train_row(f"{row}:{LSUN}:eager:batch_size={n}", args, "--steps", 3, "--log_every", 1)
        return log[-1]["s_step"], torch.cuda.max_memory_allocated(args.device) / 2**20

    # --reg_t 0.1 regularises a whole number of either.
    low, high = measure(10)[1], measure(20)[1]
    room = torch.cuda.mem_get_info(args.device)[1] / 2**20 - 1500
    n = min(int(10 + 10 * (room - low) / max(high - low, 1)), 512)
    while True:
        try:
            spent, used = measure(n)
            return {"batch_size": n, "MiB": used, "room_MiB": room, "images / s": n / spent}
        except torch.OutOfMemoryError:
            n = int(0.92 * n)
        gc.collect()
        torch.cuda.empty_cache()


def bench(args):
    """Rows given by name; or all that there is to measure, compiled rows last: they cost most."""
    cuda = args.device.type == "cuda"
    args.all = args.all or (TINY if args.tiny else "" if cuda else "batch_size=16")
    args.first = {}
    four = ["dsm", "adv", LOW_T, "random"] + [PEER] * bool(importlib.util.find_spec(PEER))
    rows = args.rows or [f"{row}:eager" for row in four]
    late = [f"{row}:compiled" for row in four] + ["dsm:reduce-overhead", "adv:reduce-overhead"]
    for row in rows:
        read_row(row, args)
    items = {row: functools.partial(measure, row, args) for row in rows}
    if not args.rows:
        items |= {f"profile {row}": functools.partial(profile, f"{row}:eager", args)
                  for row in PAIR}
        items["ddim"] = lambda: measure_ddim(args)
    if cuda and not args.rows:
        items |= {f"lsun {row}": functools.partial(largest_batch, row, args)
                  for row in ("dsm", LOW_T, "adv")}
        items |= {row: functools.partial(measure, row, args) for row in late}
    found = [record["figures"] for record in run_items(args, items)]
    found = [figures for figures in found if figures and "row" in figures]
    print(evidence.table(found[0] if found else [], found))


# ---------- cifar10: dsm and the recommended form on 90 % noisy images, at equal time

MODES = {"dsm": ["--mode", "dsm"], "adv-low-t": ["--mode", "adv", "--reg_t", "0.1"]}


def cifar10(args):
    """Train both until the time is up but for what measuring takes; draw; measure; keep weights."""
    if not args.data_dir or not args.features:
        raise UserError("cifar10 needs --data_dir and --features")
    size, num, steps = (8, 40, 2) if args.tiny else (32, 5000, 50)
    place = ["--device", args.device, "--data_dir", args.data_dir, "--cache_dir",
             args.runs / "cache"]
    sizes = ["--channels", 64, "--batch_size", 128, "--log_every", 100, "--save_every", 1000]
    if args.tiny:
        sizes = [*(f"--{flag}" for flag in TINY.split(":")), "--log_every", 1]
    images = train.load_images("cifar10", size, 3, args.data_dir, args.runs / "cache")
    folders = {name: args.runs / f"cifar10-{name}" for name in MODES}
    logs = [out / "log.jsonl" for out in folders.values()]
    before = [log.stat().st_size if log.exists() else 0 for log in logs]
    children = {name: start_training(
        out, "--dataset", "cifar10", *MODES[name], "--noise_p", 0.9, "--noise_std", 0.2,
        "--dropout", 0, *sizes, "--lr", 4e-4, "--warmup", 500, "--ema", 0.999, "--sample_every", 0,
        "--steps", 10**6, *place, *["--resume"] * (out / "ckpt.pt").exists())
        for name, out in folders.items()}
    index = np.linspace(0, len(images) - 1, num).astype(int)
    kinds = train.choose_corruption(len(images), 0.9, 0, 0)
    noisy = to_uint8(train.training_images(images, index, train.Corruption(kinds, 0, 0.2))).numpy()
    strips = {"clean": images[index], "noisy": noisy}

    def quality(name, file):
        return evaluated(args.runs / f"quality-{name}.json", "quality", file, "--reference",
                         "cifar10", "--features", args.features, "--batch_size", 250, *place)

    def baseline(name):
        """The training images themselves, while the networks compile and train."""
        np.savez(args.runs / f"{name}.npz", strips[name].transpose(0, 2, 3, 1))
        return quality(name, args.runs / f"{name}.npz")

    def training():
        def grown():
            return all(log.exists() and log.stat().st_size > size
                       for log, size in zip(logs, before))

        while all(child.poll() is None for child in children.values()) and not (
                time.monotonic() > args.deadline - args.reserve and grown()):
            time.sleep(0.1)
        for child in children.values():
            child.terminate()
        found = {}
        for name, out in folders.items():
            end_training(children[name], out, 143)
            last = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][-20:]
            found[name] = {key: statistics.median(row[key] for row in last)
                           for key in ("dsm", "img_s", "s_step", "data_wait")}
            found[name]["step"] = read_checkpoint(out)["step"]
        return found

    def drawn(name):
        out = args.runs / f"cifar10-{name}-samples"
        sample.main([str(word) for word in (
            folders[name], "--num", num, "--steps", steps, "--batch_size", 500, "--overwrite",
            "--device", args.device, "--out", out)])
        with np.load(out / "samples.npz") as file:
            strips[name] = file["arr_0"].transpose(0, 3, 1, 2)
        evaluate.save_sheet({key: some[:16] for key, some in strips.items()},
                            args.out / "cifar10.png")
        return quality(name, out / "samples.npz")

    def weights():
        """The EMA's parameters in one row, float16, in two files each."""
        for name, out in folders.items():
            vector = torch.cat([p.flatten() for p in load_run(out).net.parameters()]).half()
            for i, part in enumerate(vector.chunk(2)):
                torch.save(part.clone(), args.out / f"cifar10-{name}-ema{i}.pt")

    items = {name: functools.partial(baseline, name) for name in ("clean", "noisy")}
    items["training"] = training
    items |= {name: functools.partial(drawn, name) for name in MODES}
    run_items(args, items | {"weights": weights})


VERBS = {"check": (check, 2.5), "bench": (bench, 3.5), "cifar10": (cifar10, 6.5)}


def main(argv=None):
    """Entry point; see the module's docstring."""
    p = Parser(description=__doc__)
    flag = p.add_argument
    flag("verb", choices=VERBS, help="what to do")
    flag("rows", nargs="*", help="of bench; else all that are worth it")
    flag("--minutes", type=number(float, 0.01), help="else the verb's own 2.5, 3.5 or 6.5")
    flag("--device", default="auto", help="cpu, cuda or cuda:1")
    flag("--all", default="", help="options of all rows, such as batch_size=8:amp=bf16")
    flag("--only", type=comma_list(str), help="items to run, with commas between; else all")
    flag("--repeats", type=number(int, 2), default=7, help="timings of a row")
    flag("--tiny", action="store_true", help="the tests' sizes, without inductor")
    flag("--data_dir", type=Path, help="CIFAR-10's images, a folder or zip")
    flag("--features", type=Path, help="what tests/features.py wrote")
    flag("--reserve", type=number(float, 0), default=110,
         help="seconds of cifar10 that are left for drawing and measuring")
    flag("--out", type=Path, default=ROOT / "out/gpu", help="folder of the results")
    flag("--runs", type=Path, default=ROOT / "out/gpu", help="folder of what is gone on with")
    args = p.parse_args(argv)
    args.minutes = args.minutes or VERBS[args.verb][1]
    args.deadline = time.monotonic() + 60 * args.minutes
    args.device = setup_device(args.device)[3]
    print(f"output {args.out}", flush=True)
    for folder in (args.out, args.runs):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        VERBS[args.verb][0](args)
    finally:
        for child in CHILDREN:
            child.kill()


if __name__ == "__main__":
    run_cli(main)
