"""gpu.py's verbs in tiny sizes on the CPU, and that its checks can fail; features.py."""

import itertools
import json
import signal
import time
import warnings
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import features
import gpu
import losses
import train
from losses import Diffusion
from model import read_checkpoint
from sample import UserError

TINY = "image_size=8:channels=8:mult=1:blocks=1:attention=0:batch_size=8"


class SmallInception(nn.Module):
    """uint8 (B, C, H, W) -> (features (B, C), logits (B, C))."""

    def forward(self, x):
        return (x.float().mean((2, 3)),) * 2


def popen(words, **_):
    """Five steps more of train.py in this process, as if it had been stopped then."""
    out = Path(words[-1])
    done = read_checkpoint(out)["step"] if (out / "ckpt.pt").exists() else 0
    assert ("--resume" in words) == bool(done)
    train.main([*words[2:], "--steps", str(done + 5)])
    return Mock(wait=lambda *_: 143)


@pytest.fixture
def args(tmp_path, monkeypatch):
    """The arguments of a tiny check."""
    monkeypatch.setattr(gpu, "STEPS", 5)
    monkeypatch.setattr(gpu, "PAIR", ("dsm",))
    return SimpleNamespace(verb="check", device=torch.device("cpu"), cuda=False, all=TINY,
                           only=None, deadline=time.monotonic() + 180, out=tmp_path)


@pytest.fixture
def verb(in_process, args):
    """Run a verb; returns {item: its figures}. No item may have an error."""

    def run(*argv):
        in_process("gpu", *argv, "--all", TINY, "--minutes", 3, "--out", args.out)
        records = json.loads((args.out / f"{argv[0]}.json").read_text())
        for record in records:
            assert record["error"] is None and record["provenance"]["torch"] == torch.__version__
        return {record["name"]: record["figures"] for record in records}

    return run


def test_check(verb, monkeypatch):
    monkeypatch.setattr(gpu.evaluate, "random_inception", lambda: (SmallInception(), "a small one"))
    # The eager backend stands for inductor, which takes a minute.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(
        nn.Module.compile, backend="eager"))
    found = verb("check")
    # On a CPU both sides are the same machine.
    assert len(found) == 7 and len(found["gradients"]) == 8
    assert all(row["gradient"] == row["loss"] == 0 for row in found["gradients"].values())
    eager, compiled = (found["compiled"][f"dsm {how}"] for how in gpu.HOW)
    assert (eager["graphs"], compiled["graphs"]) == (0, 1)
    assert compiled["grad_norm"] == pytest.approx(eager["grad_norm"])


def test_checks_find_a_difference(args, monkeypatch):
    monkeypatch.setattr(gpu, "HOW", {"eager": "--no-compile"})
    monkeypatch.setattr(losses, "repeat_randomness", lambda device: lambda: None)
    with pytest.raises(AssertionError):
        gpu.check_compiled(args, {})

    schedules = itertools.cycle(["linear", "cosine"])
    monkeypatch.setattr(gpu, "Diffusion", lambda device: Diffusion(schedule=next(schedules)))
    found = {}
    with pytest.raises(AssertionError):
        gpu.check_gradients(args, found)
    assert not any(row["holds"] for row in found.values())

    update = train.update
    monkeypatch.setattr(train, "update", lambda *step: warnings.warn("a synchronizing call")
                        or update(*step))
    found = {}
    with pytest.raises(AssertionError):
        gpu.check_waits(args, found)
    assert found["dsm"]["waits"] == 10


def test_items_fail_alone(args):
    def fail(args, found):
        found["before"] = 1
        raise ValueError("of its own")

    def hang(args, found):
        args.deadline = 0
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        while True:
            pass

    def fine(args, found):
        found["all"] = 2

    gpu.run_items(args, {"fail": fail, "fine": fine, "hang": hang, "late": hang})
    fails, works, *late = json.loads((args.out / "check.json").read_text())
    assert "ValueError: of its own" in fails["error"] and fails["figures"] == {"before": 1}
    assert works["figures"] == {"all": 2} and works["error"] is None
    assert [record["error"] for record in late] == ["no time left"] * 2


def test_bench(verb, capsys):
    low = gpu.LOW_T
    found = verb("bench", "--repeats", 2, "--only", f"dsm:eager,{low}:eager,profile dsm,ddim")
    for row, units in (("dsm:eager", 3), (f"{low}:eager", 3.5)):
        assert found[row]["images / s"] == pytest.approx(8 / found[row]["seconds (median)"])
        assert found[row]["forward-units"] == pytest.approx(units)
    assert "aten::convolution" in found["profile dsm"]["kernels"]
    assert found["ddim"]["images / s"] > 0
    assert f"| {low}:eager | eager | " in capsys.readouterr().out


def test_forward_units_are_the_work_that_is_done(args):
    # The convolutions and products that autograd really does, against arithmetic.
    args.all = "image_size=8:channels=64:mult=1:blocks=1:attention=0:batch_size=10"
    forward = gpu.forward_flops(gpu.read_row("dsm", args))
    for row, units in (("dsm", 3), ("adv", 8), (gpu.LOW_T, 3.5)):
        with FlopCounterMode(display=False) as counter:
            gpu.train_row(row, args, "--steps", 1)
        assert counter.get_total_flops() / forward == pytest.approx(10 * units, rel=0.05)


def test_the_largest_batch_is_searched_by_memory(args, monkeypatch):
    def train_row(row, args, *flags):
        settings = gpu.read_row(row, args)
        assert (settings.image_size, settings.compile, settings.mode) == (256, False, "adv")
        if settings.batch_size > 95:
            raise torch.OutOfMemoryError
        return [{"s_step": 0.5, "MiB": 7}]

    monkeypatch.setattr(gpu, "train_row", train_row)
    found = {}
    gpu.largest_batch("adv", args, found)
    assert found == {"batch": 64, "images / s": 128, "MiB": 7}


def test_cifar10(verb, args, monkeypatch):
    monkeypatch.setattr(gpu, "subprocess", Mock(Popen=popen))
    monkeypatch.setattr(gpu, "NUM", 40)
    monkeypatch.setattr(gpu, "CIFAR10", f"{gpu.CIFAR10} --log_every 1 --"
                        + TINY.replace(":", " --"))
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(args.out / "images.npz", images)
    argv = ["cifar10", "--data_dir", args.out / "images.npz", "--features", "pixels"]
    verb(*argv, "--only", "training")
    found = verb(*argv)  # A second call goes on.
    for name in gpu.MODES:
        assert found["training"][name]["step"] == 10
        assert found[name]["provenance"]["num"] == 40
        assert (args.out / f"{name}.png").exists()


# ---------- features.py


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_features_are_the_networks(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="pip install"):
        features.main([str(tmp_path / "f.pt")])
    torch.manual_seed(0)
    net = features.EfficientNetLite0().eval().requires_grad_(False)
    for p in net.parameters():
        if p.dim() > 1:  # He et al.'s initial weights, so that no layer fades.
            p.normal_(0, (2 / p[0].numel()) ** 0.5)
    (tmp_path / features.PACKAGE).mkdir()
    torch.save(net.state_dict(), tmp_path / features.PACKAGE / "weights.pth")
    monkeypatch.syspath_prepend(tmp_path)
    features.main([str(tmp_path / "f.pt")])
    script = torch.jit.load(tmp_path / "f.pt")
    images = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8)
    expected = net(images)
    assert expected.shape == (2, 1280) and not torch.allclose(expected[0], expected[1])
    torch.testing.assert_close(script(images), expected)
    grey = images[:1, :1]
    torch.testing.assert_close(script(grey), net(grey.expand(-1, 3, -1, -1)))


def test_same_padding():
    # TensorFlow's rule: ceil(n / stride) outputs, the padding's odd pixel at the end.
    x = torch.randn(1, 2, 8, 8)
    for kernel, stride in ((3, 1), (3, 2), (5, 1), (5, 2)):
        layers = features.convolution(2, 3, kernel, stride).eval()
        total = max((8 // stride - 1) * stride + kernel - 8, 0)
        before, after = total // 2, total - total // 2
        expected = F.relu6(layers[1](F.pad(x, (before, after, before, after))) / (1 + 1e-3) ** 0.5)
        torch.testing.assert_close(layers(x), expected)
