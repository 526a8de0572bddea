"""The command line, one file a subject: each verb is a typed function that makes one library call.

The signature of a verb gives its options, their types and defaults; its docstring is its help.
"""

from beit3.cli.app import main as main
