"""The lowest declared versions of what the library and the suite need, as requirements of pip."""

import re
import tomllib
from pathlib import Path

if __name__ == "__main__":
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["suite"]
    print("\n".join(re.sub(r">=([\d.]+).*", r"==\1", requirement) for requirement in needed))
