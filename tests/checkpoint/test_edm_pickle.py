"""The importer reads what EDM wrote bit by bit, runs nothing, and says no in one line."""

import json
import os
import pickle
import random
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from edm_writer import (
    GOLDEN,
    Call,
    EasyDict,
    edm_root,
    golden_network,
    module_tree,
    new_module,
    original_modules,
    write_pickle,
)

from fastgan.checkpoint import edm_pickle, inert_pickle
from fastgan.checkpoint.edm_pickle import read_edm_pickle
from fastgan.checkpoint.edm_records import PERSISTENT, architecture, read_tensors
from fastgan.checkpoint.inert_pickle import Record
from fastgan.checkpoint.network_file import require_fit
from fastgan.common.errors import UserError
from fastgan.models import network_from_config

TINY = {
    "precond": "EDMPrecond",
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 3,
    "model_type": "DhariwalUNet",
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
}


def tiny_tree(source: str = ""):
    with torch.random.fork_rng():
        return module_tree(TINY, network_from_config(TINY).state_dict(), source)


def refusal(path: Path, network: str = "ema") -> str:
    with pytest.raises(UserError) as caught:
        read_edm_pickle(path, network)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 800
    return message


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["ncsnpp_uncond_d2o", "ddpmpp_cond_edm", "adm_cond_d2o"])
def test_every_tensor_is_bit_identical_and_nothing_runs(tmp_path, name, protocol):
    config, state = golden_network(name)
    marker = tmp_path / "marker"
    source = f"open({str(marker)!r}, 'w').close()"
    path = write_pickle(
        tmp_path / "net.pkl", edm_root(module_tree(config, state, source)), protocol
    )
    found = read_edm_pickle(path)
    assert not marker.exists()
    assert found.state.keys() == state.keys()
    for key, tensor in state.items():
        assert found.state[key].dtype == tensor.dtype
        assert found.state[key].numpy().tobytes() == tensor.numpy().tobytes(), key
    expected = {k: v for k, v in config.items() if k != "dropout"}
    assert found.config == expected
    assert (found.source_class, found.format) == (config["precond"], "edm")
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
        found = read_edm_pickle(path, key)
        assert (found.config["precond"], found.source_class) == ("D2OPrecond", "GDDPrecond")
        assert (found.format, found.network) == ("d2o", key)
        assert all(torch.equal(found.state[n], t) for n, t in state.items())


def test_layers_without_bias_and_transient_buffers(tmp_path):
    tree = tiny_tree()
    tree.model.register_buffer("cache", torch.ones(3), persistent=False)
    tree.model.register_parameter("map_augment", None)
    for protocol in (2, 4):
        path = write_pickle(tmp_path / "net.pkl", edm_root(tree), protocol)
        assert "model.cache" not in read_edm_pickle(path).state


def test_numpy_scalars_and_positional_arguments(tmp_path):
    tree = tiny_tree()
    kwargs = tree._init_kwargs
    tree._init_args = (kwargs.pop("img_resolution"), np.int64(kwargs.pop("img_channels")))
    kwargs.update(sigma_data=np.float64(0.25), sigma_max=float("inf"), extra_switch=True)
    for protocol in (2, 4):
        found = read_edm_pickle(write_pickle(tmp_path / "net.pkl", edm_root(tree), protocol))
        assert found.config == {**TINY, "sigma_data": 0.25}
        assert type(found.config["img_channels"]) is int
        assert found.unused_arguments == {"extra_switch": True}


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
        (partial, (print,), "functools.partial"),
        (torch.load, ("x",), "torch.serialization.load"),
        (np.load, ("x",), "numpy.load"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_other_globals_are_refused_by_name(tmp_path, function, arguments, name, protocol):
    root = edm_root(tiny_tree())
    root["dataset_kwargs"] = Call(function, *arguments)
    message = refusal(write_pickle(tmp_path / "bad.pkl", root, protocol))
    # protocol 2 writes Python 2's module name
    assert name in message or name.replace("builtins", "__builtin__") in message


@pytest.mark.parametrize(
    "program",
    {
        "persistent id": b"\x80\x04K\x01Q.",
        "call of a number": b"\x80\x04K\x01)R.",
        "duplicate": b"\x80\x04]2.",
        "extension": b"\x80\x04\x82\x01.",
        "state of a class": b"\x80\x04ctorch.nn.modules.linear\nLinear\n}b.",
        "state of a dict": b"\x80\x04}}b.",
        "unhashable key": b"\x80\x04}](s.",
        "empty stack": b"\x80\x040.",
        "not a dict": b"\x80\x04]K\x01a.",
        "only a header": b"\x80",
        "huge string": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f" + b".",
        "huge frame": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f" + b"}.",
        "escapes": b"\x80\x04c\x1b[31mos\nsys\x07tem\n.",
    }.items(),
    ids=lambda item: item[0],
)
def test_hostile_programs_end_in_one_line(tmp_path, program):
    path = tmp_path / "bad.pkl"
    path.write_bytes(program[1])
    assert refusal(path).isprintable()


def test_bombs_are_harmless(tmp_path):
    """Memo indices, endless hashes and deep nesting: refused or skipped, in no time."""
    path = tmp_path / "bomb.pkl"
    # One index of 2^31 makes the standard unpickler fill 32 GB with its memo.
    path.write_bytes(b"\x80\x04}r\xff\xff\xff\x7f.")
    assert "no network 'ema'" in refusal(path)
    nested = b"K\x01" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
    path.write_bytes(b"\x80\x04}" + nested + b"K\x01s.")
    assert "tuple as a key" in refusal(path)
    path.write_bytes(b"\x80\x04}X\x03\x00\x00\x00ema" + nested + b"s.")
    assert "tuple where a module belongs" in refusal(path)
    path.write_bytes(b"\x80\x04}X\x01\x00\x00\x00a" + b"(" * 200_000 + b"t" * 200_000 + b"s.")
    assert "no network 'ema'" in refusal(path)


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
@pytest.mark.parametrize(
    ("offset", "size", "stride", "reason"),
    [
        (0, (32, 9), (9, 1), "does not fit its storage of 256 values"),
        (1, (32, 8), (8, 1), "does not fit its storage of 256 values"),
        (1 << 80, (32, 8), (8, 1), "does not fit its storage of 256 values"),
        (0, (1 << 40, 1 << 40), (0, 0), "more bytes than the file has"),
        (0, (1 << 20, 1 << 10), (0, 0), "more bytes than the file has"),
        (-1, (32, 8), (8, 1), "no whole numbers"),
        (0, (-32, -8), (8, 1), "no whole numbers"),
        (0, (32, 8), (8, -1), "no whole numbers"),
        (0, (32.0, 8), (8, 1), "no whole numbers"),
        (0, [32, 8], (8, 1), "no whole numbers"),
        (0, (True, 8), (8, 1), "no whole numbers"),
        (0, (32, 8), (8,), "2 sizes with 1 strides"),
    ],
)
def test_shapes_beyond_their_storage_are_refused(tmp_path, offset, size, stride, reason):
    root = with_weight(rebuilt(offset, size, stride))
    message = refusal(write_pickle(tmp_path / "bad.pkl", root))
    assert "unreadable tensor model.map_layer0.weight" in message and reason in message


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_view_comes_out_as_the_values_it_shows(tmp_path):
    values = torch.arange(600.0)
    root = with_weight(rebuilt(5, (32, 8), (1, 40), values))
    found = read_edm_pickle(write_pickle(tmp_path / "net.pkl", root))
    expected = values.numpy()[5:][np.arange(32)[:, None] + 40 * np.arange(8)]
    weight = found.state["model.map_layer0.weight"]
    assert np.array_equal(weight.numpy(), expected)
    assert weight.untyped_storage().nbytes() == weight.nbytes


@pytest.mark.parametrize(
    "blob",
    {
        "zip": b"PK\x03\x04" + bytes(100),
        "text": b"hello",
        "pickle": pickle.dumps({"a": 1}),
        "header": b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.",
    }.items(),
    ids=lambda item: item[0],
)
def test_bad_storages_are_refused_by_tensor(tmp_path, blob):
    storage = Call(torch.storage._load_from_bytes, blob[1])
    call = Call(torch._utils._rebuild_tensor_v2, storage, 0, (2,), (1,), False, OrderedDict())
    assert "model.map_layer0.weight" in refusal(write_pickle(tmp_path / "b", with_weight(call)))


def test_integers_and_wrong_shapes_are_refused(tmp_path):
    path = tmp_path / "bad.pkl"
    message = refusal(write_pickle(path, with_weight(torch.ones(32, 8, dtype=torch.int32))))
    assert "model.map_layer0.weight" in message and "IntStorage" in message
    message = refusal(write_pickle(path, with_weight(torch.ones(32, 9))))
    assert "model.map_layer0.weight: (32, 9), architecture: (32, 8)" in message


def test_modules_that_contain_themselves_are_refused(tmp_path):
    tree = tiny_tree()
    tree.model.enc._modules["again"] = tree.model.enc
    assert "contains itself" in refusal(write_pickle(tmp_path / "bad.pkl", edm_root(tree)))
    record = Record("torch.nn.modules.Loop", (), None)
    record.state = {"_parameters": {}, "_buffers": {}, "_modules": {"a": record}}
    with pytest.raises(ValueError, match="contains itself"):
        read_tensors(record, 100, "here")


@pytest.mark.parametrize("name", ["VPPrecond", "VEPrecond", "iDDPMPrecond", "Discriminator"])
def test_other_classes_are_refused_by_name(tmp_path, name):
    root = edm_root(module_tree({**TINY, "precond": name}, {"model.w": torch.ones(1)}))
    assert name in refusal(write_pickle(tmp_path / "bad.pkl", root))


def test_edm2_is_told_apart(tmp_path):
    network = module_tree({**TINY, "precond": "Precond"}, {"model.w": torch.ones(1)})
    path = tmp_path / "edm2.pkl"
    rest = EasyDict(dataset_kwargs={}, loss_fn=None, ema=network)
    assert "EDM2" in refusal(write_pickle(path, EasyDict(encoder=None) | rest))
    # The encoder of the latent models holds arrays, a global that EDM's files do not need.
    encoder = new_module("StabilityVAEEncoder")
    encoder.scale = np.ones(4, np.float32)
    assert "EDM2" in refusal(write_pickle(path, EasyDict(encoder=encoder) | rest))
    assert "EDM2" in refusal(write_pickle(path, edm_root(network)))


def test_bytes_after_the_end_are_refused(tmp_path):
    path = write_pickle(tmp_path / "net.pkl", edm_root(tiny_tree()))
    path.write_bytes(path.read_bytes() + b"more")
    assert "4 bytes after the pickle's end" in refusal(path)


def test_missing_network_names_what_is_there(tmp_path):
    path = write_pickle(tmp_path / "net.pkl", edm_root(tiny_tree()))
    message = refusal(path, "net")
    assert "'net'" in message and "ema, loss_fn, augment_pipe, dataset_kwargs" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"img_resolution": 1 << 40}, "img_resolution"),
        ({"num_blocks": 10**9}, "num_blocks"),
        ({"num_blocks": "4"}, "num_blocks"),
        ({"label_dim": True}, "label_dim"),
        ({"channel_mult": [1] * 1000}, "channel_mult"),
        ({"channel_mult": [1, 2.5]}, "channel_mult"),
        ({"resample_filter": "11"}, "resample_filter"),
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


def read_or_refuse(path: Path) -> bool:
    try:
        read_edm_pickle(path)
    except UserError as error:
        assert "\n" not in str(error)
        return False
    return True


def test_truncated_files_are_refused(tmp_path):
    content = write_pickle(tmp_path / "net.pkl", edm_root(tiny_tree())).read_bytes()
    path = tmp_path / "cut.pkl"
    for end in sorted({*range(0, 200, 7), *range(200, len(content), 487), len(content) - 1}):
        path.write_bytes(content[:end])
        assert not read_or_refuse(path), end


def test_flipped_bits_are_refused_or_read_and_never_run(tmp_path):
    marker = tmp_path / "marker"
    tree = tiny_tree(f"open({str(marker)!r}, 'w').close()")
    content = write_pickle(tmp_path / "net.pkl", edm_root(tree)).read_bytes()
    dice = random.Random(5)
    path = tmp_path / "flipped.pkl"
    outcomes = []
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(dice.choice((1, 1, 3, 20))):
            damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        outcomes.append(read_or_refuse(path))
    assert not marker.exists()
    assert any(outcomes) and not all(outcomes)
