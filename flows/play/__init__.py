"""The page of `cm play`: `cm sample` and `cm edit` with a mouse, on the loopback interface alone."""
