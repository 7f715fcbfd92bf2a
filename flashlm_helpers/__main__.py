"""Run the command line: python -m flashlm_helpers."""

import sys

from flashlm_helpers.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
