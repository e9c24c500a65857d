"""The mission's own Python names over this library, so that its examples run as written.

    from convex_caldera.compat import CalderaParams, QuantizerFactory, caldera

Differences from the original code are deliberate and few; each module lists its own.
"""

from convex_caldera.compat.caldera import CalderaDecomposition as CalderaDecomposition
from convex_caldera.compat.caldera import caldera as caldera
from convex_caldera.compat.caldera_params import CalderaParams as CalderaParams
from convex_caldera.compat.caldera_params import QuantizerFactory as QuantizerFactory
from convex_caldera.compat.caldera_params import QuIPArgs as QuIPArgs
