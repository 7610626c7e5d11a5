"""peft's file forms, one file per `peft_type`. Importing this package imports them all, which fills `base.FORMS`."""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
