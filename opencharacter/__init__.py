"""Character training for chat models, on Ray.

Read ``pipeline.py`` first (the method on one screen), then ``config.py``, then any stage alone.
"""

__version__ = "0.1.0"
