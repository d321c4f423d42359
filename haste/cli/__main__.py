"""`python -m haste.cli` is the command `haste`."""

import sys

from haste.cli.main import main

sys.exit(main())
