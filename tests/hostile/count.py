"""python -m tests.hostile.count: how many cases each parser was given, and how they ended."""

from collections import Counter

from tests.hostile.harness import PARSERS, run_apart


def main() -> None:
    print("| parser | cases | flips | cuts | others | refused | still valid | failed | longest |")
    print("|---|---|---|---|---|---|---|---|---|")
    total = 0
    for parser in PARSERS:
        outcomes = run_apart(parser)
        kinds = Counter(outcome.kind.split()[-1] for outcome in outcomes)
        endings = Counter(outcome.ending for outcome in outcomes)
        others = len(outcomes) - kinds["flip"] - kinds["cut"]
        ended = [endings[name] for name in ("refused", "valid", "failed")]
        longest = max(outcome.cpu_seconds for outcome in outcomes)
        row = [len(outcomes), kinds["flip"], kinds["cut"], others, *ended, f"{longest:.2f} s"]
        print(f"| {outcomes[0].parser} | {' | '.join(map(str, row))} |", flush=True)
        total += len(outcomes)
    print(f"{total} cases")


if __name__ == "__main__":
    main()
