"""Writes the tables of the JSON files beside it into RESULTS.md, each between its markers.

python benchmarks/results.py
"""

import json
import re
from pathlib import Path

from beit3.files import write_text

FOLDER = Path(__file__).parent
MARKERS = re.compile(r"(<!-- from (\S+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(path: Path) -> str:
    """Returns the table of one file and the machine on which it was measured."""
    results = json.loads(path.read_text())
    origin = f"{results['date']}, commit {results['commit']}, {results['machine']}."
    return f"\n{results['table']}\n\n{origin}\n\n"


def main() -> None:
    page = FOLDER / "RESULTS.md"
    write_text(
        page,
        MARKERS.sub(
            lambda match: match[1] + render(FOLDER / match[2]) + match[3], page.read_text()
        ),
    )


if __name__ == "__main__":
    main()
