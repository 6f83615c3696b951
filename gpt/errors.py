"""The exceptions that end a command with one line."""


class BadInput(ValueError):
    """What the user gave cannot be used; the message is one line that says what, and what would work."""


class Diverged(ArithmeticError):
    """Training gave a loss that is not a finite number; the message says at which step."""
