"""`python -m ocrmem`, for launchers such as torchrun."""

from ocrmem.cli import main

if __name__ == "__main__":
    main()
