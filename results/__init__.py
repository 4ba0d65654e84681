"""From run folders to tables, figures and one page."""

import os

os.environ["MPLBACKEND"] = "agg"  # a notebook's may need a package that is not installed here
