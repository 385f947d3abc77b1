"""The builds that ahead-of-time compilation checks: one module per kernel module.

Each module has a table ``BUILDS``; its names are unique within the module.
"""

from __future__ import annotations

import importlib
import pkgutil

from tests.kernels.compilation import Build


def all_builds() -> dict[str, Build]:
    """Every module's builds, named ``module: build``."""
    return {
        f"{module.name}: {name}": build
        for module in pkgutil.iter_modules(__path__)
        for name, build in importlib.import_module(f"{__name__}.{module.name}").BUILDS.items()
    }
