"""Writes the tables of the JSON files beside it into RESULTS.md, each between its markers.

python benchmarks/results.py
"""

import json
import re
from pathlib import Path

from beit3.files import write_text

HERE = Path(__file__).parent
MARKS = re.compile(r"(<!-- from (\S+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(path: Path) -> str:
    """The table of one file and what it was measured on."""
    results = json.loads(path.read_text())
    origin = f"{results['date']}, commit {results['commit']}, {results['machine']}."
    return f"\n{results['table']}\n\n{origin}\n\n"


def main() -> None:
    page = HERE / "RESULTS.md"
    write_text(
        page,
        MARKS.sub(lambda match: match[1] + render(HERE / match[2]) + match[3], page.read_text()),
    )


if __name__ == "__main__":
    main()
