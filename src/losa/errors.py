"""The one exception for what a user can mend: one line that says what is wrong, where, and what to do."""


class LosaError(Exception):
    """Bad input. The command line prints its message and exits with code 2."""


class Diverged(LosaError):
    """A loss that did not stay finite."""
