"""Runs `rlhf` as `python -m rlhf_lightning`."""

import sys

from rlhf_lightning.cli.main import main

if __name__ == "__main__":
    # `python -m` puts the current folder first on sys.path; see `cli.user_code`.
    if not sys.flags.safe_path:
        del sys.path[0]
    main()
