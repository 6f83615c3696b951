"""The exceptions that end a command with one line."""

import importlib.util


class BadInput(ValueError):
    """What the user gave cannot be used; the message is one line that says what, and what would work."""


class Diverged(ArithmeticError):
    """Training gave a loss that is not a finite number; the message says at which step."""


def require(*packages: str) -> None:
    """BadInput unless these packages of the extra "train" are installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise BadInput(f'the package {package} is missing; pip install -e ".[train]" installs it')
