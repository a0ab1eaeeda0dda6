"""The numbers that benchmarks/targets.json asks for, computed from measured rows."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import exp, fsum, log

from benchmarks.cases import DIRECTIONS, REQUIRED, published
from benchmarks.results import Results, Row

# Where a kernel has to read its input once only; larger maps fit on no multiprocessor.
ONE_PASS_PIXELS = 1024
APEXLESS = (192, 576, 1152)


@dataclass(frozen=True)
class Metric:
    """A target's op and its number."""

    op: str
    value: Callable[[list[Row]], float]


def missing(results: Results, op: str) -> str | None:
    """Why these results do not cover `op`, or None."""
    part = results.of(op)
    failed = [case for case in part.failed if case["candidate"] in REQUIRED]
    if failed:
        first = " ".join(failed[0][k] for k in ("network", "shape", "candidate", "direction"))
        return f"{len(failed)} cases of {op} failed, the first {first}"
    wanted = {
        (case.network.name, case.label, direction, candidate)
        for case in published(op)
        for direction in DIRECTIONS
        for candidate in REQUIRED
    }
    found = {(*row.key, row.candidate) for row in part.rows}
    if wanted - found:
        absent = len(wanted - found)
        return f"{absent} of {len(wanted)} cases of {op} are absent, one is {min(wanted - found)}"
    return None


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [log(value) for value in values]
    return exp(fsum(logarithms) / len(logarithms))


def network_share(rows: list[Row], direction: str) -> float:
    """Of the floor, over all ops of a network's pass together; of the slowest network."""
    spent: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.candidate == "ours" and row.direction == direction:
            spent[row.network].append(row)
    return min(_pooled(part) for part in spent.values())


def _pooled(rows: list[Row]) -> float:
    return sum(r.count * r.floor for r in rows) / sum(r.count * r.seconds for r in rows)


def ratios(
    rows: list[Row], other: str, keep: Callable[[Row], bool] = lambda row: True
) -> list[float]:
    """How many times faster ours is than `other`, of every shape and direction in `keep`."""
    theirs = {row.key: row.seconds for row in rows if row.candidate == other}
    return [theirs[r.key] / r.seconds for r in rows if r.candidate == "ours" and keep(r)]


def one_pass(row: Row) -> bool:
    return row.pixels <= ONE_PASS_PIXELS


def swept(row: Row) -> bool:
    return not one_pass(row)


def apexless(rows: list[Row]) -> float:
    """ADM's norms with channels that apex refuses against its other norms, in bytes per second."""
    mine = [row for row in rows if row.candidate == "ours" and row.network == "ImageNet-64"]
    refused = [row for row in mine if row.channels in APEXLESS]
    return _pooled(refused) / _pooled([row for row in mine if row.channels not in APEXLESS])


def both_ways(rows: list[Row]) -> list[Row]:
    """Forward and backward as one row."""
    backward = {(*r.key[:2], r.candidate): r for r in rows if r.direction == "backward"}
    summed = []
    for row in rows:
        if row.direction == "forward":
            other = backward[*row.key[:2], row.candidate]
            summed.append(_sum(row, other))
    return summed


def _sum(a: Row, b: Row) -> Row:
    return replace(a, direction="both", seconds=a.seconds + b.seconds, floor=a.floor + b.floor)


def kept(rows: list[Row]) -> float:
    """Of what torch.compile keeps for backward; of the block where it is largest."""
    theirs = {row.key: row.kept_bytes for row in rows if row.candidate == "compile"}
    shares = []
    for row in rows:
        other = theirs.get(row.key)
        if row.candidate == "ours" and row.kept_bytes is not None and other:
            shares.append(row.kept_bytes / other)
    return max(shares)


NORM, BLOCK = "group_norm_silu", "frozen_unet_block"
METRICS: dict[str, Metric] = {
    "group_norm_silu_forward_bandwidth": Metric(NORM, lambda r: network_share(r, "forward")),
    "group_norm_silu_backward_bandwidth": Metric(NORM, lambda r: network_share(r, "backward")),
    "group_norm_silu_one_pass_vs_compile": Metric(
        NORM, lambda r: geometric_mean(ratios(r, "compile", one_pass))
    ),
    "group_norm_silu_one_pass_vs_eager": Metric(
        NORM, lambda r: geometric_mean(ratios(r, "eager", one_pass))
    ),
    "group_norm_silu_elsewhere_vs_compile": Metric(
        NORM, lambda r: min(ratios(r, "compile", swept))
    ),
    "group_norm_silu_apexless_channels": Metric(NORM, apexless),
    "frozen_unet_block_narrow_vs_compile": Metric(
        BLOCK,
        lambda r: geometric_mean(ratios(both_ways(r), "compile", lambda row: row.channels <= 256)),
    ),
    "frozen_unet_block_vs_compile": Metric(BLOCK, lambda r: min(ratios(both_ways(r), "compile"))),
    "frozen_unet_block_kept_memory": Metric(BLOCK, kept),
}
