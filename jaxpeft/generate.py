"""`python -m jaxpeft.generate`: see jaxpeft/use.py. Kept apart because `jaxpeft.generate` is the function."""

import sys

from jaxpeft.use import main

if __name__ == "__main__":
    sys.exit(main())
