"""python -m tests.hostile.count: how many cases each parser was given, and how they ended."""

from collections import Counter
from importlib import import_module
from pathlib import Path

from tests.hostile.harness import run_apart

SUITES = sorted(
    path.stem
    for path in Path(__file__).parent.glob("test_hostile_*.py")
    if "\nSUITE = " in path.read_text()
)


def main() -> None:
    print("| parser | cases | flips | cuts | others | refused | still valid | failed | longest |")
    print("|---|---|---|---|---|---|---|---|---|")
    total = 0
    for suite in SUITES:
        outcomes = run_apart(suite)
        kinds = Counter(outcome.kind.split()[-1] for outcome in outcomes)
        endings = Counter(outcome.ending for outcome in outcomes)
        others = len(outcomes) - kinds["flip"] - kinds["cut"]
        ended = [endings[name] for name in ("refused", "valid", "failed")]
        longest = max(outcome.cpu_seconds for outcome in outcomes)
        row = [len(outcomes), kinds["flip"], kinds["cut"], others, *ended, f"{longest:.2f} s"]
        parser = import_module(f"tests.hostile.{suite}").SUITE.parser
        print(f"| {parser} | {' | '.join(map(str, row))} |", flush=True)
        total += len(outcomes)
    print(f"{total} cases")


if __name__ == "__main__":
    main()
