"""Tests import the scripts as a user's own script would: from the repository's root."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

# The smallest run that has every part: two levels, attention, dropout
TINY = ["--image_size", "16", "--channels", "8", "--mult", "1,2", "--blocks", "1",
        "--attention", "8", "--dropout", "0.1", "--batch_size", "8", "--sample_every", "0",
        "--save_every", "0"]


def script(*argv, processes=1, **kwargs):
    """Run a script as a user does; returns the finished process with its stdout and stderr."""
    return subprocess.run(command(*argv, processes=processes), cwd=ROOT, text=True,
                          capture_output=True, timeout=300, env=environment(), **kwargs)


def command(*argv, processes=1):
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone",
                  f"--nproc_per_node={processes}", "--"]
    return start + [str(part) for part in argv]


def environment():
    """One thread, no GPU: what a run computes must not depend on the machine it is tested on."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def in_process():
    """Run a script's main() here; the signal handlers that it sets are put back."""
    import evaluate
    import sample
    import train

    def run_main(module, *argv):
        before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
        try:
            device = [] if "--device" in argv or not argv else ["--device", "cpu"]
            return {"train": train, "sample": sample, "evaluate": evaluate}[module].main(
                [str(part) for part in argv] + device)
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    return run_main


@pytest.fixture(scope="session")
def run(tmp_path_factory, in_process):
    """A run folder of three steps, to read and not to write."""
    out = tmp_path_factory.mktemp("run") / "run"
    in_process("train", *TINY, "--steps", 3, "--mode", "dsm", "--out", out)
    return out
