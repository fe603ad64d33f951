import sys

from pyquiet.cli import main

sys.exit(main())
