"""Access to remote resources: model servers over HTTP, and files inside published wheels."""

__all__: list[str] = []
