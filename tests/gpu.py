"""What the CUDA paths do, in numbers: run by hand where there is a card; small on a CPU as a test.

    python tests/gpu.py bench                    img/s, memory, share of the card's peak, a peer
    python tests/gpu.py check                    CUDA against the CPU, one check after another
    python tests/gpu.py cifar10 --data_dir FOLDER --features FILE.pt    dsm and adv side by side
    python tests/gpu.py bench dsm:eager adv:reg_t=0.1:channels=64 --all batch_size=8 --device cpu
    TORCHINDUCTOR_CUDAGRAPHS=1 python tests/gpu.py bench dsm:compiled adv:compiled

A verb ends within its --minutes, with what it has: --out/<verb>.json is a list of records {name,
figures, error, seconds, provenance}, written after each item; one that fails leaves its error there
and the next goes on. A row of bench is a mode of losses.py, or diffusers (its UNet2DModel trained
by dsm), and options for this row alone: flags of train.py, and eager or compiled.

A machine without a network is given: wheels of diffusers, httpx and importlib_metadata; CIFAR-10's
images as a folder or zip; the file that tests/features.py writes. The runs lie in --out too, where
a later call goes on with them. On an H100 the first use of cuDNN took one to two minutes, and the
graph of CIFAR-10's network 100 s to compile: run `bench` first and alone, then `check`.
"""

import contextlib
import gc
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import evaluate  # noqa: E402
import evidence  # noqa: E402
import losses  # noqa: E402
import train  # noqa: E402
from losses import Diffusion, Objective, Perturbation, forward_units  # noqa: E402
from model import build_network, diffusers_config, read_checkpoint  # noqa: E402
from sample import (Parser, UserError, comma_list, commit, draw_images, load_run,  # noqa: E402
                    number, run_cli, setup_device, write_json)

SMALL = "image_size=32:channels=64:mult=1,2:blocks=1:attention=16:batch_size=32"
LSUN = "image_size=256:mult=1,1,2,2,4,4:dropout=0"
LOW_T = "adv:reg_t=0.1"  # The recommended form.
PAIR = ("dsm", LOW_T)
PEER = "diffusers"
HOW = {"eager": "--no-compile", "compiled": "--compile"}
PEAK = 989e12  # Dense bf16 FLOP/s of an H100 or H200.
STEPS = 100  # Of a check's runs.

# ---------- A row: train.py with some flags, in this process


def read_row(row, args):
    """A row's settings: train.py's, and its flags `argv`, `perturbation`, `shape`."""
    name, *options = row.split(":")
    argv = ["--dataset", "cifar10", "--mode", "dsm" if name == PEER else name,
            "--sample_every", "0", "--save_every", "0"]
    for option in filter(None, [*args.all.split(":"), *options]):
        argv.append(HOW.get(option, f"--{option}"))
    settings, _ = train.parse_args(argv)
    settings.argv, settings.perturbation = argv, Perturbation.of(vars(settings))
    settings.shape = settings.in_channels, settings.image_size, settings.image_size
    return settings


def network(config, peer=False):
    """Our network or diffusers' of the same shape; near-zero layers are drawn anew.

    A fresh network gives the ascent no gradient, and hides what dropout does.
    """
    if peer:
        from diffusers import UNet2DModel  # This row's alone.
        net = UNet2DModel(**diffusers_config(config))
        net.register_forward_hook(lambda net, inputs, output: output.sample)
    else:
        net = build_network(config)
    for p in net.parameters():
        if p.dim() > 1 and p.std() < 1e-4:
            nn.init.xavier_uniform_(p.flatten(1))
    return net


def train_row(row, args, *flags, out=None):
    """The log of train.py's own loop on 64 embedded images, a list of dicts.

    The last one has the most `MiB` on the card, and how many `graphs` were compiled.
    out: folder of the run; without one nothing is saved.
    """
    fakes = {"find_source": lambda *_: mock.Mock(files={}),
             "load_images": lambda _, size, channels, *__, **___: train.shapes(
                 64, size, channels, 0),
             "build_network": partial(network, peer=row.startswith(PEER)),
             "setup_device": lambda _: (0, 0, 1, args.device)}  # Its own one would allow TF32.
    if out is None:
        fakes |= {"catch_signals": list, "save_checkpoint": lambda *_: None}
    torch.compiler.reset()
    counters.clear()
    if args.cuda:
        torch.cuda.reset_peak_memory_stats(args.device)
    with tempfile.TemporaryDirectory() as temporary, mock.patch.multiple(train, **fakes):
        out = out or temporary
        train.main([*read_row(row, args).argv, *map(str, flags), "--out", str(out)])
        log = read_log(out) or [{}]  # One that was stopped may not have a line yet.
    log[-1]["MiB"] = torch.cuda.max_memory_allocated(args.device) / 2**20 if args.cuda else None
    log[-1]["graphs"] = counters["stats"]["unique_graphs"]
    return log


def read_log(out):
    """The lines of a run's log.jsonl, a list of dicts."""
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


# ---------- Items: whatever one of them does, the next runs and the file is whole


def run_items(args, items):
    """Run {name: function(args, found)}, each of which puts its figures into the dict `found`."""
    about = {"card": torch.cuda.get_device_name(args.device) if args.cuda else "CPU",
             "torch": torch.__version__, "all": args.all, "threads": torch.get_num_threads(),
             "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    records = []
    # It raises KeyboardInterrupt, which no handler of ordinary errors swallows.
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for name in args.only or items:
        record = {"name": name, "figures": {}, "error": None, "provenance": about}
        records.append(record)
        began = time.monotonic()
        try:
            # Repeated, in case that a library swallows the first.
            signal.setitimer(signal.ITIMER_REAL, max(0.01, args.deadline - began), 5)
            with open(args.out / "gpu.log", "a") as log, contextlib.redirect_stdout(log):
                items[name](args, record["figures"])
        except KeyboardInterrupt:
            if time.monotonic() < args.deadline:
                raise
            record["error"] = "no time left"
        except Exception:
            record["error"] = traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        record["seconds"] = round(time.monotonic() - began, 2)
        if args.cuda:
            gc.collect()
            torch.cuda.empty_cache()
            record["MiB_left"] = torch.cuda.memory_allocated(args.device) / 2**20
        write_json(args.out / f"{args.verb}.json", records)
        print(f"--- {name}, {record['seconds']} s: {record['error'] or ''}", flush=True)
        for key, value in record["figures"].items():
            print(f"{key}: {value}", flush=True)
    return records


# ---------- check: each fills `found`, and then asserts what should hold


def loss_and_gradient(settings, device):
    """(loss, all gradients in one vector) of a new network on a device; both on the CPU.

    All that is random is drawn on the CPU: devices have streams of their own.
    """
    torch.manual_seed(0)
    net, n = network(vars(settings)).to(device), settings.batch_size
    objective = Objective(net, Diffusion(device=device), settings.mode, settings.perturbation)
    x0, eps = torch.randn(2, n, *settings.shape).to(device)
    t = (torch.arange(n) * 1000 // n).to(device)
    noise = [torch.full((n,), 0.1, device=device)] * (settings.mode == "aware")
    with mock.patch.multiple(torch, rand_like=lambda x: torch.rand(x.shape).to(device),
                             randn_like=lambda x: torch.randn(x.shape).to(device)):
        loss, _ = objective(x0, t, eps, *noise)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in net.parameters()]).cpu()


def check_gradients(args, found):
    """The device's loss and gradients equal the CPU's in fp32; sign steps may flip at a zero."""
    for row in ("dsm", "random", "adv:ascent_norm=l2", "adv", "invariant", "ip",
                "aware:filter=0.1", LOW_T):
        settings = read_row(f"{row}:dropout=0", args)
        loss, gradient = loss_and_gradient(settings, torch.device("cpu"))
        here, there = loss_and_gradient(settings, args.device)
        apart = ((there - gradient).norm() / gradient.norm()).item()
        bound = 1e-2 if settings.mode in ("adv", "invariant") else 1e-4
        found[row] = {"loss": abs(here / loss - 1), "gradient": apart,
                      "holds": max(abs(here / loss - 1), apart) < bound}
    assert all(figures["holds"] for figures in found.values())


def check_compiled(args, found):
    """A first step with dropout is the same eager and compiled, on the same random numbers.

    And without an omega all its branches equal the clean one: they drop the same units.
    """
    import torch._inductor.config as inductor

    def no_omega(view, omega, x_t, s, t, r, clean, cfg, rewind):
        rewind()
        inner = view(x_t.detach().requires_grad_(), t)  # As the ascent calls it.
        found[f"branches {how}"] = {"inner": (inner - clean).abs().max().item()}
        return torch.zeros_like(omega)

    for how in HOW:
        for row in PAIR:
            with inductor.patch(fallback_random=True):
                log, = train_row(f"{row}:{how}:dropout=0.1:amp=off", args, "--steps", 1)
            found[f"{row} {how}"] = {key: log[key]
                                     for key in ("loss", "grad_norm", "s_step", "graphs")}
        with mock.patch.object(losses, "ascend", no_omega):
            log, = train_row(f"adv:{how}:dropout=0.3:amp=off", args, "--steps", 1)
        found[f"branches {how}"]["moved"] = log["equivariance"] ** 0.5
    assert all(max(found[f"branches {how}"].values()) < 1e-3 for how in HOW)
    for row, key in itertools.product(PAIR, ("loss", "grad_norm")):
        assert math.isclose(found[f"{row} eager"][key], found[f"{row} compiled"][key], rel_tol=1e-2)


def check_precision(args, found):
    """The mean loss of the last fifth of the steps in bf16 and fp16 is within 5 % of fp32's."""
    for row, amp in itertools.product(PAIR, ("off", "bf16", "fp16")):
        log = train_row(f"{row}:eager:dropout=0:amp={amp}", args, "--warmup", 0, "--steps", STEPS,
                        "--log_every", STEPS // 5)
        found[f"{row} {amp}"] = log[-1]["loss"]
    for row, amp in itertools.product(PAIR, ("bf16", "fp16")):
        assert math.isclose(found[f"{row} {amp}"], found[f"{row} off"], rel_tol=0.05)


def check_waits(args, found):
    """A run of 15 steps waits for the device no more often than one of 5: its steps do not."""
    for row in PAIR:
        waits = {}
        for steps in (5, 5, 15):  # The first one warms up.
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if args.cuda:
                    torch.cuda.set_sync_debug_mode("warn")
                train_row(f"{row}:eager", args, "--steps", steps, "--log_every", 0)
                if args.cuda:
                    torch.cuda.set_sync_debug_mode("default")
            waits[steps] = [str(one) for one in caught if "synchroniz" in str(one.message)]
        found[row] = {"waits": len(waits[15]) - len(waits[5]), "all": sorted(set(waits[15]))}
    assert not any(figures["waits"] for figures in found.values())


def check_inception(args, found):
    """Features of the (random) Inception equal the CPU's, and cuDNN computes them."""
    net, _ = evaluate.random_inception()
    images = torch.from_numpy(train.shapes(16, 32, 3, 0))
    with evaluate.full_precision():
        here, there = (net.to(device).eval()(images.to(device))[0].cpu()
                       for device in (torch.device("cpu"), args.device))
        found["apart"] = ((there - here).norm() / here.norm()).item()
        assert torch.backends.cudnn.enabled and found["apart"] < 1e-4


def small_run(name, args, *flags):
    """Train a run <out>/<name>, with dropout; returns its folder."""
    row = f"{LOW_T}:eager:dropout=0.1:dataset=shapes:reg_after=0"
    out = args.out / name
    train_row(row, args, "--steps", STEPS, "--log_every", 0, *flags, out=out)
    return out


def check_resume(args, found):
    """A run that SIGTERM stopped and that was resumed equals one left alone, to the bit."""
    rate = train.learning_rate

    def stop(step, cfg):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(step, cfg)

    with mock.patch.object(train, "learning_rate", stop):
        stopped = small_run("stopped", args, "--overwrite")
    found["stopped_at"] = read_checkpoint(stopped)["step"]
    resumed = read_checkpoint(small_run("stopped", args, "--resume"))["model"]
    whole = read_checkpoint(small_run("whole", args, "--overwrite"))["model"]
    found["apart"] = max((resumed[key] - p).abs().max().item() for key, p in whole.items())
    assert found == {"stopped_at": 4, "apart": 0}


def check_sampling(args, found):
    """The images of sample.py equal the CPU's to a level of 255; evaluate.py's commands run."""
    out = small_run("sampled", args, "--overwrite")
    for sampler in ("ddim", "ddpm"):
        ends = []
        for device in (torch.device("cpu"), args.device):
            run = load_run(out, device)
            parts = draw_images(run.net, run.diffusion, run.shape, range(16), sampler=sampler,
                                steps=10, device=device)
            ends.append(np.concatenate([part.astype(int) for _, part in parts]))
        found[sampler] = int(abs(ends[0] - ends[1]).max())
    few = ["--reference_num", "32", "--features", "random", "--steps", "10"]
    for command, flags in {"quality": few, "attack": few, "steps": few, "memorization": few,
                           "denoise": [], "overfit": []}.items():
        evaluate.main([command, str(out), "--num", "16", "--device", str(args.device), *flags])
    assert max(found.values()) <= 1


def check(args):
    """All checks, the cheapest and weightiest first; the last one allows TF32 again."""
    args.all = args.all or SMALL
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    checks = (check_waits, check_inception, check_precision, check_gradients,
              check_resume, check_compiled, check_sampling)
    run_items(args, {function.__name__.removeprefix("check_"): function for function in checks})


# ---------- bench


def forward_flops(settings):
    """Floating-point operations of the network's forward of one image: convolutions, products."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_network(vars(settings))(torch.zeros(1, *settings.shape), torch.zeros(1).long())
    return counter.get_total_flops()


def measure(row, first, args, found):
    """The figures of a row, its first steps left out. `first`: {how: seconds of its first row}.

    On CUDA a time is the mean of five steps, since to wait after each would stall the launches.
    """
    settings, block = read_row(row, args), 5 if args.cuda else 1
    log = train_row(row, args, "--steps", block * (2 + args.repeats), "--log_every", block)
    spent = [line["s_step"] for line in log[-args.repeats:]]
    middle, how = statistics.median(spent), "compiled" if log[-1]["graphs"] else "eager"
    units = forward_units(settings.mode, settings.perturbation)
    flops = units * settings.batch_size * forward_flops(settings)
    found.update({
        "row": row, "how": how, "seconds (median)": middle,
        "fastest to slowest": f"{min(spent):.4f} to {max(spent):.4f}",
        "x the first": middle / first.setdefault(how, middle), "forward-units": units,
        "images / s": settings.batch_size / middle, "MiB": log[-1]["MiB"],
        "share of the bf16 peak": flops / middle / PEAK if args.cuda else None,
        "first steps, seconds": block * log[0]["s_step"], "graphs": log[-1]["graphs"]})


def profile(row, args, found):
    """The ten costliest kernels of eight steps of a row."""
    for _ in range(2):  # In the first run cuDNN tries its algorithms.
        with torch.profiler.profile() as profiler:
            train_row(f"{row}:eager", args, "--steps", 8)
    found["kernels"] = profiler.key_averages().table(
        sort_by=f"self_{'device' if args.cuda else 'cpu'}_time_total", row_limit=10)


def measure_ddim(args, found):
    """ddim's images a second in fp32, as sample.py draws them."""
    settings = read_row("dsm", args)
    n, steps = (256, 50) if args.cuda else (16, 5)
    net = network(vars(settings)).to(args.device, memory_format=torch.channels_last).eval()
    for _ in range(2):  # The first one warms up.
        tic = time.perf_counter()
        list(draw_images(net, Diffusion(device=args.device), settings.shape, range(n), steps=steps,
                         batch_size=n, device=args.device))
        found.update({"batch": n, "steps": steps, "images / s": n / (time.perf_counter() - tic)})


def largest_batch(row, args, found):
    """LSUN's 256-pixel network with the largest batch, a power of two, that fits into memory."""
    n = 256
    while not found:
        try:
            log = train_row(f"{row}:{LSUN}:eager:batch_size={n}", args, "--steps", 3,
                            "--log_every", 1)
            found.update({"batch": n, "images / s": n / log[-1]["s_step"], "MiB": log[-1]["MiB"]})
        except torch.OutOfMemoryError:
            n //= 2
        gc.collect()
        torch.cuda.empty_cache()


def bench(args):
    """Rows given by name; or all that there is to measure, compiled rows last: they cost most."""
    args.all = args.all or ("" if args.cuda else "batch_size=16")
    modes, first = ["dsm", "adv", LOW_T, "random", PEER], {}
    items = {row: partial(measure, row, first)
             for row in args.rows or [f"{mode}:eager" for mode in modes]}
    if not args.rows:
        items |= {f"profile {row}": partial(profile, row) for row in PAIR}
        items["ddim"] = measure_ddim
    if not args.rows and args.cuda:
        items |= {f"lsun {row}": partial(largest_batch, row) for row in ("dsm", LOW_T, "adv")}
        items |= {f"{mode}:compiled": partial(measure, f"{mode}:compiled", first) for mode in modes}
    found = [record["figures"] for record in run_items(args, items)]
    found = [figures for figures in found if "row" in figures]
    print(evidence.table(found[0] if found else [], found))


# ---------- cifar10: dsm and the recommended form on 90 % noisy images, at equal time

MODES = {"cifar10-dsm": "--mode dsm", "cifar10-adv-low-t": "--mode adv --reg_t 0.1"}
CIFAR10 = ("--dataset cifar10 --noise_p 0.9 --noise_std 0.2 --channels 64 --batch_size 128 "
           "--dropout 0 --lr 4e-4 --warmup 500 --ema 0.999 --steps 1000000 --log_every 100 "
           "--sample_every 0 --save_every 1000")
NUM = 5000  # Images to measure.
RESERVE = 110  # Seconds that are left to draw and measure them.


def train_both(args, found):
    """Train both side by side until the time is up, from where an earlier call has left them."""
    children = {}
    try:
        for name, mode in MODES.items():
            out = args.out / name
            resume = ["--resume"] if (out / "ckpt.pt").exists() else []
            words = [sys.executable, ROOT / "train.py", *CIFAR10.split(), *mode.split(), *resume,
                     "--device", args.device, "--data_dir", args.data_dir, "--out", out]
            children[out] = subprocess.Popen(
                [str(word) for word in words], stdout=open(f"{out}.log", "w"),
                stderr=subprocess.STDOUT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            children[out].wait(args.deadline - RESERVE - time.monotonic())
        for child in children.values():
            child.terminate()
        for out, child in children.items():
            if child.wait() != 143:
                raise RuntimeError(Path(f"{out}.log").read_text()[-1000:])
            last = read_log(out)[-20:]
            found[out.name] = {"step": last[-1]["step"]}
            for key in ("dsm", "img_s", "s_step", "data_wait"):
                found[out.name][key] = statistics.median(row[key] for row in last)
    finally:
        for child in children.values():
            child.kill()


def draw_and_measure(name, args, found):
    """The quality of ddim's samples from a run, with the features given; and a picture of them."""
    file = args.out / f"{name}.json"
    argv = ["quality", args.out / name, "--num", NUM, "--steps", 50, "--features", args.features,
            "--batch_size", 250, "--device", args.device, "--png", args.out / f"{name}.png"]
    evaluate.main([str(word) for word in (*argv, "--json", file)])
    found.update(json.loads(file.read_text()))


def cifar10(args):
    """Train both until the time is up but for what measuring takes; draw and measure."""
    if not args.data_dir or not args.features:
        raise UserError("cifar10 needs --data_dir and --features")
    items = {name: partial(draw_and_measure, name) for name in MODES}
    run_items(args, {"training": train_both, **items})


VERBS = {"check": check, "bench": bench, "cifar10": cifar10}


def main(argv=None):
    """Entry point; see the module's docstring."""
    p = Parser(description=__doc__)
    flag = p.add_argument
    flag("verb", choices=VERBS, help="what to do")
    flag("rows", nargs="*", help="of bench; else all that are worth it")
    flag("--minutes", type=number(float, 0.01), default=3.0, help="when it ends at the latest")
    flag("--device", default="auto", help="cpu, cuda or cuda:1")
    flag("--all", default="", help="options of all rows, such as batch_size=8:amp=bf16")
    flag("--only", type=comma_list(str), help="items to run, with commas between; else all")
    flag("--repeats", type=number(int, 2), default=7, help="timings of a row")
    flag("--data_dir", type=Path, help="CIFAR-10's images, a folder or zip")
    flag("--features", type=Path, help="what tests/features.py wrote")
    flag("--out", type=Path, default=Path("out/gpu"), help="folder of the results and the runs")
    args = p.parse_args(argv)
    args.deadline = time.monotonic() + 60 * args.minutes
    args.device = setup_device(args.device)[3]
    args.cuda = args.device.type == "cuda"
    print(f"output {args.out}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    VERBS[args.verb](args)


if __name__ == "__main__":
    run_cli(main)
