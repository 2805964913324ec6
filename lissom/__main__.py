"""The command `lissom`, and `python -m lissom`."""

from __future__ import annotations

import gc

# Imports make a million objects that stay, and the collector would go through them again and again.
gc.disable()
try:
    from lissom.cli.main import main
    from lissom.compiler.memory import freeze_imports

    freeze_imports()
finally:
    gc.enable()

if __name__ == "__main__":
    main()
