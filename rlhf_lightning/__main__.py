"""`python -m rlhf_lightning` is `rlhf`."""

import sys

from rlhf_lightning.cli.main import main

if __name__ == "__main__":
    # `python -m` puts the current folder there; see `cli.user_code`.
    if not sys.flags.safe_path:
        del sys.path[0]
    main()
