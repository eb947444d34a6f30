"""A Markdown table of one pytest-benchmark JSON file: python bench/summary.py FILE."""

import json
import sys
from pathlib import Path


def main(path: Path) -> None:
    report = json.loads(path.read_text())
    machine = report["machine_info"]["lipfast"]
    info = machine["info"]
    print(f"# {machine['gpu'] or report['machine_info']['cpu'].get('brand_raw', 'CPU')}\n")
    print(f"Commit {machine['commit']}, {report['datetime'][:10]}. Driver {machine['driver']}, ")
    print(f"torch {info['torch']}, triton {info['triton']}, nvcc {info['extension'].get('nvcc')}, ")
    print(f"Python {machine['python']}, {machine['threads']} CPU threads. Medians; the ratios say")
    print("how much longer each variant takes than the first.\n")
    print("| benchmark | first | ms | others |")
    print("|---|---|---|---|")
    for bench in report["benchmarks"]:
        extra = bench["extra_info"]
        first, milliseconds = next(iter(extra["median_ms"].items()))
        others = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in extra["ratio"].items())
        print(f"| {bench['name']} | {first} | {milliseconds:.4f} | {others} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
