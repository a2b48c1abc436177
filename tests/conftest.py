"""Tests import the scripts as a user's own script would: from the repository's root."""

import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

# One thread and no GPU: what a run computes must not depend on the machine that tests it.
os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sample import run_cli

# The smallest run that has every part: two levels, attention, dropout
TINY = ["--image_size", "16", "--channels", "8", "--mult", "1,2", "--blocks", "1",
        "--attention", "8", "--dropout", "0.1", "--batch_size", "8", "--sample_every", "0",
        "--save_every", "0"]


class Bomb:
    """Unpickled by who runs the code in a file, it leaves a file `exploded`."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def fork(log, module, *argv, ranks=1):
    """Start a script in forks of this process, as torchrun starts its ranks; returns them.

    They need not import torch again, which takes seconds. Rank k writes to <log>.<k>.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def main(rank):
        # A shell script's background jobs begin with it ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{ranks}",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
        sys.stdout = sys.stderr = open(f"{log}.{rank}", "w", buffering=1)
        sys.argv = [f"{module}.py", *map(str, argv)]
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")

    forks = [multiprocessing.get_context("fork").Process(target=main, args=(rank,), daemon=True)
             for rank in range(ranks)]
    for process in forks:
        process.start()
    return forks


def finish(forks):
    """The exit codes of forked processes; minus the signal's number for one that was killed."""
    for process in forks:
        process.join(120)
    return [process.exitcode for process in forks]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """A current folder with a FILE in it: what a test writes to out/ is no part of the project."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    Path("FILE").touch()


@pytest.fixture(scope="session")
def in_process():
    """Run a script's main() here, on the CPU; the signal handlers that it sets are put back."""

    def run_main(module, *argv):
        argv = [str(part) for part in argv]
        if module != "toy" and "--device" not in argv:
            argv += ["--device", "cpu"]
        before = [(name, signal.getsignal(name)) for name in (
            signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)]
        try:
            return importlib.import_module(module).main(argv)
        finally:
            for name, handler in before:
                signal.signal(name, handler)

    return run_main


@pytest.fixture
def mistake(in_process, capsys):
    """Run a script that has to end in one line on stderr and status 2; returns the line."""

    def run_main(module, *argv):
        try:  # pytest.raises would keep the frames alive, and with them a run's lock.
            run_cli(lambda: in_process(module, *argv))
        except SystemExit as end:
            status = end.code
        error = capsys.readouterr().err
        assert status == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert len(error) < 450
        return error

    return run_main


@pytest.fixture(scope="session")
def run(tmp_path_factory, in_process):
    """A run folder of three steps, to read and not to write."""
    out = tmp_path_factory.mktemp("run") / "run"
    in_process("train", *TINY, "--steps", 3, "--mode", "dsm", "--predict", "eps", "--out", out)
    return out
