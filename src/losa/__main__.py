"""python -m losa, for torchrun."""

import sys

from losa.cli import main

sys.exit(main())
