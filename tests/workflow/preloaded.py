"""What the fork server imports once for all processes; nothing is computed here."""

import transformers  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

import convex_caldera.cli.app
import convex_caldera.evaluate
import convex_caldera.fit.backfit
import convex_caldera.workflow.compress  # noqa: F401
