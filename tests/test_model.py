"""The network's published sizes and its shape rules; loading a checkpoint, and refusing others."""

import pytest
import torch

import train
from conftest import Bomb
from model import UNet, build_network, read_checkpoint, timestep_embedding
from sample import UserError, load_run


CIFAR10 = dict(image_size=32, in_channels=3, channels=128, mult=(1, 2, 2, 2), blocks=2,
               attention=(16,), dropout=0.1)


@pytest.mark.parametrize("dataset, settings, parameters", [
    ("cifar10", {}, 35_746_307),
    ("celeba", {}, 78_700_803),
    ("lsun_bedroom", {"image_size": 256, "mult": (1, 1, 2, 2, 4, 4)}, 113_673_219),
    ("shapes", {}, 280_755),
    ("fashion_mnist", {}, 6_469_889),
])
def test_parameter_counts_of_the_presets(dataset, settings, parameters):
    """The first three are published."""
    with torch.device("meta"):
        net = build_network(train.complete_config({"dataset": dataset, **settings}))
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize("size, channels", [(16, 3), (28, 1), (12, 3)])
def test_output_has_the_input_shape_and_every_weight_a_gradient(size, channels):
    net = UNet(size, channels, 8, (1, 2, 2), 1, (size // 2,), 0.1)
    x = torch.randn(2, channels, size, size)
    y = net(x, torch.tensor([0, 999]))
    assert y.shape == x.shape and y.dtype == torch.float32
    y.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    with pytest.raises(ValueError, match="not a multiple of 4"):
        net(torch.zeros(1, channels, size, size + 1), torch.zeros(1, dtype=torch.long))


def test_a_fresh_network_predicts_almost_nothing_and_its_blocks_are_the_identity():
    net = UNet(16, 3, 32, (1, 2), 1, (8,), 0.0)
    x = torch.randn(2, 3, 16, 16)
    assert net(x, torch.tensor([1, 2])).abs().max() < 1e-3
    h, emb = torch.randn(2, 32, 16, 16), torch.randn(2, 128)
    torch.testing.assert_close(net.down[0][0](h, emb), h, rtol=0, atol=1e-3)


def test_the_time_step_matters_and_a_sample_does_not_see_its_neighbours():
    torch.manual_seed(0)
    net = UNet(8, 3, 8, (1, 2), 1, (4,), 0.0).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(3, 3, 8, 8)
    together = net(x, torch.tensor([1, 500, 900]))
    alone = net(x[1:2], torch.tensor([500]))
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone, net(x[1:2], torch.tensor([501])), atol=1e-4)


def test_time_embedding():
    e = timestep_embedding(torch.tensor([0, 7]), 8)
    assert torch.equal(e[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    torch.testing.assert_close(e[1, [0, 3]], torch.tensor([7.0, 7e-4]).sin())


@pytest.mark.parametrize("settings, words", [
    (dict(image_size=30), "not a multiple of 8"),
    (dict(image_size=4, mult=(1, 1, 1, 1)), "not a multiple of 8"),
    (dict(attention=(12,)), "resolutions are 32,16,8,4"),
    (dict(in_channels=2), "grey"),
    (dict(channels=3), "even number"),
    (dict(mult=()), "at least one level"),
    (dict(mult="wide"), "not those of a network"),
])
def test_impossible_networks(settings, words):
    with pytest.raises(ValueError, match=words):
        build_network(CIFAR10 | settings)


def test_a_run_is_rebuilt_from_its_checkpoint_alone(run):
    net, diffusion, config, shape, origin = load_run(run)
    raw = load_run(run / "ckpt.pt", raw=True).net
    assert origin["step"] == 3 and origin["weights"] == "EMA" and config["mode"] == "dsm"
    assert shape == (3, 16, 16) and diffusion.T == 1000 and not net.training
    assert not any(p.requires_grad for p in net.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(net.parameters(), raw.parameters()))
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in raw.state_dict())
    assert net(torch.zeros(1, 3, 16, 16), torch.tensor([3])).shape == (1, 3, 16, 16)


def test_foreign_checkpoints_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (run / "ckpt.pt").read_bytes()
    good = torch.load(run / "ckpt.pt", weights_only=True)
    (tmp_path / "half.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello")
    torch.save(Bomb(), tmp_path / "bomb.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({**good, "config": {**good["config"], "channels": 16}}, tmp_path / "misfit.pt")
    torch.save({**good, "config": {}}, tmp_path / "bare.pt")
    for name in ("half", "empty", "text", "bomb", "other", "list", "misfit", "bare", "missing"):
        with pytest.raises(UserError, match=f"{name}.pt") as error:
            load_run(tmp_path / f"{name}.pt")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(ValueError, match="no checkpoint"):
        read_checkpoint(tmp_path)
