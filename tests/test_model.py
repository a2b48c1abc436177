"""The network's published sizes and its shape rules; checkpoints, ours and diffusers', in and out.

Files that are damaged or foreign are refused.
"""

import json
import shutil

import pytest
import torch

import train
from conftest import ROOT, Bomb
from losses import Diffusion
from model import UNet, build_network, read_checkpoint, read_safetensors, write_diffusers
from sample import UserError, load_run


@pytest.mark.parametrize("dataset, settings, parameters", [
    ("cifar10", {}, 35_746_307), ("celeba", {}, 78_700_803),
    ("lsun_bedroom", {"image_size": 256, "mult": (1, 1, 2, 2, 4, 4)}, 113_673_219)])
def test_parameter_counts_are_the_published_ones(dataset, settings, parameters):
    with torch.device("meta"):
        net = build_network(train.complete_config({"dataset": dataset, **settings}))
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize("size, channels", [(28, 1), (12, 3)])
def test_a_fresh_network_predicts_almost_nothing_and_every_weight_has_a_gradient(size, channels):
    """Every block starts as the identity."""
    net = UNet(size, channels, 8, (1, 2, 2), 1, (size // 2,), 0.1)
    x = torch.randn(2, channels, size, size)
    y = net(x, torch.tensor([0, 999]))
    assert y.shape == x.shape and y.dtype == torch.float32 and y.abs().max() < 1e-3
    h, emb = torch.randn(2, 16, 16, 16), torch.randn(2, 32)
    torch.testing.assert_close(net.mid_block["resnets"][0](h, emb), h, rtol=0, atol=1e-3)
    y.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(ValueError, match=f"attention at 5 .*resolutions are {size},{size // 2}"):
        UNet(size, channels, 8, (1, 2, 2), 1, (5,))


def test_the_weights_that_readme_begins_with_fit_and_compute_what_they_did():
    """Their names are diffusers'."""
    net = load_run(ROOT / "assets/fashion-adv.pt").net
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    y = net(x, torch.tensor([3, 700]))
    assert y[:, 0, 8, 8].tolist() == pytest.approx([1.825975, 1.376753], rel=1e-3)
    assert not any(p.requires_grad for p in net.parameters())


def test_foreign_checkpoints_are_refused(run, tmp_path, monkeypatch):
    """Damaged, with code in it, with another content, of another network."""
    monkeypatch.chdir(tmp_path)
    data = (run / "ckpt.pt").read_bytes()
    good, half = torch.load(run / "ckpt.pt", weights_only=True), len(data) // 2
    (tmp_path / "half.pt").write_bytes(data[:half])
    (tmp_path / "flipped.pt").write_bytes(data[:half] + bytes([data[half] ^ 1]) + data[half + 1:])
    misfit = {**good, "config": {**good["config"], "channels": 16}}
    for name, content in {"bomb": Bomb(), "list": [1, 2], "misfit": misfit}.items():
        torch.save(content, tmp_path / f"{name}.pt")
    for name in ("half", "flipped", "bomb", "list", "misfit", "missing"):
        with pytest.raises(UserError, match=f"{name}.pt"):
            load_run(tmp_path / f"{name}.pt")
    assert not (tmp_path / "exploded").exists()


# ---------- diffusers

CONFIG = {"image_size": 16, "in_channels": 3, "channels": 8, "mult": (1, 2), "blocks": 1,
          "attention": (8,), "dropout": 0.1, "T": 1000, "schedule": "linear", "predict": "v"}
UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A network with random weights as a folder of diffusers, and the network's state."""
    torch.manual_seed(0)
    net = build_network(CONFIG)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    path = tmp_path_factory.mktemp("diffusers") / "model"
    write_diffusers(net, CONFIG, path)
    return path, net.state_dict()


def equal(state, other):
    return all(torch.equal(value, other[key]) for key, value in state.items())


def test_the_round_trip_through_diffusers_is_exact(theirs, tmp_path):
    path, state = theirs
    for place in (path, path / "unet", path / WEIGHTS):
        again = read_checkpoint(place)
        assert equal(state, again["ema"]) and again["step"] == 0
        assert {key: again["config"][key] for key in CONFIG} == CONFIG
    net = build_network(CONFIG)
    write_diffusers(net, {**CONFIG, "predict": "eps"}, tmp_path / "eps")
    assert json.loads((tmp_path / "eps" / SCHEDULER).read_text())["prediction_type"] == "epsilon"
    # What they cannot express.
    for other in ({**CONFIG, "schedule": "sigmoid"}, {**CONFIG, "mult": (2, 2)}):
        with pytest.raises(ValueError, match="diffusers has no such"):
            write_diffusers(net, other, tmp_path / "none")


def test_bin_files_half_precision_and_the_names_of_2022(theirs, tmp_path):
    path, state = theirs
    copy = shutil.copytree(path, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = read_safetensors(path / WEIGHTS)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                     ("to_out.0", "proj_attn")):
        tensors = {name.replace(new, old): value.half() for name, value in tensors.items()}
    torch.save(tensors, copy / "unet/diffusion_pytorch_model.bin")
    found = read_checkpoint(copy)["ema"]
    assert equal({key: value.half().float() for key, value in state.items()}, found)


@pytest.mark.parametrize("name, old, new, words", [
    (UNET, '"freq_shift": 1', '"freq_shift": 0', "freq_shift is 0"),
    (UNET, '"AttnDownBlock2D"', '"ResnetDownsampleBlock2D"', "down_block_types is"),
    (UNET, '"layers_per_block": 1', '"layers_per_block": 2', "Missing key"),
    (SCHEDULER, '"v_prediction"', '"sample"', "prediction_type is sample"),
    (WEIGHTS, '"data_offsets": [0', '"data_offsets": [-9', "no UNet2DModel that fits"),
])
def test_what_our_network_cannot_express_is_named(theirs, tmp_path, name, old, new, words):
    """Or what is damaged."""
    copy = shutil.copytree(theirs[0], tmp_path / "copy")
    data = (copy / name).read_bytes()
    assert old.encode() in data
    (copy / name).write_bytes(data.replace(old.encode(), new.encode(), 1))
    with pytest.raises(UserError, match=words):
        load_run(copy)


def test_a_published_model_is_fine_tuned_drawn_from_and_exported(theirs, tmp_path, in_process,
                                                                 mistake):
    path, state = theirs
    run, copy = tmp_path / "run", tmp_path / "copy"
    in_process("train", "--init_from", path, "--batch_size", 4, "--steps", 2, "--lr", 0,
               "--sample_every", 0, "--ema", 0.5, "--out", run)
    export = ["sample", run, "--export", copy]
    in_process(*export)
    assert equal(state, read_checkpoint(copy)["ema"])
    assert "exists" in mistake(*export)
    for model, out in ((path, "a"), (copy, "b")):
        in_process("sample", model, "--num", 2, "--steps", 2, "--out", tmp_path / out)
    assert (tmp_path / "a/000001.png").read_bytes() == (tmp_path / "b/000001.png").read_bytes()
    # evaluate.py takes it for a run as well, not for a folder of images.
    assert "--reference is needed" in mistake("evaluate", "quality", path, "--num", 10)


def test_the_real_diffusers_opens_it_and_agrees(theirs, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    path, state = theirs
    unet, net = diffusers.UNet2DModel.from_pretrained(path, subfolder="unet").eval(), load_run(path)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    with torch.no_grad():
        assert (unet(x, t).sample - net.net(x, t)).abs().max() < 1e-4
    pipeline = diffusers.DDPMPipeline.from_pretrained(path)
    assert torch.allclose(pipeline.scheduler.alphas_cumprod.double(), Diffusion().alpha_bar,
                          atol=1e-6)
    assert pipeline(batch_size=1, num_inference_steps=2, output_type="np").images.shape == (
        1, 16, 16, 3)
    pipeline.save_pretrained(tmp_path / "theirs")
    assert equal(state, read_checkpoint(tmp_path / "theirs")["ema"])
