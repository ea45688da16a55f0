"""python -m losa, for torchrun."""

import sys

from losa import distributed
from losa.cli import main

code = main()
if distributed.launched() > 1:
    distributed.leave(code)
sys.exit(code)
