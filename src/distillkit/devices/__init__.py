"""Hardware and processes: accelerator streams and events, fast data types, and distributed ranks."""

__all__: list[str] = []
