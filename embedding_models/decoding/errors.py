"""What is wrong with an audio file."""


class AudioError(ValueError):
    """A clip that cannot be embedded; `reason` is "unreadable", "too short" or "not finite"."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    # Pickling passes on `args` alone by default, which would fail on the way out of a worker process.
    def __reduce__(self) -> tuple[type["AudioError"], tuple[str, str]]:
        return AudioError, (self.reason, str(self))
