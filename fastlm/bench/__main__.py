"""`python -m fastlm.bench model`, the same as `fastlm bench model`."""

import sys

from . import main

sys.exit(main())
