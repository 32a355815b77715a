"""How long a user waits before anything happens: `import jtl`, `jtl --help`.

Command: python benchmarks/startup.py
Bars: `import jtl` under 0.5 s beyond `import jax`; `jtl --help` under 1 s.

Each figure is the median of `--repeats` fresh interpreters, after one that warms the file cache.
"""

import argparse
import statistics
import subprocess
import sys
import time

CASES = {
    "python -c pass": ["-c", "pass"],
    "import jax": ["-c", "import jax"],
    "import jtl": ["-c", "import jtl"],
    "import jax, jtl": ["-c", "import jax, jtl"],
    "import jtl, every public name": ["-c", "import jtl; [getattr(jtl, name) for name in jtl.__all__]"],
    "jtl --help": ["-m", "jtl", "--help"],
    "jtl finetune --help": ["-m", "jtl", "finetune", "--help"],
}


def seconds(arguments: list[str], repeats: int) -> float:
    """Median wall-clock seconds of a fresh interpreter."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    for name, arguments in CASES.items():
        print(f"{name:32s} {seconds(arguments, repeats):6.2f} s")


if __name__ == "__main__":
    main()
