"""The import command: a network file with its origin, or one line and nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from edm_writer import edm_root, write_pickle
from test_edm_pickle import TINY, tiny_tree

from fastgan.checkpoint.edm_pickle import import_edm, read_edm_pickle
from fastgan.checkpoint.network_file import load_network_file
from fastgan.common.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "import_edm.py"


def test_import_writes_a_network_file_with_its_origin(tmp_path):
    source = write_pickle(tmp_path / "edm-tiny.pkl", edm_root(tiny_tree()))
    destination = tmp_path / "tiny.safetensors"
    said = import_edm(source, destination)
    file = load_network_file(destination)
    expected = read_edm_pickle(source)
    assert file.config == TINY
    assert all(torch.equal(file.state[k], v) for k, v in expected.state.items())
    assert file.metadata["license"] == "CC-BY-NC-SA-4.0"
    assert file.metadata["base_model"] == "edm-tiny"
    digest = subprocess.run(["sha256sum", source], capture_output=True, text=True).stdout.split()
    assert file.metadata["base_sha256"] == said["base_sha256"] == digest[0]
    assert file.provenance["source_class"] == said["source_class"] == "EDMPrecond"
    with pytest.raises(UserError, match="file exists"):
        import_edm(source, destination)
    with pytest.raises(UserError, match="one file"):
        import_edm(source, source, force=True)
    destination.write_bytes(b"old")
    import_edm(source, destination, force=True)
    assert load_network_file(destination).metadata == file.metadata


def test_the_command_ends_in_one_line_and_leaves_nothing(tmp_path):
    source = write_pickle(tmp_path / "net.pkl", edm_root(tiny_tree()))
    destination = tmp_path / "out" / "net.safetensors"
    destination.parent.mkdir()
    command = [sys.executable, str(TOOL), str(source), str(destination)]
    done = subprocess.run([*command, "--network", "net"], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: no network 'net'") and done.stderr.count("\n") == 1
    assert not list(destination.parent.iterdir())
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source_class"] == "EDMPrecond"
    assert list(destination.parent.iterdir()) == [destination]
