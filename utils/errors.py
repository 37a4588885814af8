"""The one exception that means: something the user gave is missing, damaged or contradictory."""


class InputError(ValueError):
    """Bad input. The message is one line that says what, where and what to do next."""
