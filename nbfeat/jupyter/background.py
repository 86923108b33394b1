"""Work in a thread that may change widgets and update displays."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable


def in_background(name: str, work: Callable[..., None], *given: object) -> threading.Thread:
    """Call `work` in a thread that ends with the kernel.

    ipykernel keeps in the context which cell or click a message belongs to; 7.0 fails where there is none.
    """
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(work, *given), name=f"nbfeat-{name}", daemon=True)
    thread.start()
    return thread
