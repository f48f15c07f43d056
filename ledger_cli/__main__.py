"""`python -m ledger_cli` is `ledger`."""

import sys

from ledger_cli import main

sys.exit(main())
