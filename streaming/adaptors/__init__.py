"""Third-party protocols, translated from and to the log.

An adaptor only translates: its streams use the same conversation, session, timeline, log and hub as
`/v1/stream/NAME`. A module that declares a `ROUTE` is served; nothing else names it.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from streaming.server.routes import StreamRoute


def routes() -> tuple[StreamRoute, ...]:
    """The routes that the modules of this package declare."""
    modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return tuple(module.ROUTE for module in modules if hasattr(module, "ROUTE"))
