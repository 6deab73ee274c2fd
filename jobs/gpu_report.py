"""Make tables, plots and the README's lines of what `jobs/gpu_evidence.py` measured.

    python jobs/gpu_report.py evidence

Goals stand beside what was measured. What was not measured, failed or ran over its time is said.
"""

import argparse
from pathlib import Path

from gpu_steps.goals import goals
from gpu_steps.lines import read_lines
from gpu_steps.plots import draw
from gpu_steps.tables import tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    print(write_report(parser.parse_args().folder))


def write_report(folder: Path) -> str:
    """Write `report.md` and its plots; return the report."""
    lines = read_lines(folder / "evidence.jsonl")
    plots = [f"![{title}]({name})" for name, title in draw(lines, folder)]
    text = "\n\n".join([*tables(lines), goals(lines), *plots]) + "\n"
    (folder / "report.md").write_text(text)
    return text


if __name__ == "__main__":
    main()
