"""The weights in fewer bits, and a one-step generator as a program that runs without this project.

The program is torch.export's.
"""

import subprocess
import sys
from pathlib import Path

import torch
from fastgan_kernels import dispatch
from torch import Tensor, nn

from fastgan.checkpoint.network_file import NetworkFile, load_network_file, save_network
from fastgan.common.errors import UserError, shown
from fastgan.models import Precond
from fastgan.models.sampling import few_step, to_uint8

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MIB = 1 << 20
# In a process of its own, where this project cannot be imported: draws the images of the seeds
# 0, 1, ..., one, then eight at a time, and writes their bytes.
_ALONE = """
import sys
sys.modules.update(fastgan=None, fastgan_kernels=None)
import torch
program, out, *numbers = sys.argv[1:]
channels, size, label_dim, count = map(int, numbers)
generate = torch.export.load(program).module()
with open(out, "wb") as file:
    for start, end in [(0, 1), *((at, min(at + 8, count)) for at in range(1, count, 8))]:
        z, classes = [], []
        for seed in range(start, end):
            generator = torch.Generator().manual_seed(seed)
            z.append(torch.randn(channels, size, size, generator=generator))
            if label_dim:
                classes.append(torch.randint(label_dim, (), generator=generator))
        inputs = [torch.stack(z)]
        if label_dim:
            inputs.append(torch.eye(label_dim)[torch.stack(classes)])
        images = generate(*inputs)
        assert images.dtype == torch.uint8 and images.shape == inputs[0].shape
        file.write(bytes(images.flatten().tolist()))
"""


def write_rounded(
    source: NetworkFile, network: nn.Module, path: Path, dtype: str, licence: str | None = None
) -> NetworkFile:
    """Writes `source` with the parameters of `network`, which was read from it, in `dtype`.

    `licence` is for a source that names none. Buffers, which are few, stay as they are: Fourier
    frequencies of a hundred radians would lose whole turns. Provenance has what the source's
    metadata say of base and licence, and gains `exported`, a list of {file, sha256, dtype}: what
    the file was made from, the last one last. UserError: a weight that overflows, a file that
    cannot be written.
    """
    state = dict(source.state)
    for name, _ in network.named_parameters():
        state[name] = state[name].to(DTYPES[dtype])
        if not state[name].isfinite().all():
            raise UserError(
                f"{shown(name)} has values beyond {dtype}, {source.path}, "
                "--dtype bf16 or fp32 would be right"
            )
    said = {k: source.metadata.get(k) for k in ("base_model", "base_sha256", "license")}
    before = source.provenance.get("exported")
    made_from = {"file": source.path.name, "sha256": source.sha256, "dtype": dtype}
    provenance = {
        **source.provenance,
        **{key: value for key, value in said.items() if value},
        "exported": [*(before if isinstance(before, list) else []), made_from],
    }
    if licence is not None:
        provenance["license"] = licence
    kind = source.metadata["kind"]
    save_network(path, source.config, state, kind=kind, nimg=source.nimg, provenance=provenance)
    return load_network_file(path)


def require_size(file: NetworkFile, parameters: int, dtype: str, max_mib: float | None) -> None:
    """UserError where the file is larger than `max_mib`, naming the dtype that would fit."""
    size = file.path.stat().st_size
    if max_mib is None or size <= max_mib * MIB:
        return
    without = size - parameters * DTYPES[dtype].itemsize
    sizes = {name: without + parameters * each.itemsize for name, each in DTYPES.items()}
    fitting = [name for name, each in sizes.items() if each <= max_mib * MIB]
    right = f"--dtype {' or '.join(fitting)}"
    if not fitting:
        best = min(sizes, key=lambda name: sizes[name])
        right = f"--max-mib {-(-sizes[best] // MIB)} with --dtype {best}"
    raise UserError(
        f"{size / MIB:.1f} MiB in {dtype}, {file.path.name}, more than --max-mib {max_mib:g}: "
        f"{right} would be right"
    )


class OneStep(nn.Module):
    """z [N, C, H, W] float32, standard normal, and one-hot labels [N, label_dim] if the network is
    conditional -> uint8 images [N, C, H, W], as fastgan.sample draws them.
    """

    def __init__(self, network: Precond) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return to_uint8(few_step(self.network, z.double(), labels))


def write_program(network: Precond, path: Path, about: dict[str, str]) -> None:
    """Writes the one-step generator `network` (float32, on the CPU, eval mode) as a .pt2 file.

    Any N is accepted. It is made of PyTorch's operators only. `about` lies in it as extra files.
    UserError: it cannot be written.
    """
    model = network.model
    z = torch.zeros(2, model.img_channels, model.img_resolution, model.img_resolution)
    inputs = (z, torch.zeros(2, network.label_dim)) if network.label_dim else (z,)
    n = torch.export.Dim("n")
    # Inside, every operation is its plain definition, whatever the environment asks for.
    with torch.no_grad(), dispatch.twice_differentiable():
        program = torch.export.export(
            OneStep(network).eval(), inputs, dynamic_shapes=tuple({0: n} for _ in inputs)
        )
    for node in program.graph.nodes:
        assert not str(node.target).startswith("fastgan"), node.target
        node.meta.pop("stack_trace", None)  # names this machine's folders
    try:
        torch.export.save(program, path, extra_files=dict(about))
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of its zip writer
        raise UserError(f"cannot write, {path} ({error}), free space expected") from error


def check_program(path: Path, network: Precond, images: Tensor) -> dict[str, int]:
    """Draws with the program in a fresh process that cannot import this project.

    `images` uint8 [N, C, H, W] are the network's of the seeds 0, 1, ... Returns how many images
    and values there are, and how many of the latter are off_by_one. UserError where a value differs
    by more; RuntimeError where the program does not run.
    """
    out = path.with_suffix(".raw")
    model = network.model
    numbers = (model.img_channels, model.img_resolution, network.label_dim, len(images))
    command = [sys.executable, "-P", "-c", _ALONE, str(path), str(out), *map(str, numbers)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{path.name} does not run by itself: {done.stderr[-2000:]}")
        drawn = torch.frombuffer(bytearray(out.read_bytes()), dtype=torch.uint8)
    finally:
        out.unlink(missing_ok=True)
    apart = (drawn.reshape(images.shape).int() - images.int()).abs()
    if apart.max() > 1:
        raise UserError(
            f"its images differ from the network's by {int(apart.max())}, {path.name}, at most 1 "
            "(rounding) would be right"
        )
    off = int((apart == 1).sum())
    return {"images": len(images), "values": images.numel(), "off_by_one": off}
