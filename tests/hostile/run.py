"""python -m tests.hostile.run MOST PARSER...: judges at most MOST cases of a kind, a line each."""

import sys

from tests.hostile.harness import install_audit, limit_memory, run_here

if __name__ == "__main__":
    install_audit()
    limit_memory()
    for parser in sys.argv[2:]:
        for line in run_here(parser, int(sys.argv[1])):
            print(line, flush=True)
