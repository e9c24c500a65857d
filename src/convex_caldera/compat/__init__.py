"""The mission's own Python names over this library, so that its examples run as written.

    from convex_caldera.compat import CalderaParams, QuantizerFactory, caldera
    from convex_caldera.compat import ConvexCalderaParams, convex_caldera, evaluate_compression
    from convex_caldera.compat import SCLQuantizationParams, scl_quantize

Differences from the original code are deliberate and few; each module lists its own.
"""

from convex_caldera.compat.caldera import CalderaDecomposition as CalderaDecomposition
from convex_caldera.compat.caldera import caldera as caldera
from convex_caldera.compat.caldera_params import CalderaParams as CalderaParams
from convex_caldera.compat.caldera_params import QuantizerFactory as QuantizerFactory
from convex_caldera.compat.caldera_params import QuIPArgs as QuIPArgs
from convex_caldera.compat.convex import ConvexCalderaResult as ConvexCalderaResult
from convex_caldera.compat.convex import convex_caldera as convex_caldera
from convex_caldera.compat.convex import convex_caldera_decompose as convex_caldera_decompose
from convex_caldera.compat.convex_params import ConvexCalderaParams as ConvexCalderaParams
from convex_caldera.compat.metrics import CompressionMetrics as CompressionMetrics
from convex_caldera.compat.metrics import compute_accuracy_drop as compute_accuracy_drop
from convex_caldera.compat.metrics import compute_bits_per_parameter as compute_bits_per_parameter
from convex_caldera.compat.metrics import compute_compression_ratio as compute_compression_ratio
from convex_caldera.compat.metrics import compute_effective_rank as compute_effective_rank
from convex_caldera.compat.metrics import compute_entropy_rank as compute_entropy_rank
from convex_caldera.compat.metrics import compute_model_size_mb as compute_model_size_mb
from convex_caldera.compat.metrics import (
    compute_perplexity_increase as compute_perplexity_increase,
)
from convex_caldera.compat.metrics import compute_relative_error as compute_relative_error
from convex_caldera.compat.metrics import compute_relative_loss as compute_relative_loss
from convex_caldera.compat.metrics import compute_singular_values as compute_singular_values
from convex_caldera.compat.metrics import compute_stable_rank as compute_stable_rank
from convex_caldera.compat.metrics import evaluate_compression as evaluate_compression
from convex_caldera.compat.scl import SCLQuantizationParams as SCLQuantizationParams
from convex_caldera.compat.scl import SCLQuantizationResult as SCLQuantizationResult
from convex_caldera.compat.scl import scl_quantize as scl_quantize
