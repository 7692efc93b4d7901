"""What is wrong with the arguments of a conversion."""


class ConversionError(ValueError):
    """An argument of the conversion is unknown, out of its range, or matches nothing."""
