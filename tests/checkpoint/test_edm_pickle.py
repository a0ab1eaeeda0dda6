"""The importer reads what EDM wrote bit by bit, runs nothing, and says no in one line.

Flipped bits, truncations, programs, bombs: tests/hostile/edm_pickle.py.
"""

import hashlib
import json
import os
import pickle
import runpy
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from edm_writer import (
    GOLDEN,
    Call,
    edm_root,
    golden_network,
    module_tree,
    new_module,
    original_modules,
    write_pickle,
)

from fastgan.checkpoint import edm_pickle, inert_pickle
from fastgan.checkpoint.edm_pickle import import_edm, read_edm_pickle
from fastgan.checkpoint.edm_records import PERSISTENT, architecture
from fastgan.checkpoint.inert_pickle import Record
from fastgan.checkpoint.network_file import load_network_file, require_fit
from fastgan.common.errors import UserError
from fastgan.models import network_from_config
from tests import conftest

TOOL = Path(__file__).parents[2] / "tools" / "import_edm.py"
TINY = {**conftest.TINY, "precond": "EDMPrecond", "label_dim": 3, "channel_mult": [1]}


def tiny_tree(source: str = ""):
    with torch.random.fork_rng():
        return module_tree(TINY, network_from_config(TINY).state_dict(), source)


def refusal(path: Path, network: str = "ema") -> str:
    with pytest.raises(UserError) as caught:
        read_edm_pickle(path, network)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 800
    return message


@pytest.mark.parametrize(
    ("name", "protocol"),
    [("ncsnpp_uncond_d2o", 2), ("ddpmpp_cond_edm", 3), ("adm_cond_d2o", 4), ("adm_cond_d2o", 5)],
)
def test_every_tensor_is_bit_identical_and_nothing_runs(tmp_path, name, protocol):
    config, state = golden_network(name)
    marker = tmp_path / "marker"
    source = f"open({str(marker)!r}, 'w').close()"
    path = write_pickle(
        tmp_path / "net.pkl", edm_root(module_tree(config, state, source)), protocol
    )
    found_config, found, origin = read_edm_pickle(path)
    assert not marker.exists()
    assert found.keys() == state.keys()
    for key, tensor in state.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].numpy().tobytes() == tensor.numpy().tobytes(), key
    assert found_config == {k: v for k, v in config.items() if k != "dropout"}
    assert (origin["source_class"], origin["source_format"]) == (config["precond"], "edm")
    with original_modules():  # the file is live: the original way of loading it runs its text
        pickle.loads(path.read_bytes())  # noqa: TID251
    assert marker.exists()


def test_gdd_file_holds_two_networks(tmp_path):
    with torch.random.fork_rng():
        states = [network_from_config(TINY).state_dict() for _ in range(2)]
    net, ema = (module_tree({**TINY, "precond": "GDDPrecond"}, state) for state in states)
    root = {"net": net, "ema": ema, "augment_pipe": None, "dataset_kwargs": {}}
    path = write_pickle(tmp_path / "gdd.pkl", root)
    for key, state in zip(("net", "ema"), states, strict=True):
        config, found, origin = read_edm_pickle(path, key)
        assert (config["precond"], origin["source_class"]) == ("D2OPrecond", "GDDPrecond")
        assert (origin["source_format"], origin["source_network"]) == ("d2o", key)
        assert all(torch.equal(found[n], t) for n, t in state.items())


def test_layers_without_bias_and_transient_buffers(tmp_path):
    tree = tiny_tree()
    tree.model.register_buffer("cache", torch.ones(3), persistent=False)
    tree.model.register_parameter("map_augment", None)
    for protocol in (2, 4):
        path = write_pickle(tmp_path / "net.pkl", edm_root(tree), protocol)
        assert "model.cache" not in read_edm_pickle(path)[1]


def test_numpy_scalars_and_positional_arguments(tmp_path):
    tree = tiny_tree()
    kwargs = tree._init_kwargs
    tree._init_args = (kwargs.pop("img_resolution"), np.int64(kwargs.pop("img_channels")))
    kwargs.update(sigma_data=np.float64(0.25), sigma_max=float("inf"), extra_switch=True)
    for protocol in (2, 4):
        path = write_pickle(tmp_path / "net.pkl", edm_root(tree), protocol)
        config, _, origin = read_edm_pickle(path)
        assert config == {**TINY, "sigma_data": 0.25} and type(config["img_channels"]) is int
        assert origin["unused_arguments"] == {"extra_switch": True}


@pytest.mark.parametrize("name", json.loads((GOLDEN / "edm_checkpoint_layouts.json").read_text()))
def test_published_layouts_fit_exactly(name):
    layout = json.loads((GOLDEN / "edm_checkpoint_layouts.json").read_text())[name]
    unet = Record(PERSISTENT, ({"class_name": layout["init_kwargs"]["model_type"], "state": {}},))
    kwargs = {**layout["init_kwargs"], "dropout": 0.13, "use_fp16": True}
    content = {"_init_args": (), "_init_kwargs": kwargs, "_modules": {"model": unet}}
    config, unused = architecture("EDMPrecond", content, name)
    assert config == {"precond": "EDMPrecond", **layout["init_kwargs"]} and not unused
    state = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, (shape, dtype) in layout["state"].items()
    }
    network = require_fit(config, state, name)
    assert {t.dtype for t in network.state_dict().values()} == {torch.float32}
    first, *_ = state
    with pytest.raises(UserError, match=rf"{first}.*missing.*{name}|{name}.*{first}.*missing"):
        require_fit(config, {k: v for k, v in state.items() if k != first}, name)
    with pytest.raises(UserError, match=r"extra\.weight"):
        require_fit(config, {**state, "extra.weight": state[first]}, name)


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("true",), f"{os.system.__module__}.system"),
        (eval, ("1",), "builtins.eval"),
        (getattr, ("", "join"), "builtins.getattr"),
        (torch.load, ("x",), "torch.serialization.load"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_other_globals_are_refused_by_name(tmp_path, function, arguments, name, protocol):
    root = edm_root(tiny_tree())
    root["dataset_kwargs"] = Call(function, *arguments)
    message = refusal(write_pickle(tmp_path / "bad.pkl", root, protocol))
    # protocol 2 writes Python 2's module name
    assert name in message or name.replace("builtins", "__builtin__") in message


def test_too_many_instructions_and_too_large_files(tmp_path, monkeypatch):
    path = write_pickle(tmp_path / "net.pkl", edm_root(tiny_tree()))
    with monkeypatch.context() as patch:
        patch.setattr(inert_pickle, "MAX_INSTRUCTIONS", 100)
        assert "100 instructions" in refusal(path)
    monkeypatch.setattr(edm_pickle, "MAX_FILE_BYTES", 1000)
    assert "at most 1000" in refusal(path)


def with_weight(tensor: object):
    tree = tiny_tree()
    tree.model.map_layer0._parameters["weight"] = tensor
    return edm_root(tree)


def rebuilt(offset, size, stride, values: torch.Tensor | None = None):
    storage = (torch.zeros(256) if values is None else values).storage()
    arguments = (storage, offset, size, stride, False, OrderedDict())
    return Call(torch._utils._rebuild_tensor_v2, *arguments)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_view_comes_out_as_the_values_it_shows(tmp_path):
    values = torch.arange(600.0)
    root = with_weight(rebuilt(5, (32, 8), (1, 40), values))
    _, found, _ = read_edm_pickle(write_pickle(tmp_path / "net.pkl", root))
    expected = values.numpy()[5:][np.arange(32)[:, None] + 40 * np.arange(8)]
    weight = found["model.map_layer0.weight"]
    assert np.array_equal(weight.numpy(), expected)
    assert weight.untyped_storage().nbytes() == weight.nbytes


def test_integers_and_wrong_shapes_are_refused(tmp_path):
    path = tmp_path / "bad.pkl"
    message = refusal(write_pickle(path, with_weight(torch.ones(32, 8, dtype=torch.int32))))
    assert "model.map_layer0.weight" in message and "IntStorage" in message
    message = refusal(write_pickle(path, with_weight(torch.ones(32, 9))))
    assert "model.map_layer0.weight: (32, 9), architecture: (32, 8)" in message


@pytest.mark.parametrize("name", ["VPPrecond", "Discriminator"])
def test_other_classes_are_refused_by_name(tmp_path, name):
    root = edm_root(module_tree({**TINY, "precond": name}, {"model.w": torch.ones(1)}))
    assert name in refusal(write_pickle(tmp_path / "bad.pkl", root))


def test_edm2_is_told_apart(tmp_path):
    network = module_tree({**TINY, "precond": "Precond"}, {"model.w": torch.ones(1)})
    root = edm_root(network)
    message = refusal(write_pickle(tmp_path / "edm2.pkl", root))
    assert "'ema' is of class Precond" in message and "EDM2 is not supported" in message
    # The encoder of the latent models holds arrays, a global that EDM's files do not need.
    root["encoder"] = new_module("StabilityVAEEncoder")
    root["encoder"].scale = np.ones(4, np.float32)
    assert "EDM2 is not supported" in refusal(write_pickle(tmp_path / "edm2.pkl", root))


def test_missing_network_names_what_is_there(tmp_path):
    path = write_pickle(tmp_path / "net.pkl", edm_root(tiny_tree()))
    message = refusal(path, "net")
    assert "'net'" in message and "ema, loss_fn, augment_pipe, dataset_kwargs" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"img_resolution": 1 << 40}, "img_resolution"),
        ({"channel_mult": [1, 2.5]}, "channel_mult"),
        ({"model_type": "UNet"}, "model_type"),
        ({"sigma_data": float("nan")}, "sigma_data"),
        ({"attention": {"heads": 2}}, "attention"),
        ({"num_blocks": 2}, "tensors do not fit"),
        ({"embedding_type": "fourier"}, "embedding_type"),
    ],
)
def test_bad_constructor_arguments_are_named(tmp_path, changes, named):
    tree = tiny_tree()
    tree._init_kwargs.update(changes)
    assert named in refusal(write_pickle(tmp_path / "bad.pkl", edm_root(tree)))


def test_import_writes_a_network_file_with_its_origin(tmp_path):
    source = write_pickle(tmp_path / "edm-tiny.pkl", edm_root(tiny_tree()))
    destination = tmp_path / "tiny.safetensors"
    said = import_edm(source, destination)
    file = load_network_file(destination)
    _, expected, _ = read_edm_pickle(source)
    assert file.config == TINY
    assert all(torch.equal(file.state[k], v) for k, v in expected.items())
    assert file.metadata["license"] == "CC-BY-NC-SA-4.0"
    assert file.metadata["base_model"] == "edm-tiny"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert file.metadata["base_sha256"] == said["base_sha256"] == digest
    assert file.provenance["source_class"] == said["source_class"] == "EDMPrecond"
    with pytest.raises(UserError, match="file exists"):
        import_edm(source, destination)
    with pytest.raises(UserError, match="one file"):
        import_edm(source, source, force=True)
    destination.write_bytes(b"old")
    import_edm(source, destination, force=True)
    assert load_network_file(destination).metadata == file.metadata


def test_the_command_ends_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    source = write_pickle(tmp_path / "net.pkl", edm_root(tiny_tree()))
    destination = tmp_path / "out" / "net.safetensors"
    destination.parent.mkdir()

    def command(*options: str) -> int:
        monkeypatch.setattr("sys.argv", ["import_edm.py", str(source), str(destination), *options])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOL), run_name="__main__")
        return end.value.code

    assert command("--network", "net") == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: no network 'net'") and err.count("\n") == 1
    assert not list(destination.parent.iterdir())
    assert command() == 0
    assert json.loads(capsys.readouterr().out)["source_class"] == "EDMPrecond"
    assert list(destination.parent.iterdir()) == [destination]
