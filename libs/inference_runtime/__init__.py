"""inference-runtime: the package that applications and plugin authors import.

Nothing heavy is imported here; take what you need from its modules (`inference_runtime.client`, `inference_runtime.runner`, …).
"""

import os

# gRPC's C core reads this when it is first imported, and would write lines of its own to stderr, past every logger.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

__version__ = "0.1.0"
__all__ = ["__version__"]
