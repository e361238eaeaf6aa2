"""`python -m qlora_lab.cli` is the command `qlora-lab`."""

import sys

from qlora_lab.cli import main

sys.exit(main())
