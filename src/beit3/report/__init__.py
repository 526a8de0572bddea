"""One self-contained HTML page of one or several runs: what they learnt, to look at."""
