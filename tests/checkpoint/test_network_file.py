"""Network files: what is written, what comes back, and what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from edm_writer import GOLDEN, golden_network
from safetensors import safe_open
from safetensors.torch import save_file

from fastgan.checkpoint.network_file import (
    load_network_file,
    network_from_file,
    save_network,
)
from fastgan.common.errors import UserError

GOOD = {
    "format": "fastgan-network",
    "version": "1",
    "kind": "ema",
    "config": "{}",
    "nimg": "0",
    "license": "unspecified",
    "provenance": "{}",
}


def test_metadata_and_tensors_are_plain_safetensors(tmp_path):
    path = tmp_path / "net.safetensors"
    state = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.ones(2, dtype=torch.bfloat16)}
    origin = {"base_model": "m.pkl", "base_sha256": "ab", "license": "CC-BY-NC-SA-4.0", "more": [1]}
    config = {"label_dim": 10, "channel_mult": [1, 2]}
    save_network(path, config, state, kind="generator", nimg=2_000, provenance=origin)
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        assert np.array_equal(file.get_tensor("a"), [[0, 3], [1, 4], [2, 5]])
    assert json.loads(metadata.pop("config")) == config
    assert json.loads(metadata.pop("provenance")) == origin
    assert metadata == {
        "format": "fastgan-network",
        "version": "1",
        "kind": "generator",
        "nimg": "2000",
        "label_dim": "10",
        "sigma_init": "80",
        "base_model": "m.pkl",
        "base_sha256": "ab",
        "license": "CC-BY-NC-SA-4.0",
    }
    file = load_network_file(path)
    assert (file.nimg, file.config, file.provenance) == (2_000, config, origin)
    assert file.state["b"].dtype == torch.bfloat16


def test_derived_networks_keep_the_licence(tmp_path):
    path, child = tmp_path / "base.safetensors", tmp_path / "child.safetensors"
    origin = {"license": "CC-BY-NC-SA-4.0", "base_model": "edm"}
    save_network(path, {}, {"a": torch.ones(1)}, kind="ema", provenance=origin)
    base = load_network_file(path)
    derived = base.provenance_of_derived()
    save_network(child, {}, {"a": torch.zeros(1)}, kind="ema", provenance=derived)
    file = load_network_file(child)
    assert file.metadata["license"] == "CC-BY-NC-SA-4.0"
    assert file.metadata["base_sha256"] == base.sha256
    assert file.provenance["base"] == origin


@pytest.mark.parametrize("name", ["ncsnpp_uncond_d2o", "ddpmpp_cond_edm", "adm_cond_d2o"])
def test_a_loaded_network_computes_the_golden_output(tmp_path, name):
    config, state = golden_network(name)
    path = tmp_path / "net.safetensors"
    save_network(path, config, state, kind="generator")
    before = torch.get_rng_state()
    network = network_from_file(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.requires_grad and not p.is_meta for p in network.parameters())
    arrays = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    x, sigma, expected = (torch.from_numpy(arrays[f"mid/{key}"]) for key in ("x", "sigma", "out"))
    labels = torch.from_numpy(arrays["mid/labels"]) if "mid/labels" in arrays.files else None
    with torch.no_grad():
        out = network(x, sigma, labels)
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": "other"}, "format=fastgan-network"),
        ({"version": "2"}, "version '2'"),
        ({"kind": None, "nimg": None}, "without kind, nimg"),
        ({"config": "[1]"}, "config .no JSON object"),
        ({"config": "{"}, "config .malformed JSON"),
        ({"provenance": "null"}, "provenance .no JSON object"),
        ({"provenance": '{"a":' * 101 + "1" + "}" * 101}, "more than 100 levels"),
        ({"nimg": "-3"}, "nimg='-3'"),
    ],
)
def test_bad_metadata_is_named(tmp_path, changes, named):
    path = tmp_path / "bad.safetensors"
    metadata = {k: v for k, v in {**GOOD, **changes}.items() if v is not None}
    save_file({"a": torch.ones(1)}, path, metadata)
    with pytest.raises(UserError, match=named) as caught:
        load_network_file(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 500


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"\x80\x04}.")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_network_file(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(UserError, match="metadata without format"):
        load_network_file(path)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            load_network_file(missing)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    config, state = golden_network("ddpmpp_cond_edm")
    path = tmp_path / "net.safetensors"
    first, second, *_ = state
    wrong = {**state, first: torch.ones(2, 2), "extra": torch.ones(1)}
    del wrong[second]
    save_network(path, config, wrong, kind="ema")
    with pytest.raises(UserError) as caught:
        network_from_file(path)
    message = str(caught.value)
    assert f"{first}: (2, 2)" in message and f"{second}: missing" in message
    assert "extra: (1,), architecture: none" in message and str(path) in message


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    save_network(path, {}, {"a": torch.ones(3)}, kind="ema")
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        save_network(path, {}, {"a": torch.zeros(3)}, kind="ema")
    assert path.read_bytes() == before
    assert list(Path(tmp_path).iterdir()) == [path]
