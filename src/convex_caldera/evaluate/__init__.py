"""How good a compressed model is: perplexity, KL and agreement beside the original."""

from convex_caldera.evaluate.compare import Candidate as Candidate
from convex_caldera.evaluate.compare import Evaluation as Evaluation
from convex_caldera.evaluate.compare import ModelScore as ModelScore
from convex_caldera.evaluate.compare import evaluate as evaluate
from convex_caldera.evaluate.generation import generate as generate
from convex_caldera.evaluate.table import HEADINGS as HEADINGS
from convex_caldera.evaluate.table import plain_table as plain_table
from convex_caldera.evaluate.table import rich_table as rich_table
from convex_caldera.evaluate.table import score_cells as score_cells
from convex_caldera.evaluate.windows import Protocol as Protocol
from convex_caldera.evaluate.windows import token_windows as token_windows
