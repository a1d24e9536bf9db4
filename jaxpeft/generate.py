"""`python -m jaxpeft.generate`: see jaxpeft/use.py. Kept apart because `jaxpeft.generate` is the function."""

from jaxpeft import stop
from jaxpeft.use import main

if __name__ == "__main__":
    stop.program(main)
