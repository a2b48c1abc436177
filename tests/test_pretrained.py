"""Weights of diffusers in and out, cleaning a folder, and what a run folder shows beside them."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TINY
from losses import Diffusion
from model import (build_network, diffusers_keys, read_checkpoint, read_safetensors,
                   write_diffusers)
from sample import UserError, clean_images, image_noise, load_run, noise_estimate
from train import load_images

CONFIG = {"image_size": 16, "in_channels": 3, "channels": 8, "mult": (1, 2), "blocks": 1,
          "attention": (8,), "dropout": 0.1, "T": 1000, "schedule": "linear"}
RES = ["norm1", "conv1", "time_emb_proj", "norm2", "conv2"]
LAYERS = [  # of that network, written by hand
    "time_embedding.linear_1", "time_embedding.linear_2", "conv_in", "conv_norm_out", "conv_out",
    *[f"down_blocks.0.resnets.0.{name}" for name in RES], "down_blocks.0.downsamplers.0.conv",
    *[f"down_blocks.1.resnets.0.{name}" for name in [*RES, "conv_shortcut"]],
    *[f"{block}.attentions.{k}.{name}" for block, k in (
        ("down_blocks.1", 0), ("mid_block", 0), ("up_blocks.0", 0), ("up_blocks.0", 1))
      for name in ("group_norm", "to_q", "to_k", "to_v", "to_out.0")],
    *[f"mid_block.resnets.{k}.{name}" for k in (0, 1) for name in RES],
    *[f"up_blocks.{level}.resnets.{k}.{name}" for level in (0, 1) for k in (0, 1)
      for name in [*RES, "conv_shortcut"]],
    "up_blocks.0.upsamplers.0.conv"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network with random weights as a folder of diffusers, and the network."""
    torch.manual_seed(0)
    net = build_network(CONFIG).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    path = tmp_path_factory.mktemp("diffusers") / "model"
    write_diffusers(net, CONFIG, path)
    return path, net


def rewrite(folder, copy, name="unet/config.json", **changes):
    """A copy of the folder with some settings changed."""
    import shutil
    shutil.copytree(folder, copy)
    settings = json.loads((copy / name).read_text()) | changes
    (copy / name).write_text(json.dumps(settings))
    return copy


def test_the_keys_are_those_of_diffusers_and_the_round_trip_is_exact(folder):
    path, net = folder
    tensors = read_safetensors(path / "unet/diffusion_pytorch_model.safetensors")
    assert sorted(tensors) == sorted(f"{name}.{kind}" for name in LAYERS
                                     for kind in ("weight", "bias"))
    assert tensors["mid_block.attentions.0.to_k.weight"].shape == (16, 16)
    for place in (path, path / "unet", path / "unet/diffusion_pytorch_model.safetensors"):
        again = read_checkpoint(place)
        assert all(torch.equal(value, again["ema"][key]) for key, value in
                   net.state_dict().items())
        assert {key: again["config"][key] for key in CONFIG} == CONFIG and again["step"] == 0


def test_bin_files_half_precision_and_the_names_of_2022(folder, tmp_path):
    path, net = folder
    copy = rewrite(path, tmp_path / "old")
    tensors = read_safetensors(copy / "unet/diffusion_pytorch_model.safetensors")
    (copy / "unet/diffusion_pytorch_model.safetensors").unlink()
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                     ("to_out.0", "proj_attn")):
        tensors = {name.replace(new, old): value.half() for name, value in tensors.items()}
    torch.save(tensors, copy / "unet/diffusion_pytorch_model.bin")
    for key, value in read_checkpoint(copy)["ema"].items():
        assert value.dtype == torch.float32
        assert torch.equal(value, net.state_dict()[key].half().float())


@pytest.mark.parametrize("name, changes, words", [
    ("unet/config.json", {"freq_shift": 0}, "freq_shift is 0"),
    ("unet/config.json", {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    ("unet/config.json", {"attention_head_dim": 8}, "attention_head_dim is 8"),
    ("unet/config.json", {"out_channels": 6}, "out_channels is 6"),
    ("unet/config.json", {"down_block_types": ["DownBlock2D", "ResnetDownsampleBlock2D"]},
     "down_block_types"),
    ("unet/config.json", {"norm_num_groups": 4}, "norm_num_groups is 4"),
    ("unet/config.json", {"layers_per_block": 2}, "is missing"),
    ("unet/config.json", {"block_out_channels": "many"}, "no UNet2DModel that fits"),
    ("scheduler/scheduler_config.json", {"beta_end": 0.03}, "beta_end is 0.03"),
    ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "v_prediction"),
    ("scheduler/scheduler_config.json",
     {"num_train_timesteps": 10**12, "beta_start": 0.1 / 10**12, "beta_end": 20 / 10**12}, "steps"),
])
def test_what_our_network_cannot_express_is_named(folder, tmp_path, name, changes, words):
    copy = rewrite(folder[0], tmp_path / "copy", name, **changes)
    with pytest.raises((ValueError, UserError), match=words):
        load_run(copy)


@pytest.mark.parametrize("damage", [
    lambda data: data[:100], lambda data: b"", lambda data: b"\xff" * 8 + data[8:],
    lambda data: data.replace(b'"data_offsets": [0', b'"data_offsets": [-9', 1),
    lambda data: data.replace(b'"F32"', b'"F99"', 1),
    lambda data: (10).to_bytes(8, "little") + b"[[[[[[[[[[" + data])
def test_a_damaged_or_hostile_safetensors_is_one_line(folder, tmp_path, damage):
    copy = rewrite(folder[0], tmp_path / "copy")
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="no UNet2DModel that fits"):
        read_checkpoint(copy)


def test_a_published_model_is_fine_tuned_drawn_from_and_exported(folder, tmp_path, in_process):
    path, net = folder
    run, copy = tmp_path / "run", tmp_path / "copy"
    in_process("train", "--init_from", path, "--mode", "adv", "--reg_t", 0.5, "--batch_size", 4,
               "--steps", 2, "--lr", 0, "--sample_every", 0, "--ema", 0.5, "--out", run)
    in_process("sample", run, "--export", copy)
    exported = read_checkpoint(copy)["ema"]
    assert all(torch.equal(value, exported[key]) for key, value in net.state_dict().items())
    with pytest.raises(UserError, match="exists"):
        in_process("sample", run, "--export", copy)
    for model, out in ((path, "a"), (copy, "b")):
        in_process("sample", model, "--num", 2, "--steps", 2, "--out", tmp_path / out)
    assert (tmp_path / "a/000001.png").read_bytes() == (tmp_path / "b/000001.png").read_bytes()
    with pytest.raises(UserError, match="--reference is needed"):
        in_process("evaluate", "quality", path, "--num", 10, "--features", "random")


def test_the_real_diffusers_opens_it_and_agrees(folder, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    path, net = folder
    theirs = diffusers.UNet2DModel.from_pretrained(path, subfolder="unet").eval()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    with torch.no_grad():
        assert (theirs(x, t).sample - net(x, t)).abs().max() < 1e-4
    pipeline = diffusers.DDPMPipeline.from_pretrained(path)
    assert torch.allclose(pipeline.scheduler.alphas_cumprod.double(), Diffusion().alpha_bar,
                          atol=1e-6)
    assert pipeline(batch_size=1, num_inference_steps=2, output_type="np").images.shape == (
        1, 16, 16, 3)
    pipeline.save_pretrained(tmp_path / "theirs")
    again = read_checkpoint(tmp_path / "theirs")["ema"]
    assert all(torch.equal(value, again[key]) for key, value in net.state_dict().items())


def test_an_ideal_denoiser_cleans_each_image_from_its_own_noise_on():
    """Data that are one constant image: D(x) is that image, whatever the noise."""
    diffusion = Diffusion()
    clean = torch.full((1, 1, 8, 8), 0.3)
    started = []

    def net(x, t):
        started.append(t)
        return diffusion.eps_from_x0(x, t, clean.expand_as(x))

    std = torch.tensor([0.1, 0.2, 0.8])
    noisy = clean + std.view(-1, 1, 1, 1) * torch.randn(3, 1, 8, 8)
    for sampler in ("ddim", "ddpm"):
        out = clean_images(net, diffusion, noisy, std, image_noise(0, range(3), (1, 8, 8), "cpu"),
                           sampler, 1000)
        assert (out - clean).abs().max() < 1e-3
    level = diffusion.s[started[0][0]] / diffusion.sqrt_a[started[0][0]]
    assert abs(level - 0.8) < 0.01 and started[-1][0] == 0


def test_the_noise_estimate_is_unbiased_on_noise_and_zero_on_flat_images():
    x = 0.3 * torch.randn(4, 3, 64, 65)
    assert (noise_estimate(x) / 0.3 - 1).abs().max() < 0.05
    assert noise_estimate(torch.ones(2, 1, 9, 9)).tolist() == [0, 0]
    assert math.isnan(noise_estimate(torch.ones(1, 1, 1, 1))[0])


def test_a_folder_is_cleaned_under_its_own_names(run, tmp_path, in_process, capsys):
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, std in (("a.jpg", 0), ("sub/b.png", 40)):
        pixels = (128 + std * rng.standard_normal((20, 20, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(photos / name)
    out = tmp_path / "out"
    in_process("sample", run, "--denoise", photos, "--out", out)
    text = capsys.readouterr().out
    assert "a.png: noise of std 0.000" in text and "sub/b.png: noise of std 0.2" in text
    assert Image.open(out / "sub/b.png").size == (16, 16)
    # An image without noise stays as it is, to the one step of the lowest level.
    before, after = (np.asarray(Image.open(file)).astype(int)[:16, :16]
                     for file in (photos / "a.jpg", out / "a.png"))
    assert abs(before - after).mean() < 4
    assert load_images("folder", 16, 3, out / "samples.npz", tmp_path).shape == (2, 3, 16, 16)
    # The command again does nothing; another noise is refused; the photos are never written to.
    in_process("sample", run, "--denoise", photos, "--out", out)
    assert "2 of 2 images are there" in capsys.readouterr().out
    with pytest.raises(UserError, match="noise_std differ"):
        in_process("sample", run, "--denoise", photos, "--noise_std", 0.2, "--out", out)
    with pytest.raises(UserError, match="take another --out"):
        in_process("sample", run, "--denoise", out / "samples.npz", "--out", photos, "--overwrite")
    in_process("sample", run, "--denoise", photos, "--noise_std", 0.2, "--out", out, "--overwrite")
    with pytest.raises(UserError, match="noise of the images to --denoise"):
        in_process("sample", run, "--noise_std", 0.2)


def test_the_curves_are_drawn(tmp_path, in_process):
    in_process("train", *TINY, "--steps", 4, "--log_every", 1, "--mode", "dsm", "--out", tmp_path)
    picture = np.asarray(Image.open(tmp_path / "curves.png"))
    assert picture.shape == (320, 960, 3)
    for left in (0, 320, 640):  # In each panel a curve, of a colour.
        inside = picture[30:280, left + 20:left + 250].astype(int)
        assert (np.ptp(inside, axis=-1) > 100).any()
