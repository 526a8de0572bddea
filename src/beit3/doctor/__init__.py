"""`beit3 doctor`: what this machine has and what stands in the way, one line per finding.

A line begins with `ok`, `note` or `FAULT` and ends with the remedy. Modules import only the
standard library and what needs no more at the top, because the doctor must work where torch does
not import.
"""
