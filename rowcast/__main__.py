"""`python -m rowcast`."""

import sys

from rowcast.cli import main

sys.exit(main())
