"""``python -m mat.show RUNS``: the command of ``mat.suite.show``."""

import sys

from mat.suite.show import main

if __name__ == "__main__":
    sys.exit(main())
