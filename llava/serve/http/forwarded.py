"""Where a request was sent to, as the client sees it.

In: an ASGI scope. Out: its path below the prefix that this server is published under.
"""

from __future__ import annotations

from starlette.types import Scope


def route_path(scope: Scope) -> str:
    """Return the path of a request without the prefix."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(prefix) :] if prefix and (path + "/").startswith(prefix + "/") else path
