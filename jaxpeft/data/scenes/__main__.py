"""`python -m jaxpeft.data.scenes` is the command of the package's docstring."""

from jaxpeft.data import scenes

if __name__ == "__main__":
    scenes.main()
