"""`beit3 report`: a page of runs."""

from pathlib import Path


def report(run: str, /, *runs: str, out: str = "") -> None:
    """Write one self-contained HTML page of a run, or of several side by side.

    ```
    beit3 report runs/vqa-demo
    beit3 report runs/vqa-demo runs/vqa-scratch --out comparison.html
    ```

    Args:
        run: A run directory.
        runs: More of them, to compare.
        out: The page; by default report.html in the first run.
    """
    from beit3.report.page import write_report

    paths = [Path(path) for path in (run, *runs)]
    print(write_report(paths, Path(out or Path(run, "report.html"))))
