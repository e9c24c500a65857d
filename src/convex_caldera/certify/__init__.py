"""The independent checker: reads our files by the documented format alone.

Imports numpy and the standard library, and nothing of the rooms that it checks, so that a
mistake there cannot hide here.
"""

from __future__ import annotations

from convex_caldera.certify.claims import Claim as Claim
from convex_caldera.certify.claims import Verification as Verification
from convex_caldera.certify.verify import verify as verify
