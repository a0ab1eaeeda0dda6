"""From an experiment's rounds to its numbers: iteration, images per second, MFU, ratios."""

from collections.abc import Iterable
from statistics import median

from benchmarks.gpu_report.results import Content, samples


def described(progress: Content, baselines: Iterable[str]) -> Content:
    """The content of a case: per variant its facts and speeds, and ratios of images per second, of
    every round by itself, to the baselines that ran in it (medians). Without a matrix rate (a dry
    run) there is no MFU."""
    rate = median(progress["matmul_rates"]) if progress["matmul_rates"] else None
    variants = {}
    for name, noted in progress["variants"].items():
        rounds = [found[name] for found in progress["rounds"] if name in found]
        speeds = _speeds(noted["facts"], rounds, rate) if rounds else {}
        variants[name] = noted | speeds
    return {
        "experiment": progress["experiment"],
        "matmul_rate": rate,
        "variants": variants,
        "ratios": {base: _ratios(progress, base) for base in baselines},
    }


def images_per_second(batch: int, iteration: float, r1: float, interval: int) -> float:
    """On the published schedule: every `interval`-th iteration takes `r1` seconds, the others
    `iteration`."""
    return batch / (iteration + (r1 - iteration) / interval)


def _speeds(facts: Content, rounds: list[Content], rate: float | None) -> Content:
    iterations = [taken for each in rounds for taken in each["iterations"]]
    r1s = [each["r1"] for each in rounds]
    iteration, r1 = median(iterations), median(r1s)
    img_s = images_per_second(facts["batch"], iteration, r1, facts["interval"])
    return {
        "iteration_ms": samples([1e3 * taken for taken in iterations]),
        "r1_iteration_ms": samples([1e3 * taken for taken in r1s]),
        "r1_extra_ms": 1e3 * (r1 - iteration),
        "img_s": img_s,
        "mfu": None if rate is None else facts["flop_per_image"] * img_s / rate,
    }


def _ratios(progress: Content, base: str) -> dict[str, Content]:
    """How many times as many images per second as `base`, which may have had another batch."""
    found: dict[str, list[float]] = {}
    for each in progress["rounds"]:
        if base not in each:
            continue
        speeds = {name: _of_round(progress, name, taken) for name, taken in each.items()}
        for name, speed in speeds.items():
            found.setdefault(name, []).append(speed / speeds[base])
    return {name: samples(values) for name, values in found.items() if name != base}


def _of_round(progress: Content, name: str, taken: Content) -> float:
    facts = progress["variants"][name]["facts"]
    iteration = median(taken["iterations"])
    return images_per_second(facts["batch"], iteration, taken["r1"], facts["interval"])
