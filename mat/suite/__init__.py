"""The experiments: configuration, data, models, engine, run folders (``launch.py``)."""
