"""Tokens to statistics, one per distinct input of the linear layers."""

from convex_caldera.calibrate.collect import CalibratedBlock as CalibratedBlock
from convex_caldera.calibrate.collect import collect as collect
from convex_caldera.calibrate.saved import Provenance as Provenance
from convex_caldera.calibrate.saved import SavedStatistics as SavedStatistics
from convex_caldera.calibrate.saved import load_statistics as load_statistics
from convex_caldera.calibrate.saved import save_statistics as save_statistics
from convex_caldera.calibrate.statistics import InputAccumulator as InputAccumulator
from convex_caldera.calibrate.statistics import InputStatistics as InputStatistics
from convex_caldera.calibrate.text import fingerprint as fingerprint
from convex_caldera.calibrate.text import token_windows as token_windows
