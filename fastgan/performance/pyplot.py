"""matplotlib for pictures in files, where it is installed."""

from typing import Any

from fastgan.errors import UserError


def import_pyplot(purpose: str) -> Any:
    """pyplot without a window. UserError: not installed, needed for `purpose`."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError(
            f"matplotlib is not installed, needed for {purpose}, "
            "install it with: pip install 'fastgan[plot]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
