"""`python -m pyquiet` is the command `pyquiet`; so launchers of several processes start it."""

import sys

from pyquiet.cli import main

sys.exit(main())
