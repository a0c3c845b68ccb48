"""inference-runtime: the package that applications and plugin authors import.

Nothing heavy is imported here; take what you need from its modules (`inference_runtime.client`, `inference_runtime.runner`, …).
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
