"""The exception for what a person can put right."""


class BadInput(ValueError):
    """What the user gave cannot be used; the message is one line that says what, and what would work."""
