"""Part `rates`: what the chip copies and multiplies, and what convolutions reach of that.

Every case measures the matrix rate in its own process, so that a share never mixes two moments.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from fastgan_kernels.aot.shapes import NETWORKS

from benchmarks.gpu_report import convolutions as conv
from benchmarks.gpu_report.parts import Case, module
from benchmarks.gpu_report.results import Content, case_parser, header, samples, write_json
from benchmarks.gpu_report.timing import DEVICE, ON_GPU, per_call
from fastgan.common.errors import UserError, run_command

CHIP, HEADS = "chip", "heads"
NETWORK_NAMES = tuple(network.name for network in NETWORKS)


def cases(tiny: bool) -> list[Case]:
    """The chip, the UNets' 3x3 convolutions network by network, the discriminator's heads."""
    expected = {CHIP: 20, HEADS: 60} | dict.fromkeys(NETWORK_NAMES, 60)
    names = (CHIP, NETWORK_NAMES[0], HEADS) if tiny else (CHIP, *NETWORK_NAMES, HEADS)
    return [
        Case("rates", name, expected[name], module("rates", "--what", name, tiny=tiny))
        for name in names
    ]


def chip(tiny: bool) -> Content:
    """Bytes read and written per second of a copy, FLOP per second of products by arithmetic."""
    return {"copy": copy_bandwidth(tiny)} | {
        name: product_rate(name, tiny) for name in conv.ARITHMETIC
    }


def copy_bandwidth(tiny: bool) -> Content:
    """Of 1 GiB in bfloat16 (tiny: 128 kB): bytes read plus bytes written, per second."""
    source = torch.randn(2**16 if tiny else 2**29, device=DEVICE).to(torch.bfloat16)
    target = torch.empty_like(source)
    taken = per_call([lambda: target.copy_(source)])
    return samples([2 * source.nbytes / t for t in taken])


def product_rate(arithmetic: str, tiny: bool) -> Content:
    """FLOP per second of a product of 8192 x 8192 matrices (tiny: 64 x 64) of random numbers."""
    n = 64 if tiny else 8192
    with conv.arithmetic(arithmetic) as dtype:
        a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
        product = torch.empty_like(a)
        taken = per_call([lambda: torch.mm(a, b, out=product)])
    return samples([2 * n**3 / t for t in taken])


def measure(what: str, tiny: bool) -> Content:
    """One case's content."""
    if what == CHIP:
        return {"chip_rates": chip(tiny)}
    rows = conv.head_rows(tiny) if what == HEADS else conv.network_rows(what, tiny)
    kinds = dict.fromkeys(row["arithmetic"] for row in rows)
    rates = {name: product_rate(name, tiny)["median"] for name in kinds}
    return {"matmul_rates": rates, "rows": [row | _share(row, rates) for row in rows]}


def _share(row: Content, rates: dict[str, float]) -> Content:
    """A row's FLOP per second, and their share of the product's in the same arithmetic."""
    flops = row["flop"] / row["seconds"]["median"]
    return {"flops": flops, "share": flops / rates[row["arithmetic"]]}


def merged(found: dict[str, Content]) -> Content:
    """The part's file: the chip's rates, every row, and the efficiencies of whole networks.

    An efficiency is pooled over all shapes of the networks measured, each as often as a pass has
    it: FLOP / seconds / matrix rate of the same process. Keys without a suffix are bfloat16.
    """
    first = next(iter(found.values()))
    content: Content = {key: first[key] for key in header()}
    if CHIP in found:
        measured = found[CHIP]["chip_rates"]
        content["copy_bandwidth"] = measured["copy"]["median"]
        content["matmul_rates"] = {k: measured[k]["median"] for k in conv.ARITHMETIC}
        content["matmul_rate"] = content["matmul_rates"]["bf16"]
        content["chip_rates"] = measured
    rows = {name: found[name]["rows"] for name in NETWORK_NAMES if name in found}
    content |= efficiencies([row for each in rows.values() for row in each])
    content["by_network"] = {name: efficiencies(each) for name, each in rows.items()}
    content["convolutions"] = rows
    content["heads"] = found.get(HEADS, {}).get("rows", [])
    return content


def efficiencies(rows: Iterable[Content]) -> dict[str, float]:
    """conv_forward_efficiency, conv_dgrad_efficiency, conv_dgrad_flipped_efficiency, and the same
    with _fp16: of rows of one or several networks."""
    ideal: defaultdict[str, float] = defaultdict(float)
    spent: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        suffix = "" if row["arithmetic"] == "bf16" else f"_{row['arithmetic']}"
        name = f"conv_{row['direction']}_efficiency{suffix}"
        spent[name] += row["count"] * row["seconds"]["median"]
        ideal[name] += row["count"] * row["seconds"]["median"] * row["share"]
    return {name: ideal[name] / spent[name] for name in spent}


def main() -> int:
    parser = case_parser(__doc__)
    parser.add_argument("--what", required=True, choices=(CHIP, *NETWORK_NAMES, HEADS))
    options = parser.parse_args()
    if not (ON_GPU or options.tiny):
        raise UserError("no GPU, on this machine, --tiny for a dry run would do")
    torch.backends.cudnn.benchmark = True
    write_json(options.out, header() | measure(options.what, options.tiny))
    return 0


if __name__ == "__main__":
    run_command(main)
