"""The paper's claims on real images at the scale of a CPU; not run by the tests.

    python tests/evidence.py --list                   the studies, their runs, what they would take
    python tests/evidence.py headline --workers 2     trains, draws and measures what is missing
    python tests/evidence.py headline --tables        prints the table of what is there

A run is `train.py` on Fashion-MNIST at 16x16 (60,000 real images, area-downsampled) with a network
of 1.1 M parameters, then `evaluate.py quality` on 2000 images (EMA weights, DDIM, 50 steps). Each
lives in OUT/<column>/<row>-<seed>, with its log and quality-<steps>-<num>.json, from which the
tables are printed. Stopped, it goes on where it was; more --steps continue the same runs.
The Frechet distance and KID look at the features of a small classifier, which is trained first, on
the clean labelled images: OUT/classifier.pt. They compare with nothing published.
"""

import argparse
import gzip
import json
import os
import signal
import statistics
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from losses import Perturbation, forward_units  # noqa: E402
from model import UserError, read_checkpoint, run_cli  # noqa: E402
from sample import Parser, number, write_atomically  # noqa: E402
from train import load_images  # noqa: E402

COMMON = ("--dataset fashion_mnist --image_size 16 --channels 32 --blocks 1 --attention 8 "
          "--dropout 0 --batch_size 64 --lr 1e-3 --warmup 200 --ema 0.999 --log_every 50 "
          "--sample_every 0 --save_every 250")
# column: corruption of the training set
COLUMNS = {
    "clean": {},
    "noise.1": {"noise_p": 0.9, "noise_std": 0.1},
    "noise.2": {"noise_p": 0.9, "noise_std": 0.2},
    "outliers": {"outlier_p": 0.1},
}
# row: the objective and what of it differs from the defaults
ROWS = {
    "dsm": {"mode": "dsm"},
    "random": {"mode": "random"},
    "adv": {"mode": "adv"},
    "adv_epsilon": {"mode": "adv", "reading": "epsilon"},
    "adv_l2": {"mode": "adv", "ascent_norm": "l2"},
    "adv_l2x3": {"mode": "adv", "ascent_norm": "l2", "ascent_steps": 3},
    "invariant": {"mode": "invariant"},
    "adv_share": {"mode": "adv", "reg_share": 0.3},
    "adv_l2_share": {"mode": "adv", "ascent_norm": "l2", "reg_share": 0.3},
}
# study: its columns, rows and seeds, in the order in which they are run
STUDIES = {
    "frontier": (["noise.2"], ["dsm", "adv", "adv_l2_share", "adv_share", "random"], [0]),
    "headline": (["noise.2"], list(ROWS), [0, 1]),
    "table": (["noise.2", "clean", "outliers", "noise.1"], list(ROWS), [0]),
}
FIGURES = ("residual_noise", "pixel_std", "fid", "kid_mean", "precision", "recall")


def units(row):
    """Forwards that a training step of the row takes, see `losses.forward_units`."""
    settings = dict(ROWS[row])
    return forward_units(settings.pop("mode"), Perturbation(**settings))


def labels(folder, split):
    """Fashion-MNIST's labels, int64 (N,); UserError where the file is not there."""
    name = f"{'train' if split == 'train' else 't10k'}-labels-idx1-ubyte.gz"
    found = sorted(Path(folder).rglob(name))
    if not found:
        raise UserError(f"no {name} under {folder}")
    with gzip.open(found[0]) as file:
        return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64))


class Classifier(nn.Module):
    """uint8 (B, 3, H, W), grey repeated -> features (B, 64), logits (B, 10)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(1024, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        features = self.body(x[:, :1].float() / 127.5 - 1)
        return features, self.head(features)


def train_classifier(path, data_dir, cache_dir, epochs=5):
    """Write the classifier as TorchScript; prints its accuracy on the test images."""
    source = ("fashion_mnist", 16, 1, data_dir, cache_dir)
    images = torch.from_numpy(np.array(load_images(*source)))
    folder = data_dir or "data/fashion_mnist"
    truth = labels(folder, "train")
    torch.manual_seed(0)
    net = Classifier()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(128):
            x = images[index].expand(-1, 3, -1, -1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x)[1], truth[index]).backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        test = torch.from_numpy(np.array(load_images(*source, split="test")))
        right = net(test.expand(-1, 3, -1, -1))[1].argmax(1) == labels(folder, "test")
    write_atomically(path, torch.jit.script(net).save)
    print(f"{path}: {right.double().mean():.3f} of the test images right", flush=True)


running = set()


def call(script, *argv, log):
    """One of the project's scripts in a process with one thread; UserError when it fails."""
    with open(log, "a") as file:
        process = subprocess.Popen(
            [sys.executable, ROOT / script, *map(str, argv)], stdout=file,
            stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    running.add(process)
    code = process.wait()
    running.discard(process)
    if code:
        raise UserError(f"{script} failed with status {code}: see {log}")


def measured(column, row, seed, args):
    """Where the figures of a run are, once it is done."""
    return args.out / column / f"{row}-{seed}" / f"quality-{args.steps}-{args.num}.json"


def do(run, args):
    """Train and measure one (column, row, seed), as far as that is not done."""
    column, row, seed = run
    result = measured(*run, args)
    if result.exists():
        return
    folder = result.parent
    print(f"{column} {row} seed {seed}: begun", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{folder.name}.log"
    data = [f"--{name}={value}" for name in ("data_dir", "cache_dir")
            if (value := getattr(args, name))]
    saved = 0
    if (folder / "ckpt.pt").exists():
        saved = read_checkpoint(folder)["step"]
    if saved > args.steps:
        raise UserError(f"{folder} is at step {saved}, beyond --steps {args.steps}")
    flags = {**COLUMNS[column], **ROWS[row], "seed": seed}
    how = ["--resume"] if saved else [*COMMON.split(), "--overwrite", *(
        f"--{name}={value}" for name, value in flags.items())]
    if saved < args.steps:
        call("train.py", "--out", folder, "--steps", args.steps, *data, *how, log=log)
    call("evaluate.py", "quality", folder, "--num", args.num, "--steps", 50, *data, "--features",
         args.out / "classifier.pt", "--json", result, log=log)
    figures = json.loads(result.read_text())
    print(f"{column} {row} seed {seed}: "
          + ", ".join(f"{name} {figures[name]:.3f}" for name in FIGURES), flush=True)


def spread(values):
    """Mean, and standard deviation where there are several."""
    text = f"{statistics.mean(values):.3f}"
    return text + (f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def attempt(run, args):
    """`do`; one run that fails does not end the others, its error is returned."""
    try:
        do(run, args)
    except UserError as error:
        return f"{' '.join(map(str, run))}: {error}"


def table(study, args):
    """The study's runs that are measured, as a markdown table: means over the seeds."""
    columns, rows, seeds = STUDIES[study]
    lines = [["corruption", "mode", "seeds", "forward-units", *FIGURES]]
    lines.append(["---"] * len(lines[0]))
    for column in columns:
        for row in rows:
            files = [measured(column, row, seed, args) for seed in seeds]
            found = [json.loads(file.read_text()) for file in files if file.exists()]
            if found:
                cells = [spread([figures[name] for figures in found]) for name in FIGURES]
                lines.append([column, row, str(len(found)), f"{units(row):.3g}", *cells])
                data = [found[0].get(f"{name}_reference") for name in FIGURES]
    if len(lines) > 2:
        lines.append(["", "clean images", "", "", *(f"{x:.3f}" if x else "" for x in data)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parse_args(argv=None):
    """The command line; UserError where it is wrong."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", nargs="?", choices=list(STUDIES), default="headline")
    p.add_argument("--list", action="store_true", help="show the studies' runs, run nothing")
    p.add_argument("--tables", action="store_true", help="print the table, run nothing")
    p.add_argument("--steps", type=number(int, 1), default=5000, help="training steps (5000)")
    p.add_argument("--num", type=number(int, 10), default=2000, help="images to measure (2000)")
    p.add_argument("--workers", type=number(int, 1), default=torch.get_num_threads(),
                   help="runs side by side, one thread each (one a core)")
    p.add_argument("--data_dir", help="folder with Fashion-MNIST; else data/, filled by download")
    p.add_argument("--cache_dir", help="folder of the decoded images; else beside the data")
    p.add_argument("--out", type=Path, default=Path("out/evidence"), help="(out/evidence)")
    return p.parse_args(argv)


def main(argv=None):
    """Entry point; see the module's docstring."""
    args = parse_args(argv)
    columns, rows, seeds = STUDIES[args.study]
    runs = [(column, row, seed) for seed in seeds for column in columns for row in rows]
    if args.list:
        for study, (columns, rows, seeds) in STUDIES.items():
            total = sum(units(row) for row in rows) * len(columns) * len(seeds)
            print(f"{study}: {', '.join(rows)}; {', '.join(columns)}; {len(seeds)} seeds; "
                  f"{total:.0f} forwards of 64 images a step")
        return
    if not args.tables:
        args.out.mkdir(parents=True, exist_ok=True)
        if not (args.out / "classifier.pt").exists():
            train_classifier(args.out / "classifier.pt", args.data_dir, args.cache_dir)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            with ThreadPool(args.workers) as pool:
                failed = [*filter(None, pool.imap_unordered(lambda run: attempt(run, args), runs))]
        finally:
            for process in list(running):  # a run without its driver would meet the next one's
                process.terminate()
                process.wait()
        for text in failed:
            print(text, file=sys.stderr)
    print(table(args.study, args))
    if not args.tables and failed:
        raise UserError(f"{len(failed)} runs failed, see above")


if __name__ == "__main__":
    run_cli(main)
