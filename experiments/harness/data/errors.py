"""The error that every loader raises."""


class DatasetError(ValueError):
    """A dataset or a text that cannot be used; the message is one line that says what to do."""
