"""`python -m rlhf_lightning` is `rlhf`."""

from rlhf_lightning.cli.main import main

if __name__ == "__main__":
    main()
