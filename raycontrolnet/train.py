"""`fit(config) -> RunResult`, and `python -m raycontrolnet.train ARGS`, which is `raycontrolnet train ARGS`."""

from __future__ import annotations

import sys

from raycontrolnet.launch.fit import RunResult, fit

__all__ = ["RunResult", "fit"]

if __name__ == "__main__":
    from raycontrolnet.cli import main

    sys.argv[1:1] = ["train"]
    sys.exit(main())
