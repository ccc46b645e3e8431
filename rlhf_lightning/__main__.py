"""Runs `rlhf` as `python -m rlhf_lightning`."""

import sys

if __name__ == "__main__":
    # `python -m` puts the current folder first on sys.path, where any file could shadow a library; see `cli.user_code`.
    # It must be removed before the first import.
    if not sys.flags.safe_path:
        del sys.path[0]
    from rlhf_lightning.cli.main import main

    main()
