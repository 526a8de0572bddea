"""`python -m beit3`, so that torchrun needs no script path."""

import sys

from beit3.cli import main

sys.exit(main())
